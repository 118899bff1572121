"""A decoded copy of a TFDS dataset, as .npy files beside its records.

With it, a run neither parses record by record nor imports TFDS to start.
"""

import errno
import hashlib
import io
import os
import pathlib
import tempfile
import zlib

import numpy as np

from seqmnist import errors
from seqmnist.errors import UserError

_CHECKSUMS = "decoded.crc32"  # a line per file
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Decoded:
    """The arrays `SPLIT_images` uint8 [N, 28, 28], `SPLIT_labels` int32 [N] and `fingerprint`.

    If the directory is read-only and holds no good copy, they are kept in memory.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._in_memory = {}

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
                if error.errno not in _READ_ONLY:
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
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    arrays, digest = {}, hashlib.sha256()
    try:
        builder = tfds.builder_from_directory(directory)
        for split in ("train", "test"):
            source = builder.as_data_source(split)
            examples = source.__getitems__(range(len(source)))
            images = np.stack([example["image"] for example in examples])
            labels = np.array([example["label"] for example in examples], np.int32)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
            digest.update(images.tobytes() + labels.astype("<i4").tobytes())
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, ParseError) as error:
        reason = errors.storage_reason(error)
        if reason in (None, os.strerror(errno.ENOENT)):
            problem = f"holds damaged records ({errors.one_line(error)})"
            remedy = "move it to another place and run again, which prepares it anew"
        else:
            problem, remedy = f"cannot be read ({reason})", "check its permissions and its disk"
        raise UserError(f"{directory} {problem}; {remedy}") from error
    return arrays | {"fingerprint": np.array(digest.hexdigest())}
