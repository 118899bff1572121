"""Where a dataset comes from: prepared before, archives in a folder, or a download.

Prepared datasets are TFDS's own, in TFDS's own folder: any program can read them with
`tfds.builder_from_directory`. Beside the records lies a decoded copy, so that a run need
neither parse record by record nor import TFDS to start.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import pathlib
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from seqmnist.datasets import archives
from seqmnist.errors import UserError

_ARRAYS = "arrays.npz"
_FINGERPRINT = "fingerprint"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset that is ready to be read.

    Attributes:
      name: what it is.
      requested: what was asked for: `name`, or `auto`.
      notice: what a user must be told about it wherever its scores stand, or None.
      directory: the TFDS directory of its records.
      fingerprint: SHA-256 of all images and labels.
    """

    name: str
    requested: str
    notice: str | None
    directory: pathlib.Path
    fingerprint: str

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns all of "train" or "test": images uint8 [N, 28, 28] and labels int32 [N]."""
        return tuple(_load(self.directory, f"{split}/images", f"{split}/labels"))

    def num_examples(self, split: str) -> int:
        """Returns N of "train" or "test"."""
        (labels,) = _load(self.directory, f"{split}/labels")
        return len(labels)

    def mapped(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `arrays` does, with the images left on disk until they are read."""
        labels = _load(self.directory, f"{split}/images", f"{split}/labels")[1]  # checks both
        return _map(self.directory / _ARRAYS, f"{split}/images"), labels


