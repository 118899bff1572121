"""Reading in parts, with masks and with truncated gradients, against reading in one go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module, random_params
from flax import nnx
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from seqmnist.config import Config, ModelConfig
from seqmnist.networks import scans
from seqmnist.networks.cells import CELLS
from seqmnist.networks.model import READOUTS, SequenceClassifier
from seqmnist.training.batches import Batch
from seqmnist.training.steps import init_state, make_system, train_step

T, B, F = 9, 3, 28
X = np.random.default_rng(0).normal(size=(T, B, F)) / 2
TOLERANCES = {jnp.float32: 1e-5, jnp.float64: 1e-12}


def make(dtype=jnp.float32, **fields):
    """Returns a network's structure and random parameters of a dtype."""
    config = ModelConfig(**{"hidden_size": 6, **fields})
    graphdef, params = nnx.split(random_module(lambda r: SequenceClassifier(config, rngs=r)))
    return graphdef, random_params(params, 1, dtype)


def loss_and_gradients(graphdef, read_all, level=0):
    """Returns a compiled function: logits, and gradients of a mixture of them.

    Its arguments are params and x, and the further arguments of `read_all`. `level` is XLA's: at 0,
    XLA 0.10.2 gets the gradients of maxima of masked parts wrong; 1 takes four times as long.
    """

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": level})
    def both(params, x, *arguments):
        def total(params, x):
            logits = read_all(nnx.merge(graphdef, params), x, *arguments)
            return jnp.sum(jnp.sin(jnp.arange(logits.size, dtype=x.dtype)) * logits.ravel()), logits

        (_, logits), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x)
        return logits, grads

    return both


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_end_with_the_sequence_and_may_be_zero(readout, bidirectional):
    graphdef, params = make(readout=readout, bidirectional=bidirectional)
    network, x = nnx.merge(graphdef, params), jnp.asarray(X, jnp.float32)
    longer = network.classify(x, jnp.array([T + 2, T, 0]))
    assert_close(longer[:2], network.classify(x, jnp.array([T, T, 0]))[:2])
    assert_close(longer[2], params.readout.bias[...])


def test_a_truncation_longer_than_the_sequence_cuts_nothing():
    graphdef, params = make()
    network, x = nnx.merge(graphdef, params), jnp.asarray(X, jnp.float32)
    with jax.disable_jit():
        assert_close(network.classify(x, truncate=T + 1), network.classify(x))


def read_in_parts(cuts):
    def read_all(network, x):
        state = network.initial_state(x.shape[1])
        for part in jnp.split(x, cuts):
            state = network.read(state, part)
        return network.answer(state)

    return read_all


NETWORKS = [
    *({"cell": cell} for cell in CELLS),
    {"cell": "lstm", "num_layers": 2, "readout": "mean"},
    {"cell": "min_gru", "num_layers": 2, "block": "residual"},
    {"cell": "lru", "block": "residual", "readout": "mean"},
]


# Flax's LayerNorm refuses float64 under strict promotion.
CASES = [(fields, jnp.float32 if "block" in fields else jnp.float64) for fields in NETWORKS]
CASES += [({"cell": cell}, jnp.float32) for cell in ("gru", "lru")]


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "dtype"), CASES)
def test_parts_equal_one_go(fields, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        graphdef, params = make(dtype, **fields)
        x = jnp.array(X, dtype)
        in_parts = read_in_parts([1, 4, 8])  # of one step at either end, and of several
        reads = (in_parts, SequenceClassifier.classify)
        got, expected = (loss_and_gradients(graphdef, read)(params, x) for read in reads)
        assert_close(got, expected, TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("length", [4, 7, 99])
def test_stretches_equal_one_go(length, monkeypatch):
    monkeypatch.setattr(scans, "SHORTEST_CUT", 2)
    monkeypatch.setattr(CELLS["gru"], "stretch", length)
    graphdef, params = make(cell="gru", num_layers=2)
    x = jnp.array(X, jnp.float32)
    got = loss_and_gradients(graphdef, SequenceClassifier.classify)(params, x)
    assert_close(got, loss_and_gradients(graphdef, read_in_parts([]))(params, x))


DIRECTIONS = {"forwards": {}, "both": {"bidirectional": True}}
LONGEST = 3
MASKS = hnp.arrays(bool, (LONGEST, B)).filter(lambda mask: mask.any(0).all())


def place(x, mask):
    """Moves each sequence of x [T, B, F] to where the mask is True, in order."""
    return jnp.take_along_axis(x, jnp.maximum(mask.cumsum(0) - 1, 0)[..., None], axis=0)


def read_with_a_mask(network, x, mask):
    """Reads in parts of fixed shape; the mask says where in them each sequence lies."""
    state = network.initial_state(B)
    for part in zip(*(jnp.split(a, [1]) for a in (place(x, mask), mask)), strict=True):
        state = network.read(state, *part)
    return network.answer(state)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("cell", "readout", "block"),
    [
        ("simple_rnn", "last", "plain"),
        ("irnn", "mean", "plain"),
        ("gru", "max", "plain"),
        ("lstm", "last", "plain"),
        ("min_gru", "max", "plain"),
        ("slstm", "mean", "plain"),
        ("s6", "last", "plain"),
        ("delta_net", "max", "plain"),
        ("lru", "mean", "plain"),
        ("lru", "last", "residual"),
    ],
)
def test_a_padded_sequence_is_read_as_it_is_alone(cell, readout, block, direction):
    dtype = jnp.float32 if block == "residual" else jnp.float64
    num_layers = 2 if cell == "lstm" else 1  # compiling takes nearly all of the time
    fields = {"cell": cell, "readout": readout, "block": block, "num_layers": num_layers}
    with jax.enable_x64(dtype == jnp.float64):
        graphdef, params = make(dtype, **fields, **DIRECTIONS[direction])
        x = jnp.array(X[:LONGEST], dtype)

    def padded(network, x, mask):
        return network.classify(x, mask.sum(0))

    def alone(network, x, mask):
        """Reads all beginnings without a mask, and chooses that of each sequence's length."""
        each = jnp.stack([network.classify(x[: n + 1]) for n in range(LONGEST)])
        return each[mask.sum(0) - 1, jnp.arange(B)]

    reads = [padded] if direction == "both" else [padded, read_with_a_mask]
    level = int(readout == "max")
    expected, *got = (loss_and_gradients(graphdef, read, level) for read in (alone, *reads))

    @settings(max_examples=20, deadline=None)
    @given(MASKS)
    def check(mask):
        with jax.enable_x64(dtype == jnp.float64):
            for function in got:
                assert_close(
                    function(params, x, mask), expected(params, x, mask), TOLERANCES[dtype]
                )

    check()


def test_a_state_stays_where_nothing_is_read():
    graphdef, params = make(cell="lstm", readout="max")
    network = nnx.merge(graphdef, params)
    x, nothing = jnp.array(X, jnp.float32), jnp.zeros((T, B), bool)
    state = network.read(network.initial_state(B), x)
    same = network.read(state, x, nothing)
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(same)))


