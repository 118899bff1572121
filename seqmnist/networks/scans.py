"""Recurrences over time, and products with all time steps at once, on plain arrays, time first.

Each fast path here computes what `sequential` or a plain product does, value and gradient.
Shapes: B batch, T time steps, F features, H hidden units, K gates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqmnist.config import ScanConfig

# Below this many time steps the parallel form saves nothing, even on an accelerator.
_PARALLEL_LENGTH = 64


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies what all time steps see by one kernel: x [..., F], W [F, H] -> [..., H]."""
    return x @ kernel


def _product_backward(residuals, dy):
    x, kernel = residuals
    return dy @ kernel.T, _kernel_gradient(x, dy)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def _kernel_gradient(x, dy):
    """Sums x dyᵀ over all time steps and examples: [..., F] and [..., H] -> [F, H].

    Computed as [H, F], and turned only then: XLA on CPUs takes up to twice as long for a long
    product whose two factors both need turning. The barrier keeps it from undoing this.
    """
    axes = tuple(range(x.ndim - 1))
    turned = lax.dot_general(dy, x, ((axes, axes), ((), ())))
    return lax.optimization_barrier(turned).T


def sequential(step: Callable, carry: Any, z: jax.Array, config: ScanConfig) -> jax.Array:
    """Applies a recurrence step by step.

    Args:
      step: (carry, z_t) -> (carry, h_t), with z_t [B, K·H] and h_t [B, H].
      carry: the state before the first step.
      z: [T, B, K·H].
      config: how.

    Returns:
      h, [T, B, H].
    """
    return lax.scan(step, carry, z, unroll=_unroll(config))[1]


def gated_step(
    gates: Callable, kernel: jax.Array, bias: jax.Array | None, carry: Any, z: jax.Array
) -> tuple[Any, jax.Array]:
    """Takes one step of a recurrence through a matrix: (carry, z_t) -> (carry, h_t).

    Args:
      gates: (carry, z_t + h_{t-1} U) -> (carry, h_t); with a bias, (carry, z_t, h_{t-1} U + c) ->
        (carry, h_t). Elementwise.
      kernel: U, [H, K·H].
      bias: c, [K·H], or None.
      carry: a pytree whose first array is h_{t-1}, [B, H].
      z: z_t, [B, K·H].
    """
    return gates(carry, *_inputs(kernel, bias, carry, z))


