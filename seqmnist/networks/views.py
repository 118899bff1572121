"""Views: how an image becomes a sequence.

A view is a pure function: normalized images [B, H, W], or [B, H, W, channels] in color -> a
sequence [B, T, F]. It runs on the device, inside the compiled step, so images are transferred as
bytes.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.errors import Table, UserError, choose
from seqmnist.spec import ImageSpec


def permutation(height: int, width: int) -> np.ndarray:
    """Returns the order of `permuted_pixels`, int64 [H·W], which is always the same.

    It is NumPy's `RandomState(92916).permutation(H·W)`, which is the same in all versions of NumPy.
    For 28 × 28 pixels it begins 319, 576, 323, and its `permutation_sha256` is
    96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74.

    Source: the code of K. Helfrich et al., arXiv 1707.09520, and others of its kind.
    """
    return np.random.RandomState(92916).permutation(height * width)


def bit_reversal(height: int, width: int) -> np.ndarray:
    """Returns the order of `bit_reversed_pixels`, int64 [H·W].

    It counts up to the next power of two, with the bits of each number reversed; numbers that are
    not pixels are left out. For 28 × 28 pixels it begins 0, 512, 256; its `permutation_sha256` is
    30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44.

    Source: the code of A. Gu et al., arXiv 2111.00396, and of J. T. H. Smith et al., arXiv
    2208.04933.
    """
    size = height * width
    bits = (size - 1).bit_length()
    order = np.array([int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)])
    return order[order < size]


def hilbert(height: int, width: int) -> np.ndarray:
    """Returns the order of `hilbert_pixels`, int64 [H·W], with neighbors in time close in space.

    It follows a Hilbert curve through the smallest square of 2^n pixels that holds the image, and
    leaves out what is outside of it.

    Source: D. Hilbert, Über die stetige Abbildung einer Linie auf ein Flächenstück (1891).
    """
    last = (1 << (max(height, width) - 1).bit_length()) - 1
    y, x = np.indices((height, width)).reshape(2, -1)
    place, half = np.zeros(height * width, np.int64), (last + 1) // 2
    while half:  # finds the quarter of the square, then goes on within it, rotated with the curve
        right, below = (x & half) > 0, (y & half) > 0
        place += half**2 * np.where(right, 3 - below, below)
        x, y = (np.where(right & ~below, last - axis, axis) for axis in (x, y))
        x, y = np.where(below, x, y), np.where(below, y, x)
        half //= 2
    return np.argsort(place)


def permutation_sha256(order: np.ndarray) -> str:
    """Returns the SHA-256 of a permutation, as 64-bit little-endian numbers."""
    return hashlib.sha256(np.asarray(order).astype("<i8").tobytes()).hexdigest()


def rows(images: jax.Array) -> jax.Array:
    """One row per time step, from top to bottom: -> [B, H, W·channels]."""
    return images.reshape(*images.shape[:2], -1)


def columns(images: jax.Array) -> jax.Array:
    """One column per time step, from left to right: -> [B, W, H·channels]."""
    return rows(jnp.swapaxes(images, 1, 2))


def pixels(images: jax.Array, order: Callable[[int, int], np.ndarray] | None = None) -> jax.Array:
    """One pixel per time step, row after row or in an order: -> [B, H·W, channels].

    Source: Q. V. Le et al., arXiv 1504.00941.
    """
    batch_size, height, width = images.shape[:3]
    sequences = images.reshape(batch_size, height * width, -1)
    return sequences if order is None else sequences[:, order(height, width)]


def patches(images: jax.Array, size: int) -> jax.Array:
    """One square of `size` pixels per time step, row after row.

    -> [B, H·W / size², size²·channels]. Raises UserError if `size` does not divide both sides of
    the image.
    """
    batch_size, height, width = images.shape[:3]
    if size < 1 or height % size or width % size:
        side = math.gcd(height, width)
        several = (k for k in range(1, side + 1) if side % k == 0 and height * width > k * k)
        sizes = ", ".join(f"patches_{k}" for k in several)
        raise UserError(
            f"config.model.view=patches_{size} does not divide images of {height} × {width} "
            f"pixels; choose one of: {sizes}"
        )
    blocks = images.reshape(batch_size, height // size, size, width // size, size, -1)
    return jnp.swapaxes(blocks, 2, 3).reshape(batch_size, -1, size * size * blocks.shape[-1])


ORDERS = {
    "permuted_pixels": permutation, "bit_reversed_pixels": bit_reversal, "hilbert_pixels": hilbert
}  # fmt: skip
VIEWS = Table(
    {
        "rows": rows,
        "columns": columns,
        "pixels": pixels,
        **{name: functools.partial(pixels, order=order) for name, order in ORDERS.items()},
        "patches": functools.partial(patches, size=4),
    }
)


def find(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns a view of `VIEWS`, or patches_k for any k; raises UserError if there is none."""
    if name not in VIEWS and (size := re.fullmatch(r"patches_(\d{1,6})", name)):
        return functools.partial(patches, size=int(size[1]))
    return choose(VIEWS, name, "model.view")


def sequence(config: ModelConfig, images: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Returns what the configured network reads: uint8 [B, H, W, …] -> [B, T, F].

    Bytes are scaled to [0, 1], as the notebook does. Raises UserError if the view does not exist
    or does not fit.
    """
    x = find(config.view)(images.astype(dtype) / 255)[:, :: config.subsample]
    return x[:, ::-1] if config.reverse else x


def sequence_shape(config: ModelConfig, spec: ImageSpec) -> tuple[int, int]:
    """Returns (T, F) of what `sequence` returns."""
    images = jax.ShapeDtypeStruct((1, *spec.shape), jnp.uint8)
    return jax.eval_shape(lambda images: sequence(config, images), images).shape[1:]


def numbers_read(config: ModelConfig, spec: ImageSpec) -> np.ndarray | None:
    """Returns which numbers of the flat image each time step reads, int [T, F].

    None if the view does more than choose numbers.
    """

    def read(numbers):
        numbers = numbers.reshape(1, *spec.shape)
        return np.asarray(sequence(config, numbers))[0] * 255

    count = math.prod(spec.shape)
    found = np.rint(read(np.arange(count))).astype(int)
    other = np.random.default_rng(0).integers(0, 256, count)
    is_choice = found.min() >= 0 and found.max() < count
    return found if is_choice and abs(other[found] - read(other)).max() < 0.01 else None


def read_at(config: ModelConfig, spec: ImageSpec) -> np.ndarray:
    """Returns the time step at which each pixel is first read, float64 [H, W].

    NaN if it never is; for all pixels if the view does more than choose numbers.
    """
    times = np.full(spec.height * spec.width, np.nan)
    found = numbers_read(config, spec)
    for t, numbers in enumerate([] if found is None else found[::-1]):
        times[numbers // spec.channels] = len(found) - 1 - t
    return times.reshape(spec.height, spec.width)
