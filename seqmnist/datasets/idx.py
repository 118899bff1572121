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

_MOST = 1_000_000  # examples; an archive that promises more would only exhaust the memory


class IdxError(UserError):
    """A file is not the archive it should be."""


def read_images(path: str | os.PathLike) -> np.ndarray:
    """Reads a gzip-compressed archive of images: uint8 [N, 28, 28].

    Raises:
      IdxError: the file is missing, damaged, or holds something else.
    """
    return _read(path, magic=0x803, item_shape=(28, 28))


def read_labels(path: str | os.PathLike) -> np.ndarray:
    """Reads a gzip-compressed archive of labels 0 to 9: uint8 [N].

    Raises:
      IdxError: the file is missing, damaged, or holds something else.
    """
    labels = _read(path, magic=0x801, item_shape=())
    if labels.size and labels.max() > 9:
        raise IdxError(f"{path} holds the label {labels.max()}; labels are 0 to 9")
    return labels


def _read(path, magic, item_shape):
    try:
        with gzip.open(path) as file:
            header = file.read(4 * (2 + len(item_shape)))
            found, *shape = np.frombuffer(header.ljust(16, b"\0"), ">u4").tolist()
            if found != magic:
                raise IdxError(
                    f"{path} has the magic number 0x{found:x} instead of 0x{magic:x}: it is not an "
                    f"IDX archive of {'images' if item_shape else 'labels'}; get it again"
                )
            count, size = shape[0], tuple(shape[1 : 1 + len(item_shape)])
            if size != item_shape:
                raise IdxError(
                    f"{path} holds images of {size[0]} × {size[1]} pixels; 28 × 28 are expected"
                )
            if count > _MOST:
                raise IdxError(f"{path} promises {count:,} examples; at most {_MOST:,} are read")
            promised = count * math.prod(item_shape)
            content = file.read(promised + 1)
    except IdxError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise IdxError(f"{path} cannot be read ({reason}); get it again") from error
    if len(content) != promised:
        found = "more" if len(content) > promised else f"only {len(content):,}"
        raise IdxError(f"{path} promises {promised:,} bytes and holds {found}; get it again")
    return np.frombuffer(content, np.uint8).reshape((count, *item_shape))
