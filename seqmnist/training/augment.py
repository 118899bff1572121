"""Augmentation: random distortions of training images, computed on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates


def affine(
    images: jax.Array, keys: jax.Array, degrees=12.0, shift=2.0, stretch=0.12, shear=0.15
) -> jax.Array:
    """Rotates, stretches, shears and shifts images uint8 [B, 28, 28], each by a key of its own.

    Amounts are uniform between minus and plus their limits: of the rotation in degrees, of the
    relative changes of height and width, of the vertical shear in pixels per pixel of width, and
    of the shifts down and right in pixels. A shift that would leave ink on the border of the image,
    where MNIST has it in one image of 75, is changed as little as keeps it off; ink that is too
    large for that is centred. Pixels are interpolated bilinearly; outside of the image they are
    zero.
    """
    amounts = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1, maxval=1))(keys)
    limits = jnp.array([jnp.deg2rad(degrees), shift, shift, stretch, stretch, shear])
    return jax.vmap(_affine_one)(images, amounts * limits.reshape(1, -1))


def _affine_one(image, amounts):
    angle, *shift, tall, wide, shear = amounts
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    distortion = jnp.array([[1 + tall, shear], [0.0, 1 + wide]])
    inverse = jnp.array([[1 + wide, -shear], [0.0, 1 + tall]]) / ((1 + tall) * (1 + wide))
    to_source, from_source = rotation @ distortion, inverse @ rotation.T
    centre = (image.shape[0] - 1) / 2
    grid = jnp.array(np.indices(image.shape).reshape(2, -1) - centre, jnp.float32)

    # From the centre to where ink may be: interpolation spreads it by little more than a pixel.
    room, ink, is_ink = centre - 1.5, from_source @ grid, image.ravel() > 0
    least = -room - jnp.min(ink, 1, initial=room, where=is_ink)
    most = room - jnp.max(ink, 1, initial=-room, where=is_ink)
    middle = (least + most) / 2  # for ink that is too large
    shift = jnp.clip(jnp.stack(shift), jnp.minimum(least, middle), jnp.maximum(most, middle))

    source = to_source @ grid + (centre - to_source @ shift).reshape(2, 1)
    values = map_coordinates(image.astype(jnp.float32), list(source), order=1)
    return jnp.round(values).astype(image.dtype).reshape(image.shape)


AUGMENTATIONS = {"none": None, "affine": affine}
