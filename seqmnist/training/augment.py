"""Augmentation: random distortions of training images, computed on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates


def affine(
    images: jax.Array, keys: jax.Array, degrees=12.0, shift=2.0, stretch=0.12, shear=0.15
) -> jax.Array:
    """Rotates, shifts, stretches and shears images uint8 [B, 28, 28], each by a key of its own.

    Amounts are uniform between minus and plus their limits: of the rotation in degrees, of the
    shifts down and right in pixels, of the relative changes of height and width, and of the
    vertical shear in pixels per pixel of width. Pixels are interpolated bilinearly; outside of
    the image they are zero.
    """
    amounts = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1, maxval=1))(keys)
    limits = jnp.array([jnp.deg2rad(degrees), shift, shift, stretch, stretch, shear])
    return jax.vmap(_affine_one)(images, amounts * limits.reshape(1, -1))


def _affine_one(image, amounts):
    angle, down, right, tall, wide, shear = amounts
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    distortion = jnp.array([[1 + tall, shear], [0.0, 1 + wide]])
    centre = (image.shape[0] - 1) / 2
    grid = jnp.array(np.indices(image.shape).reshape(2, -1) - centre, jnp.float32)
    source = rotation @ distortion @ grid + centre + jnp.stack([down, right]).reshape(2, 1)
    values = map_coordinates(image.astype(jnp.float32), list(source), order=1)
    return jnp.round(values).astype(image.dtype).reshape(image.shape)


AUGMENTATIONS = {"none": None, "affine": affine}
