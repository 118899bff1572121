import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, product_dtypes, random_module
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from seqmnist.config import _ACTS_WITH
from seqmnist.errors import UserError
from seqmnist.networks import cells
from seqmnist.networks.cells import CELLS, RecurrentParam

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


def lem(p, x):
    w, b = np.split(p["kernel"], 4, axis=1), np.split(p["bias"], 4)
    u, v = np.split(p["recurrent_kernel"], 3, axis=1), p["slow_kernel"]
    h, z = np.zeros((B, H)), np.zeros((B, H))
    for x_t in x:
        d, e = (sigmoid(x_t @ w[k] + b[k] + h @ u[k]) for k in (0, 1))
        z = (1 - d) * z + d * np.tanh(x_t @ w[2] + b[2] + h @ u[2])
        h = (1 - e) * h + e * np.tanh(x_t @ w[3] + b[3] + z @ v)
        yield h


def slstm(p, x):
    """The equations without the stabilizer."""
    w, u = np.split(p["kernel"], 4, axis=1), np.split(p["recurrent_kernel"], 4, axis=1)
    b, h, c, n = np.split(p["bias"], 4), np.zeros((B, H)), np.zeros((B, H)), np.zeros((B, H))
    for x_t in x:
        i, f, g, o = (x_t @ w[k] + h @ u[k] + b[k] for k in range(4))
        c = sigmoid(f) * c + np.exp(i) * np.tanh(g)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        yield h


def min_lstm(p, x):
    w, b, h = np.split(p["kernel"], 3, axis=1), np.split(p["bias"], 3), np.zeros((B, H))
    for x_t in x:
        f, i = (sigmoid(x_t @ w[k] + b[k]) for k in (0, 1))
        h = (f * h + i * (x_t @ w[2] + b[2])) / (f + i)
        yield h


def rg_lru(p, x):
    w, b, h = np.split(p["kernel"], 3, axis=1), np.split(p["bias"], 3), np.zeros((B, H))
    for x_t in x:
        r, i = (sigmoid(x_t @ w[k] + b[k]) for k in (0, 1))
        a = sigmoid(p["Lambda"]) ** (8 * r)
        h = a * h + np.sqrt(1 - a**2) * i * (x_t @ w[2] + b[2])
        yield h


def s5(p, x):
    eigenvalues, dt = -np.exp(p["decay_log"]) + 1j * p["frequency"], np.exp(p["step_log"])
    b, c = p["B_re"] + 1j * p["B_im"], p["C_re"] + 1j * p["C_im"]
    h = np.zeros((B, len(dt)), complex)
    for x_t in x:
        hold = (np.exp(eigenvalues * dt) - 1) / eigenvalues
        h = np.exp(eigenvalues * dt) * h + hold * (x_t @ b)
        yield (h @ c).real + (x_t * p["D"] if "D" in p else 0)


def s6(p, x):
    n = p["A_log"].shape[1]
    w_u, w_dt, w_b, w_c = np.split(p["kernel"], [H, 2 * H, 2 * H + n], axis=1)
    h = np.zeros((B, H, n))
    for x_t in x:
        u, dt = x_t @ w_u, np.log1p(np.exp(x_t @ w_dt + p["bias"]))
        a = np.exp(np.einsum("bh,hn->bhn", dt, -np.exp(p["A_log"])))
        h = a * h + np.einsum("bh,bn->bhn", dt * u, x_t @ w_b)
        yield np.einsum("bhn,bn->bh", h, x_t @ w_c) + p["D"] * u


