"""Augmentation: random distortions of training images, computed on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from seqmnist.errors import Table


def affine(
    images: jax.Array, keys: jax.Array, degrees=12.0, shift=1 / 14, stretch=0.12, shear=0.15
) -> jax.Array:
    """Rotates, stretches, shears and shifts images, uint8 [B, H, W] or [B, H, W, 3].

    Each image has its own key, [B]. Amounts are uniform between minus and plus their limits:
    rotation in `degrees`, `stretch` as relative changes of height and width, vertical `shear` in
    pixels per pixel of width, and the `shift` down and right as fractions of height and width, by
    default two pixels of MNIST's images. Pixels are interpolated bilinearly.

    An image whose border is mostly zero shows something on an empty background. Outside of it,
    pixels are zero. A shift that would leave ink on the border, where MNIST has it in one image of
    75, is changed just enough to keep it off; ink that is too large for that is centred. Any other
    image, such as a photograph, is shifted freely; outside of it, its nearest pixel is repeated.
    """
    height, width = images.shape[1:3]
    amounts = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1, maxval=1))(keys)
    limits = [jnp.deg2rad(degrees), shift * height, shift * width, stretch, stretch, shear]
    return jax.vmap(_affine_one)(images, amounts * jnp.array(limits).reshape(1, -1))


def _affine_one(image, amounts):
    angle, *shift, tall, wide, shear = amounts
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    distortion = jnp.array([[1 + tall, shear], [0.0, 1 + wide]])
    inverse = jnp.array([[1 + wide, -shear], [0.0, 1 + tall]]) / ((1 + tall) * (1 + wide))
    to_source, from_source = rotation @ distortion, inverse @ rotation.T
    size = np.array(image.shape[:2], np.float32)
    centre = (size - 1) / 2
    grid = jnp.array(np.indices(image.shape[:2]).reshape(2, -1) - centre.reshape(2, 1), jnp.float32)

    planes = image.reshape(*image.shape[:2], -1)
    is_ink = (planes > 0).any(-1)
    border = np.ones(image.shape[:2], bool)
    border[1:-1, 1:-1] = False
    is_on_ground = jnp.sum(is_ink & border) * 2 < border.sum()

    # From the centre to where ink may be: interpolation spreads it by little more than a pixel.
    room, ink = (centre - 1.5).reshape(2, 1), from_source @ grid
    least = -room - jnp.min(jnp.where(is_ink.ravel(), ink, room), 1, keepdims=True)
    most = room - jnp.max(jnp.where(is_ink.ravel(), ink, -room), 1, keepdims=True)
    middle = (least + most) / 2  # for ink that is too large
    least, most = jnp.minimum(least, middle)[:, 0], jnp.maximum(most, middle)[:, 0]
    shift = jnp.stack(shift)
    shift = jnp.where(is_on_ground, jnp.clip(shift, least, most), shift)

    source = to_source @ grid + (centre - to_source @ shift).reshape(2, 1)
    inside = jnp.clip(source, 0, (size - 1).reshape(2, 1))
    source = list(jnp.where(is_on_ground, source, inside))
    values = jax.vmap(lambda plane: map_coordinates(plane, source, order=1), -1, -1)(
        planes.astype(jnp.float32)
    )
    return jnp.round(values).astype(image.dtype).reshape(image.shape)


AUGMENTATIONS = Table({"none": None, "affine": affine})
