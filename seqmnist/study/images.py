"""Reads image files and prepares images as those of the training set were prepared.

For MNIST the result is a light digit on a dark background, 20 pixels tall or wide, with its centre
of mass in the middle of 28 × 28 pixels. Images of any other dataset are resized, and made gray or
colored.
"""

import collections
import glob
import math
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from seqmnist import paths
from seqmnist.datasets import idx, pictures
from seqmnist.errors import UserError, explain_any
from seqmnist.spec import MNIST, ImageSpec

_BOX, _SIZE, _MIDDLE = 20, MNIST.height, MNIST.height // 2
_MOST_PIXELS = 1 << 20  # in which digits are searched; larger images are reduced first
_MIN_CONTRAST = 16  # gray levels between the background and the strongest strokes
_STROKE, _MIN_INK = 0.5, 0.2  # least ink of a stroke and of its soft edges; 1 is the strongest
_NEAR = 0.06  # times a digit's size: how far ink reaches out to join separate parts
_RECTANGULAR, _ROOM = 0.87, 0.16  # of a sheet of paper; see `_sheet`
_MIN_WIDTH = 2  # pixels of a prepared stroke; MNIST's pen was no thinner
_MOST_RADIUS = 0.3  # half a stroke's width, in digit sizes; anything wider is a blot
_WIDEST = 3  # width of a digit, in heights; anything wider is a line. MNIST's widest digit: 2.5
_MOST_FIELDS = 16  # regions of paper around and within a digit; grids have more. MNIST's most: 10
_CLEAN = 0.5  # smallest share of all strokes that belongs to digits; noise is everywhere
_MOST_DIGITS = 30  # in an image; noise has more groups
_MAX_BYTES = 1 << 31  # of a file of arrays

# How the names of files that may hold several images end.
_ARRAYS = (".npy", ".npz", "idx3-ubyte", "idx3-ubyte.gz")
_KINDS = "pictures, NPY, NPZ or IDX"


def find(name: str, say: Callable[[str], None]) -> list[pathlib.Path]:
    """Returns the image files that a name stands for, in natural order: 2.png before 10.png.

    The name is that of a file or of a folder with its sub-folders, or a pattern such as
    `scans/*.png`. Hidden files are skipped; `say` is told how many other files in a folder are not
    images. Raises UserError if nothing matches the name.
    """
    paths.resolve(name, "IMAGE")
    path = pathlib.Path(name).expanduser()
    matches = [path]
    if glob.has_magic(name) and not path.exists():
        matches = sorted(map(pathlib.Path, glob.glob(str(path))), key=paths.natural_order)
        if not matches:
            raise UserError(f"no file matches {name}; name images that exist")
    elif not path.exists():
        raise UserError(f"{name} does not exist; name an image")
    files: list[pathlib.Path] = []
    for match in matches:
        files += _walk(match, say) if match.is_dir() else [match]
    if not files:
        raise UserError(f"{name} contains no image ({_KINDS}); name another folder")
    return files


def _walk(folder, say):
    endings = (*_ARRAYS, *pictures.extensions())
    found, others = [], collections.Counter()

    def skip(error):
        say(f"NOTICE: {error.filename} cannot be read ({error.strerror}); skipped")

    for parent, folders, names in os.walk(folder, onerror=skip):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):  # which could lead in a circle
                say(f"NOTICE: {os.path.join(parent, name)} is a symbolic link; skipped")
        for path in (pathlib.Path(parent, name) for name in names if not name.startswith(".")):
            if path.name.lower().endswith(endings):
                found.append(path)
            else:
                others[path.suffix.lower() or "no ending"] += 1
    if others:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items())[:5])
        say(f"NOTICE: {folder}: skipped what is no image: {listed}")
    return sorted(found, key=paths.natural_order)


def read(path: pathlib.Path, any_range: bool = False, spec: ImageSpec = MNIST) -> list[np.ndarray]:
    """Reads all images of a picture, NPY, NPZ or IDX file, whatever its name.

    A picture is in any format that Pillow decodes; see `pictures.read_picture`. NPY contains
    [H, W], [N, H, W], [N, H, W, 1], [N, 1, H, W] or [N, 784], or colors [H, W, 3] or [N, H, W, 3],
    as bytes or numbers in 0 to 1 or 0 to 255; for `any_range`, see `pictures.to_bytes`. Flat images
    may also be [N, H · W · channels] of the network's `spec`, channels last; for a network of
    colors, [3, H, W] and [N, 3, H, W] are colors as well. NPZ contains one or more such arrays;
    labels beside them are skipped.

    Returns at least one image, gray uint8 [H, W] or colored uint8 [H, W, 3]. Raises UserError if
    the file is missing, not an image, damaged, empty or too large.
    """
    beginning = pictures.read_beginning(path)
    readers = [reader for signature, reader in _READERS.items() if beginning.startswith(signature)]
    read_all = readers[0] if readers else lambda *args: [pictures.read_picture(*args[:2])]
    images = read_all(path, any_range, spec)
    if not images or not all(image.size for image in images):
        shape = " × ".join(map(str, next((x.shape for x in images if not x.size), (0,))))
        raise UserError(f"{path} contains no pixels ({shape}); name another image")
    return images


