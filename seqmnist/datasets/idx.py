"""The IDX format, in which MNIST and its relatives are published.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits",
section "File formats for the MNIST database".
"""

import gzip
import math
import os
import zlib

import numpy as np

from seqmnist.errors import UserError

# What promises more examples, or more bytes, would only exhaust the memory.
_MOST, _MOST_BYTES = 1_000_000, 1 << 31


class IdxError(UserError):
    """A file is not the archive it should be."""


def read_images(path: str | os.PathLike, shape: tuple[int, int] | None = (28, 28)) -> np.ndarray:
    """Reads an archive of images, gzip-compressed or not: uint8 [N, H, W].

    Args:
      path: the file.
      shape: (H, W) that it must have; None takes any.

    Raises:
      IdxError: the file is missing, damaged, or holds something else.
    """
    return _read(path, magic=0x803, num_sizes=2, item_shape=shape)


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Reads an archive of labels 0 to 9, gzip-compressed or not: uint8 [N].

    Raises:
      IdxError: the file is missing, damaged, or holds something else.
    """
    labels = _read(path, magic=0x801, num_sizes=0, item_shape=())
    if labels.size and labels.max() > 9:
        raise IdxError(f"{path} holds the label {labels.max()}; labels are 0 to 9")
    return labels


def _read(path, magic, num_sizes, item_shape):
    try:
        with _open(path) as file:
            header = file.read(4 * (2 + num_sizes))
            found, *shape = np.frombuffer(header.ljust(16, b"\0"), ">u4").tolist()
            if found != magic:
                raise IdxError(
                    f"{path} has the magic number 0x{found:x} instead of 0x{magic:x}: it is not an "
                    f"IDX archive of {'images' if num_sizes else 'labels'}; get it again"
                )
            count, size = shape[0], tuple(shape[1 : 1 + num_sizes])
            if item_shape is not None and size != item_shape:
                raise IdxError(
                    f"{path} holds images of {size[0]} × {size[1]} pixels; 28 × 28 are expected"
                )
            if count > _MOST:
                raise IdxError(f"{path} promises {count:,} examples; at most {_MOST:,} are read")
            promised = count * math.prod(size)
            if promised > _MOST_BYTES:
                raise IdxError(
                    f"{path} promises {promised:,} bytes; at most {_MOST_BYTES:,} are read"
                )
            content = file.read(promised + 1)
    except IdxError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise IdxError(f"{path} cannot be read ({reason}); get it again") from error
    if len(content) != promised:
        found = "more" if len(content) > promised else f"only {len(content):,}"
        raise IdxError(f"{path} promises {promised:,} bytes and holds {found}; get it again")
    return np.frombuffer(content, np.uint8).reshape((count, *size))


def _open(path):
    with open(path, "rb") as file:
        is_compressed = file.read(2) != b"\0\0"  # what is neither fails in gzip, which says so
    return gzip.open(path) if is_compressed else open(path, "rb")
