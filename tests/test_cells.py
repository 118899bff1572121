import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module
from flax import nnx
from jax.test_util import check_grads

from seqmnist.networks import cells
from seqmnist.networks.cells import CELLS

F, H, T, B = 5, 7, 11, 3
INPUTS = np.random.default_rng(0).normal(size=(T, B, F))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simple_rnn(p, x):
    h = np.zeros((B, H))
    for x_t in x:
        h = np.tanh(x_t @ p["kernel"] + p["bias"] + h @ p["recurrent_kernel"])
        yield h


def irnn(p, x):
    h = np.zeros((B, H))
    for x_t in x:
        h = np.maximum(0, x_t @ p["kernel"] + p["bias"] + h @ p["recurrent_kernel"])
        yield h


def gru(p, x):
    w, u = np.split(p["kernel"], 3, axis=1), np.split(p["recurrent_kernel"], 3, axis=1)
    b, c = np.split(p["bias"], 3), np.split(p["recurrent_bias"], 3)
    h = np.zeros((B, H))
    for x_t in x:
        update, reset = (sigmoid(x_t @ w[i] + b[i] + h @ u[i] + c[i]) for i in (0, 1))
        candidate = np.tanh(x_t @ w[2] + b[2] + reset * (h @ u[2] + c[2]))
        h = update * h + (1 - update) * candidate
        yield h


def lstm(p, x):
    w, u = np.split(p["kernel"], 4, axis=1), np.split(p["recurrent_kernel"], 4, axis=1)
    b, h, c = np.split(p["bias"], 4), np.zeros((B, H)), np.zeros((B, H))
    for x_t in x:
        i, f, g, o = (x_t @ w[k] + h @ u[k] + b[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def min_gru(p, x):
    w, b, h = np.split(p["kernel"], 2, axis=1), np.split(p["bias"], 2), np.zeros((B, H))
    for x_t in x:
        z = sigmoid(x_t @ w[0] + b[0])
        h = (1 - z) * h + z * (x_t @ w[1] + b[1])
        yield h


def lru(p, x):
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    b, c = p["B_re"] + 1j * p["B_im"], p["C_re"] + 1j * p["C_im"]
    h = np.zeros((B, len(lam)), complex)
    for x_t in x:
        h = lam * h + np.exp(p["gamma_log"]) * (x_t @ b)
        yield (h @ c).real + (x_t * p["D"] if "D" in p else 0)


ORACLES = {
    "simple_rnn": simple_rnn, "irnn": irnn, "gru": gru, "lstm": lstm,
    "min_gru": min_gru, "lru": lru,
}  # fmt: skip


def make(name, input_size=F, **options):
    return random_module(lambda rngs: CELLS[name](input_size, H, rngs=rngs, **options))


def pure(cell):
    params = nnx.to_pure_dict(nnx.state(cell))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize(
    ("name", "input_size", "options"),
    [*((name, size, {}) for name in CELLS for size in (F, H)), ("lru", H, {"state_size": 4})],
)
def test_a_cell_equals_a_float64_loop(name, input_size, options):
    cell = make(name, input_size, **options)
    x = np.random.default_rng(2).normal(size=(T, B, input_size))
    got = jax.jit(cell)(jnp.array(x, jnp.float32))
    chex.assert_shape(got, (T, B, H))
    chex.assert_type(got, jnp.float32)
    expected = np.array(list(ORACLES[name](pure(cell), x)))
    assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_gradients_equal_finite_differences(name):
    with jax.enable_x64(True):
        graphdef, params = nnx.split(make(name))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)

        @jax.jit
        def outputs(params, x):
            return nnx.merge(graphdef, params)(x)

        @jax.jit
        def plain(params, x):
            return nnx.merge(graphdef, params)(x, jnp.full(B, T))  # given lengths, no fast path

        inputs = (params, jnp.array(INPUTS))
        check_grads(outputs, inputs, order=1, modes=["rev"], eps=1e-6)
        check_grads(plain, inputs, order=1, modes=["fwd", "rev"], eps=1e-6)


COUNTS = {
    "simple_rnn": H * (F + H + 1),
    "irnn": H * (F + H + 1),
    "gru": 3 * H * (F + H + 2),
    "lstm": 4 * H * (F + H + 1),
    "min_gru": 2 * H * (F + 1),
    "lru": H * (2 * F + 2 * H + 3),
}


@pytest.mark.parametrize("name", CELLS)
def test_parameter_counts_are_as_documented(name):
    cell = CELLS[name](F, H, rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(cell))) == COUNTS[name]


def test_simple_rnn_starts_as_keras_does():
    cell = cells.SimpleRNN(28, 64, rngs=nnx.Rngs(0))
    kernel, recurrent = np.asarray(cell.kernel), np.asarray(cell.recurrent_kernel)
    limit = np.sqrt(6 / (28 + 64))
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(64), atol=1e-5)
    np.testing.assert_array_equal(cell.bias[...], np.zeros(64))


def test_irnn_starts_as_the_identity():
    cell = cells.IRNN(28, 64, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(cell.recurrent_kernel[...], np.eye(64))
    np.testing.assert_allclose(np.std(cell.kernel[...]), 1e-3, rtol=0.05)


def test_lstm_starts_with_a_forget_bias_of_one():
    np.testing.assert_array_equal(
        cells.LSTM(3, 2, rngs=nnx.Rngs(0)).bias[...], [0, 0, 1, 1] + [0] * 4
    )


def test_lru_starts_on_its_ring_with_unit_variance():
    cell = cells.LRU(1, 2000, rngs=nnx.Rngs(0))
    modulus = np.exp(-np.exp(cell.nu_log[...]))
    assert modulus.min() >= 0.9
    assert modulus.max() <= 0.999
    # Uniform on the ring: |λ|² is uniform between its bounds.
    np.testing.assert_allclose(np.mean(modulus**2), (0.9**2 + 0.999**2) / 2, rtol=0.01)
    # White noise in, unit variance out, in the long run.
    variance = np.exp(2 * cell.gamma_log[...]) / (1 - modulus**2)
    np.testing.assert_allclose(variance, 1, rtol=1e-3)


@pytest.mark.parametrize("name", CELLS)
def test_project_takes_any_leading_axes(name):
    cell = make(name)
    x = jax.random.normal(jax.random.key(0), (2, 3, F))
    assert_close(cell.project(x)[1], cell.project(x[1]))
