"""Options of cells and optimizers: typed, checked, swept."""

import argparse
import json
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from flax import nnx

from seqmnist import config as config_lib
from seqmnist import main
from seqmnist.config import Config
from seqmnist.errors import UserError
from seqmnist.networks import cells
from seqmnist.training import batches, steps


class Leaky(cells.Cell):
    """h_t = a h_{t-1} + (1 - a) (x_t W + b), in which a is an option."""

    def __init__(
        self,
        input_size,
        hidden_size,
        *,
        rngs,
        keep: Annotated[float, "[0, 1)"] = 0.5,
        scale: float = 1.0,
        forms: int = 1,
    ):
        init = nnx.initializers.glorot_uniform()
        self.kernel = nnx.Param(scale * init(rngs.params(), (input_size, hidden_size)))
        self.bias = nnx.Param(jnp.zeros(hidden_size))
        self.keep = cells.Constant(keep)

    def step(self, h, z):
        keep = self.keep[...].reshape(1, 1)
        return keep * h + (1 - keep) * z


class Attribute(Leaky):
    def __init__(self, input_size, hidden_size, *, rngs, keep: float = 0.5):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.rest = 1 - keep


class Branch(Leaky):
    def __init__(self, input_size, hidden_size, *, rngs, keep: float = 0.5):
        super().__init__(input_size, hidden_size, rngs=rngs, keep=keep if keep < 1 else 0.5)


@pytest.fixture(autouse=True)
def _cells(monkeypatch):
    for cell in (Leaky, Attribute, Branch):
        monkeypatch.setitem(cells.CELLS, cell.__name__.lower(), cell)


def config_of(values, sweep=None):
    values = {"model.hidden_size": 4, **values}
    if sweep:
        values["members.sweep"] = json.dumps(sweep)
    return config_lib.validated(config_lib.override(Config(), values))


def layer_of(values):
    config = config_of(values)
    return steps.init_state(config, steps.make_system(config), 0).params["layers"][0]


def test_the_options_of_an_lru_shape_its_start():
    radii = {"r_min": 0.5, "r_max": 0.6, "max_phase": 0.1, "state_size": 7}
    layer = layer_of({"model.cell": "lru", "model.cell_options": radii})
    moduli = np.exp(-np.exp(layer["nu_log"][...]))
    assert moduli.shape == (7,)
    assert ((moduli >= 0.5) & (moduli <= 0.6 + 1e-6)).all()
    assert (np.exp(layer["theta_log"][...]) <= 0.1).all()
    assert layer["C_re"].shape == (7, 4)


def test_the_forget_bias_of_an_lstm_is_an_option():
    layer = layer_of({"model.cell": "lstm", "model.cell_options": {"forget_bias": 3}})
    np.testing.assert_array_equal(layer["bias"][4:8], 3 * np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("cell", "options", "gates"),  # gates that keep (+) and write (-), in their order
    [
        ("gru", {}, "+"),
        ("lstm", {"forget_bias": 0}, "-+"),
        ("slstm", {"forget_bias": 0}, "-+"),
        ("min_gru", {}, "-"),
        ("min_lstm", {}, "+-"),
    ],
)
@pytest.mark.parametrize(("t_max", "keep"), [(2, [1 / 2] * 4), (10, [2 / 3, 4 / 5, 6 / 7, 8 / 9])])
def test_without_input_gates_keep_what_the_time_scales_say(cell, options, gates, t_max, keep):
    layer = layer_of({"model.cell": cell, "model.cell_options": options | {"t_max": t_max}})
    shares = 1 / (1 + np.exp(-np.float64(layer["bias"]).reshape(-1, 4)))
    for gate, share in zip(gates, shares[: len(gates)], strict=True):
        np.testing.assert_allclose(share if gate == "+" else 1 - share, keep, rtol=1e-6)


