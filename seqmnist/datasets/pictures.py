"""Reads picture files of any format that Pillow decodes: arrays of bytes, gray or colored."""

import functools
import logging
import os
import pathlib
import warnings

import numpy as np

from seqmnist.errors import UserError, explain_any

MAX_PIXELS = 50_000_000  # per picture
_ROUNDING = 1e-3  # by which floats may exceed 1
# Pillow passes EPS files to another program, Ghostscript. The others it only recognizes.
_NOT_READ = {"EPS", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"}


def read_picture(path: str | os.PathLike, any_range: bool = False) -> np.ndarray:
    """Reads a picture file: gray as uint8 [H, W], colors as uint8 [H, W, 3].

    The content counts, not the name; of several frames, the first is read. The file's pixel format
    decides whether it is colored; a palette is colored unless all its colors are gray. 16 bits per
    pixel become 8; whole numbers of 32 bits are in 0 to 255, and floating point is in 0 to 1 or 0
    to 255; for `any_range`, see `to_bytes`. The picture is rotated as its EXIF data say.
    Transparent pixels become white behind dark strokes and black behind light ones.

    Raises UserError if the file is missing, not a regular file, not a picture, damaged, or larger
    than MAX_PIXELS, which is checked before its pixels are decoded.
    """
    from PIL import Image, UnidentifiedImageError  # imported here: only picture files need it

    path = pathlib.Path(path)
    read_beginning(path)
    with explain_any(f"{path} cannot be read as an image", "save it again"):
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                Image.open(path, formats=_formats()) as picture,
            ):
                check_size(path, picture.height, picture.width)
                array, alpha = _decode(picture)
        except Image.DecompressionBombError:  # by `open` itself
            raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels; scale it down") from None
        except UnidentifiedImageError:
            raise UserError(f"{path} is not an image, or is damaged; name a picture file") from None
    if array.dtype == np.uint16 and not any_range:
        array = np.rint(array / 257).astype(np.uint8)
    if array.dtype != np.uint8 or any_range:  # bytes of pictures are what they are, however dark
        array = to_bytes(array, path, any_range)
    return array if alpha is None else _opaque(array, alpha)


def read_beginning(path: pathlib.Path) -> bytes:
    """Returns a file's first eight bytes; raises UserError if it is missing, unreadable or empty.

    Anything but a regular file, such as a FIFO, is refused, not waited for.
    """
    try:
        if not path.is_file():
            fault = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {fault}; name an image")
        with path.open("rb") as file:
            beginning = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name an image") from None
    if not beginning:
        raise UserError(f"{path} is empty; name an image")
    return beginning


def check_size(path: pathlib.Path, height: int, width: int) -> None:
    """Raises UserError if a picture has more than MAX_PIXELS pixels."""
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{path} has {width:,} × {height:,} pixels, more than {MAX_PIXELS:,}; scale it down"
        )


def to_bytes(array: np.ndarray, path: pathlib.Path, any_range: bool = False) -> np.ndarray:
    """Converts numbers in 0 to 255, or in 0 to 1 if they are floats or a mask, to uint8.

    A mask is booleans, or whole numbers of which some are 0 and all others 1. With `any_range`,
    numbers other than bytes are scaled to 0 to 255 from their minimum to their maximum, whatever
    these are.

    Raises UserError if they are in another range, or not finite.
    """
    if not array.size or (array.dtype == np.uint8 and array.max() != 1):
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(high - low):
        raise UserError(f"{path} contains numbers that are not finite; replace them")
    if not (any_range or (low >= 0 and high <= 255)):
        raise UserError(f"{path} contains numbers outside 0 to 255; scale them")
    is_unit = (low, high) == (0, 1) or (array.dtype.kind in "bf" and high <= 1 + _ROUNDING)
    if array.dtype.kind == "f" and not (any_range or is_unit or high >= 2):
        raise UserError(
            f"{path} contains numbers up to {high:.4g}, which are neither in 0 to 1 nor look like "
            "those in 0 to 255; scale them"
        )
    if any_range and (high > low):
        array, is_unit = (array.astype(np.float64) - low) / (high - low), True
    return np.rint(np.clip(array * (255.0 if is_unit else 1.0), 0, 255)).astype(np.uint8)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Makes a picture gray or colored: uint8 [H, W] or [H, W, 3] -> [H, W] (1) or [H, W, 3] (3).

    Colors become gray as in Pillow; gray becomes three equal channels.
    """
    from PIL import Image

    mode, num_axes = ("L", 2) if channels == 1 else ("RGB", 3)
    return image if image.ndim == num_axes else np.asarray(Image.fromarray(image).convert(mode))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a picture, uint8 [H, W] or [H, W, 3], bilinearly, with anti-aliasing."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def allocate(num_images: int, shape: tuple[int, ...], origin: object) -> np.ndarray:
    """Returns an uninitialized array for pictures, uint8 [N, *shape].

    Raises UserError if they do not fit into memory. The message says that they are of `origin`.
    """
    try:
        return np.empty((num_images, *shape), np.uint8)
    except MemoryError:
        raise UserError(
            f"the {num_images:,} pictures of {origin}, {shape[1]:,} × {shape[0]:,} pixels each, "
            "do not fit into memory; make them smaller, e.g. with --config.data.size=64"
        ) from None


@functools.cache
def extensions() -> frozenset[str]:
    """Returns the endings of names of pictures that can be read, in lower case, such as ".png"."""
    from PIL import Image

    readable = {*_formats(), "MPO"}  # MPO is JPEG with several frames
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in readable
    )


@functools.cache
def _formats():
    from PIL import Image

    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # errors are raised as well
    return tuple(name for name in Image.ID if name not in _NOT_READ)


def _decode(picture):
    """Returns the pixels [H, W] or [H, W, 3], and their opacity, float64 [H, W] in 0 to 1."""
    from PIL import ImageCms, ImageOps

    # Pillow reads 16 bits of some formats as 32, whose numbers are otherwise anything.
    is_16_bits = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "LAB":  # which Pillow converts by profiles only
        profiles = map(ImageCms.createProfile, ("LAB", "sRGB"))
        picture = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
    if picture.mode == "F":
        return np.asarray(picture), None
    if picture.mode.startswith("I"):
        return np.asarray(picture, np.uint16 if is_16_bits else np.int64), None
    is_gray = picture.mode in ("1", "L", "LA", "La")
    if not picture.has_transparency_data:
        array, alpha = np.asarray(picture.convert("L" if is_gray else "RGB")), None
    else:
        array = np.asarray(picture.convert("RGBA"))
        array, alpha = array[..., :3], array[..., 3] / 255
        array = array[..., 0] if is_gray else array
    if picture.mode in ("P", "PA") and (array == array[..., :1]).all():
        array = array[..., 0]
    return array, alpha


def _opaque(array, alpha):
    gray = to_channels(array, 1)
    mean = (gray * alpha).sum() / max(alpha.sum(), 1)
    ground = 255 if mean < 128 else 0
    alpha = alpha.reshape(*alpha.shape, *[1] * (array.ndim - 2))
    return np.rint(array * alpha + ground * (1 - alpha)).astype(np.uint8)
