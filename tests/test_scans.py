"""Fast paths against the plain scan: values and gradients, under random cotangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module, random_params
from flax import nnx

from seqmnist.networks import cells, scans

RECURRENT = ["simple_rnn", "irnn", "gru", "lstm"]
FORMS = [scans.linear_sequential, scans.linear_parallel]


def random_like(tree, seed, dtype):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)

    values = [jnp.array(rng.normal(size=leaf.shape), dtype) for leaf in leaves]
    return jax.tree.unflatten(structure, values)


def outputs_and_cotangents(function, *inputs):
    """Returns the outputs of a function, and its pullback of random cotangents."""

    @jax.jit
    def both(inputs, cotangent):
        outputs, pullback = jax.vjp(function, *inputs)
        return outputs, pullback(cotangent)

    shape = jax.eval_shape(function, *inputs)
    return both(inputs, random_like(shape, 4, jax.tree.leaves(shape)[0].dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_a_cell_scans_as_its_steps_one_by_one(name):
    with jax.enable_x64(True):
        cell = random_module(lambda rngs: cells.CELLS[name](3, 5, rngs=rngs))
        graphdef, params = nnx.split(cell)
        params = random_params(params, 1, jnp.float64)
        state = random_like(cell.initial_state(2), 2, jnp.float64)
        z = random_like(jnp.zeros((9, 2, cell.kernel.shape[1])), 3, jnp.float64)

        def slow(params, state, z):
            return scans.plain(nnx.merge(graphdef, params).step, state, z)

        def fast(params, state, z):
            return nnx.merge(graphdef, params).recur(state, z)

        got, expected = (outputs_and_cotangents(f, params, state, z) for f in (fast, slow))
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(9, 4, 3), (4, 3)])
def test_product_equals_the_plain_product(shape, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        inputs = [random_like(jnp.zeros(s), i, dtype) for i, s in enumerate((shape, (3, 5)))]
        got, expected = (outputs_and_cotangents(f, *inputs) for f in (scans.product, jnp.matmul))
        assert_close(got, expected, 1e-12 if dtype == jnp.float64 else 1e-5)


@pytest.mark.parametrize("product", [scans.product, scans.matmul])
@pytest.mark.parametrize("shape", [(9, 4, 3), (4, 3)])
def test_a_product_of_rounded_factors_has_exact_sums(product, shape):
    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)

    x, kernel, dy = (
        random_like(jnp.zeros(s), i, jnp.float32)
        for i, s in enumerate((shape, (3, 5), (*shape[:-1], 5)))
    )
    got, pullback = jax.vjp(lambda x, kernel: product(x, kernel, jnp.bfloat16), x, kernel)
    x, kernel, dy_rounded = map(rounded, (x, kernel, dy))
    rows = tuple(range(x.ndim - 1))
    dkernel = np.tensordot(x, dy_rounded, (rows, rows))
    expected = (x @ kernel, dy_rounded @ kernel.T, dkernel)
    assert_close((got, *pullback(dy)), expected, 1e-6)


def linear_slow(a, b, state):
    """The same with complex numbers, one step at a time."""

    def join(x):
        return jax.lax.complex(*x) if isinstance(x, tuple) else x

    def part(x):
        return (x.real, x.imag) if isinstance(b, tuple) else x

    a, b_t, state = map(join, (a, b, state))
    a = jnp.broadcast_to(a, b_t.shape)
    last, h = jax.lax.scan(lambda h, ab: (ab[0] * h + ab[1],) * 2, state, (a, b_t))
    return part(last), part(h)


@pytest.mark.slow
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(784, 2, 3), (1, 1, 3), (784, 1, 3)])
def test_linear_equals_the_plain_scan(is_complex, shape):
    with jax.enable_x64(True):

        def draw(seed, *shape):
            zeros = jnp.zeros(shape)
            return random_like((zeros, zeros) if is_complex else zeros, seed, jnp.float64)

        a = draw(0, *shape)
        # The hardest stable case: memory over all 784 steps.
        modulus = jnp.hypot(*a) if is_complex else jnp.abs(a)
        a = jax.tree.map(lambda part: part / (1.001 * modulus), a)
        inputs = a, draw(1, 784, 2, 3), draw(2, 2, 3)
        expected = outputs_and_cotangents(linear_slow, *inputs)
        for form in FORMS:
            fast = functools.partial(scans.linear, form=form)
            assert_close(outputs_and_cotangents(fast, *inputs), expected, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_linear_equals_a_float64_loop(form):
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1, (784, 2, 3)) * np.exp(1j * rng.uniform(0, 6, (784, 2, 3)))
    b, h = rng.normal(size=(784, 2, 3)) + 0j, np.zeros((2, 3)) + 0j
    expected = []
    for t in range(784):
        h = a[t] * h + b[t]
        expected.append(h)
    inputs = [
        (jnp.array(x.real, jnp.float32), jnp.array(x.imag, jnp.float32))
        for x in (a, b, np.zeros((2, 3), complex))
    ]
    _, (real, imaginary) = jax.jit(scans.linear, static_argnums=3)(*inputs, form)
    assert_close(np.asarray(real) + 1j * np.asarray(imaginary), np.array(expected), 1e-4)


def linear_and_gradients(a, b, state):
    def total(*inputs):
        last, h = scans.linear(*inputs)
        return jnp.sum(h**2) + jnp.sum(last), h

    (_, h), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(a, b, state)
    return h, grads


LOOPS = {"cpu": 2, "cuda": 0, "tpu": 0, "cpu,cuda,tpu": 2}  # forwards and backwards


@pytest.mark.parametrize("platforms", LOOPS)
def test_each_platform_gets_its_form_of_a_long_sequence(platforms):
    (size,) = jax.export.symbolic_shape("B")
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(100, size, 3)] * 2 + [(size, 3)]]
    exported = jax.export.export(jax.jit(linear_and_gradients), platforms=platforms.split(","))
    exported = exported(*shapes)
    module = exported.mlir_module()
    assert module.count("stablehlo.while") == LOOPS[platforms]
    assert ("pad" in module) == (platforms != "cpu")  # the parallel form interleaves by padding
    if "cpu" in platforms:
        inputs = [
            random_like(jnp.zeros(s), i, jnp.float32) for i, s in enumerate([(100, 2, 3)] * 2)
        ]
        inputs.append(jnp.ones((2, 3)))
        assert_close(exported.call(*inputs), linear_and_gradients(*inputs))


@pytest.mark.parametrize("length", [8, 100])
def test_a_cpu_compiles_one_loop_and_no_choice(length):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(length, 2, 3)] * 2 + [(2, 3)]]
    text = jax.jit(scans.linear).lower(*shapes).compile().as_text()
    assert text.count(" while(") == 1
    assert " conditional(" not in text


def over_devices(function):
    mesh = jax.sharding.Mesh(jax.devices()[:2], "member")
    split = jax.P("member")
    return jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "lift",
    [jax.vmap, lambda f: lambda *x: jax.lax.map(lambda one: f(*one), x), over_devices],
    ids=["vmap", "map", "shard_map"],
)
def test_linear_runs_under_transformations(lift):
    shapes = [(4, 100, 2, 3), (4, 100, 2, 3), (4, 2, 3)]
    inputs = [random_like(jnp.zeros(s), i, jnp.float32) / 2 for i, s in enumerate(shapes)]
    got = jax.jit(lift(linear_and_gradients))(*inputs)
    one_by_one = [linear_and_gradients(*(x[i] for x in inputs)) for i in range(4)]
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))
