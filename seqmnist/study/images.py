"""Reads image files and prepares images as MNIST's were prepared.

The result is what the networks were trained on: a light digit on a dark ground, 20 pixels tall or
wide, with its centre of mass in the middle of 28 × 28 pixels.
"""

import functools
import glob
import math
import pathlib
import re
import struct
import warnings
from collections.abc import Iterable

import numpy as np

from seqmnist import paths
from seqmnist.datasets import idx
from seqmnist.errors import UserError, one_line

MAX_PIXELS = 50_000_000  # per image
_MIN_CONTRAST = 16  # bytes between the darkest and the lightest pixel
_MIN_INK = 0.2  # of the strongest; fainter pixels do not extend a digit's bounding box
_BOX, _SIZE, _MIDDLE = 20, 28, 14

_IS_IMAGE = re.compile(r"(\.(png|jpe?g|npy)|idx3-ubyte(\.gz)?)$")
_KINDS = "PNG, JPEG, NPY or IDX"


def find(names: Iterable[str]) -> list[pathlib.Path]:
    """Returns the image files in order: of files, folders, or patterns such as `scans/*.png`.

    Raises UserError if a name stands for nothing.
    """
    files: list[pathlib.Path] = []
    for name in names:
        paths.resolve(name, "IMAGE")
        path = pathlib.Path(name).expanduser()
        matches, nothing = [path], ""
        if path.is_dir():
            matches = [file for file in path.iterdir() if _IS_IMAGE.search(file.name.lower())]
            nothing = f"{name} contains no image ({_KINDS}); name another folder"
        elif glob.has_magic(name) and not path.exists():
            matches = [pathlib.Path(match) for match in glob.glob(str(path))]
            nothing = f"no file matches {name}; name images that exist"
        if not matches:
            raise UserError(nothing)
        files += sorted(matches, key=str)
    return files


def read(path: pathlib.Path) -> list[np.ndarray]:
    """Reads all images of a PNG, JPEG, NPY or IDX file, whatever its name.

    Colors become gray. Transparent pixels become white behind dark strokes and black behind light
    ones. NPY contains [H, W] or [N, H, W], bytes or numbers in 0 to 1 or 0 to 255.

    Returns at least one image, uint8 [H, W]. Raises UserError if the file is missing, not an image,
    damaged, empty or too large.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name an image") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name an image") from None
    if not beginning:
        raise UserError(f"{path} is empty; name an image")
    readers = [reader for signature, reader in _READERS.items() if beginning.startswith(signature)]
    if not readers:
        raise UserError(f"{path} is not an image; name one that is {_KINDS}")
    images = readers[0](path)
    if not len(images) or not images[0].size:
        shape = " × ".join(map(str, np.shape(images)))
        raise UserError(f"{path} contains no pixels ({shape}); name another image")
    return list(images)


def as_it_is(image: np.ndarray, name: object) -> np.ndarray:
    """Returns an image uint8 [H, W] unchanged; raises UserError if it has not MNIST's size.

    Messages call the image `name`.
    """
    if image.shape != (_SIZE, _SIZE):
        height, width = image.shape
        raise UserError(
            f"{name} has {width} × {height} pixels; without preparation 28 × 28 are needed"
        )
    return image


def prepare(image: np.ndarray, name: object) -> np.ndarray:
    """Prepares an image as MNIST's were: uint8 [H, W], light or dark strokes -> uint8 [28, 28].

    The ground, the median of the border, becomes 0 and the strongest stroke 255. The bounding box
    of the digit is scaled to 20 pixels at its longer side, with anti-aliasing, and moved so that
    the digit's centre of mass is on the middle pixel. Raises UserError if all pixels are alike.
    Messages call the image `name`.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".
    """
    from PIL import Image  # here, not above: only image files need it

    ink = image.astype(np.float32)
    low, high = ink.min(), ink.max()
    if high - low < _MIN_CONTRAST:
        raise UserError(f"{name} shows nothing: all its pixels are alike; name another image")
    ground = np.median(np.concatenate([ink[0], ink[-1], ink[1:-1, 0], ink[1:-1, -1]]))
    if ground > (low + high) / 2:
        ink, ground, high = -ink, -ground, -low
    ink = np.clip((ink - ground) / (high - ground), 0, 1)

    is_ink = ink > _MIN_INK
    rows, columns = (np.flatnonzero(is_ink.any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _BOX / max(ink.shape)
    height, width = (max(1, round(scale * length)) for length in ink.shape)
    small = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(small, np.float64)
    ink = ink / ink.max()

    top, left = (
        # A digit with all its mass at one end stays in the frame rather than centred.
        min(max(_MIDDLE - math.floor(centre + 0.5), 0), _SIZE - length)
        for centre, length in zip(_centre_of_mass(ink), ink.shape, strict=True)
    )
    prepared = np.zeros((_SIZE, _SIZE), np.uint8)
    prepared[top : top + height, left : left + width] = np.rint(255 * ink)
    return prepared


def _centre_of_mass(ink):
    return [np.average(np.arange(n), weights=ink.sum(1 - axis)) for axis, n in enumerate(ink.shape)]


def _read_picture(path):
    from PIL import Image, ImageOps

    # What Pillow raises for damaged files and, the last three, for damaged EXIF data in them.
    damaged = (OSError, SyntaxError, EOFError, ValueError, TypeError, struct.error)
    formats = ("PNG", "JPEG")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as picture:
            _check_size(path, picture.height, picture.width)
            if picture.mode.startswith("I"):  # 16 bits per pixel
                return [np.rint(np.asarray(picture, np.float64) / 257).astype(np.uint8)]
            picture = ImageOps.exif_transpose(picture)
            if not picture.has_transparency_data:
                return [np.asarray(picture.convert("L"))]
            channels = np.asarray(picture.convert("RGBA").convert("LA"), np.float64)
    except (*damaged, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({one_line(error)}); save it again"
        ) from error
    gray, alpha = channels[..., 0], channels[..., 1] / 255
    mean = (gray * alpha).sum() / max(alpha.sum(), 1)
    ground = 255 if mean < 128 else 0
    return [np.rint(gray * alpha + ground * (1 - alpha)).astype(np.uint8)]


def _read_npy(path):
    try:  # mapped first: an array larger than memory is refused by its size, not loaded
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an array ({one_line(error)}); save it again"
        ) from error
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise UserError(
            f"{path} contains {array.dtype} {list(array.shape)} instead of numbers [H, W] or "
            "[N, H, W]; convert it"
        )
    _check_size(path, *array.shape[-2:])
    array = np.array(array if array.ndim == 3 else array[None])
    if array.dtype == np.uint8 or not array.size:
        return array
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255):
        raise UserError(f"{path} contains numbers outside 0 to 255; scale them")
    is_unit = array.dtype.kind in "bf" and array.max() <= 1
    return np.rint(array * (255.0 if is_unit else 1.0)).astype(np.uint8)


_READERS = {
    b"\x89PNG\r\n\x1a\n": _read_picture,
    b"\xff\xd8\xff": _read_picture,
    b"\x93NUMPY": _read_npy,
    b"\0\0\x08\x03": functools.partial(idx.read_images, shape=None),
    b"\x1f\x8b": functools.partial(idx.read_images, shape=None),
}


def _check_size(path, height, width):
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{path} has {width:,} × {height:,} pixels, more than {MAX_PIXELS:,}; scale it down"
        )