def as_it_is(image: np.ndarray, name: object, spec: ImageSpec) -> np.ndarray:
    """Returns an image, uint8 [H, W] or [H, W, 3], as uint8 [*spec.shape], not resized.

    Raises UserError if it has another size. Messages call the image `name`.
    """
    height, width = image.shape[:2]
    if (height, width) != (spec.height, spec.width):
        raise UserError(
            f"{name} has {width} × {height} pixels; without preparation "
            f"{spec.width} × {spec.height} are needed; leave out --no_prepare"
        )
    return pictures.to_channels(image, spec.channels)


def is_of_digits(spec: ImageSpec) -> bool:
    """Returns whether images are prepared as MNIST's digits: light strokes, far from the border."""
    return spec == MNIST


class Digits(NamedTuple):
    """Prepared images, uint8 [*spec.shape]: the digits from left to right, or the one image."""

    images: list[np.ndarray]
    largest: int  # index


def prepare_all(image: np.ndarray, name: object, spec: ImageSpec) -> Digits:
    """Prepares an image, uint8 [H, W] or [H, W, 3], as those of the dataset were.

    For a network of MNIST's digits, all digits in the image are prepared as MNIST's were. For any
    other network, the result is the one image, uint8 [*spec.shape]: made gray or colored, resized
    with anti-aliasing, and otherwise unchanged. Messages call the image `name`; for errors, see
    `prepare_digits`.
    """
    if is_of_digits(spec):
        return prepare_digits(image, name)
    image = pictures.to_channels(image, spec.channels)
    return Digits([pictures.resize(image, spec.height, spec.width)], 0)


def prepare_digits(image: np.ndarray, name: object) -> Digits:
    """Finds the digits in an image and prepares them as MNIST's were.

    Strokes are dark on light paper, which may lie on a dark desk, or light on a dark background.
    What differs from the background around it is ink; a digit is a group of connected ink with the
    parts close to it. Its bounding box is scaled to 20 pixels at the longer side, with
    anti-aliasing, and moved so that its centre of mass is on the middle pixel. An image of MNIST
    itself is returned unchanged.

    Args:
      image: uint8 [H, W] or [H, W, 3].
      name: what messages call the image.

    Raises:
      UserError: no digit is found.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".
    """
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = image[..., 0]
    if _is_prepared(image):
        return Digits([image], 0)
    ink = _ink(_without_desk(_gray(image)))
    groups = [] if ink is None else _groups(ink)
    if not groups or len(groups) > _MOST_DIGITS:
        raise UserError(f"no digit found: {name} shows nothing like a digit; name another image")
    largest = int(np.argmax([group.sum() for group in groups]))
    return Digits([_normalize(group) for group in groups], largest)


def _is_prepared(image):
    """Returns whether an image follows MNIST's rules, as all of MNIST's own images do."""
    if image.shape != (_SIZE, _SIZE) or not image.any():
        return False
    sides = [np.ptp(np.flatnonzero(image.any(axis))) + 1 for axis in (0, 1)]
    return max(sides) in (_BOX - 1, _BOX) and all(
        abs(centre - _MIDDLE) < 0.6 for centre in _centre_of_mass(image)
    )


def _gray(image):
    """Returns the brightness, or the mixture of colors that varies most: float32 [H, W].

    Black and white become shades again: a scanner that knows no others has dithered them.
    """
    from PIL import Image
    from scipy import ndimage

    height, width = image.shape[:2]
    if (factor := math.ceil(math.sqrt(height * width / _MOST_PIXELS))) > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    gray = image.astype(np.float32)
    if gray.ndim == 3:
        # Red ink on green paper may have one brightness.
        _, axes = np.linalg.eigh(np.cov(gray.reshape(-1, 3).T, ddof=0))
        weights = axes[:, -1] * np.sign(axes[:, -1].sum() or 1)
        gray = (gray @ (weights / np.abs(weights).sum())).astype(np.float32)
    has_shades = ((gray != gray.min()) & (gray != gray.max())).any()
    return gray if has_shades or min(gray.shape) < 100 else ndimage.gaussian_filter(gray, 1)


