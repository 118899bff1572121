"""Images from files, and their preparation as that of MNIST.

Whatever a person draws or photographs becomes what the networks were trained on: a light digit
on dark ground, 20 pixels tall or wide, its centre of mass in the middle of 28 × 28.
"""

import fnmatch
import glob
import math
import pathlib
import warnings
from collections.abc import Iterable

import numpy as np

from seqmnist.datasets import idx
from seqmnist.errors import UserError

MOST_PIXELS = 50_000_000  # of an image; more would only exhaust the memory
_LEAST_CONTRAST = 16  # bytes between the darkest and the lightest pixel of what shows something
_FAINTEST_INK = 0.2  # of the strongest; what is fainter does not extend a digit's box
_BOX, _SIZE, _MIDDLE = 20, 28, 14

_PATTERNS = ("*.png", "*.jpg", "*.jpeg", "*.npy", "*idx3-ubyte", "*idx3-ubyte.gz")
_KINDS = "PNG, JPEG, NPY or IDX"


def find(names: Iterable[str]) -> list[pathlib.Path]:
    """Returns the image files that names stand for, in order.

    Args:
      names: files, folders (of which all files named like images are taken), or patterns such as
        `scans/*.png`.

    Raises:
      UserError: a name stands for nothing.
    """
    found: list[pathlib.Path] = []
    for name in names:
        path = pathlib.Path(name)
        if path.is_dir():
            matches = [
                file
                for file in sorted(path.iterdir())
                if any(fnmatch.fnmatch(file.name.lower(), pattern) for pattern in _PATTERNS)
            ]
            if not matches:
                raise UserError(f"{name} holds no image ({_KINDS}); name another folder")
        elif path.exists() or not glob.has_magic(name):
            matches = [path]
        else:
            matches = sorted(map(pathlib.Path, glob.glob(name)))
            if not matches:
                raise UserError(f"no file matches {name}; name images that exist")
        found += matches
    return found


def read(path: pathlib.Path) -> list[np.ndarray]:
    """Reads all images of a PNG, JPEG, NPY or IDX file, whatever its name says.

    Colours become grey, transparency the ground: white under dark strokes, black under light ones.

    Args:
      path: a file. NPY holds [H, W] or [N, H, W], bytes, or numbers in 0 to 1 or 0 to 255.

    Returns:
      Images uint8 [H, W], at least one.

    Raises:
      UserError: there is no such file, it is no image, damaged, empty or too large.
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
    for signature, reader in _READERS.items():
        if beginning.startswith(signature):
            images = reader(path)
            break
    else:
        raise UserError(f"{path} is not an image; name one that is {_KINDS}")
    if not len(images) or not images[0].size:
        shape = " × ".join(map(str, np.shape(images)))
        raise UserError(f"{path} holds no pixels ({shape}); name an image that shows something")
    return list(images)


def as_it_is(image: np.ndarray, name: object) -> np.ndarray:
    """Returns an image uint8 [H, W] unchanged, if it is of MNIST's size.

    Raises:
      UserError: it is of another size; `name` says which image it is.
    """
    if image.shape != (_SIZE, _SIZE):
        height, width = image.shape
        raise UserError(
            f"{name} has {width} × {height} pixels; without preparation 28 × 28 are needed"
        )
    return image


def prepare(image: np.ndarray, name: object) -> np.ndarray:
    """Prepares an image as MNIST's were: of any size, light strokes or dark ones.

    The ground, which most of the border shows, becomes 0 and the strongest stroke 255; the box
    around the digit is scaled to 20 pixels at its longer side, anti-aliased, and moved so that
    the digit's centre of mass comes to lie on the middle pixel.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".

    Args:
      image: uint8 [H, W].
      name: says which image it is.

    Returns:
      uint8 [28, 28].

    Raises:
      UserError: all pixels are alike.
    """
    from PIL import Image  # here, not above: only images from files need it

    ink = image.astype(np.float32)
    low, high = ink.min(), ink.max()
    if high - low < _LEAST_CONTRAST:
        raise UserError(f"{name} shows nothing: all its pixels are alike; name another image")
    border = np.concatenate([ink[0], ink[-1], ink[1:-1, 0], ink[1:-1, -1]])
    ground = np.median(border)
    if ground > (low + high) / 2:
        ink, ground, high = -ink, -ground, -low
    ink = np.clip((ink - ground) / (high - ground), 0, 1)

    is_ink = ink > _FAINTEST_INK
    rows, columns = (np.flatnonzero(is_ink.any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _BOX / max(ink.shape)
    height, width = (max(1, round(scale * length)) for length in ink.shape)
    small = Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(small, np.float64)
    ink = ink / ink.max()

    top, left = (
        # A digit with all its mass at one end stays whole rather than centred.
        min(max(_MIDDLE - math.floor(_centre(ink.sum(1 - axis)) + 0.5), 0), _SIZE - length)
        for axis, length in enumerate(ink.shape)
    )
    prepared = np.zeros((_SIZE, _SIZE), np.uint8)
    prepared[top : top + height, left : left + width] = np.rint(255 * ink)
    return prepared


def _centre(masses):
    return (masses * np.arange(len(masses))).sum() / masses.sum()


def _read_picture(path):
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=("PNG", "JPEG"))
        with picture:
            _check_size(path, picture.height, picture.width)
            if picture.mode.startswith("I"):  # 16 bits a pixel
                return [np.rint(np.asarray(picture, np.float64) / 257).astype(np.uint8)]
            picture = ImageOps.exif_transpose(picture)
            if not picture.has_transparency_data:
                return [np.asarray(picture.convert("L"))]
            grey, alpha = np.asarray(picture.convert("RGBA").convert("LA"), np.float64).T
    except UserError:
        raise
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise UserError(f"{path} cannot be read as an image ({error}); get it again") from error
    grey, alpha = grey.T, alpha.T / 255
    mean = (grey * alpha).sum() / max(alpha.sum(), 1)
    ground = 255 if mean < 128 else 0
    return [np.rint(grey * alpha + ground * (1 - alpha)).astype(np.uint8)]


def _read_npy(path):
    try:
        # The header first: an array that promises too much is never loaded.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as an array ({reason}); save it again") from error
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise UserError(
            f"{path} holds {array.dtype} {list(array.shape)}; numbers [H, W] or [N, H, W] are "
            "expected"
        )
    _check_size(path, *array.shape[-2:])
    array = np.array(array if array.ndim == 3 else array[None])
    if array.dtype == np.uint8 or not array.size:
        return array
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255):
        raise UserError(f"{path} holds numbers beyond 0 to 255; scale them")
    is_unit = array.dtype.kind in "bf" and array.max() <= 1
    return np.rint(array * (255.0 if is_unit else 1.0)).astype(np.uint8)


def _read_idx(path):
    return idx.read_images(path, shape=None)


_READERS = {
    b"\x89PNG\r\n\x1a\n": _read_picture,
    b"\xff\xd8\xff": _read_picture,
    b"\x93NUMPY": _read_npy,
    b"\0\0\x08\x03": _read_idx,
    b"\x1f\x8b": _read_idx,
}


def _check_size(path, height, width):
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{path} has {width:,} × {height:,} pixels; at most {MOST_PIXELS:,} are read: scale it "
            "down"
        )
