"""The network, its training and its optimizer, against Keras itself, step for step."""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmnist.config import Config, OptimizerConfig
from seqmnist.training.optim import make_optimizer
from tools import cli, keras_parity


class Toy(NamedTuple):
    """A dataset of ten classes of noisy images, as `sources.Prepared` gives one."""

    name: str = "toy"

    def num_examples(self, split):
        return {"train": 1600, "test": 200}[split]

    def arrays(self, split):
        rng = np.random.default_rng(len(split))
        labels = rng.integers(0, 10, self.num_examples(split), dtype=np.int32)
        images = rng.integers(0, 50, (len(labels), 28, 28), dtype=np.uint8)
        images[np.arange(len(labels)), :, labels] = 255
        return images, labels


@pytest.fixture
def as_keras_likes_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("as_keras_likes_it")
@pytest.mark.parametrize("softmax", [False, True])
def test_training_equals_keras_in_float32(softmax, tmp_path):
    import keras

    file = tmp_path / "network.keras"
    figures = keras_parity.compare(Toy(), Config(), softmax=softmax, save=file)
    assert figures["steps"] == 10
    assert figures["initial_logits"] <= 1e-6
    assert figures["first_gradients"] <= 1e-6
    assert figures["loss_all_steps"] <= 1e-5
    assert figures["ours_in_keras"]["accuracy"] == pytest.approx(figures["ours"]["accuracy"])
    assert figures["ours_in_keras"]["loss"] == pytest.approx(figures["ours"]["loss"], rel=1e-5)
    assert keras.saving.load_model(file).layers[0].activation is keras.activations.tanh


@pytest.mark.parametrize(
    ("without_keras", "arguments", "message"),
    [
        (True, [], "Keras is not installed; pip install 'keras>=3.9'"),
        (False, ["--save={}/network.h5"], "--save={}/network.h5 must end in .keras"),
        (False, ["--seed=-1"], "config.seed must lie in [0, 4294967295]; got -1"),
    ],
)
def test_a_mistake_is_one_line(without_keras, arguments, message, tmp_path, monkeypatch, capsys):
    if without_keras:
        monkeypatch.setitem(sys.modules, "keras", None)
    arguments = [argument.format(tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["keras_parity", *arguments])
    assert cli.call(keras_parity._make_parser(), keras_parity._main) == 2
    output = capsys.readouterr()
    assert output.err == f"error: {message.format(tmp_path)}\n"
    assert not output.out


@pytest.mark.slow
@pytest.mark.usefixtures("as_keras_likes_it")
def test_rmsprop_equals_keras_over_200_steps():
    import keras

    rng = np.random.default_rng(0)
    shapes = [(5, 7), (7,)]
    ours = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    theirs = [keras.Variable(value) for value in ours]
    reference = keras.optimizers.RMSprop()
    reference.build(theirs)
    optimizer = make_optimizer(OptimizerConfig(), num_steps=200)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    for scale in np.logspace(-6, 2, 200):  # from below the epsilon to far above it
        grads = [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]
        updates, state = update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        reference.apply(grads, theirs)
    for value, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(value, np.asarray(other), rtol=1e-5, atol=1e-6)
