"""The IDX format, in which MNIST and its relatives are published.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits",
section "File formats for the MNIST database".
"""

import gzip
import io
import math
import os
import zlib

import numpy as np

from seqmnist.errors import UserError

_MAX_EXAMPLES, _MAX_BYTES = 1_000_000, 1 << 31  # a damaged header can announce any size


class IdxError(UserError):
    """A file is not the archive that it should be."""


def read_images(
    path: str | os.PathLike,
    shape: tuple[int, int] | None = (28, 28),
    content: bytes | None = None,
) -> np.ndarray:
    """Reads an archive of images, gzip-compressed or not: uint8 [N, H, W].

    `shape` is the (H, W) to require, None accepts any; `content` is that of the file, if it has
    been read. Raises IdxError if the file is missing, damaged, or holds something else.
    """
    return _read(path, content, 0x803, "images", shape)


def read_labels(
    path: str | os.PathLike, content: bytes | None = None, classes: range = range(10)
) -> np.ndarray:
    """Reads an archive of labels, uint8 [N] within `classes`; the rest is as in `read_images`."""
    labels = _read(path, content, 0x801, "labels", ())
    if len(others := labels[(labels < classes[0]) | (labels > classes[-1])]):
        raise IdxError(
            f"{path} holds the label {others[0]}; labels are {classes[0]} to {classes[-1]}"
        )
    return labels


def _read(path, content, magic, kind, item_shape):
    num_words = 1 + (magic & 0xFF)  # the magic number's last byte is the number of axes
    try:
        with open(path, "rb") if content is None else io.BytesIO(content) as raw:
            is_compressed = raw.read(2) != b"\0\0"  # IDX begins with two zeros
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if is_compressed else raw
            header = file.read(4 * num_words).ljust(4 * num_words, b"\0")
            found, count, *size = np.frombuffer(header, ">u4").tolist()
            if found != magic:
                raise IdxError(
                    f"{path} is not an IDX archive of {kind} (magic number 0x{found:x}, not "
                    f"0x{magic:x}); download it again"
                )
            if item_shape is not None and tuple(size) != item_shape:
                raise IdxError(
                    f"{path} holds images of {size[0]} × {size[1]} pixels; "
                    f"{item_shape[0]} × {item_shape[1]} are expected"
                )
            num_bytes = count * math.prod(size)
            if count > _MAX_EXAMPLES or num_bytes > _MAX_BYTES:
                raise IdxError(
                    f"{path} announces {count:,} examples, {num_bytes:,} bytes; at most "
                    f"{_MAX_EXAMPLES:,} examples and {_MAX_BYTES:,} bytes are read"
                )
            pixels = file.read(num_bytes + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None)
        remedy = "" if reason else "; download it again"
        raise IdxError(f"{path} cannot be read ({reason or error}){remedy}") from error
    if len(pixels) != num_bytes:
        found = "more" if len(pixels) > num_bytes else f"only {len(pixels):,}"
        raise IdxError(f"{path} announces {num_bytes:,} bytes and holds {found}; download it again")
    return np.frombuffer(pixels, np.uint8).reshape((count, *size))
