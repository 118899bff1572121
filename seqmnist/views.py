"""Views: how an image becomes a sequence.

A view is a pure array function: images uint8 [B, 28, 28] in, a normalized sequence
[B, T, F] out. It runs on the device, inside the compiled step, so that images travel as
bytes.
"""

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Scales bytes to [0, 1], as the notebook does.

    Args:
      images: uint8, any shape.
      dtype: of the result.
    """
    return images.astype(dtype) / 255


def rows(images: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Reads an image from top to bottom, a row a time step: [B, 28, 28] -> [B, 28, 28]."""
    return normalize(images, dtype)


VIEWS = {"rows": rows}
