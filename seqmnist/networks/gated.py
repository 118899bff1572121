"""Cells whose gates depend on the previous state, and which therefore read step by step.

Shapes as in `cell`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist.networks import scans
from seqmnist.networks.cell import Cell, TimeScale, log_odds


class GatedCell(Cell):
    """A recurrence through a matrix: gates act on z_t, from the input, and on h_{t-1} U.

    A subclass defines `gates`. Parameters have Keras's names, layout and initial distribution, with
    the gates side by side in the order that the subclass documents: W [F, K·H] is Glorot uniform,
    U [H, K·H] orthogonal, and b [K·H] zero.
    """

    kernel_init = staticmethod(nnx.initializers.glorot_uniform())
    recurrent_init = staticmethod(nnx.initializers.orthogonal())

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        width = self.num_gates * hidden_size
        self.kernel = nnx.Param(self.kernel_init(rngs.params(), (input_size, width)))
        self.recurrent_kernel = nnx.Param(self.recurrent_init(rngs.params(), (hidden_size, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    @staticmethod
    def gates(state: Any, *inputs: jax.Array) -> Any:
        """(state, z_t + h_{t-1} U [B, K·H]) -> state; static, so that it reads no parameters.

        If `recurrence` returns a c, it gets z_t and h_{t-1} U + c as two arguments.
        """
        raise NotImplementedError

    def recurrence(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns U [H, K·H], and c [K·H] or None."""
        return self.recurrent_kernel[...], None

    def step(self, state: Any, z: jax.Array) -> Any:
        inputs = scans.gate_inputs(*self.recurrence(), state, z, self.dtype)
        return type(self).gates(state, *inputs)

    def recur(self, state: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        return scans.gated(type(self).gates, *self.recurrence(), state, z, self.dtype)


class SimpleRNN(GatedCell):
    """The Elman network, as Keras's `SimpleRNN`; H (F + H + 1) parameters.

    h_t = tanh(x_t W + b + h_{t-1} U), h_0 = 0

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """

    gates = staticmethod(lambda state, z: jnp.tanh(z))
    slope = staticmethod(lambda h: 1 - h * h)

    def recur(self, state: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.recurrent_kernel[...]
        return scans.ungated(self.gates, self.slope, kernel, state, z, self.dtype)


class IRNN(SimpleRNN):
    """The Elman network with rectified units and U = I initially; H (F + H + 1) parameters.

    h_t = max(0, x_t W + b + h_{t-1} U), h_0 = 0; initially, W ~ N(0, 0.001²).

    Source: Q. V. Le, N. Jaitly, G. E. Hinton, A simple way to initialize recurrent networks of
    rectified linear units, arXiv 1504.00941.
    """

    kernel_init = staticmethod(nnx.initializers.normal(1e-3))
    recurrent_init = staticmethod(lambda key, shape: jnp.eye(*shape))

    # XLA for CPUs merges a maximum into the product before it, which then takes twice as long.
    gates = staticmethod(lambda state, z: jnp.where(z < 0, jnp.zeros_like(z), z))
    slope = staticmethod(lambda h: (h > 0).astype(h.dtype))


class GRU(GatedCell):
    """The gated recurrent unit with the reset gate after the product; 3 H (F + H + 2) parameters.

    u_t = σ(x_t W_u + b_u + h_{t-1} U_u + c_u)          update, Keras's z
    r_t = σ(x_t W_r + b_r + h_{t-1} U_r + c_r)          reset
    n_t = tanh(x_t W_n + b_n + r_t (h_{t-1} U_n + c_n))   candidate
    h_t = u_t h_{t-1} + (1 - u_t) n_t

    Gates side by side: update, reset, candidate, as in Keras (`reset_after=True`); cuDNN and
    PyTorch differ in their order only. Initially, c = 0, the `recurrent_bias`, and b_u = log(t - 1)
    for time scales t of the units, evenly from 2 to `t_max`; by default b_u = 0, as in Keras.

    Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder, arXiv
    1406.1078v3; Keras `GRU`; `t_max`: C. Tallec, Y. Ollivier, Can recurrent neural networks warp
    time?, arXiv 1804.11188, where t is drawn.
    """

    num_gates = 3

    def __init__(
        self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, t_max: TimeScale = 2.0
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.bias[...] = self.bias[...].at[:hidden_size].set(log_odds(t_max, hidden_size))
        self.recurrent_bias = nnx.Param(jnp.zeros(3 * hidden_size))

    def recurrence(self) -> tuple[jax.Array, jax.Array]:
        return self.recurrent_kernel[...], self.recurrent_bias[...]

    @staticmethod
    def gates(state: jax.Array, z: jax.Array, r: jax.Array) -> jax.Array:
        (z_u, z_r, z_n), (r_u, r_r, r_n) = (jnp.split(x, 3, axis=-1) for x in (z, r))
        update, reset = jax.nn.sigmoid(z_u + r_u), jax.nn.sigmoid(z_r + r_r)
        candidate = jnp.tanh(z_n + reset * r_n)
        return update * state + (1 - update) * candidate


class LSTMState(NamedTuple):
    """The state of an LSTM: hidden state h and cell state c, each [B, H]."""

    h: jax.Array
    c: jax.Array


class LSTM(GatedCell):
    """Long short-term memory; 4 H (F + H + 1) parameters.

    i_t, f_t, o_t = σ(x_t W + b + h_{t-1} U), g_t = tanh(x_t W + b + h_{t-1} U)
    c_t = f_t c_{t-1} + i_t g_t
    h_t = o_t tanh(c_t)

    Gates side by side: i, f, g, o, as in Keras and PyTorch. Initially, b_f = `forget_bias` +
    log(t - 1) and b_i = -log(t - 1), for time scales t of the units evenly from 2 to `t_max`; by
    default b_f = 1 and b_i = 0, Keras's `unit_forget_bias`.

    Source: S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997);
    forget gate: F. A. Gers et al. (2000); its bias: R. Jozefowicz et al. (2015); `t_max`: C.
    Tallec, Y. Ollivier, arXiv 1804.11188, with `forget_bias` 0, where t is drawn.
    """

    num_gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        forget_bias: float = 1.0,
        t_max: TimeScale = 2.0,
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        odds = log_odds(t_max, hidden_size)
        i_and_f = jnp.concatenate([-odds, forget_bias + odds])
        self.bias[...] = self.bias[...].at[: 2 * hidden_size].add(i_and_f)

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(*[super().initial_state(batch_size)] * 2)

    @staticmethod
    def gates(state: LSTMState, z: jax.Array) -> LSTMState:
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class LEMState(NamedTuple):
    """The state of a LEM: fast h, its output, and slow z, each [B, H]."""

    h: jax.Array
    z: jax.Array


class LEM(Cell):
    """Long expressive memory, two states of learned time scales; 4 H (F + H + 1) parameters.

    d_t = σ(x_t W_d + b_d + h_{t-1} U_d), e_t = σ(x_t W_e + b_e + h_{t-1} U_e)
    z_t = (1 - d_t) z_{t-1} + d_t tanh(x_t W_z + b_z + h_{t-1} U_z)
    h_t = (1 - e_t) h_{t-1} + e_t tanh(x_t W_h + b_h + z_t V)

    Gates side by side: d, e, z, h. Initially, all is uniform on ±1 / √H, as in the paper's code.
    Its y is our h; its Δt, the longest time scale, is 1.

    Source: T. K. Rusch et al., Long expressive memory for sequence modeling, arXiv 2110.04744.
    """

    num_gates = 4

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        def uniform(*shape):
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        h, bound = hidden_size, hidden_size**-0.5
        self.kernel, self.bias = uniform(input_size, 4 * h), uniform(4 * h)
        self.recurrent_kernel, self.slow_kernel = uniform(h, 3 * h), uniform(h, h)

    def initial_state(self, batch_size: int) -> LEMState:
        return LEMState(*[super().initial_state(batch_size)] * 2)

    def step(self, state: LEMState, z: jax.Array) -> LEMState:
        fixed, last = jnp.split(z, [self.recurrent_kernel.shape[1]], axis=-1)
        fixed += scans.matmul(state.h, self.recurrent_kernel[...], self.dtype)
        d, e, slow = jnp.split(fixed, 3, axis=-1)
        d, e = jax.nn.sigmoid(d), jax.nn.sigmoid(e)
        slow = (1 - d) * state.z + d * jnp.tanh(slow)
        last += scans.matmul(slow, self.slow_kernel[...], self.dtype)
        fast = (1 - e) * state.h + e * jnp.tanh(last)
        return LEMState(fast, slow)


class SLSTMState(NamedTuple):
    """The state of an sLSTM: hidden, cell, normalizer and stabilizer states, each [B, H]."""

    h: jax.Array
    c: jax.Array
    n: jax.Array
    m: jax.Array


class SLSTM(LSTM):
    """The LSTM with an exponential input gate, a part of xLSTM; 4 H (F + H + 1) parameters.

    i_t = exp(ĩ_t), f_t = σ(f̃_t), g_t = tanh(g̃_t), o_t = σ(õ_t); each ˜ is x_t W + b + h_{t-1} U
    c_t = f_t c_{t-1} + i_t g_t
    n_t = f_t n_{t-1} + i_t
    h_t = o_t c_t / n_t

    m_t = max(log f_t + m_{t-1}, ĩ_t) keeps the exponentials small: c and n are stored divided by
    exp(m), which cancels in h. Parameters are those of `LSTM`, side by side: i, f, g, o. There is
    one head: U is not block-diagonal.

    Source: M. Beck et al., xLSTM: extended long short-term memory, arXiv 2405.04517, section 2.2,
    with the forget gate σ.
    """

    def initial_state(self, batch_size: int) -> SLSTMState:
        zeros = super().initial_state(batch_size).h
        # In effect -inf: it makes i equal to 1 in the first step, so that n is never 0.
        return SLSTMState(zeros, zeros, zeros, jnp.full_like(zeros, -1e30))

    @staticmethod
    def gates(state: SLSTMState, z: jax.Array) -> SLSTMState:
        i, f, g, o = jnp.split(z, 4, axis=-1)
        kept = jax.nn.log_sigmoid(f) + state.m
        m = jnp.maximum(kept, i)
        f, i = jnp.exp(kept - m), jnp.exp(i - m)
        c, n = f * state.c + i * jnp.tanh(g), f * state.n + i
        return SLSTMState(jax.nn.sigmoid(o) * c / n, c, n, m)
