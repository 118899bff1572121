"""Recurrent layers as Flax NNX modules, and the `CELLS` table.

A cell has a time-parallel half and a recurrent half. `project` computes the input products of
several time steps at once, as one large matrix product; `step` computes what depends on the
previous step; `emit` turns states into outputs, again for several time steps at once. A new cell is
a subclass of `Cell` with `step`, an entry in `CELLS`, and an oracle in the tests.

Shapes: B batch, T time steps, L time steps that are read in one go, F features per step, H hidden
units, K gates.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmnist.networks import scans


class RecurrentParam(nnx.Param):
    """A parameter that sets how long a linear recurrence remembers.

    The papers train it with a smaller learning rate and no weight decay; see `optim`.
    """


class Constant(nnx.Variable):
    """A number that a cell computes with and that is not trained, such as an option to be swept."""

    def __init__(self, value: Any, **metadata: Any):
        super().__init__(jnp.asarray(value, jnp.float32), **metadata)


class Cell(nnx.Module):
    """A recurrent layer; constructed as `cell(F, H, rngs=rngs)`, and options as further keywords.

    A subclass defines `step`, and either a `kernel` W [F, K·H] and a `bias` b [K·H], or `project`
    and `initial_state` of its own; the rest follows. Reading a sequence in one go, in parts or step
    by step gives the same numbers.

    Its options are keywords of `__init__` with a default; each is a field of the configuration,
    `model.cell_options.NAME`. A float may come as an array, if it is swept; what is needed of it
    after initialization is kept as a `Constant`.
    """

    num_gates = 1
    # Time steps that a CPU reads in one go when it trains on a long sequence; see `in_stretches`.
    # Milliseconds of a training step on pixels, B = 128, H = 128, two cores, by this number:
    #                           2     4     7    14    28   uncut
    #   SimpleRNN              90    84    82    82    83     136
    #   GRU                   302   296   299   319   342     563
    #   LSTM                  404   392   383   409   423     639
    #   MinGRU                 56    47    43    45    45     107
    #   LRU                   119    76    63    52    47     148
    #   four residual MinGRU       1523  1475  1409  1409
    #   four residual LRU          2104  1927  1878  2165
    stretch = 7

    def initial_state(self, batch_size: int) -> Any:
        """Returns the state before the first step, a pytree of [B, H] whose first array is h_0."""
        return jnp.zeros((batch_size, self.bias.shape[0] // self.num_gates), self.bias.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., K·H]: what the inputs contribute; by default x W + b."""
        y = scans.product(x, self.kernel[...])
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + self.bias.shape)

    def step(self, state: Any, z: jax.Array) -> Any:
        """(state, z_t [B, K·H]) -> the next state, whose first array is h_t."""
        raise NotImplementedError

    def recur(self, state: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        """(state, z [L, B, K·H]) -> (state, h [L, B, H]): `step` over time, or a faster equivalent.

        Forward-mode derivatives need `scans.plain`, which `read` uses if it is given a mask.
        """
        return scans.plain(self.step, state, z)

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """(h, x [L, B, F]) -> outputs [L, B, H]: h itself, unless overridden."""
        return h

    def read(
        self, state: Any, x: jax.Array, mask: jax.Array | None = None, last: bool = False
    ) -> tuple[Any, jax.Array]:
        """Reads the next time steps: (state, x [L, B, F]) -> (state, outputs [L, B, H]).

        Where the mask, bool [L, B], is False, the state stays, and the output has no meaning. If
        only the `last` output is needed, it is the only one, [1, B, H].
        """
        with jax.named_scope("project"):
            z = self.project(x)
        with jax.named_scope("recurrence"):
            if mask is None:
                state, h = self.recur(state, z)
            else:
                state, h = scans.plain(self.step, state, z, mask)
        with jax.named_scope("emit"):
            return state, self.emit(h[-1:], x[-1:]) if last else self.emit(h, x)

    def __call__(
        self, x: jax.Array, lengths: jax.Array | None = None, truncate: int = 0
    ) -> jax.Array:
        """Returns the outputs for whole sequences: [T, B, F] -> [T, B, H].

        Of example b, the first `lengths[b]` time steps are read, or all without lengths, int [B];
        further outputs have no meaning. `truncate` as in `scans.in_stretches`.
        """

        def read(state, at_t):
            return self.read(state, *at_t)

        state, at_t = self.initial_state(x.shape[1]), (x, scans.mask(x, lengths))
        return scans.in_stretches(read, state, at_t, self.stretch, truncate)[1]


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
        """Returns U and c, or U and None."""
        return self.recurrent_kernel[...], None

    def step(self, state: Any, z: jax.Array) -> Any:
        return type(self).gates(state, *scans.gate_inputs(*self.recurrence(), state, z))

    def recur(self, state: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        return scans.gated(type(self).gates, *self.recurrence(), state, z)


class SimpleRNN(GatedCell):
    """The Elman network, as Keras's `SimpleRNN`; H (F + H + 1) parameters.

    h_t = tanh(x_t W + b + h_{t-1} U), h_0 = 0

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """

    activation = staticmethod(jnp.tanh)
    slope = staticmethod(lambda h: 1 - h * h)

    def step(self, state: jax.Array, z: jax.Array) -> jax.Array:
        return self.activation(*scans.gate_inputs(*self.recurrence(), state, z))

    def recur(self, state: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.recurrent_kernel[...]
        return scans.ungated(self.activation, self.slope, kernel, state, z)


class IRNN(SimpleRNN):
    """The Elman network with rectified units and U = I initially; H (F + H + 1) parameters.

    h_t = max(0, x_t W + b + h_{t-1} U), h_0 = 0; initially, W ~ N(0, 0.001²).

    Source: Q. V. Le, N. Jaitly, G. E. Hinton, A simple way to initialize recurrent networks of
    rectified linear units, arXiv 1504.00941.
    """

    kernel_init = staticmethod(nnx.initializers.normal(1e-3))
    recurrent_init = staticmethod(lambda key, shape: jnp.eye(*shape))

    activation = staticmethod(jax.nn.relu)
    slope = staticmethod(lambda h: (h > 0).astype(h.dtype))


class GRU(GatedCell):
    """The gated recurrent unit with the reset gate after the product; 3 H (F + H + 2) parameters.

    u_t = σ(x_t W_u + b_u + h_{t-1} U_u + c_u)          update, Keras's z
    r_t = σ(x_t W_r + b_r + h_{t-1} U_r + c_r)          reset
    n_t = tanh(x_t W_n + b_n + r_t (h_{t-1} U_n + c_n))   candidate
    h_t = u_t h_{t-1} + (1 - u_t) n_t

    Gates side by side: update, reset, candidate, as in Keras (`reset_after=True`); cuDNN and
    PyTorch differ in their order only. Initially, c = 0, the `recurrent_bias`.

    Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder, arXiv
    1406.1078v3; Keras `GRU`.
    """

    num_gates = 3

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        super().__init__(input_size, hidden_size, rngs=rngs)
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

    Gates side by side: i, f, g, o, as in Keras and PyTorch. Initially, b_f = `forget_bias`; 1 is
    Keras's `unit_forget_bias`.

    Source: S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997);
    forget gate: F. A. Gers et al. (2000); its bias: R. Jozefowicz et al. (2015).
    """

    num_gates = 4

    def __init__(
        self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, forget_bias: float = 1.0
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.bias[...] = self.bias[...].at[hidden_size : 2 * hidden_size].set(forget_bias)

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(*[super().initial_state(batch_size)] * 2)

    @staticmethod
    def gates(state: LSTMState, z: jax.Array) -> LSTMState:
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class LinearCell(Cell):
    """A recurrence that is linear in its state, channel by channel: h_t = a_t h_{t-1} + b_t.

    A subclass defines `coefficients`. Linear maps compose to linear maps, so a whole sequence can
    be computed in O(log T) parallel steps.
    """

    stretch = 14  # see `Cell.stretch`

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z [..., B, K·H] -> a, of that shape or one that broadcasts, and b [..., B, H]."""
        raise NotImplementedError

    def step(self, state: jax.Array, z: jax.Array) -> jax.Array:
        return self.recur(state, z[None], scans.linear_sequential)[0]

    def recur(
        self, state: jax.Array, z: jax.Array, linear: Callable = scans.linear
    ) -> tuple[jax.Array, jax.Array]:
        return linear(*self.coefficients(z), state)


class MinGRU(LinearCell):
    """The minimal GRU, whose gates do not see the state; 2 H (F + 1) parameters.

    z_t = σ(x_t W_z + b_z), h̃_t = x_t W_h + b_h
    h_t = (1 - z_t) h_{t-1} + z_t h̃_t

    Gates side by side: z, h̃; initially, each W is Glorot uniform and b = 0, as in Keras's dense
    layers.

    Source: L. Feng et al., Were RNNs all we needed?, arXiv 2410.01201, section 3.1: the form
    without the logarithm, in which h̃ may be negative.
    """

    num_gates = 2

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()
        kernels = [init(rngs.params(), (input_size, hidden_size)) for _ in range(2)]
        self.kernel = nnx.Param(jnp.concatenate(kernels, axis=1))
        self.bias = nnx.Param(jnp.zeros(2 * hidden_size))

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate, candidate = jnp.split(z, 2, axis=-1)
        return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate


class LRU(LinearCell):
    """The linear recurrent unit, diagonal and complex.

    It has N (2 F + 2 H + 3) parameters, and H more if F = H, for N complex states.

    λ = exp(-exp(ν) + i exp(θ)), γ = sqrt(1 - |λ|²)
    h_t = λ h_{t-1} + γ x_t B                          complex
    y_t = Re(h_t C) + x_t D                            real

    Initially, λ is uniform on the part of the ring r_min <= |λ| <= r_max whose phase is at most
    `max_phase`, and γ normalizes the variance of the state; both are trained. D, one number per
    channel, exists only if F = H. N is `state_size`, or H if that is 0. The state is [B, 2·N]: real
    and imaginary parts side by side.

    Source: A. Orvieto et al., Resurrecting recurrent neural networks for long sequences, arXiv
    2303.06349, appendix A.

    Parameters are ν, θ and log γ [N]; initially, the parts of B [F, N] are N(0, 1 / 2F), those of
    C [N, H] N(0, 1 / N), and D [H] N(0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        state_size: Annotated[int, "[0, 65536]"] = 0,
        r_min: Annotated[float, "[0, 1)"] = 0.9,
        r_max: Annotated[float, "(0, 1)"] = 0.999,
        max_phase: Annotated[float, "(0, 6.284)"] = 2 * np.pi,
    ):
        f, h, n = input_size, hidden_size, state_size or hidden_size

        def uniform():
            return jax.random.uniform(rngs.params(), (n,))

        def normal(variance, *shape):
            return nnx.initializers.normal(variance**0.5)(rngs.params(), shape)

        squares = r_min**2 + (r_max**2 - r_min**2) * uniform()
        self.nu_log = RecurrentParam(jnp.log(-0.5 * jnp.log(squares)))
        self.theta_log = RecurrentParam(jnp.log(max_phase * jnp.maximum(uniform(), 1e-7)))
        self.gamma_log = RecurrentParam(0.5 * jnp.log(1 - squares))
        self.B_re, self.B_im = (RecurrentParam(normal(1 / (2 * f), f, n)) for _ in range(2))
        self.C_re, self.C_im = (nnx.Param(normal(1 / n, n, h)) for _ in range(2))
        self.D = nnx.Param(normal(1, h)) if f == h else None

    def initial_state(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, 2 * self.nu_log.shape[0]), self.nu_log.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., 2·N]: real and imaginary parts of γ x_t B, side by side."""
        gamma = jnp.exp(self.gamma_log[...])[None]
        kernel = jnp.concatenate([self.B_re[...] * gamma, self.B_im[...] * gamma], axis=1)
        return scans.product(x, kernel)

    def coefficients(self, z: jax.Array) -> tuple[Any, Any]:
        modulus, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
        a = modulus * jnp.cos(phase), modulus * jnp.sin(phase)
        return tuple(part[None, None] for part in a), tuple(jnp.split(z, 2, axis=-1))

    def recur(
        self, state: jax.Array, z: jax.Array, linear: Callable = scans.linear
    ) -> tuple[jax.Array, jax.Array]:
        pairs = linear(*self.coefficients(z), tuple(jnp.split(state, 2, axis=-1)))
        last, h = (jnp.concatenate(pair, axis=-1) for pair in pairs)
        return last, h

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        y = scans.product(h, jnp.concatenate([self.C_re[...], -self.C_im[...]], axis=0))
        return y if self.D is None else y + x * self.D[...].reshape(1, 1, -1)


CELLS = {
    "simple_rnn": SimpleRNN,
    "irnn": IRNN,
    "gru": GRU,
    "lstm": LSTM,
    "min_gru": MinGRU,
    "lru": LRU,
}
