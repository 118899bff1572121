"""Fast paths against the plain scan: values and gradients, under random cotangents."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmnist.config import ScanConfig
from seqmnist.networks import cells, scans

RECURRENT = ["simple_rnn", "irnn", "gru", "lstm"]


def random_like(tree, seed, dtype):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return jnp.array(values + 1j * rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.array(values, dtype)

    return jax.tree.unflatten(structure, [draw(leaf) for leaf in leaves])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("unroll", ["auto", "1", "4"])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_cell_scans_as_its_steps_one_by_one(name, unroll, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        cell = cells.CELLS[name](3, 5, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(cell)
        params = jax.tree.map(lambda leaf: leaf / 2, random_like(params, 1, dtype))
        carry = random_like(cell.initial_carry(2), 2, dtype)
        z = random_like(jnp.zeros((9, 2, cell.kernel.shape[1])), 3, dtype)

        def slow(params, carry, z):
            step = nnx.merge(graphdef, params).step
            return scans.sequential(step, carry, z, ScanConfig())

        def fast(params, carry, z):
            return nnx.merge(graphdef, params).scan(carry, z, ScanConfig(unroll=unroll))

        inputs = (params, carry, z)
        (h, pullback), (fast_h, fast_pullback) = jax.vjp(slow, *inputs), jax.vjp(fast, *inputs)
        dh = random_like(h, 4, dtype)
        tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
        chex.assert_trees_all_close(fast_h, h, atol=tolerance)
        chex.assert_trees_all_close(fast_pullback(dh), pullback(dh), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(9, 4, 3), (4, 3)])
def test_product_equals_the_plain_product(shape, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, kernel = (random_like(jnp.zeros(s), i, dtype) for i, s in enumerate((shape, (3, 5))))
        (y, pullback), (fast_y, fast_pullback) = (
            jax.vjp(function, x, kernel) for function in (jnp.matmul, scans.product)
        )
        dy = random_like(y, 2, dtype)
        tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
        chex.assert_trees_all_close(fast_y, y, atol=tolerance)
        chex.assert_trees_all_close(fast_pullback(dy), pullback(dy), rtol=tolerance, atol=tolerance)


def linear_slow(a, b, carry):
    a = jnp.broadcast_to(a, b.shape)
    return jax.lax.scan(lambda h, ab: (ab[0] * h + ab[1],) * 2, carry, (a, b))[1]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(784, 2, 3), (1, 1, 3), (784, 1, 3)])
def test_linear_equals_the_plain_scan(method, is_complex, shape, double):
    with jax.enable_x64(double):
        dtype = jnp.complex64 if is_complex else jnp.float32
        if double:
            dtype = jnp.complex128 if is_complex else jnp.float64
        real = jnp.zeros((), dtype).real.dtype
        a = random_like(jnp.zeros(shape, dtype), 0, real)
        a = a / (1.001 * jnp.abs(a)).astype(
            a.dtype
        )  # the hardest stable case: memory over all 784 steps
        b = random_like(jnp.zeros((784, 2, 3), dtype), 1, real)
        carry = random_like(jnp.zeros((2, 3), dtype), 2, real)
        dh = random_like(b, 3, real)

        @functools.partial(jax.jit, static_argnums=0)
        def outputs_and_cotangents(scan):
            h, pullback = jax.vjp(scan, a, b, carry)
            return h, *pullback(dh)

        got = outputs_and_cotangents(lambda *x: scans.linear(*x, ScanConfig(method=method)))
        expected = outputs_and_cotangents(linear_slow)
        tolerance = 1e-10 if double else 1e-4
        for x, y in zip(got, expected, strict=True):
            scale = float(jnp.abs(y).max())
            np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)


def test_linear_equals_a_float64_loop():
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1, (784, 2, 3)) * np.exp(1j * rng.uniform(0, 6, (784, 2, 3)))
    b, h = rng.normal(size=(784, 2, 3)) + 0j, np.zeros((2, 3)) + 0j
    expected = []
    for t in range(784):
        h = a[t] * h + b[t]
        expected.append(h)
    for method in ("sequential", "parallel"):
        scan = jax.jit(scans.linear, static_argnums=3)
        inputs = [jnp.array(x, jnp.complex64) for x in (a, b, np.zeros((2, 3)))]
        got = scan(*inputs, ScanConfig(method=method))
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_auto_is_sequential_on_a_cpu():
    arguments = jnp.ones((100, 2, 3)), jnp.ones((100, 2, 3)), jnp.ones((2, 3))

    def trace(method):
        return str(
            jax.make_jaxpr(lambda *x: scans.linear(*x, ScanConfig(method=method)))(*arguments)
        )

    assert trace("auto") == trace("sequential") != trace("parallel")