@pytest.mark.slow
def test_truncated_gradients_stop_at_the_cuts():
    graphdef, params = make(cell="gru")
    x = jnp.array(X, jnp.float32)

    def by_hand(network, x):
        state = network.initial_state(B)
        for part in jnp.split(x, [4, 8]):
            state = network.read(jax.lax.stop_gradient(state), part)
        return network.answer(state)

    def truncated(network, x):
        return network.classify(x, truncate=4)

    got, expected = (loss_and_gradients(graphdef, f)(params, x) for f in (truncated, by_hand))
    assert_close(got, expected)
    assert not got[1][1][:8].any()
    assert got[1][1][8:].all()


@pytest.mark.slow
@pytest.mark.parametrize("readout", READOUTS)
def test_truncation_leaves_the_gradients_of_what_the_readout_gathered(readout):
    graphdef, params = make(cell="gru", readout=readout)
    x, lengths = jnp.array(X, jnp.float32), jnp.array([T, 7, 3])

    def by_outputs(network, x):
        return network.classify_outputs(network.run(x, lengths, truncate=4), lengths)

    def truncated(network, x):
        return network.classify(x, lengths, truncate=4)

    got, expected = (loss_and_gradients(graphdef, f)(params, x) for f in (truncated, by_outputs))
    assert_close(got, expected)
    assert got[1][1][2, 2].any()  # the last step of the third sequence


@pytest.mark.slow
@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_parameter_has_a_gradient(cell, direction, block):
    fields = {"cell": cell, "block": block, **DIRECTIONS[direction]}
    graphdefs = {readout: make(readout=readout, **fields)[0] for readout in READOUTS}
    _, params = make(**fields)

    @jax.jit
    def gradients(params, x):
        def total(params, graphdef):
            return jnp.sum(jnp.cos(nnx.merge(graphdef, params).classify(x)))

        return {name: jax.grad(total)(params, graphdef) for name, graphdef in graphdefs.items()}

    grads = gradients(params, jnp.array(X, jnp.float32))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.asarray(grad).any(), path


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lru"])
def test_memory_is_that_of_the_states_at_the_cuts(cell):
    """XLA's count of temporary bytes at T = 784, against four times as long sequences."""
    config = Config(model=ModelConfig(cell=cell, view="pixels", hidden_size=32))
    system = make_system(config)
    state = jax.eval_shape(lambda: init_state(config, system, 0))
    graphdef, params = nnx.split(nnx.merge(system.graphdef, state.params))
    stretch = CELLS[cell].stretch
    state_bytes = 8 * 32 * (8 if cell == "lru" else 4)  # that of an LRU has two parts

    def temporary(num_steps):
        def total(params, x):
            return nnx.merge(graphdef, params).classify(x).sum()

        shape = jax.ShapeDtypeStruct((num_steps, 8, 1), jnp.float32)
        compiled = jax.jit(jax.grad(total)).lower(params, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = temporary(3136) - temporary(784)
    cuts = (3136 - 784) / stretch
    inputs = 2 * (3136 - 784) * 8 * 4
    assert growth <= 1.1 * cuts * state_bytes + inputs


@pytest.mark.slow
def test_a_run_truncates_as_its_configuration_says(digits):
    images, labels = digits
    batch = Batch(jnp.array(images[:4]), jnp.array(labels[:4]), jnp.ones(4, bool))
    config, kernels = Config(model=ModelConfig(hidden_size=8)), []
    before = jax.jit(lambda: init_state(config, make_system(config), 0))()
    for truncate in (0, 28, 5):
        config.train.truncate = truncate
        state, _ = jax.jit(train_step, static_argnums=0)(make_system(config), before, batch)
        kernels.append(np.asarray(state.params["layers"][0]["recurrent_kernel"][...]))
    whole, in_one_part, truncated = kernels
    assert_close(in_one_part, whole)
    assert np.abs(truncated - whole).max() > 1e-4


@pytest.mark.slow
def test_truncation_beyond_the_end_changes_nothing():
    graphdef, params = make(cell="gru", bidirectional=True, num_layers=2)
    x = jnp.array(X, jnp.float32)

    def truncated(network, x):
        return network.classify(x, truncate=99)

    whole = loss_and_gradients(graphdef, SequenceClassifier.classify)(params, x)
    assert_close(loss_and_gradients(graphdef, truncated)(params, x), whole)