def _without_desk(gray):
    """Makes strokes light and the background dark; what surrounds a sheet becomes like paper."""
    corners = _corners(gray)
    low, high = gray.min(), gray.max()
    middle = (low + high) / 2
    light_corners = (corners > middle).sum()
    if light_corners in (0, 4):
        is_light = light_corners == 4
    else:
        border = np.concatenate([gray[0], gray[-1], gray[1:-1, 0], gray[1:-1, -1]])
        is_light = np.median(border) > middle
    gray = -gray if is_light else gray
    sheet = _sheet(gray > (-middle if is_light else middle))
    if sheet is not None:
        gray = -gray
        gray[~sheet] = np.median(gray[sheet])
    return gray


def _corners(gray):
    n = 1 + min(gray.shape) // 30
    ends = slice(None, n), slice(-n, None)
    return np.array([np.median(gray[rows, columns]) for rows in ends for columns in ends])


def _sheet(mask):
    """Returns the sheet of paper, bool [H, W], if the largest group of `mask` is one, else None.

    A sheet fills a rectangle, which may be rotated, and its blank parts are wider than its strokes.
    """
    from scipy import ndimage, spatial

    if min(mask.shape) < 2 * _SIZE:
        return None
    mask = _largest(mask)
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    sheet = outside[1:-1, 1:-1] != outside[0, 0]
    edge = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    holes, long_side = sheet & ~mask, np.ptp(edge, 0).max() + 1
    # Lines and points have no hull.
    if long_side < _SIZE or sheet.sum() < (2 * _ROOM * long_side) ** 2:
        return None
    # The smallest rectangle around a group lies along an edge of its hull.
    hull = edge[spatial.ConvexHull(edge).vertices]
    along = np.diff(hull, axis=0, append=hull[:1]) @ [1, 1j]
    along /= np.abs(along)
    turned = (hull @ [1, 1j])[:, None] / along
    if sheet.sum() < _RECTANGULAR * (np.ptp(turned.real, 0) * np.ptp(turned.imag, 0)).min():
        return None
    room = _radius(mask)  # without ink, a narrow sheet may be the stroke of a digit 1
    if room < (_ROOM if holes.any() else _MOST_RADIUS) * long_side or room < _radius(holes):
        return None
    return ndimage.binary_erosion(sheet, iterations=2 + long_side // 200)


def _largest(mask):
    from scipy import ndimage

    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return labels == counts.argmax()


def _ink(gray):
    """Returns how much lighter than the background each pixel is, 1 for the strongest strokes.

    The background is what remains of `gray` without light parts narrower than half the image's
    longer side, or than twice its shorter one if that is less. Returns None if nothing stands out.
    """
    from scipy import ndimage

    size = min(max(gray.shape), 4 * min(gray.shape))  # well above that of a digit that fits
    gray = ndimage.gaussian_filter(gray, size / 800) if size > 100 else gray
    ground = ndimage.gaussian_filter(gray, max(1, size / 100))  # not the darkest noise
    corners, width = _corners(gray), size // 2 + 1
    if np.ptp(corners) < 0.25 * np.ptp(gray):  # room around a digit without margins
        ground = np.pad(ground, width, constant_values=np.median(corners))
    else:
        ground = np.pad(ground, width, mode="edge")
    ink = gray - ndimage.grey_opening(ground, (width, width))[width:-width, width:-width]
    rank = 1 + min(ink.size // 2000, 50)  # a few specks may be stronger than a digit
    strongest = np.partition(ink.ravel(), -rank)[-rank]
    return None if strongest < _MIN_CONTRAST else np.clip(ink / strongest, 0, 1)


def _groups(ink):
    """Returns the ink of each digit, float32 [H, W], from left to right; [] if there is none."""
    from scipy import ndimage

    strokes = ink > _STROKE
    size = max(np.ptp(np.argwhere(_largest(strokes)), 0)) + 1
    near = ndimage.distance_transform_edt(~strokes) <= max(1, _NEAR * size)
    labels, _ = ndimage.label(near, np.ones((3, 3)))
    boxes = enumerate(ndimage.find_objects(labels), 1)
    parts, inner = [], []
    for label, box in sorted(boxes, key=lambda pair: pair[1][1].start):
        part = np.where(labels[box] == label, ink[box], 0)
        rows, columns = (np.flatnonzero((part > _MIN_INK).any(axis)) for axis in (1, 0))
        parts.append(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
        if not any(x.start == 0 or x.stop == n for x, n in zip(box, ink.shape, strict=True)):
            inner.append(parts[-1])
    # The edge of a table touches the border; so does a digit without margins, but it is alone.
    if any(max(part.shape) > 0.3 * size for part in inner):
        parts = inner
    size = max(max(part.shape) for part in parts)
    digits = [part for part in parts if max(part.shape) > size / 2]
    num_digits, num_all = (sum((part > _STROKE).sum() for part in each) for each in (digits, parts))
    if num_digits < _CLEAN * num_all:
        return []
    return [digit for digit in digits if _may_be_digit(digit > _STROKE)]


def _may_be_digit(strokes):
    from scipy import ndimage

    height, width = np.ptp(np.argwhere(_largest(strokes)), 0) + 1
    return (
        width <= _WIDEST * height
        and _radius(strokes) < _MOST_RADIUS * max(strokes.shape)
        and ndimage.label(~strokes)[1] <= _MOST_FIELDS
    )


def _radius(mask):
    """Returns the radius of the largest circle within a mask, in pixels."""
    from scipy import ndimage

    return ndimage.distance_transform_edt(np.pad(mask, 1)).max()


def _normalize(ink):
    """Scales and centres the ink of a digit: float32 [H, W] in 0 to 1 -> uint8 [28, 28]."""
    from PIL import Image  # imported here: only image files need it
    from scipy import ndimage

    scale = _BOX / max(ink.shape)
    mask = np.pad(ink > _STROKE, 1)
    stroke = 4 * ndimage.distance_transform_edt(mask)[mask].mean() - 1
    if stroke * scale < _MIN_WIDTH:
        n = round((_MIN_WIDTH / scale - stroke) / 2)
        ink = ndimage.grey_dilation(np.pad(ink, n), (2 * n + 1,) * 2)
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


def _read_arrays(path, any_range, spec):
    # Mapped first: an array larger than memory is refused by its size, not loaded.
    failure = explain_any(f"{path} cannot be read as an array", "save it again")
    with failure, warnings.catch_warnings(action="ignore"):
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            arrays = [arrays]
        else:
            with arrays as archive:
                _check_bytes(path, sum(entry.file_size for entry in archive.zip.infolist()))
                arrays = [archive[name] for name in archive]
            arrays = [array for array in arrays if isinstance(array, np.ndarray)]
    if any(array.ndim > 1 for array in arrays):
        arrays = [array for array in arrays if array.ndim > 1]  # others are labels
    arrays = [_with_usual_axes(array, spec) for array in arrays]
    axes = [_num_axes(array) for array in arrays]
    if not arrays or max(axes) < 2:
        contents = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays[:3])
        raise UserError(
            f"{path} contains {contents or 'no array'} instead of numbers [H, W], [N, H, W] or "
            "[N, 784], or colors [H, W, 3] or [N, H, W, 3]; convert it"
        )
    found = []
    for array, num_axes in zip(arrays, axes, strict=True):
        if num_axes == max(axes):  # others are labels
            array = array if num_axes == 3 else array[None]
            pictures.check_size(path, *array.shape[1:3])
            _check_bytes(path, array.size * 8)
            found += list(pictures.to_bytes(np.array(array), path, any_range))
    return found


def _with_usual_axes(array, spec):
    """Turns [N, H, W, 1], [N, 1, H, W] and flat images into [N, H, W]; moves colors to the end."""
    if array.ndim in (3, 4) and array.shape[-1] == 1:
        return array[..., 0]
    if array.ndim == 4 and array.shape[1] == 1:
        return array[:, 0]
    if spec.channels == 3 and array.ndim in (3, 4) and array.shape[-3] == 3 != array.shape[-1]:
        return np.moveaxis(array, -3, -1)
    for shape in (spec.shape, MNIST.shape):
        num = math.prod(shape)
        if array.ndim in (1, 2) and array.shape[-1] == num and array.shape != (num, num):
            return array.reshape(-1, *shape)
    return array


def _num_axes(array):
    """Returns 2 for an image, 3 for several, 0 for anything else, such as transparent colors."""
    is_transparent = array.ndim > 2 and array.shape[-1] == 4
    if array.dtype.kind not in "buif" or is_transparent:
        return 0
    num_axes = array.ndim - (array.ndim > 2 and array.shape[-1] == 3)
    return num_axes if num_axes in (2, 3) else 0


def _check_bytes(path, num_bytes):
    if num_bytes > _MAX_BYTES:
        raise UserError(f"{path} contains {num_bytes:,} bytes, more than {_MAX_BYTES:,}; split it")


def _read_idx(path, any_range, _):
    return list(pictures.to_bytes(idx.read_images(path, shape=None), path, any_range))


_READERS = {
    b"\x93NUMPY": _read_arrays,
    b"PK\x03\x04": _read_arrays,
    b"\0\0\x08\x03": _read_idx,
    b"\x1f\x8b": _read_idx,
}
