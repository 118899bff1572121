import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist.config import ModelConfig
from seqmnist.networks import views

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


def test_bytes_are_scaled_to_one():
    images = jnp.zeros((1, 28, 28), jnp.uint8).at[0, 0, :3].set(jnp.array([0, 51, 255], jnp.uint8))
    x = views.sequence(ModelConfig(), images)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x[0, 0, :4], [0, 0.2, 1, 0], atol=1e-7)


def as_patches(image, size):
    steps = []
    for top in range(0, 28, size):
        for left in range(0, 28, size):
            steps.append(image[top : top + size, left : left + size].ravel())
    return np.array(steps)


ORACLES = {
    "rows": lambda image: [image[t] for t in range(28)],
    "columns": lambda image: [image[:, t] for t in range(28)],
    "pixels": lambda image: [[image[t // 28, t % 28]] for t in range(784)],
    "permuted_pixels": lambda image: [
        [image.ravel()[t]] for t in np.random.RandomState(92916).permutation(784)
    ],
    "patches": lambda image: as_patches(image, 4),
    "patches_2": lambda image: as_patches(image, 2),
    "patches_7": lambda image: as_patches(image, 7),
    "patches_14": lambda image: as_patches(image, 14),
}


@pytest.mark.parametrize("name", views.VIEWS)
def test_a_view_reads_every_pixel_in_its_order(name):
    sequence = jax.jit(views.VIEWS[name])(jnp.array(IMAGES))
    np.testing.assert_array_equal(sequence, [ORACLES[name](image) for image in IMAGES])


def test_the_permutation_is_the_published_one():
    order = views.permutation()
    np.testing.assert_array_equal(np.sort(order), np.arange(784))
    assert order[:3].tolist() == [319, 576, 323]
    published = "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74"
    assert views.permutation_sha256(order) == published
    assert published in views.permutation.__doc__


@pytest.mark.parametrize("size", [14, 56])
def test_only_images_of_28_pixels_are_permuted(size):
    with pytest.raises(TypeError, match="reshape"):
        views.VIEWS["permuted_pixels"](jnp.zeros((4, size, size)))


@pytest.mark.parametrize("view", ["rows", "patches_7", "permuted_pixels"])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_knows_when_each_pixel_is_read(view, reverse):
    config = ModelConfig(view=view, subsample=3, reverse=reverse)
    when = views.read_at(config)
    (x,) = np.asarray(views.sequence(config, IMAGES[:1]))
    for t, step in enumerate(x):
        expected = np.sort(IMAGES[0][when == t] / np.float32(255))
        np.testing.assert_allclose(np.sort(step), expected, rtol=1e-6)
    assert np.isfinite(when).sum() == x.size
