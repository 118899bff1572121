"""Recurrent layers as Flax NNX modules, and the `CELLS` table.

A cell has a time-parallel half and a recurrent half. `project` does the input products of all
time steps at once, as one large matrix product; `step` does what has to wait for the step
before; `emit` turns states into outputs, again for all time steps at once. A new cell is a
subclass of `Cell` and an entry in `CELLS`.

Shapes: B batch, T time steps, F features a step, H hidden units, K gates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from seqmnist.config import ScanConfig
from seqmnist.networks import scans


class RecurrentParam(nnx.Param):
    """A parameter that sets how long a linear recurrence remembers.

    Its papers ask for a smaller learning rate and no weight decay; see `optim`.
    """


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x W + b: [..., F] with [F, H] and [H] -> [..., H]."""
    return scans.product(x, kernel) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


class Cell(nnx.Module):
    """A recurrent layer, [T, B, F] -> [T, B, H]; built as `cell(F, H, rngs=rngs)`.

    A subclass gives `project`, `initial_carry` and `step`; the rest follows.
    """

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., K·H]: what the inputs contribute, for all time steps at once."""
        raise NotImplementedError

    def initial_carry(self, batch_size: int) -> Any:
        """Returns the state before the first step, a pytree of [B, H]."""
        raise NotImplementedError

    def step(self, carry: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        """(carry, z_t [B, K·H]) -> (carry, h_t [B, H])."""
        raise NotImplementedError

    def scan(self, carry: Any, z: jax.Array, config: ScanConfig) -> jax.Array:
        """(carry, z [T, B, K·H]) -> h [T, B, H]: `step` over time, or something as good."""
        return scans.sequential(self.step, carry, z, config)

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """(h, x [T, B, F]) -> outputs [T, B, H]: the states themselves, unless overridden."""
        del x
        return h

    def states(self, x: jax.Array, config: ScanConfig) -> jax.Array:
        """Reads a whole sequence from the first state: [T, B, F] -> h [T, B, H]."""
        with jax.named_scope("project"):
            z = self.project(x)
        with jax.named_scope("recurrence"):
            return self.scan(self.initial_carry(x.shape[1]), z, config)

    def __call__(self, x: jax.Array, config: ScanConfig) -> jax.Array:
        """Returns the outputs of all time steps: [T, B, F] -> [T, B, H]."""
        return self.emit(self.states(x, config), x)

    def last(self, x: jax.Array, config: ScanConfig) -> jax.Array:
        """Returns the output of the last time step: [T, B, F] -> [B, H]."""
        return self.emit(self.states(x, config)[-1:], x[-1:])[0]


class GatedCell(Cell):
    """A recurrence through a matrix: gates act on z_t, from the input, and on h_{t-1} U.

    A subclass gives `gates`. Parameters are named, laid out and started as in Keras, the
    gates side by side in the order that the subclass documents.

    Attributes:
      kernel: W, [F, K·H], Glorot uniform.
      recurrent_kernel: U, [H, K·H], orthogonal.
      bias: b, [K·H], zeros.
    """

    num_gates = 1
    kernel_init = staticmethod(nnx.initializers.glorot_uniform())
    recurrent_init = staticmethod(nnx.initializers.orthogonal())

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        width = self.num_gates * hidden_size
        self.kernel = nnx.Param(self.kernel_init(rngs.params(), (input_size, width)))
        self.recurrent_kernel = nnx.Param(self.recurrent_init(rngs.params(), (hidden_size, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def initial_carry(self, batch_size: int) -> Any:
        """Returns h_0 = 0, [B, H]."""
        return jnp.zeros((batch_size, self.recurrent_kernel.shape[0]), self.kernel.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., K·H]: x_t W + b."""
        return affine(x, self.kernel[...], self.bias[...])

    @staticmethod
    def gates(carry: Any, *inputs: jax.Array) -> tuple[Any, jax.Array]:
        """(carry, z_t + h_{t-1} U [B, K·H]) -> (carry, h_t [B, H]); no parameters.

        Where `recurrence` gives a c, z_t and h_{t-1} U + c come apart. The first array of the
        carry is h.
        """
        raise NotImplementedError

    def recurrence(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns U and c, or None."""
        return self.recurrent_kernel[...], None

    def step(self, carry: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        """See `Cell`."""
        return scans.gated_step(self.gates, *self.recurrence(), carry, z)

    def scan(self, carry: Any, z: jax.Array, config: ScanConfig) -> jax.Array:
        """See `Cell`."""
        return scans.gated(self.gates, *self.recurrence(), carry, z, config)


class SimpleRNN(GatedCell):
    """The Elman network, as Keras's `SimpleRNN`; H (F + H + 1) parameters.

    h_t = tanh(x_t W + b + h_{t-1} U), h_0 = 0

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """

    activation = staticmethod(jnp.tanh)
    slope = staticmethod(lambda h: 1 - h * h)

    def gates(self, carry: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `GatedCell`."""
        del carry
        h = self.activation(z)
        return h, h

    def scan(self, carry: jax.Array, z: jax.Array, config: ScanConfig) -> jax.Array:
        """See `Cell`."""
        kernel = self.recurrent_kernel[...]
        return scans.ungated(self.activation, self.slope, kernel, carry, z, config)


class IRNN(SimpleRNN):
    """The Elman network with rectified units, started as the identity; H (F + H + 1) parameters.

    h_t = max(0, x_t W + b + h_{t-1} U), h_0 = 0; U = I and W ~ N(0, 0.001²) at the start.

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

    Gates side by side: update, reset, candidate, as in Keras (`reset_after=True`) and, but for
    their order, cuDNN and PyTorch.

    Source: K. Cho et al., Learning phrase representations using RNN encoder-decoder, arXiv
    1406.1078v3; Keras `GRU`.

    Attributes:
      recurrent_bias: c, [3·H], zeros.
    """

    num_gates = 3

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.recurrent_bias = nnx.Param(jnp.zeros(3 * hidden_size))

    def recurrence(self) -> tuple[jax.Array, jax.Array]:
        """See `GatedCell`."""
        return self.recurrent_kernel[...], self.recurrent_bias[...]

    @staticmethod
    def gates(carry: jax.Array, z: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `GatedCell`."""
        z_update, z_reset, z_candidate = jnp.split(z, 3, axis=-1)
        r_update, r_reset, r_candidate = jnp.split(r, 3, axis=-1)
        update = jax.nn.sigmoid(z_update + r_update)
        reset = jax.nn.sigmoid(z_reset + r_reset)
        candidate = jnp.tanh(z_candidate + reset * r_candidate)
        h = update * carry + (1 - update) * candidate
        return h, h


class LSTMCarry(NamedTuple):
    """The state of an LSTM.

    Attributes:
      h: hidden state, [B, H].
      c: cell state, [B, H].
    """

    h: jax.Array
    c: jax.Array


class LSTM(GatedCell):
    """Long short-term memory with a forget bias of 1; 4 H (F + H + 1) parameters.

    i_t, f_t, o_t = σ(x_t W + b + h_{t-1} U), g_t = tanh(x_t W + b + h_{t-1} U)
    c_t = f_t c_{t-1} + i_t g_t
    h_t = o_t tanh(c_t)

    Gates side by side: i, f, g, o, as in Keras and PyTorch. Keras draws and starts the
    parameters like this, with b_f = 1 (`unit_forget_bias`).

    Source: S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997);
    forget gate: F. A. Gers et al. (2000); its bias: R. Jozefowicz et al. (2015).
    """

    num_gates = 4

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.bias[...] = self.bias[...].at[hidden_size : 2 * hidden_size].set(1)

    def initial_carry(self, batch_size: int) -> LSTMCarry:
        """Returns h_0 = c_0 = 0."""
        return LSTMCarry(*[super().initial_carry(batch_size)] * 2)

    @staticmethod
    def gates(carry: LSTMCarry, z: jax.Array) -> tuple[LSTMCarry, jax.Array]:
        """See `GatedCell`."""
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * carry.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return LSTMCarry(h, c), h


class LinearCell(Cell):
    """A recurrence that is linear in its state, channel by channel: h_t = a_t h_{t-1} + b_t.

    A subclass gives `coefficients`. Linear maps compose to linear maps, so a whole sequence can
    be computed in O(log T) parallel steps.
    """

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z [..., B, K·H] -> a, of that shape or one that broadcasts, and b [..., B, H]."""
        raise NotImplementedError

    def step(self, carry: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Cell`."""
        a, b = self.coefficients(z)
        h = a * carry + b
        return h, h

    def scan(self, carry: jax.Array, z: jax.Array, config: ScanConfig) -> jax.Array:
        """See `Cell`."""
        return scans.linear(*self.coefficients(z), carry, config)


class MinGRU(LinearCell):
    """The minimal GRU, whose gates do not see the state; 2 H (F + 1) parameters.

    z_t = σ(x_t W_z + b_z)
    h̃_t = x_t W_h + b_h
    h_t = (1 - z_t) h_{t-1} + z_t h̃_t

    Source: L. Feng et al., Were RNNs all we needed?, arXiv 2410.01201, section 3.1: the form
    without the logarithm, which keeps h̃ signed. Initializers are Keras's for dense layers.

    Attributes:
      kernel: W, [F, 2·H], gates z and h̃ side by side, Glorot uniform for each.
      bias: b, [2·H], zeros.
    """

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_uniform()
        kernels = [init(rngs.params(), (input_size, hidden_size)) for _ in range(2)]
        self.kernel = nnx.Param(jnp.concatenate(kernels, axis=1))
        self.bias = nnx.Param(jnp.zeros(2 * hidden_size))

    def initial_carry(self, batch_size: int) -> jax.Array:
        """Returns h_0 = 0, [B, H]."""
        return jnp.zeros((batch_size, self.bias.shape[0] // 2), self.bias.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., 2·H]."""
        return affine(x, self.kernel[...], self.bias[...])

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `LinearCell`: a = 1 - z_t, b = z_t h̃_t."""
        gate, candidate = jnp.split(z, 2, axis=-1)
        return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate


class LRU(LinearCell):
    r"""The linear recurrent unit: a diagonal complex recurrence; H (2 F + 2 H + 3) parameters,
    and H more where F = H.

    λ = exp(-exp(ν) + i exp(θ)), γ = sqrt(1 - |λ|²)
    h_t = λ h_{t-1} + γ x_t B                          complex
    y_t = Re(h_t C) + x_t D                            real

    λ starts uniformly on the ring r_min <= |λ| <= r_max; γ normalizes the state's variance at
    the start and is trained from there. D, one number a channel, is there where F = H.

    Source: A. Orvieto et al., Resurrecting recurrent neural networks for long sequences, arXiv
    2303.06349, appendix A; as many complex states as outputs, [H].

    Attributes:
      nu_log, theta_log, gamma_log: ν, θ and log γ, [H].
      B_re, B_im: B, [F, H], N(0, 1 / 2F).
      C_re, C_im: C, [H, H], N(0, 1 / H).
      D: [H], N(0, 1).
    """

    r_min, r_max, max_phase = 0.9, 0.999, 2 * jnp.pi

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        uniform, normal = nnx.initializers.uniform(1.0), nnx.initializers.normal
        squares = self.r_min**2 + (self.r_max**2 - self.r_min**2) * uniform(
            rngs.params(), (hidden_size,)
        )
        phases = self.max_phase * uniform(rngs.params(), (hidden_size,))
        self.nu_log = RecurrentParam(jnp.log(-0.5 * jnp.log(squares)))
        self.theta_log = RecurrentParam(jnp.log(phases))
        self.gamma_log = RecurrentParam(0.5 * jnp.log(1 - squares))
        inward, outward = (input_size, hidden_size), (hidden_size, hidden_size)
        self.B_re = RecurrentParam(normal((2 * input_size) ** -0.5)(rngs.params(), inward))
        self.B_im = RecurrentParam(normal((2 * input_size) ** -0.5)(rngs.params(), inward))
        self.C_re = nnx.Param(normal(hidden_size**-0.5)(rngs.params(), outward))
        self.C_im = nnx.Param(normal(hidden_size**-0.5)(rngs.params(), outward))
        has_skip = input_size == hidden_size
        self.D = nnx.Param(normal(1.0)(rngs.params(), (hidden_size,))) if has_skip else None

    def initial_carry(self, batch_size: int) -> jax.Array:
        """Returns h_0 = 0, complex [B, H]."""
        zeros = jnp.zeros((batch_size, self.nu_log.shape[0]), self.nu_log.dtype)
        return lax.complex(zeros, zeros)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., 2·H]: the real and imaginary part of γ x_t B, side by side."""
        gamma = jnp.exp(self.gamma_log[...])[None]
        kernel = jnp.concatenate([self.B_re[...] * gamma, self.B_im[...] * gamma], axis=1)
        return scans.product(x, kernel)

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `LinearCell`: a = λ, the same at every time step, b = γ x_t B."""
        modulus, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
        a = lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase))
        b = lax.complex(*jnp.split(z, 2, axis=-1))
        return a.reshape((1,) * (z.ndim - 1) + (-1,)), b

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """(h complex [T, B, H], x [T, B, F]) -> y, [T, B, H]."""
        parts = jnp.concatenate([h.real, h.imag], axis=-1)
        y = scans.product(parts, jnp.concatenate([self.C_re[...], -self.C_im[...]], axis=0))
        return y if self.D is None else y + x * self.D[...].reshape(1, 1, -1)


CELLS = {
    "simple_rnn": SimpleRNN,
    "irnn": IRNN,
    "gru": GRU,
    "lstm": LSTM,
    "min_gru": MinGRU,
    "lru": LRU,
}
