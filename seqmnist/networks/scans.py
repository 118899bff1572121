"""Recurrences over time on plain arrays, time first, and how a sequence is cut into stretches.

`plain` is the recurrence that everything else here is tested against, values and gradients.
Shapes: B batch, T time steps, F features, H hidden units, K gates. A mask, bool [T, B] or None,
says what is read: where it is False, the state stays as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Without `truncate`, shorter sequences are not cut; linear recurrences read them step by step.
SHORTEST_CUT = 64


def plain(step: Callable, state: Any, z: Any, mask: jax.Array | None = None) -> tuple[Any, Any]:
    """Repeats `step`, (state, z_t) -> state, over time; z is a pytree of [T, B, …].

    Returns the last state, and h [T, B, H], the first array of each state.
    """

    def one(state, at_t):
        z_t, is_read = at_t
        after = step(state, z_t)
        if _kinds(after) != _kinds(state):
            raise TypeError(f"step returns {_kinds(after)} for a state {_kinds(state)}")
        if is_read is not None:
            after = jax.tree.map(functools.partial(where, is_read), after, state)
        return after, jax.tree.leaves(after)[0]

    return lax.scan(one, state, (z, mask))


def _kinds(state):
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", state)


def where(is_read: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Chooses between arrays [B, …] by example: bool [B], or [] for all."""
    return jnp.where(is_read.reshape(is_read.shape + (1,) * (new.ndim - is_read.ndim)), new, old)


def shifted(state: Any, states: Any) -> Any:
    """Returns the states before each time step: the first, and all but the last of [T, B, …]."""
    return jax.tree.map(lambda first, h: jnp.concatenate([first[None], h[:-1]]), state, states)


def mask(x: jax.Array, lengths: jax.Array | None) -> jax.Array | None:
    """Returns the mask, bool [T, B], for x [T, B, …] and lengths, int [B]; None for None."""
    return None if lengths is None else jnp.arange(len(x)).reshape(-1, 1) < lengths.reshape(1, -1)


