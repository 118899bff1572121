"""Reads image files and prepares images as those of the training set were prepared.

For MNIST that is a light digit on a dark ground, 20 pixels tall or wide, with its centre of mass in
the middle of 28 × 28 pixels. For any other dataset it is its size, and gray or colors.
"""

import functools
import glob
import math
import pathlib
from collections.abc import Iterable

import numpy as np

from seqmnist import paths
from seqmnist.datasets import idx, pictures
from seqmnist.errors import UserError, one_line
from seqmnist.spec import MNIST, ImageSpec

_MIN_CONTRAST = 16  # bytes between the darkest and the lightest pixel
_MIN_INK = 0.2  # of the strongest; fainter pixels do not extend a digit's bounding box
_BOX, _SIZE, _MIDDLE = 20, MNIST.height, MNIST.height // 2

_ARRAYS = (".npy", "idx3-ubyte", "idx3-ubyte.gz")  # how names of files of several images end
_KINDS = "pictures, NPY or IDX"


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
            endings = (*_ARRAYS, *pictures.extensions())
            matches = [file for file in path.iterdir() if file.name.lower().endswith(endings)]
            nothing = f"{name} contains no image ({_KINDS}); name another folder"
        elif glob.has_magic(name) and not path.exists():
            matches = [pathlib.Path(match) for match in glob.glob(str(path))]
            nothing = f"no file matches {name}; name images that exist"
        elif not path.exists():
            matches, nothing = [], f"{name} does not exist; name an image"
        if not matches:
            raise UserError(nothing)
        files += sorted(matches, key=str)
    return files


def read(path: pathlib.Path) -> list[np.ndarray]:
    """Reads all images of a picture, NPY or IDX file, whatever its name.

    A picture is in any format that Pillow decodes; see `pictures.read_picture`. NPY contains
    [H, W] or [N, H, W], or colors [H, W, 3] or [N, H, W, 3], as bytes or numbers in 0 to 1 or 0 to
    255.

    Returns at least one image, gray uint8 [H, W] or colored uint8 [H, W, 3]. Raises UserError if
    the file is missing, not an image, damaged, empty or too large.
    """
    beginning = pictures.read_beginning(path)
    readers = [reader for signature, reader in _READERS.items() if beginning.startswith(signature)]
    images = readers[0](path) if readers else [pictures.read_picture(path)]
    if not len(images) or not images[0].size:
        shape = " × ".join(map(str, np.shape(images)))
        raise UserError(f"{path} contains no pixels ({shape}); name another image")
    return list(images)


def as_it_is(image: np.ndarray, name: object, spec: ImageSpec) -> np.ndarray:
    """Returns an image, uint8 [H, W] or [H, W, 3], as uint8 [*spec.shape], not resized.

    Raises UserError if it has another size. Messages call the image `name`.
    """
    height, width = image.shape[:2]
    if (height, width) != (spec.height, spec.width):
        raise UserError(
            f"{name} has {width} × {height} pixels; without preparation "
            f"{spec.width} × {spec.height} are needed"
        )
    return pictures.to_channels(image, spec.channels)


def is_of_digits(spec: ImageSpec) -> bool:
    """Returns whether images are prepared as MNIST's digits."""
    return spec == MNIST


def prepare(image: np.ndarray, name: object, spec: ImageSpec) -> np.ndarray:
    """Prepares an image as those of the dataset were: -> uint8 [*spec.shape].

    A digit for a network of MNIST's digits is prepared as they were. For every other network the
    image, uint8 [H, W] or [H, W, 3], becomes gray or colored and is resized, with anti-aliasing,
    and nothing else. Messages call the image `name`; for errors, see `prepare_digit`.
    """
    image = pictures.to_channels(image, spec.channels)
    if is_of_digits(spec):
        return prepare_digit(image, name)
    return pictures.resize(image, spec.height, spec.width)


def prepare_digit(image: np.ndarray, name: object) -> np.ndarray:
    """Prepares a digit as MNIST's were: uint8 [H, W], light or dark strokes -> uint8 [28, 28].

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


def _read_npy(path):
    try:  # mapped first: an array larger than memory is refused by its size, not loaded
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an array ({one_line(error)}); save it again"
        ) from error
    num_axes = array.ndim - (array.ndim > 2 and array.shape[-1] == 3)
    if num_axes not in (2, 3) or array.dtype.kind not in "buif":
        raise UserError(
            f"{path} contains {array.dtype} {list(array.shape)} instead of numbers [H, W] or "
            "[N, H, W], or colors [H, W, 3] or [N, H, W, 3]; convert it"
        )
    array = array if num_axes == 3 else array[None]
    pictures.check_size(path, *array.shape[1:3])
    return pictures.to_bytes(np.array(array), path)


_READERS = {
    b"\x93NUMPY": _read_npy,
    b"\0\0\x08\x03": functools.partial(idx.read_images, shape=None),
    b"\x1f\x8b": functools.partial(idx.read_images, shape=None),
}