LEAKY = {"model.cell": "leaky"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.cell_options.r_min": 0.5}, "does not exist with model.cell=simple_rnn"),
        (LEAKY | {"model.cell_options.kep": 0.5}, "kep does not exist .*: keep, scale, forms"),
        (LEAKY | {"model.cell_options.keep": 1.0}, r"keep must lie in \[0, 1\); got 1.0"),
        (LEAKY | {"model.cell_options.keep": np.float64(1)}, r"keep must lie in \[0, 1\); got 1.0"),
        (LEAKY | {"model.cell_options.scale": float("nan")}, "scale must lie in"),
        (LEAKY | {"model.cell_options.forms": 1.5}, "forms must be of type int"),
        (LEAKY | {"model.cell_options.forms": True}, "forms must be of type int"),
        (LEAKY | {"model.cell_options": {"keep": [0.5]}}, "keep must be a number, text or bool"),
        ({"model.cell_options": 3}, "cell_options must be of type dict"),
        ({"optimizer.options.b1": 0.5}, "b1 does not exist with optimizer.name=rmsprop"),
        ({"optimizer.options.eps": 0}, "eps must lie in"),
        ({"optimizer.name": "sgd", "optimizer.options.nesterov": 1}, "must be of type bool"),
    ],
)
def test_what_is_no_option_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        steps.make_system(config_of(values))


@pytest.mark.parametrize(
    ("cell", "sweep", "message"),
    [
        ("leaky", {"model.cell_options.keep": [0.1, 1.0]}, "keep must lie in"),
        ("leaky", {"model.cell_options.forms": [1, 2]}, "forms cannot be swept"),
        ("leaky", {"model.cell_options.kep": [1, 2]}, "kep does not exist"),
        (
            "leaky",
            {"model.cell_options.keep": ["a"]},
            "has 'a' for model.cell_options.keep, which must be a number",
        ),
        ("leaky", {"optimizer.options.decay": [0.9, 2]}, "decay must lie in"),
        ("leaky", {"model.cell_options.keep": [10**400]}, "keep that float32 cannot hold"),
        ("attribute", {"model.cell_options.keep": [0, 0.1]}, "attribute `rest` .* cells.Constant"),
        ("branch", {"model.cell_options.keep": [0, 0.1]}, "must use JAX's functions only"),
    ],
)
def test_what_cannot_be_swept_is_refused(cell, sweep, message):
    with pytest.raises(UserError, match=message):
        steps.make_system(config_of({"model.cell": cell}, sweep))


@pytest.mark.slow
def test_a_member_with_options_of_its_own_equals_a_separate_run():
    sweep = {"model.cell_options.keep": [0.1, 0.6], "optimizer.options.decay": [0.5, 0.8]}
    sweep["model.cell_options.scale"] = [2]
    config = config_of(LEAKY, sweep)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 28, 28), np.uint8), np.arange(8, dtype=np.int32)
    batch = batches.Batch(images, labels, np.ones(8, bool))

    def train(config, settings=None):
        system = steps.make_system(config)
        state = steps.init_state(config, system, 0, settings)
        for _ in range(2):
            state, sums = steps.train_step(system, state, batch)
        return state.params, sums.loss

    settings = [dict(zip(sweep, each, strict=True)) for each in ((0.1, 0.5, 2), (0.6, 0.8, 2))]
    together = {name: jnp.float32([each[name] for each in settings]) for name in sweep}
    found = jax.jit(jax.vmap(lambda settings: train(config, settings)))(together)
    for i, setting in enumerate(settings):
        alone = jax.jit(lambda one=setting: train(config_of(LEAKY | one)))()
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], found), alone, 1e-5)
        assert float(alone[0]["layers"][0]["keep"][...]) == np.float32(setting[next(iter(sweep))])


def test_a_constant_is_not_trained():
    config = config_of(LEAKY)
    state = steps.init_state(config, steps.make_system(config), 0)
    trained = jax.tree.structure(nnx.filter_state(state.params, nnx.Param))
    assert trained.num_leaves == jax.tree.structure(state.params).num_leaves - 1
    assert jax.tree.structure(state.opt_state[0].nu) == trained


def test_brackets_without_end_are_no_value():
    assert main._scalar("[" * 100_000) == "[" * 100_000
    with pytest.raises(argparse.ArgumentTypeError, match="is not JSON"):
        main._json("[" * 100_000)