def backwards(x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Reverses sequences [T, B, …], each within its length, int [B]."""
    if lengths is None:
        return x[::-1]
    lengths = jnp.minimum(lengths, len(x))
    t = (lengths.reshape(1, -1) - 1 - jnp.arange(len(x)).reshape(-1, 1)) % len(x)
    return jnp.take_along_axis(x, t.reshape(t.shape + (1,) * (x.ndim - 2)), axis=0)


def in_stretches(
    read: Callable,
    state: Any,
    x: Any,
    length: int,
    truncate: int = 0,
    stop: Callable[[Any], Any] = lax.stop_gradient,
) -> tuple[Any, Any]:
    """Reads a sequence, in stretches if that is better; equal to `read(state, x)`.

    Training on a CPU keeps only the states at the cuts of a long sequence, and recomputes the
    inside of a stretch in the backward pass: memory does not grow with what a step keeps, and a
    stretch stays in the cache. On an accelerator, where time grows with the number of sequential
    steps, nothing is cut.

    Args:
      read: (state, x) -> (state, y), for any number of time steps.
      x: a pytree of [T, B, …].
      length: of a stretch, in time steps.
      truncate: if not 0, gradients stop after every `truncate` time steps.
      stop: returns a state through which they stop.

    Returns the last state and y, a pytree of [T, …].
    """
    num_steps = len(jax.tree.leaves(x)[0])
    truncate = truncate if truncate < num_steps else 0

    def cut(state, x, length=length):
        def stretch(state, x):
            return read(stop(state) if truncate else state, x)

        whole = num_steps - num_steps % length
        stretches = jax.tree.map(lambda a: a[:whole].reshape(-1, length, *a.shape[1:]), x)
        state, y = lax.scan(jax.checkpoint(stretch, prevent_cse=False), state, stretches)
        y = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), y)
        if whole == num_steps:
            return state, y
        state, rest = stretch(state, jax.tree.map(lambda a: a[whole:], x))
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), y, rest)

    if truncate:
        return cut(state, x, truncate)
    if num_steps < SHORTEST_CUT or num_steps <= length:
        return read(state, x)
    return lax.platform_dependent(state, x, cpu=cut, default=read)


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Multiplies all time steps by one kernel: x [..., F], W [F, H] -> [..., H].

    `dtype` is that of `matmul`. Without it, x is multiplied by a materialized Wᵀ, whose gradient is
    a product with one transposed factor instead of two: on rows, a minGRU trains 1.27 times as fast
    this way. The barrier keeps XLA from merging the transposition.
    """
    if dtype is not None:
        return matmul(x, kernel, dtype)
    transposed = lax.optimization_barrier(kernel.T)
    return lax.dot_general(x, transposed, (((x.ndim - 1,), (1,)), ((), ())))


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Multiplies x [..., F] by W [F, H] -> [..., H].

    With a dtype, factors are rounded to it, here and in the gradients, and sums are in that of x;
    there are no forward-mode derivatives then.
    """
    return x @ kernel if dtype is None else _rounded_matmul(x, kernel, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_matmul(x, kernel, dtype):
    return _rounded_forward(x, kernel, dtype)[0]


def _rounded_forward(x, kernel, dtype):
    factors = x.astype(dtype), kernel.astype(dtype)
    y = jnp.matmul(*factors, preferred_element_type=x.dtype)
    return y, factors


def _rounded_backward(dtype, factors, dy):
    x, kernel = factors
    sums, dy = dy.dtype, dy.astype(dtype)
    dx = jnp.matmul(dy, kernel.T, preferred_element_type=sums)
    rows = tuple(range(x.ndim - 1))
    return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=sums)


_rounded_matmul.defvjp(_rounded_forward, _rounded_backward)


def gate_inputs(
    kernel: jax.Array,
    bias: jax.Array | None,
    state: Any,
    z: jax.Array,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, ...]:
    """Returns what the gates of a step act on: (z_t + h_{t-1} U,), or (z_t, h_{t-1} U + c).

    U is [H, K·H], c [K·H] or None, z_t [..., B, K·H], and the first array of `state` h_{t-1}
    [..., B, H]. `dtype` is that of `product`.
    """
    r = matmul(jax.tree.leaves(state)[0], kernel, dtype)
    return (z + r,) if bias is None else (z, r + lax.broadcast_to_rank(bias, z.ndim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def gated(
    gates: Callable,
    kernel: jax.Array,
    bias: jax.Array | None,
    state: Any,
    z: jax.Array,
    dtype: jnp.dtype | None = None,
) -> tuple[Any, jax.Array]:
    """Computes `plain` for a step of gates, with a backward pass of fewer and larger products.

    `gates`, (state, *gate_inputs) -> state, is elementwise. Differentiating a plain scan adds to
    the gradient of U at every time step. Here the cotangents of all h_{t-1} U are kept and followed
    by one product over all T·B rows: on rows, an LSTM trains 1.13 times as fast.
    """

    def step(state, z_t):
        z_t = jnp.concatenate(z_t, axis=-1)
        return gates(state, *gate_inputs(kernel, bias, state, z_t, dtype))

    return plain(step, state, _split_gates(z, kernel))


def _gated_forward(gates, kernel, bias, state, z, dtype):
    gates = jax.checkpoint(gates, policy=_is_kept, prevent_cse=False)

    def step(state, z_t):
        inputs = gate_inputs(kernel, bias, state, jnp.concatenate(z_t, axis=-1), dtype)
        after, pullback = jax.vjp(gates, state, *inputs)
        return after, (jax.tree.leaves(after)[0], pullback)

    last, (h, pullbacks) = lax.scan(step, state, _split_gates(z, kernel))
    return (last, h), (kernel, bias, state, h, pullbacks)


def _gated_backward(_, dtype, residuals, cotangents):
    (dstate, dh), (kernel, bias, state, h, pullbacks) = cotangents, residuals

    def step(dstate, at_t):
        pullback, dh_t = at_t
        (first, *rest), structure = jax.tree.flatten(dstate)
        dstate, *dinputs = pullback(jax.tree.unflatten(structure, [first + dh_t, *rest]))
        (first, *rest), structure = jax.tree.flatten(dstate)
        first += matmul(dinputs[-1], kernel.T, dtype)
        return jax.tree.unflatten(structure, [first, *rest]), dinputs

    dstate, dinputs = lax.scan(step, dstate, (pullbacks, dh), reverse=True)
    dz, dr = dinputs[0], dinputs[-1]
    dbias = None if bias is None else dr.sum((0, 1))
    return _kernel_gradient(state, h, dr, dtype), dbias, dstate, dz


gated.defvjp(_gated_forward, _gated_backward)


def _kernel_gradient(state, h, dr, dtype):
    """Returns the gradient of U [H, K·H] from the cotangents dr [T, B, K·H] of all h_{t-1} U."""
    before = shifted(jax.tree.leaves(state)[0], h)
    zeros = jnp.zeros((h.shape[-1], dr.shape[-1]), dr.dtype)
    return jax.vjp(lambda kernel: product(before, kernel, dtype), zeros)[1](dr)[0]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5))
def ungated(
    gates: Callable,
    slope: Callable,
    kernel: jax.Array,
    state: jax.Array,
    z: jax.Array,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes h_t = φ(z_t + h_{t-1} U), z [T, B, H] -> (h_T, h [T, B, H]); h_t overwrites z_t.

    In the backward pass, dz_t overwrites dh_t in place: on rows, a SimpleRNN trains 1.25 times as
    fast as by `plain`. `gates` is (h, z) -> φ(z), and `slope` φ' as a function of φ's result, both
    elementwise; U is [H, H], and `state` h_0 [B, H].
    """

    def step(t, carry):
        h, memory = carry
        h = gates(h, memory[t] + matmul(h, kernel, dtype))
        return h, lax.dynamic_update_index_in_dim(memory, h, t, 0)

    return lax.fori_loop(0, len(z), step, (state, z))


def _ungated_forward(gates, slope, kernel, state, z, dtype):
    last, h = ungated(gates, slope, kernel, state, z, dtype)
    return (last, h), (kernel, state, h)


def _ungated_backward(_, slope, dtype, residuals, cotangents):
    (dstate, dh), (kernel, state, h) = cotangents, residuals

    def step(i, carry):
        dstate, memory = carry
        t = len(h) - 1 - i
        dz_t = (memory[t] + dstate) * slope(h[t])
        memory = lax.dynamic_update_index_in_dim(memory, dz_t, t, 0)
        return matmul(dz_t, kernel.T, dtype), memory

    dstate, dz = lax.fori_loop(0, len(h), step, (dstate, dh))
    return _kernel_gradient(state, h, dz, dtype), dstate, dz


ungated.defvjp(_ungated_forward, _ungated_backward)


def linear_sequential(a: Any, b: Any, state: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Computes `linear` step by step; h_t overwrites b_t in place."""
    num_steps = _length(b)

    def step(i, carry):
        h, memory = carry
        t = num_steps - 1 - i if reverse else i
        a_t = _at(a, 0 if _length(a) == 1 else t)
        h = _sum(times(a_t, h), _at(memory, t))
        return h, jax.tree.map(lambda m, h: lax.dynamic_update_index_in_dim(m, h, t, 0), memory, h)

    return lax.fori_loop(0, num_steps, step, (state, b))


def linear_parallel(a: Any, b: Any, state: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Computes `linear` in O(log T) parallel steps.

    Source: G. E. Blelloch, Prefix sums and their applications, CMU-CS-90-190 (1990).
    """
    if reverse:
        a, b = jax.tree.map(jnp.flipud, (a, b))
    first = _sum(_at(b, 0), times(_at(a, 0), state))
    a = jax.tree.map(lambda x, like: jnp.broadcast_to(x, (len(like), *x.shape[1:])), a, b)
    b = jax.tree.map(lambda one, x: jnp.concatenate([one[None], x[1:]]), first, b)

    def compose(left, right):
        return times(left[0], right[0]), _sum(times(right[0], left[1]), right[1])

    h = lax.associative_scan(compose, (a, b))[1]
    return _at(h, -1), jax.tree.map(jnp.flipud, h) if reverse else h


def linear_by_platform(a: Any, b: Any, state: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Computes `linear` in the form that is fast on the platform it is compiled for.

    The parallel form does twice the arithmetic and moves several times the memory, which pays
    for long sequences on an accelerator, but not on a few CPU cores.
    """
    forms = linear_sequential, linear_parallel
    sequential, parallel = (functools.partial(form, reverse=reverse) for form in forms)
    if _length(b) < SHORTEST_CUT:
        return sequential(a, b, state)
    return lax.platform_dependent(a, b, state, cpu=sequential, default=parallel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(a: Any, b: Any, state: Any, form: Callable = linear_by_platform) -> tuple[Any, Any]:
    """Computes h_t = a_t h_{t-1} + b_t; returns h_T and h.

    Each is an array, or a pair of arrays, (real parts, imaginary parts): on pixels, an LRU trains
    1.18 times as fast as with complex arrays, which are slow on a CPU. b and h are [T, B, H], a has
    a shape that broadcasts to theirs, and `state` is h_0 [B, H]. The cotangents follow a recurrence
    of the same kind, backwards in time, so only h is kept for them: on rows, a minGRU trains 1.3
    times as fast as by `plain`.
    """
    return form(a, b, state)


def _linear_forward(a, b, state, form):
    last, h = form(a, b, state)
    return (last, h), (a, state, h)


def _linear_backward(form, residuals, cotangents):
    (dlast, dh), (a, state, h) = cotangents, residuals

    def add_last(dh, dlast):
        return lax.dynamic_update_index_in_dim(dh, dh[-1] + dlast, len(dh) - 1, 0)

    # g_t = dh_t + ā_{t+1} g_{t+1}: the same recurrence, read from the end.
    later = _conjugate(a)
    if _length(a) > 1:
        later = jax.tree.map(lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])]), later)
    zeros = jax.tree.map(jnp.zeros_like, state)
    first, g = form(later, jax.tree.map(add_last, dh, dlast), zeros, reverse=True)
    before = shifted(state, h)

    def reduce(da, a):
        axes = tuple(i for i, size in enumerate(a.shape) if size != da.shape[i])
        return jnp.sum(da, axes, keepdims=True)

    da = jax.tree.map(reduce, times(_conjugate(before), g), a)
    return da, g, times(_at(_conjugate(a), 0), first)


linear.defvjp(_linear_forward, _linear_backward)


def times(a: Any, b: Any) -> Any:
    """Returns a b, elementwise; each is an array or a pair, as in `linear`."""
    if not isinstance(a, tuple):
        return a * b
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _sum(a, b):
    return jax.tree.map(jnp.add, a, b)


def _conjugate(a):
    return (a[0], -a[1]) if isinstance(a, tuple) else a


def _at(x, t):
    return jax.tree.map(lambda leaf: leaf[t], x)


def _length(x):
    return len(jax.tree.leaves(x)[0])
