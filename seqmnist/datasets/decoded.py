"""A decoded copy of a TFDS dataset, as .npy files beside its records.

With it, a run neither parses record by record nor imports TFDS to start.
"""

import hashlib
import io
import pathlib
import tempfile
import zlib

import numpy as np

from seqmnist import errors
from seqmnist.datasets.archives import Splits
from seqmnist.datasets.from_tfds import explain_damage, read_split

_CHECKSUMS = "decoded.crc32"  # a line per file


class Decoded:
    """The arrays `SPLIT_images` uint8 [N, …], `SPLIT_labels` int32 [N], and facts of the dataset.

    The facts are arrays, too: `fingerprint`, `class_names` [C] and `image_shape` [2] or [3]. If the
    directory is read-only and holds no good copy, all are kept in memory.
    """

    def __init__(self, directory: pathlib.Path, splits: Splits | None = None):
        """Takes a directory of TFDS records, or `splits` to keep in memory instead."""
        self._directory = directory
        self._in_memory = {} if splits is None else _arrays(*splits, splits.class_names)

    def load(self, name: str, mmap_mode: str | None = None) -> np.ndarray:
        """Loads an array from the copy, which is written anew if it is missing or damaged.

        Raises UserError if there is no good copy, and the records or the disk do not allow one.
        """
        if name in self._in_memory:
            return self._in_memory[name]
        try:
            return _load(self._directory / f"{name}.npy", mmap_mode)
        except (OSError, ValueError):
            arrays = _read_records(self._directory)
        data_dir = self._directory.parents[2]
        with errors.explain_storage(f"config.data.data_dir={data_dir}", "name another folder"):
            try:
                _save(self._directory, arrays)
            except OSError as error:
                if error.errno not in errors.READ_ONLY:
                    raise
                self._in_memory = arrays
        return arrays[name]


def _load(path, mmap_mode):
    lines = (path.parent / _CHECKSUMS).read_text().splitlines()
    if f"{zlib.crc32(np.memmap(path, mode='r')):08x}  {path.name}" not in lines:
        raise ValueError(f"{path} is damaged")
    return np.load(path, mmap_mode)


def _save(directory, arrays):
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=directory) as aside:
        lines = ""
        for name, array in arrays.items():
            np.save(file := io.BytesIO(), array)  # NumPy's errors of a file have no errno
            content = file.getvalue()  # Python 3.12.1 crashes after a failed write of `getbuffer`
            pathlib.Path(aside, f"{name}.npy").write_bytes(content)
            lines += f"{zlib.crc32(content):08x}  {name}.npy\n"
        pathlib.Path(aside, _CHECKSUMS).write_text(lines)
        for path in pathlib.Path(aside).iterdir():
            path.replace(directory / path.name)


def _read_records(directory):
    import tensorflow_datasets as tfds  # imported here: a good copy needs none

    with explain_damage(directory, "run again, which prepares it anew"):
        builder = tfds.builder_from_directory(directory)
        sources = map(builder.as_data_source, ("train", "test"))
        splits = [read_split(directory, source, "image", "label") for source in sources]
        return _arrays(*splits, builder.info.features["label"].names)


def _arrays(train, test, class_names):
    arrays, digest = {}, hashlib.sha256()
    for split, (images, labels) in (("train", train), ("test", test)):
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        digest.update(images.tobytes() + labels.astype("<i4").tobytes())
    return arrays | {
        "fingerprint": np.array(digest.hexdigest()),
        "class_names": np.array(class_names),
        "image_shape": np.array(train[0].shape[1:]),
    }
