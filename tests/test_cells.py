import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmnist import cells, scans


def test_simple_rnn_equals_a_float64_loop():
    cell = cells.SimpleRNN(5, 7, rngs=nnx.Rngs(0))
    cell.bias[...] = jnp.linspace(-1, 1, 7)
    x = np.random.default_rng(0).normal(size=(11, 3, 5))
    _, got = scans.sequential(
        cell.step, cell.initial_carry(3), cell.project(jnp.array(x, jnp.float32))
    )
    w, u, b = (np.asarray(p, np.float64) for p in (cell.kernel, cell.recurrent_kernel, cell.bias))
    h = np.zeros((3, 7))
    for t in range(11):
        h = np.tanh(x[t] @ w + b + h @ u)
        np.testing.assert_allclose(got[t], h, atol=1e-5)


def test_simple_rnn_starts_as_keras_does():
    cell = cells.SimpleRNN(28, 64, rngs=nnx.Rngs(0))
    kernel, recurrent = np.asarray(cell.kernel), np.asarray(cell.recurrent_kernel)
    limit = np.sqrt(6 / (28 + 64))
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(64), atol=1e-5)
    np.testing.assert_array_equal(cell.bias[...], np.zeros(64))


def test_project_takes_any_leading_axes():
    cell = cells.SimpleRNN(5, 7, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    np.testing.assert_allclose(cell.project(x)[1], cell.project(x[1]), atol=1e-6)