def _inputs(kernel, bias, carry, z):
    r = jax.tree.leaves(carry)[0] @ kernel
    return (z + r,) if bias is None else (z, r + bias.reshape(1, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def gated(
    gates: Callable,
    kernel: jax.Array,
    bias: jax.Array | None,
    carry: Any,
    z: jax.Array,
    config: ScanConfig,
) -> jax.Array:
    """Scans `gated_step` over time, and differentiates it with one matrix product for U.

    Differentiating a plain scan adds to the gradient of U at every time step, a small product
    and a pass over [H, K·H] each. Here the cotangents of all r_t are kept, and one product over
    all T·B rows follows.

    Args:
      gates, kernel, bias, carry: see `gated_step`; the carry is that before the first step.
      z: [T, B, K·H].
      config: how.

    Returns:
      h, [T, B, H].
    """

    def step(carry, z_t):
        return gated_step(gates, kernel, bias, carry, _together(z_t))

    return lax.scan(step, carry, _apart(z, kernel), unroll=_unroll(config))[1]


def _gated_forward(gates, kernel, bias, carry, z, config):
    gates = jax.checkpoint(gates, policy=_is_kept, prevent_cse=False)

    def step(carry, z_t):
        inputs = _inputs(kernel, bias, carry, _together(z_t))
        (after, h), pullback = jax.vjp(gates, carry, *inputs)
        return after, (h, pullback)

    _, (h, pullbacks) = lax.scan(step, carry, _apart(z, kernel), unroll=_unroll(config))
    return h, (kernel, bias, carry, h, pullbacks)


def _gated_backward(gates, config, residuals, dh):
    del gates
    kernel, bias, carry, h, pullbacks = residuals
    first, *rest = jax.tree.leaves(carry)
    structure = jax.tree.structure(carry)

    def step(dcarry, at_t):
        pullback, dh_t = at_t
        dcarry, *dinputs = pullback((dcarry, dh_t))
        dfirst, *drest = jax.tree.leaves(dcarry)
        dcarry = jax.tree.unflatten(structure, [dfirst + dinputs[-1] @ kernel.T, *drest])
        return dcarry, dinputs

    zeros = jax.tree.unflatten(structure, [jnp.zeros_like(x) for x in (first, *rest)])
    unroll = _unroll(config)
    dcarry, dinputs = lax.scan(step, zeros, (pullbacks, dh), reverse=True, unroll=unroll)
    dz, dr = dinputs[0], dinputs[-1]
    before = jnp.concatenate([first[None], h[:-1]])
    return _kernel_gradient(before, dr), None if bias is None else dr.sum((0, 1)), dcarry, dz


gated.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def ungated(
    activation: Callable,
    slope: Callable,
    kernel: jax.Array,
    carry: jax.Array,
    z: jax.Array,
    config: ScanConfig,
) -> jax.Array:
    """Computes h_t = φ(z_t + h_{t-1} U), each h_t in the memory of its z_t.

    Backwards, the cotangent of what φ sees takes the memory of that of h_t. So a loop over time
    is as fast as all of its steps written out, and takes half the time to compile.

    Args:
      activation: φ, elementwise.
      slope: φ' as a function of φ's result, elementwise.
      kernel: U, [H, H].
      carry: h_0, [B, H].
      z: [T, B, H].
      config: how.

    Returns:
      h, [T, B, H].
    """
    del slope

    def step(t, state):
        h, memory = state
        h = activation(memory[t] + h @ kernel)
        return h, lax.dynamic_update_index_in_dim(memory, h, t, 0)

    return lax.fori_loop(0, len(z), step, (carry, z), unroll=_unroll(config))[1]


def _ungated_forward(activation, slope, kernel, carry, z, config):
    h = ungated(activation, slope, kernel, carry, z, config)
    return h, (kernel, carry, h)


def _ungated_backward(activation, slope, config, residuals, dh):
    del activation
    kernel, carry, h = residuals

    def step(i, state):
        dcarry, memory = state
        t = len(h) - 1 - i
        dz_t = (memory[t] + dcarry) * slope(h[t])
        return dz_t @ kernel.T, lax.dynamic_update_index_in_dim(memory, dz_t, t, 0)

    start = jnp.zeros_like(carry), dh
    dcarry, dz = lax.fori_loop(0, len(h), step, start, unroll=_unroll(config))
    return _kernel_gradient(jnp.concatenate([carry[None], h[:-1]]), dz), dcarry, dz


ungated.defvjp(_ungated_forward, _ungated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(a: jax.Array, b: jax.Array, carry: jax.Array, config: ScanConfig) -> jax.Array:
    """Computes h_t = a_t h_{t-1} + b_t, step by step or in O(log T) parallel steps.

    Its cotangents follow a recurrence of the same kind, backwards, so that nothing but h is
    kept for it, whichever way it is computed.

    Source of the parallel form: G. E. Blelloch, Prefix sums and their applications, CMU-CS-90-190
    (1990).

    Args:
      a: real or complex, [T, B, H], or a shape that broadcasts to it.
      b: [T, B, H].
      carry: h_0, [B, H].
      config: how; `auto` is parallel for long sequences on an accelerator. The parallel form
        does twice the arithmetic and moves several times the memory, which two CPU cores do
        not make up for.

    Returns:
      h, [T, B, H].
    """
    method = config.method
    if method == "auto":
        is_wide = jax.default_backend() != "cpu" and len(b) >= _PARALLEL_LENGTH
        method = "parallel" if is_wide else "sequential"
    if method == "parallel":
        return _linear_parallel(a, b, carry)
    return _linear_sequential(a, b, carry, config)


def _linear_sequential(a, b, carry, config):
    def step(h, at_t):
        a_t, b_t = (a[0], at_t) if len(a) == 1 else at_t
        h = a_t * h + b_t
        return h, h

    return lax.scan(step, carry, b if len(a) == 1 else (a, b), unroll=_unroll(config))[1]


def _linear_parallel(a, b, carry):
    first = b[:1] + a[:1] * carry[None]
    a = jnp.broadcast_to(a, (len(b), *a.shape[1:]))

    def compose(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return lax.associative_scan(compose, (a, jnp.concatenate([first, b[1:]])))[1]


def _linear_forward(a, b, carry, config):
    h = linear(a, b, carry, config)
    return h, (a, carry, h)


def _linear_backward(config, residuals, dh):
    a, carry, h = residuals
    # g_t = dh_t + a_{t+1} g_{t+1}: the same recurrence, read from the end.
    later = a if len(a) == 1 else jnp.concatenate([jnp.zeros_like(a[:1]), a[:0:-1]])
    g = linear(later, dh[::-1], jnp.zeros_like(carry), config)[::-1]
    before = jnp.concatenate([carry[None], h[:-1]])
    axes = tuple(i for i, size in enumerate(a.shape) if size != h.shape[i])
    return jnp.sum(g * before, axes, keepdims=True), g, a[0] * g[0]


linear.defvjp(_linear_forward, _linear_backward)


def _is_kept(primitive, *_, **__):
    """Whether the backward pass reads an operation's results, or computes them once more.

    What arithmetic can make again from activations, such as 1 - tanh², is not worth storing for
    every time step: memory, not arithmetic, is what training waits for.
    """
    return primitive not in (lax.add_p, lax.sub_p, lax.mul_p, lax.neg_p)


def _apart(z, kernel):
    """Gives each gate an array of its own: XLA does not vectorize what reads a gate's columns of
    a time step inside a loop, but does where each gate's time step is whole."""
    return tuple(jnp.split(z, kernel.shape[1] // kernel.shape[0], axis=-1))


def _together(z):
    return jnp.concatenate(z, axis=-1)


def _unroll(config):
    """Measured on two CPU cores: more time steps an iteration gain nothing, with gates or without,
    and take longer to compile."""
    return 1 if config.unroll == "auto" else int(config.unroll)
