import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist.config import ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks import views
from seqmnist.spec import MNIST, ImageSpec


def test_bytes_are_scaled_to_one():
    images = jnp.zeros((1, 28, 28), jnp.uint8).at[0, 0, :3].set(jnp.array([0, 51, 255], jnp.uint8))
    x = views.sequence(ModelConfig(), images)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x[0, 0, :4], [0, 0.2, 1, 0], atol=1e-7)


def as_patches(image, size):
    steps = []
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            steps.append(image[top : top + size, left : left + size].ravel())
    return np.array(steps)


def in_order(order):
    return lambda image: [np.atleast_1d(image.reshape(-1, *image.shape[2:])[t]) for t in order]


def bits_reversed(size):
    """As the code of S4 draws it: halves are put beside each other until one row is left."""
    order = np.arange(1 << (size - 1).bit_length()).reshape(-1, 1)
    while len(order) > 1:
        order = np.hstack(np.split(order, 2))
    return [i for i in order[0] if i < size]


ORACLES = {
    "rows": lambda image: [row.ravel() for row in image],
    "columns": lambda image: [image[:, t].ravel() for t in range(image.shape[1])],
    "pixels": lambda image: [np.atleast_1d(pixel) for row in image for pixel in row],
    "permuted_pixels": lambda image: in_order(
        np.random.RandomState(92916).permutation(image.shape[0] * image.shape[1])
    )(image),
    "bit_reversed_pixels": lambda image: in_order(bits_reversed(image.shape[0] * image.shape[1]))(
        image
    ),
    "patches": lambda image: as_patches(image, 4),
}
SHAPES = [(28, 28), (8, 8), (12, 20), (32, 32, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*ORACLES, "patches_1", "patches_2"])
def test_a_view_reads_every_pixel_in_its_order(name, shape):
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    oracle = ORACLES.get(name, lambda image: as_patches(image, int(name[-1])))
    sequence = jax.jit(views.find(name))(jnp.array(images))
    np.testing.assert_array_equal(sequence, [oracle(image) for image in images])


def test_every_view_has_an_oracle():
    assert {*ORACLES, "hilbert_pixels"} == set(views.VIEWS)


@pytest.mark.parametrize("size", [2, 8, 32])
def test_a_hilbert_curve_moves_by_one_pixel(size):
    y, x = np.divmod(views.hilbert(size, size), size)
    np.testing.assert_array_equal(np.abs(np.diff(y)) + np.abs(np.diff(x)), 1)
    assert (y[0], x[0], y[-1], x[-1]) == (0, 0, 0, size - 1)


@pytest.mark.parametrize("shape", [(28, 28), (5, 3), (1, 7), (32, 32)], ids=str)
@pytest.mark.parametrize("name", views.ORDERS)
def test_an_order_holds_every_pixel_once(name, shape):
    order = views.ORDERS[name](*shape)
    np.testing.assert_array_equal(np.sort(order), np.arange(shape[0] * shape[1]))


@pytest.mark.parametrize(
    ("name", "first", "published"),
    [
        (
            "permuted_pixels",
            [319, 576, 323],
            "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74",
        ),
        (
            "bit_reversed_pixels",
            [0, 512, 256],
            "30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44",
        ),
    ],
)
def test_the_permutations_are_the_published_ones(name, first, published):
    order = views.ORDERS[name](28, 28)
    assert order[:3].tolist() == first
    assert views.permutation_sha256(order) == published
    assert published in views.ORDERS[name].__doc__


@pytest.mark.parametrize("size", [0, 3, 8, 999999])
def test_patches_that_do_not_fit_say_which_do(size):
    fitting = "choose one of: patches_1, patches_2, patches_4\n"  # and a note of JAX
    with pytest.raises(UserError, match=fitting):
        views.sequence_shape(ModelConfig(view=f"patches_{size}"), ImageSpec(12, 20, 3, ("a", "b")))


def test_a_view_of_ones_own_may_be_called_as_patches_are(monkeypatch):
    monkeypatch.setitem(views.VIEWS, "patches_7", "mine")
    assert views.find("patches_7") == "mine"


@pytest.mark.parametrize("view", ["rows", "patches_4", "permuted_pixels"])
@pytest.mark.parametrize("spec", [MNIST, ImageSpec(12, 20, 3, ("a", "b"))], ids=["gray", "color"])
@pytest.mark.parametrize("reverse", [False, True])
def test_read_at_tells_when_each_pixel_is_read(view, spec, reverse):
    config = ModelConfig(view=view, subsample=3, reverse=reverse)
    image = np.random.default_rng(0).integers(0, 256, spec.shape, dtype=np.uint8)
    when = views.read_at(config, spec)
    (x,) = np.asarray(views.sequence(config, image[None]))
    for t, step in enumerate(x):
        expected = np.sort(image[when == t].ravel() / np.float32(255))
        np.testing.assert_allclose(np.sort(step), expected, rtol=1e-6)
    assert np.isfinite(when).sum() * spec.channels == x.size


def test_a_view_that_computes_reads_no_pixel_as_it_is(monkeypatch):
    monkeypatch.setitem(views.VIEWS, "blurred", lambda images: images[:, 1:] + images[:, :-1])
    config = ModelConfig(view="blurred")
    assert views.numbers_read(config, MNIST) is None
    assert np.isnan(views.read_at(config, MNIST)).all()