def delta_net(p, x):
    heads = p["bias"].size - 3 * H
    s = np.zeros((B, heads, H // heads, H // heads))
    for x_t in x:
        q, k, v, beta = np.split(x_t @ p["kernel"] + p["bias"], [H, 2 * H, 3 * H], axis=1)
        q, k, v = (np.reshape(y * sigmoid(y), (B, heads, -1)) for y in (q, k, v))
        q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        h = np.zeros((B, heads, H // heads))
        for example in range(B):
            for head in range(heads):
                matrix, key = s[example, head], k[example, head]
                matrix += np.outer(
                    sigmoid(beta[example, head]) * (v[example, head] - matrix @ key), key
                )
                h[example, head] = matrix @ q[example, head]
        yield h.reshape(B, H)


ORACLES = {
    "simple_rnn": simple_rnn, "irnn": irnn, "gru": gru, "lstm": lstm, "lem": lem, "slstm": slstm,
    "min_gru": min_gru, "min_lstm": min_lstm, "rg_lru": rg_lru, "lru": lru, "s5": s5, "s6": s6,
    "delta_net": delta_net,
}  # fmt: skip


def make(name, input_size=F, **options):
    return random_module(lambda rngs: CELLS[name](input_size, H, rngs=rngs, **options))


def pure(cell):
    params = nnx.to_pure_dict(nnx.state(cell))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize(
    ("name", "input_size", "options"),
    [
        *((name, size, {}) for name in CELLS for size in (F, H)),
        ("lru", H, {"state_size": 4}),
        ("s5", H, {"state_size": 4}),
        ("s6", H, {"state_size": 3}),
        ("delta_net", F, {"num_heads": H}),
    ],
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
    "lem": 4 * H * (F + H + 1),
    "slstm": 4 * H * (F + H + 1),
    "min_lstm": 3 * H * (F + 1),
    "rg_lru": H * (3 * F + 4),
    "s5": H * (2 * F + 2 * H + 3),
    "s6": H * (2 * F + 16 + 2) + 2 * F * 16,
    "delta_net": (F + 1) * (3 * H + 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_parameter_counts_are_as_documented(name):
    cell = nnx.eval_shape(lambda: CELLS[name](F, H, rngs=nnx.Rngs(0)))
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


def test_rg_lru_starts_between_its_bounds():
    cell = CELLS["rg_lru"](3, 2000, rngs=nnx.Rngs(0))
    a = sigmoid(np.float64(cell.Lambda[...])) ** 8
    np.testing.assert_allclose([a.min(), a.mean(), a.max()], [0.9, 0.9495, 0.999], atol=2e-3)


def test_s5_starts_with_the_eigenvalues_of_hippo():
    """Those of HiPPO-LegS plus the low-rank term that makes it normal, from its definition."""
    n = 6
    i, j = np.mgrid[: 2 * n, : 2 * n]
    hippo = -np.where(i > j, np.sqrt((2 * i + 1) * (2 * j + 1)), np.where(i == j, i + 1, 0))
    normal = hippo + np.sqrt(np.outer(i[:, 0] + 0.5, i[:, 0] + 0.5))
    expected = np.linalg.eigvals(normal)
    cell = CELLS["s5"](1, 4, rngs=nnx.Rngs(0), state_size=n)
    np.testing.assert_allclose(-np.exp(cell.decay_log[...]), [-0.5] * n, rtol=1e-6)
    np.testing.assert_allclose(
        np.sort(cell.frequency[...]), np.sort(expected.imag[expected.imag > 0]), rtol=1e-5
    )


def test_s6_starts_with_its_time_scales():
    cell = CELLS["s6"](3, 2000, rngs=nnx.Rngs(0))
    dt = np.log1p(np.exp(np.float64(cell.bias[...])))
    np.testing.assert_allclose([dt.min(), dt.max()], [0.001, 0.1], rtol=0.02)
    np.testing.assert_allclose(np.median(dt), 0.01, rtol=0.1)
    np.testing.assert_allclose(np.exp(cell.A_log[...][7]), np.arange(1, 17), rtol=1e-5)


def test_slstm_reads_large_gates():
    """Inputs at which an exponential gate would overflow without the stabilizer."""
    cell = make("slstm")

    @jax.jit
    def outputs_and_gradient(x):
        y, pullback = jax.vjp(cell, x)
        return y, pullback(jnp.ones_like(y))

    chex.assert_tree_all_finite(outputs_and_gradient(jnp.full((T, B, F), 200, jnp.float32)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lru", {"r_min": 0.0, "r_max": 1e-25}),
        ("lru", {"r_min": 0.999999999, "r_max": 0.999999999}),
        ("lru", {"max_phase": 1e-30}),
        ("rg_lru", {"r_min": 0.0, "r_max": 1e-25}),
        ("rg_lru", {"r_min": 0.999999999, "r_max": 0.999999999}),
        ("s5", {"dt_min": 1e-30, "dt_max": 1e-30}),
        ("s5", {"dt_min": 1.0, "dt_max": 10.0}),
        ("s6", {"dt_min": 1e-30, "dt_max": 1e-30}),
        ("s6", {"dt_min": 1.0, "dt_max": 10.0}),
    ],
)
def test_extreme_options_give_finite_parameters(name, options):
    cell = CELLS[name](F, 64, rngs=nnx.Rngs(0), **options)
    chex.assert_tree_all_finite(nnx.state(cell))
    chex.assert_tree_all_finite(cell(jnp.ones((5, 2, F))))


def test_a_matrix_of_too_many_states_is_refused():
    with pytest.raises(UserError, match=r"4,097 states .*state_size to 4096 or less"):
        CELLS["s5"](F, 4097, rngs=nnx.Rngs(0))


def test_heads_must_divide_the_units():
    with pytest.raises(UserError, match="num_heads=2 does not divide hidden_size=7; choose"):
        make("delta_net", num_heads=2)


def test_the_recurrent_factor_acts_on_the_cells_with_such_parameters():
    with_them = {name for name in CELLS if jax.tree.leaves(nnx.state(make(name), RecurrentParam))}
    _, acts, idle = _ACTS_WITH["optimizer.recurrent_factor"]
    assert set(acts.split()) == with_them
    assert set(idle.split()) == CELLS.keys() - with_them


@pytest.mark.parametrize("name", CELLS)
def test_project_takes_any_leading_axes(name):
    cell = make(name)
    both = jax.jit(lambda x: (cell.project(x)[1], cell.project(x[1])))
    assert_close(*both(jnp.asarray(INPUTS[:2], jnp.float32)))


@pytest.mark.parametrize("name", CELLS)
def test_factors_of_products_can_be_bfloat16(name):
    cell, x = make(name), jnp.asarray(INPUTS, jnp.float32)
    params = nnx.state(cell)

    def gradient():
        graphdef = nnx.graphdef(cell)

        def loss(params, x):
            y = nnx.merge(graphdef, params)(x)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)

    exact = gradient()
    cell.dtype = jnp.dtype("bfloat16")
    rounded = gradient()
    kinds = set(product_dtypes(jax.make_jaxpr(rounded)(params, x).jaxpr))
    assert kinds == {("bfloat16", "bfloat16", "float32")}
    got, expected = (jax.eval_shape(each, params, x) for each in (rounded, exact))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    got, expected = (jax.jit(each)(params, x) for each in (rounded, exact))
    got, expected = (np.asarray(ravel_pytree(each)[0]) for each in (got, expected))
    assert 0 < np.linalg.norm(got - expected) < 0.2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["gru", "lru"])
def test_each_step_can_be_seen_without_compilation(name, monkeypatch):
    graphdef, params = nnx.split(make(name))
    x, seen = jnp.asarray(INPUTS[:3], jnp.float32), []

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    expected = jax.jit(jax.grad(loss))(params)
    step = CELLS[name].step
    monkeypatch.setattr(CELLS[name], "step", lambda *each: seen.append(each) or step(*each))
    with jax.disable_jit():
        assert_close(jax.grad(loss)(params), expected)
    assert len(seen) == 3
