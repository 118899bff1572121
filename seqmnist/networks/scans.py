"""Recurrences over time, and products over all time steps at once, on plain arrays, time first.

Each fast path computes what a plain `lax.scan` or product computes, values and gradients.
Shapes: B batch, T time steps, F features, H hidden units, K gates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Below this many time steps the parallel form saves nothing, even on an accelerator.
_PARALLEL_LENGTH = 64


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies all time steps by one kernel: x [..., F], W [F, H] -> [..., H]."""
    return x @ kernel


def _product_backward(residuals, dy):
    x, kernel = residuals
    return dy @ kernel.T, _kernel_gradient(x, dy)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def _kernel_gradient(x, dy):
    """Sums x dyᵀ over all time steps and examples: [..., F] and [..., H] -> [F, H].

    Computed as [H, F] and then transposed: on CPUs, a long product that transposes both of its
    factors takes up to twice as long. The barrier keeps XLA from merging the transposition.
    """
    axes = tuple(range(x.ndim - 1))
    transposed = lax.dot_general(dy, x, ((axes, axes), ((), ())))
    return lax.optimization_barrier(transposed).T


def gate_inputs(
    kernel: jax.Array, bias: jax.Array | None, carry: Any, z: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns what the gates of a step act on: (z_t + h_{t-1} U,), or (z_t, h_{t-1} U + c).

    U is [H, K·H], c [K·H] or None, z_t [B, K·H], and the first array of `carry` h_{t-1} [B, H].
    """
    r = jax.tree.leaves(carry)[0] @ kernel
    return (z + r,) if bias is None else (z, r + bias.reshape(1, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(
    gates: Callable, kernel: jax.Array, bias: jax.Array | None, carry: Any, z: jax.Array
) -> jax.Array:
    """Scans `gates` over time, z [T, B, K·H] -> h [T, B, H]; other arguments as `gate_inputs`.

    `gates`, (carry, *gate_inputs) -> (carry, h_t), is elementwise. Differentiating a plain scan
    adds to the gradient of U at every time step: a small product and a pass over [H, K·H] each.
    Here the cotangents of all h_{t-1} U are kept and followed by one product over all T·B rows.
    """

    def step(carry, z_t):
        return gates(carry, *gate_inputs(kernel, bias, carry, jnp.concatenate(z_t, axis=-1)))

    return lax.scan(step, carry, _split_gates(z, kernel))[1]


def _gated_forward(gates, kernel, bias, carry, z):
    gates = jax.checkpoint(gates, policy=_is_kept, prevent_cse=False)

    def step(carry, z_t):
        inputs = gate_inputs(kernel, bias, carry, jnp.concatenate(z_t, axis=-1))
        (after, h), pullback = jax.vjp(gates, carry, *inputs)
        return after, (h, pullback)

    _, (h, pullbacks) = lax.scan(step, carry, _split_gates(z, kernel))
    return h, (kernel, bias, carry, h, pullbacks)


def _gated_backward(_, residuals, dh):
    kernel, bias, carry, h, pullbacks = residuals

    def step(dcarry, at_t):
        pullback, dh_t = at_t
        dcarry, *dinputs = pullback((dcarry, dh_t))
        (first, *rest), structure = jax.tree.flatten(dcarry)
        return jax.tree.unflatten(structure, [first + dinputs[-1] @ kernel.T, *rest]), dinputs

    zeros = jax.tree.map(jnp.zeros_like, carry)
    dcarry, dinputs = lax.scan(step, zeros, (pullbacks, dh), reverse=True)
    dz, dr = dinputs[0], dinputs[-1]
    before = jnp.concatenate([jax.tree.leaves(carry)[0][None], h[:-1]])
    return _kernel_gradient(before, dr), None if bias is None else dr.sum((0, 1)), dcarry, dz


gated.defvjp(_gated_forward, _gated_backward)


def _is_kept(primitive, *_, **__):
    """Whether the backward pass stores the results of an operation instead of recomputing them.

    Arithmetic on activations, such as 1 - tanh², is recomputed: training is limited by memory
    traffic, not by arithmetic.
    """
    return primitive not in (lax.add_p, lax.sub_p, lax.mul_p, lax.neg_p)


def _split_gates(z, kernel):
    """Gives each gate an array of its own.

    Inside a loop, XLA vectorizes code that reads a gate's whole time step, but not code that
    reads its columns out of a wider array.
    """
    return tuple(jnp.split(z, kernel.shape[1] // kernel.shape[0], axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ungated(
    activation: Callable, slope: Callable, kernel: jax.Array, carry: jax.Array, z: jax.Array
) -> jax.Array:
    """Computes h_t = φ(z_t + h_{t-1} U), z [T, B, H] -> h [T, B, H]; h_t overwrites z_t in place.

    In the backward pass, dz_t overwrites dh_t in place. A loop is then as fast as an unrolled one
    and compiles in half the time. `activation` is φ, and `slope` φ' as a function of φ's result,
    both elementwise; U is [H, H], and `carry` h_0 [B, H].
    """

    def step(t, state):
        h, memory = state
        h = activation(memory[t] + h @ kernel)
        return h, lax.dynamic_update_index_in_dim(memory, h, t, 0)

    return lax.fori_loop(0, len(z), step, (carry, z))[1]


def _ungated_forward(activation, slope, kernel, carry, z):
    h = ungated(activation, slope, kernel, carry, z)
    return h, (kernel, carry, h)


def _ungated_backward(_, slope, residuals, dh):
    kernel, carry, h = residuals

    def step(i, state):
        dcarry, memory = state
        t = len(h) - 1 - i
        dz_t = (memory[t] + dcarry) * slope(h[t])
        return dz_t @ kernel.T, lax.dynamic_update_index_in_dim(memory, dz_t, t, 0)

    dcarry, dz = lax.fori_loop(0, len(h), step, (jnp.zeros_like(carry), dh))
    return _kernel_gradient(jnp.concatenate([carry[None], h[:-1]]), dz), dcarry, dz


ungated.defvjp(_ungated_forward, _ungated_backward)


def linear_sequential(a: jax.Array, b: jax.Array, carry: jax.Array) -> jax.Array:
    """Computes `linear` step by step."""

    def step(h, at_t):
        a_t, b_t = (a[0], at_t) if len(a) == 1 else at_t
        h = a_t * h + b_t
        return h, h

    return lax.scan(step, carry, b if len(a) == 1 else (a, b))[1]


def linear_parallel(a: jax.Array, b: jax.Array, carry: jax.Array) -> jax.Array:
    """Computes `linear` in O(log T) parallel steps.

    Source: G. E. Blelloch, Prefix sums and their applications, CMU-CS-90-190 (1990).
    """
    first = b[:1] + a[:1] * carry[None]
    a = jnp.broadcast_to(a, (len(b), *a.shape[1:]))

    def compose(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return lax.associative_scan(compose, (a, jnp.concatenate([first, b[1:]])))[1]


def linear_by_platform(a: jax.Array, b: jax.Array, carry: jax.Array) -> jax.Array:
    """Computes `linear` in the form that is fast on the platform it is compiled for.

    The parallel form does twice the arithmetic and moves several times the memory, which pays
    for long sequences on an accelerator, but not on a few CPU cores.
    """
    if len(b) < _PARALLEL_LENGTH:
        return linear_sequential(a, b, carry)
    forms = {"cpu": linear_sequential, "default": linear_parallel}
    return lax.platform_dependent(a, b, carry, **forms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
    a: jax.Array, b: jax.Array, carry: jax.Array, form: Callable = linear_by_platform
) -> jax.Array:
    """Computes h_t = a_t h_{t-1} + b_t.

    Real or complex: b and h are [T, B, H], a is of a shape that broadcasts to it, and `carry` is
    h_0 [B, H]. The cotangents follow a recurrence of the same kind, backwards in time, so only h
    is kept for them, whatever the `form`: `linear_sequential`, `linear_parallel` or
    `linear_by_platform`.
    """
    return form(a, b, carry)


def _linear_forward(a, b, carry, form):
    h = form(a, b, carry)
    return h, (a, carry, h)


def _linear_backward(form, residuals, dh):
    a, carry, h = residuals
    # g_t = dh_t + a_{t+1} g_{t+1}: the same recurrence, read from the end.
    later = a if len(a) == 1 else jnp.concatenate([jnp.zeros_like(a[:1]), a[:0:-1]])
    g = form(later, dh[::-1], jnp.zeros_like(carry))[::-1]
    before = jnp.concatenate([carry[None], h[:-1]])
    axes = tuple(i for i, size in enumerate(a.shape) if size != h.shape[i])
    return jnp.sum(g * before, axes, keepdims=True), g, a[0] * g[0]


linear.defvjp(_linear_forward, _linear_backward)
