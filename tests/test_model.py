import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, product_dtypes, random_module
from flax import nnx

from seqmnist.config import Config, ModelConfig, override
from seqmnist.errors import UserError
from seqmnist.networks import cells
from seqmnist.networks.cells import CELLS
from seqmnist.networks.model import READOUTS, Bidirectional, SequenceClassifier
from seqmnist.networks.views import sequence_shape
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.training.batches import Batch
from seqmnist.training.steps import init_state, make_system, train_step


def make(**fields):
    config = ModelConfig(**{"hidden_size": 6, **fields})
    return random_module(lambda rngs: SequenceClassifier(config, rngs=rngs))


def count(config):
    model = nnx.eval_shape(lambda: SequenceClassifier(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


H = 64


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 6602),
        ({"num_layers": 2}, 6602 + H * (H + H + 1)),
        ({"bidirectional": True}, 2 * 5952 + 2 * H * 10 + 10),
        (
            {"bidirectional": True, "num_layers": 2},
            2 * 5952 + 2 * H * (2 * H + H + 1) + 2 * H * 10 + 10,
        ),
        (
            {"block": "residual", "num_layers": 3},
            (28 + 1) * H + 3 * (H * (2 * H + 1) + H * (2 * H + 4)) + 650,
        ),
    ],
)
def test_parameter_counts_are_as_documented(fields, parameters):
    assert count(ModelConfig(**fields)) == parameters


@pytest.mark.parametrize("field", ["view", "cell", "readout"])
def test_an_unknown_name_is_refused_with_the_choices(field):
    with pytest.raises(UserError, match=f"config.model.{field}='nothing'.*choose one of"):
        make_system(Config(model=ModelConfig(**{field: "nothing"})))


def test_a_sequence_of_one_step_is_refused():
    with pytest.raises(UserError, match="subsample=28"):
        make_system(Config(model=ModelConfig(subsample=28)))


class LogitsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_logits_equal_a_float64_loop(self):
        system = make_system(Config())
        params = init_state(Config(), system, 0).params
        images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
        logits = self.variant(system.apply)(params, jnp.array(images))
        chex.assert_shape(logits, (4, 10))
        chex.assert_type(logits, jnp.float32)

        cell = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))
        layer, readout = cell["layers"][0], cell["readout"]
        h = np.zeros((4, 64))
        for t in range(28):
            h = np.tanh(
                images[:, t] / 255 @ layer["kernel"] + layer["bias"] + h @ layer["recurrent_kernel"]
            )
        assert_close(logits, h @ readout["kernel"] + readout["bias"])


@pytest.mark.slow
def test_all_products_of_layers_can_be_bfloat16():
    fields = {"model.cell": "gru", "model.block": "residual", "model.bidirectional": True}
    config = override(Config(), {**fields, "model.num_layers": 2, "model.hidden_size": 8})
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8))
    batch = Batch(images, jnp.arange(4), jnp.ones(4, bool))
    exact, rounded = (
        make_system(override(config, {"model.dtype": dtype})) for dtype in ("float32", "bfloat16")
    )
    state = jax.jit(lambda: init_state(config, exact, 0))()
    step = functools.partial(train_step, rounded)
    kinds = collections.Counter(product_dtypes(jax.make_jaxpr(step)(state, batch).jaxpr))
    # Those of the encoder, whose input needs no gradient, and of the readout.
    assert kinds.pop(("float32",) * 3) == 2 + 3
    assert list(kinds) == [("bfloat16", "bfloat16", "float32")]
    other = functools.partial(train_step, exact)
    after, expected = (jax.eval_shape(each, state, batch)[0] for each in (step, other))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, expected)
    got, expected = (jax.jit(system.apply)(state.params, images) for system in (rounded, exact))
    assert 0 < jnp.linalg.norm(got - expected) < 0.02 * jnp.linalg.norm(expected)


@pytest.mark.slow
def test_it_computes_in_the_dtype_of_its_parameters():
    system = make_system(Config())
    params = jax.eval_shape(lambda: init_state(Config(), system, 0)).params
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), params)
        images = jax.ShapeDtypeStruct((1, 28, 28), jnp.uint8)
        assert jax.eval_shape(system.apply, double, images).dtype == jnp.float64


@pytest.mark.parametrize("name", CELLS)
def test_bidirectional_equals_two_passes(name):
    one, other = (random_module(lambda rngs: CELLS[name](5, 4, rngs=rngs), seed) for seed in (0, 1))

    @jax.jit
    def check(x):
        both, forward, backward = Bidirectional(one, other), one(x), other(jnp.flip(x, 0))
        return both(x), jnp.concatenate([forward, jnp.flip(backward, 0)], axis=-1)

    assert_close(*check(jax.random.normal(jax.random.key(0), (9, 2, 5))))


