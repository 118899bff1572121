"""Views: how an image becomes a sequence.

A view is a pure function: normalized images [B, 28, 28] -> a sequence [B, T, F]. It runs on the
device, inside the compiled step, so images are transferred as bytes.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.errors import choose


def permutation() -> np.ndarray:
    """Returns the order of view `permuted_pixels`, int64 [784].

    It is NumPy's `RandomState(92916).permutation(784)`, which is the same in all versions of NumPy
    and begins 319, 576, 323. Its `permutation_sha256` is
    96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74.
    """
    return np.random.RandomState(92916).permutation(784)


def permutation_sha256(order: np.ndarray) -> str:
    """Returns the SHA-256 of a permutation, as 64-bit little-endian numbers."""
    return hashlib.sha256(np.asarray(order).astype("<i8").tobytes()).hexdigest()


def patches(images: jax.Array, size: int) -> jax.Array:
    """Reads an image in squares of `size` pixels, a divisor of 28: -> [B, (28 / size)², size²]."""
    n = 28 // size
    blocks = images.reshape(-1, n, size, n, size)
    return jnp.swapaxes(blocks, 2, 3).reshape(-1, n * n, size * size)


def _pixels(images):
    return images.reshape(images.shape[0], -1, 1)


VIEWS = {
    # One row per time step, from top to bottom, or one column, from left to right.
    "rows": lambda images: images,
    "columns": lambda images: jnp.swapaxes(images, 1, 2),
    # One pixel per time step, row after row or permuted; Q. V. Le et al., arXiv 1504.00941.
    "pixels": _pixels,
    # JAX would take the last pixel of a smaller image for those that it lacks.
    "permuted_pixels": lambda images: images.reshape(images.shape[0], 784, 1)[:, permutation()],
    "patches": functools.partial(patches, size=4),
    "patches_2": functools.partial(patches, size=2),
    "patches_7": functools.partial(patches, size=7),
    "patches_14": functools.partial(patches, size=14),
}


def sequence(config: ModelConfig, images: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Returns what the configured network reads: uint8 [B, 28, 28] -> `dtype` [B, T, F].

    Bytes are scaled to [0, 1], as the notebook does. Raises UserError if the view does not exist.
    """
    view = choose(VIEWS, config.view, "model.view")
    x = view(images.astype(dtype) / 255)[:, :: config.subsample]
    return x[:, ::-1] if config.reverse else x


def sequence_shape(config: ModelConfig) -> tuple[int, int]:
    """Returns (T, F) of what `sequence` returns."""
    images = jax.ShapeDtypeStruct((1, 28, 28), jnp.uint8)
    return jax.eval_shape(lambda images: sequence(config, images), images).shape[1:]


def read_at(config: ModelConfig) -> np.ndarray:
    """Returns the time step at which each pixel is read, float64 [28, 28]; NaN if it never is."""
    lit = 255 * np.eye(784, dtype=np.uint8).reshape(784, 28, 28)  # one pixel in each image
    reads = np.asarray(sequence(config, lit)).sum(-1)
    return np.where(reads.any(1), reads.argmax(1), np.nan).reshape(28, 28)