def prepare(
    name: str,
    *,
    data_dir: str | None,
    manual_dir: str | None,
    verify_checksums: bool,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Makes a dataset ready: from `data_dir`, else from `manual_dir`, else by download.

    Any number of processes may prepare the same dataset at the same time. What is not whole
    is never used.

    Args:
      name: `mnist`, `fashion_mnist`, `kmnist`, `mnist_5k`, or `auto`: mnist, or mnist_5k
        where mnist is neither there nor to be had.
      data_dir: where prepared datasets live; None is TFDS's own folder.
      manual_dir: a folder with the four archives, used instead of downloading.
      verify_checksums: refuse archives whose SHA-256 is not the registered one. Without it,
        such archives become a dataset of another name.
      say: is told, in a line, what takes time.

    Raises:
      UserError: the dataset cannot be had, an archive is damaged, or `data_dir` cannot be used.
    """
    home = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = pathlib.Path(data_dir or home).expanduser().absolute()
    manual = manual_dir and pathlib.Path(manual_dir).expanduser().absolute()
    if name == "mnist_5k":
        return _prepare(name, root, None, True, say)
    if name != "auto":
        return _prepare(name, root, manual, verify_checksums, say)
    try:
        prepared = _prepare("mnist", root, manual, verify_checksums, say)
    except archives.DownloadError as error:
        fallback = _prepare("mnist_5k", root, None, True, say)
        notice = (
            "this is mnist_5k, a subset of 5,000 digits, because full MNIST is not on this machine "
            f"and {error}; --config.data.manual_dir=FOLDER takes the four archives from a folder"
        )
        prepared = dataclasses.replace(fallback, notice=notice)
    return dataclasses.replace(prepared, requested=name)


def _prepare(name, root, manual, verify_checksums, say) -> Prepared:
    config, notice = name, None
    if manual and not verify_checksums:
        hashes = archives.hash_files(manual)
        if hashes != archives.checksums(name):
            content = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
            config = f"{name}_{content[:8]}"
            notice = f"the archives in {manual} are not the registered ones of {name}"
    # The names of a TFDS directory, spelled out so that a prepared dataset needs no TFDS.
    directory = root / "mnist_family" / config / "1.0.0"
    if not _is_whole(directory):
        with tempfile.TemporaryDirectory() as temporary:
            folder = manual or pathlib.Path(temporary)
            if name != "mnist_5k":
                _get_archives(name, folder, download=not manual, verify=config == name, say=say)
            with _alone_in(root):
                if not _is_whole(directory):
                    say(f"Preparing {config} in {directory} (only once)")
                    with _explain_failure(directory):
                        _build(config, directory, folder, temporary)
    (fingerprint,) = _load(directory, _FINGERPRINT)
    return Prepared(config, name, notice, directory, str(fingerprint))


@contextlib.contextmanager
def _alone_in(root) -> Iterator[None]:
    """Keeps other processes from preparing at the same time; a killed one holds no lock."""
    with _explain_failure(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".seqmnist.lock", "w")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explain_failure(root):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"config.data.data_dir={root} cannot be written ({error.strerror or error}); "
            "name another folder"
        ) from error


def _get_archives(name, folder, download, verify, say):
    """Sees to it that a folder holds four whole archives, before anything is written."""
    if download:
        say(f"Downloading {name} from {archives.URLS[name]}")
        archives.download(name, folder)
    if verify:
        hashes, registered = archives.hash_files(folder), archives.checksums(name)
        for file, sha256 in registered.items():
            if hashes[file] != sha256:
                raise (archives.DownloadError if download else UserError)(
                    f"{folder / file} is not the registered archive of {name} (SHA-256 "
                    f"{hashes[file][:8]}…, not {sha256[:8]}…); get it again, or accept it with "
                    "--config.data.verify_checksums=false"
                )
    archives.read({file: folder / file for file in sum(archives.NAMES.values(), ())})


def _is_whole(directory):
    return (directory / "dataset_info.json").is_file()  # TFDS renames a directory when it is done


def _build(config, directory, folder, temporary):
    import tensorflow_datasets as tfds  # here, not above: a prepared dataset does not need it

    from seqmnist.datasets.mnist_family.mnist_family_dataset_builder import Builder, Config

    for leftover in directory.parent.glob("*incomplete*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    known = config in Builder.builder_configs
    builder = Builder(
        config=config if known else Config(name=config, description="Unregistered archives."),
        data_dir=directory.parents[2],
        file_format="array_record",
    )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own lines name no dataset
        builder.download_and_prepare(
            download_dir=temporary,
            download_config=tfds.download.DownloadConfig(manual_dir=folder),
        )
    _decode(directory)


def _load(directory, *names) -> list[np.ndarray]:
    """Loads arrays of the decoded copy, which is made again where missing or damaged."""
    damage = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    for attempt in (1, 2):
        try:
            with np.load(directory / _ARRAYS, allow_pickle=False) as copy:
                return [copy[name] for name in names]
        except damage:
            if attempt == 2:
                raise
            with _explain_failure(directory):
                _decode(directory)


def _map(path, name) -> np.ndarray:
    """Maps an array of an uncompressed .npz file into memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            header = member.tell()
    with path.open("rb") as file:  # a zip entry: 30 bytes, a name, an extra field, the content
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    offset = info.header_offset + 30 + name_length + extra_length + header
    return np.memmap(path, dtype, "r", offset, shape)


def _decode(directory):
    """Writes the decoded copy of the records, aside first."""
    arrays, digest = {}, hashlib.sha256()
    for split, source in _read_records(directory).items():
        try:
            examples = source.__getitems__(range(len(source)))
            images = np.stack([example["image"] for example in examples])
            labels = np.array([example["label"] for example in examples], np.int32)
        except Exception as error:
            raise _damaged(directory, error) from error
        arrays |= {f"{split}/images": images, f"{split}/labels": labels}
        digest.update(images.tobytes() + labels.astype("<i4").tobytes())
    arrays[_FINGERPRINT] = np.array(digest.hexdigest())
    descriptor, aside = tempfile.mkstemp(dir=directory, suffix=".partial")
    try:
        with open(descriptor, "wb") as file:
            np.savez(file, **arrays)
        os.replace(aside, directory / _ARRAYS)
    except BaseException:
        os.unlink(aside)
        raise


def _read_records(directory) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        return {split: builder.as_data_source(split) for split in ("train", "test")}
    except Exception as error:
        raise _damaged(directory, error) from error


def _damaged(directory, error):
    reason = str(error).partition("\n")[0]
    return UserError(f"{directory} holds damaged records ({reason}); delete it and run again")