def test_reversal_and_subsampling_act_on_the_sequence(digits):
    images = jnp.array(digits[0][:4])
    plain, backwards = make(), make(reverse=True)
    assert_close(backwards(images), plain(images[:, ::-1]))
    third = make(subsample=3, reverse=True)
    assert sequence_shape(third.config, MNIST) == (10, 28)
    h = third.layers[0].initial_state(4)
    for t in range(27, -1, -3):
        h = third.layers[0].step(h, third.layers[0].project(images[:, t] / 255))
    assert_close(third(images), third.readout(h))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_readouts_read_all_outputs_of_the_top_layer(block, bidirectional, digits):
    images = jnp.array(digits[0][:4])
    logits = {}
    for readout in READOUTS:
        model = make(readout=readout, block=block, bidirectional=bidirectional, cell="gru")

        @jax.jit
        def both(images, model=model, readout=readout):
            x = jnp.swapaxes(images / 255, 0, 1)
            if block == "residual":
                x = model.encoder(x)
            (layer,) = model.layers
            h = layer(x)
            last = jnp.concatenate([h[-1, :, :6], h[0, :, 6:]], axis=-1)  # of both directions
            expected = {"last": last, "mean": h.sum(0) / 28, "max": h.max(0)}[readout]
            return model(images), model.readout(expected)

        logits[readout], expected = both(images)
        assert_close(logits[readout], expected)
    assert not np.allclose(logits["last"], logits["mean"])


def test_a_residual_block_is_its_formula():
    model = make(block="residual", cell="lru", readout="mean")
    (block,) = model.layers
    norm, gate = (
        {name: np.asarray(value) for name, value in nnx.to_pure_dict(nnx.state(part)).items()}
        for part in (block.norm, block.gate)
    )
    x = np.random.default_rng(0).normal(size=(7, 2, 6)).astype(np.float32)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    normed = jnp.array(normed * norm["scale"] + norm["bias"])
    outputs, cell_outputs = jax.jit(lambda x, y: (block(x), block.layer(y)))(x, normed)
    v = np.asarray(jax.nn.gelu(cell_outputs)) @ gate["kernel"] + gate["bias"]
    assert_close(outputs, x + v[..., :6] / (1 + np.exp(-v[..., 6:])))


@pytest.mark.slow
def test_dropout_is_random_in_training_and_absent_otherwise(digits):
    images = jnp.array(digits[0][:8])
    model, still = (jax.jit(make(dropout=p, num_layers=2).__call__) for p in (0.5, 0.0))
    keys = jax.random.split(jax.random.key(0), (2, 8))
    assert_close(model(images), still(images))
    assert_close(still(images, keys[0]), still(images))
    chex.assert_trees_all_equal(model(images, keys[0]), model(images, keys[0]))
    assert not np.allclose(model(images, keys[0]), model(images, keys[1]))
    assert not np.allclose(model(images, keys[0]), model(images))
    part = model(images[3:5], keys[0, 3:5])
    assert_close(part, model(images, keys[0])[3:5])


SMALL = ImageSpec(8, 8, 1, tuple("0123456789"))
COLORED = ImageSpec(32, 32, 3, tuple(f"class {i}" for i in range(47)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "view", "spec"),
    [
        *((cell, "rows", SMALL) for cell in CELLS),
        *(("gru", view, COLORED) for view in ("rows", "pixels", "patches")),
    ],
)
def test_every_parameter_of_every_cell_learns_from_every_view(cell, view, spec):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, *spec.shape), dtype=np.uint8)
    labels = rng.choice(spec.num_classes, 4, replace=False).astype(np.int32)
    config = Config(model=ModelConfig(cell=cell, view=view, hidden_size=8))
    system = make_system(config, spec=spec)
    batch = Batch(jnp.array(images), jnp.array(labels), jnp.ones(4, bool))
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=quickly)
    def init_and_step(batch):
        state = init_state(config, system, 0)
        return state, *train_step(system, state, batch)

    state, after, sums = init_and_step(batch)
    assert np.isfinite(sums.loss)
    for path, (old, new) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *pair: pair, state.params, after.params),
        is_leaf=lambda x: isinstance(x, tuple),
    ):
        assert np.isfinite(new).all(), path
        assert not np.array_equal(old, new), path


class Leaky(cells.Cell):
    """h_t = (h_{t-1} + x_t W) / 2."""

    def __init__(self, input_size, hidden_size, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (input_size, hidden_size)))

    def project(self, x):
        return x @ self.kernel[...]

    def initial_state(self, batch_size):
        return jnp.zeros((batch_size, self.kernel.shape[1]), self.kernel.dtype)

    def step(self, state, z):
        return (state + z) / 2


@pytest.mark.slow
def test_a_new_cell_needs_nothing_but_a_table_entry(monkeypatch, digits):
    monkeypatch.setitem(CELLS, "leaky", Leaky)
    config = Config(model=ModelConfig(cell="leaky", num_layers=2, bidirectional=True))
    system = make_system(config)
    batch = Batch(*(jnp.array(x) for x in digits), jnp.ones(130, bool))
    state, losses = init_state(config, system, 0), []
    for _ in range(20):
        state, sums = jax.jit(train_step, static_argnums=0)(system, state, batch)
        losses.append(sums.means()["loss"])
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("cell", "view"), [*((cell, "rows") for cell in CELLS), ("min_gru", "pixels")]
)
@jax.numpy_dtype_promotion("standard")
def test_with_floats_of_64_bits_all_parameters_have_them(cell, view):
    model = ModelConfig(cell=cell, hidden_size=4, block="residual", view=view)
    with jax.enable_x64(True):
        system = make_system(Config(model=model))
        images, labels = jnp.zeros((2, 28, 28), jnp.uint8), jnp.zeros(2, jnp.int32)
        batch = Batch(images, labels, jnp.ones(2, bool))

        def step():
            state = init_state(Config(model=model), system, 0)
            return state, *train_step(system, state, batch)

        before, after, _ = jax.eval_shape(step)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    params = jax.tree.leaves(nnx.filter_state(after.params, nnx.Param))
    assert {leaf.dtype.name for leaf in params} == {"float64"}
