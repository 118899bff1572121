"""Cells that are linear in their state, and so can read a whole sequence in parallel.

Shapes as in `cell`.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from seqmnist.errors import UserError
from seqmnist.networks import scans
from seqmnist.networks.cell import Cell, RecurrentParam, TimeScale, log_odds


class LinearCell(Cell):
    """A recurrence that is linear in its state, channel by channel: h_t = a_t h_{t-1} + b_t.

    A subclass defines `coefficients`. Linear maps compose to linear maps, so a whole sequence can
    be computed in O(log T) parallel steps. Unless it defines parameters of its own, it has W
    [F, K·H], initially Glorot uniform for each gate, and b [K·H] zero.
    """

    stretch = 14  # see `Cell.stretch`

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.kernel = _glorot(rngs, input_size, [hidden_size] * self.num_gates)
        self.bias = nnx.Param(jnp.zeros(self.num_gates * hidden_size))

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z [..., B, K·H] -> b [..., B, H], and before it a, which broadcasts to that shape."""
        raise NotImplementedError

    def step(self, state: jax.Array, z: jax.Array) -> jax.Array:
        return self.recur(state, z[None], scans.linear_sequential)[0]

    def recur(
        self, state: jax.Array, z: jax.Array, linear: Callable = scans.linear
    ) -> tuple[jax.Array, jax.Array]:
        return linear(*self.coefficients(z), state)


def _glorot(rngs, input_size, widths):
    """Returns kernels [F, width], each Glorot uniform, side by side."""
    init = nnx.initializers.glorot_uniform()
    kernels = [init(rngs.params(), (input_size, width)) for width in widths]
    return nnx.Param(jnp.concatenate(kernels, axis=1))


def _log_time_steps(rngs, dt_min, dt_max, number):
    """Returns log Δ [number], for Δ log-uniform on dt_min to dt_max."""
    low, high = jnp.log(dt_min), jnp.log(dt_max)
    return low + (high - low) * jax.random.uniform(rngs.params(), (number,))


class MinGRU(LinearCell):
    """The minimal GRU, whose gates do not see the state; 2 H (F + 1) parameters.

    z_t = σ(x_t W_z + b_z), h̃_t = x_t W_h + b_h
    h_t = (1 - z_t) h_{t-1} + z_t h̃_t

    Gates side by side: z, h̃. Initially, b_z = -log(t - 1) for time scales t of the units, evenly
    from 2 to `t_max`, as in `GRU`; by default 0.

    Source: L. Feng et al., Were RNNs all we needed?, arXiv 2410.01201, section 3.1: the form
    without the logarithm, in which h̃ may be negative.
    """

    num_gates = 2

    def __init__(
        self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, t_max: TimeScale = 2.0
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        self.bias[...] = self.bias[...].at[:hidden_size].add(-log_odds(t_max, hidden_size))

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate, candidate = jnp.split(z, 2, axis=-1)
        return jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate


class MinLSTM(LinearCell):
    """The minimal LSTM, whose gates do not see the state; 3 H (F + 1) parameters.

    f_t = σ(x_t W_f + b_f), i_t = σ(x_t W_i + b_i), h̃_t = x_t W_h + b_h
    h_t = (f_t h_{t-1} + i_t h̃_t) / (f_t + i_t)

    Gates side by side: f, i, h̃. Initially, b_f = log(t - 1) = -b_i for time scales t of the units,
    evenly from 2 to `t_max`, as in `GRU`; by default 0.

    Source: L. Feng et al., Were RNNs all we needed?, arXiv 2410.01201, section 3.2, without the
    logarithm.
    """

    num_gates = 3

    def __init__(
        self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, t_max: TimeScale = 2.0
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        odds = log_odds(t_max, hidden_size)
        self.bias[...] = self.bias[...].at[: 2 * hidden_size].add(jnp.concatenate([odds, -odds]))

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        f, i, candidate = jnp.split(z, 3, axis=-1)
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)  # f / (f + i), even for gates near 0
        return jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds) * candidate


class RGLRU(LinearCell):
    """The real-gated linear recurrent unit, of Griffin; H (3 F + 4) parameters.

    r_t = σ(x_t W_r + b_r), i_t = σ(x_t W_i + b_i), u_t = x_t W_u + b_u
    a_t = σ(Λ)^(8 r_t)
    h_t = a_t h_{t-1} + sqrt(1 - a_t²) i_t u_t

    Gates side by side: r, i, u; initially, σ(Λ)^8 is uniform on `r_min` to `r_max`. The paper's
    layer takes H channels and gates these themselves; ours gates u, so that F may be any number.

    Source: S. De et al., Griffin: mixing gated linear recurrences with local attention for
    efficient language models, arXiv 2402.19427, section 2.4.
    """

    num_gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        r_min: Annotated[float, "[0, 1)"] = 0.9,
        r_max: Annotated[float, "(0, 1)"] = 0.999,
    ):
        super().__init__(input_size, hidden_size, rngs=rngs)
        a = r_min + (r_max - r_min) * jax.random.uniform(rngs.params(), (hidden_size,))
        root = jnp.clip(a, 1e-7, 1 - 1e-6) ** (1 / 8)
        self.Lambda = RecurrentParam(jnp.log(root / (1 - root)))

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        r, i, u = jnp.split(z, 3, axis=-1)
        log_a = jax.nn.log_sigmoid(lax.broadcast_to_rank(self.Lambda[...], z.ndim))
        log_a = 8 * jax.nn.sigmoid(r) * log_a
        return jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a)) * jax.nn.sigmoid(i) * u


class DiagonalCell(LinearCell):
    """A complex recurrence with constant coefficients, between two products.

    h_t = λ h_{t-1} + x_t B                            complex [N]
    y_t = Re(h_t C) + x_t D                            real [H]

    D, one number per channel, exists only if F = H. The state is [B, 2·N]: real and imaginary parts
    side by side. A subclass defines `poles` and `input_kernel`, and parameters C_re, C_im and D;
    `read` does not go through `project`, `coefficients` or `recur` if only the last output counts.
    """

    # Milliseconds of a training step of 512 units and 192 states on pixels, B = 128, by this
    # number, on one core: 14 570, 56 164, 784 40. Longer sequences are cut, to save memory.
    stretch_to_last = 784

    def poles(self) -> tuple[jax.Array, jax.Array]:
        """Returns the real and imaginary parts of λ, each [N]."""
        raise NotImplementedError

    def input_kernel(self) -> tuple[jax.Array, jax.Array]:
        """Returns the real and imaginary parts of B, each [F, N]."""
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, 2 * self.C_re.shape[0]), self.C_re.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., 2·N]: real and imaginary parts of x_t B, side by side."""
        return scans.product(x, jnp.concatenate(self.input_kernel(), axis=1), self.dtype)

    def coefficients(self, z: jax.Array) -> tuple[Any, Any]:
        a = tuple(part[None, None] for part in self.poles())
        return a, tuple(jnp.split(z, 2, axis=-1))

    def recur(
        self, state: jax.Array, z: jax.Array, linear: Callable = scans.linear
    ) -> tuple[jax.Array, jax.Array]:
        pairs = linear(*self.coefficients(z), tuple(jnp.split(state, 2, axis=-1)))
        last, h = (jnp.concatenate(pair, axis=-1) for pair in pairs)
        return last, h

    def read(
        self, state: jax.Array, x: jax.Array, mask: jax.Array | None = None, last: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """As `Cell.read`; the last state alone is one product, Σ_t x_t B λ^(L - t) + λ^L h_0.

        A single layer with the readout `last` so trains 1.6 to 2.1 times as fast on rows, and 17 to
        30 times on pixels.
        """
        if mask is not None or not last or jax.config.jax_disable_jit:
            return super().read(state, x, mask, last)
        with jax.named_scope("recurrence"):
            a = tuple(part[None, None] for part in self.poles())
            one = jnp.ones_like(a[0][0]), jnp.zeros_like(a[0][0])
            nothing = tuple(jnp.zeros((len(x), *part.shape), part.dtype) for part in one)
            a_to_l, powers = scans.linear(a, nothing, one)
            powers = jax.tree.map(jnp.flipud, scans.shifted(one, powers))  # λ^(L - t)
            kernel = scans.times(powers, tuple(part[None] for part in self.input_kernel()))
            kernel = jnp.concatenate(kernel, axis=-1).reshape(-1, state.shape[-1])
            before = scans.times(a_to_l, tuple(jnp.split(state, 2, axis=-1)))
            inputs = jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)
            h = jnp.concatenate(before, axis=-1) + scans.product(inputs, kernel, self.dtype)
        with jax.named_scope("emit"):
            return h, self.emit(h[None], x[-1:])

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        kernel = jnp.concatenate([self.C_re[...], -self.C_im[...]], axis=0)
        y = scans.product(h, kernel, self.dtype)
        return y if self.D is None else y + x * self.D[...].reshape(1, 1, -1)


class LRU(DiagonalCell):
    """The linear recurrent unit, diagonal and complex.

    It has N (2 F + 2 H + 3) parameters, and H more if F = H, for N complex states.

    λ = exp(-exp(ν) + i exp(θ)), γ = sqrt(1 - |λ|²)
    h_t = λ h_{t-1} + γ x_t B, as `DiagonalCell` says

    Initially, λ is uniform on the part of the ring r_min <= |λ| <= r_max whose phase is at most
    `max_phase`, and γ normalizes the variance of the state; both are trained. N is `state_size`, or
    H if that is 0.

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
        max_phase: Annotated[float, "[1e-30, 6.284)"] = 2 * np.pi,
    ):
        f, h, n = input_size, hidden_size, state_size or hidden_size

        def uniform():
            return jax.random.uniform(rngs.params(), (n,))

        def normal(variance, *shape):
            return nnx.initializers.normal(variance**0.5)(rngs.params(), shape)

        squares = r_min**2 + (r_max**2 - r_min**2) * uniform()
        squares = jnp.clip(squares, 1e-14, 1 - 1e-6)
        self.nu_log = RecurrentParam(jnp.log(-0.5 * jnp.log(squares)))
        self.theta_log = RecurrentParam(jnp.log(max_phase * jnp.maximum(uniform(), 1e-7)))
        self.gamma_log = RecurrentParam(0.5 * jnp.log(1 - squares))
        self.B_re, self.B_im = (RecurrentParam(normal(1 / (2 * f), f, n)) for _ in range(2))
        self.C_re, self.C_im = (nnx.Param(normal(1 / n, n, h)) for _ in range(2))
        self.D = nnx.Param(normal(1, h)) if f == h else None

    def poles(self) -> tuple[jax.Array, jax.Array]:
        modulus, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
        return modulus * jnp.cos(phase), modulus * jnp.sin(phase)

    def input_kernel(self) -> tuple[jax.Array, jax.Array]:
        gamma = jnp.exp(self.gamma_log[...])[None]
        return self.B_re[...] * gamma, self.B_im[...] * gamma


class S5(DiagonalCell):
    """The simplified state space layer, diagonal, with many inputs and outputs.

    It has N (2 F + 2 H + 3) parameters, and H more if F = H, for N complex states.

    λ̄ = exp(λ Δ), B̄ = (λ̄ - 1) / λ B                    zero-order hold
    h_t = λ̄ h_{t-1} + x_t B̄, as `DiagonalCell` says

    Initially, λ are those eigenvalues of the normal part of the HiPPO-LegS matrix [2·N, 2·N] with a
    positive imaginary part, each of which stands for a conjugate pair; B is a real and C a complex
    random matrix in the basis of its eigenvectors, LeCun normal, C twice that for the other half of
    each pair; Δ, one for each state, is log-uniform on `dt_min` to `dt_max`; D is N(0, 1). N is
    `state_size`, or H if that is 0. We keep Re λ negative by training the logarithm of -Re λ, and
    have one of the paper's J blocks.

    Source: J. T. H. Smith et al., Simplified state space layers for sequence modeling, arXiv
    2208.04933, sections 3 and B.1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        state_size: Annotated[int, "[0, 4096]"] = 0,
        dt_min: Annotated[float, "[1e-30, 1]"] = 0.001,
        dt_max: Annotated[float, "[1e-30, 10]"] = 0.1,
    ):
        f, h, n = input_size, hidden_size, state_size or hidden_size
        if n > 4096:
            raise UserError(
                f"{n:,} states need the eigenvalues of a matrix of {2 * n:,} rows; set "
                "config.model.cell_options.state_size to 4096 or less"
            )
        frequencies, basis = _hippo(n)
        b = jax.random.normal(rngs.params(), (f, 2 * n)) * f**-0.5
        c = jax.random.normal(rngs.params(), (2, 2 * n, h)) * n**-0.5
        re, im = jnp.asarray(basis.real, b.dtype), jnp.asarray(basis.imag, b.dtype)
        self.decay_log = RecurrentParam(jnp.full(n, jnp.log(0.5)))
        self.frequency = RecurrentParam(jnp.asarray(frequencies, b.dtype))
        self.step_log = RecurrentParam(_log_time_steps(rngs, dt_min, dt_max, n))
        self.B_re, self.B_im = RecurrentParam(b @ re), RecurrentParam(-b @ im)
        self.C_re = nnx.Param(re.T @ c[0] - im.T @ c[1])
        self.C_im = nnx.Param(im.T @ c[0] + re.T @ c[1])
        self.D = nnx.Param(jax.random.normal(rngs.params(), (h,))) if f == h else None

    def poles(self) -> tuple[jax.Array, jax.Array]:
        a = jnp.exp(self._exponents())
        return a.real, a.imag

    def input_kernel(self) -> tuple[jax.Array, jax.Array]:
        exponents, dt = self._exponents(), jnp.exp(self.step_log[...])[None]
        hold = (jnp.expm1(exponents) / exponents)[None]
        kernel = lax.complex(self.B_re[...] * dt, self.B_im[...] * dt) * hold
        return kernel.real, kernel.imag

    def _exponents(self):
        """Returns λ Δ [N]."""
        dt = jnp.exp(self.step_log[...])
        return lax.complex(-jnp.exp(self.decay_log[...]) * dt, self.frequency[...] * dt)


@functools.cache
def _hippo(n):
    """Returns ω [N] > 0 and eigenvectors [2·N, N] of HiPPO-LegS's normal part, λ = -1/2 + iω."""
    p = np.sqrt(np.arange(2 * n) + 0.5)
    skew = np.triu(np.outer(p, p), 1)
    frequencies, basis = np.linalg.eigh(-1j * (skew - skew.T))
    return frequencies[n:], basis[:, n:]


class S6(LinearCell):
    """The selective state space layer, the core of Mamba; H (2 F + N + 2) + 2 F N parameters.

    u_t = x_t W_u, Δ_t = softplus(x_t W_Δ + b), B_t = x_t W_B, C_t = x_t W_C
    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t, A = -exp(log A)     [H, N]
    y_t = h_t C_t + D u_t                                        [H]

    N is `state_size`. Initially, A is -1 to -N in each channel, softplus(b) log-uniform on `dt_min`
    to `dt_max`, D = 1, and each W Glorot uniform; `kernel` has those of u, Δ, B, C side by side.
    The state is [B, H·N]. The convolution and the output gate of Mamba's block are left out, and
    W_Δ has full rank.

    Source: A. Gu, T. Dao, Mamba: linear-time sequence modeling with selective state spaces, arXiv
    2312.00752, algorithm 2.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        state_size: Annotated[int, "[1, 1024]"] = 16,
        dt_min: Annotated[float, "[1e-30, 1]"] = 0.001,
        dt_max: Annotated[float, "[1e-30, 10]"] = 0.1,
    ):
        h, n = hidden_size, state_size
        self.kernel = _glorot(rngs, input_size, (h, h, n, n))
        dt = jnp.exp(_log_time_steps(rngs, dt_min, dt_max, h))
        self.bias = nnx.Param(jnp.log(jnp.expm1(dt)))
        rates = jnp.log(jnp.arange(1.0, n + 1))
        self.A_log = RecurrentParam(jnp.broadcast_to(rates[None], (h, n)))
        self.D = nnx.Param(jnp.ones(h))

    def initial_state(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, self.A_log.size), self.A_log.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., 2·H + N]: u, Δ before softplus, and B, side by side."""
        h, n = self.A_log.shape
        z = scans.product(x, self.kernel[:, : 2 * h + n], self.dtype)
        bias = jnp.pad(self.bias[...], (h, n))
        return z + lax.broadcast_to_rank(bias, z.ndim)

    def coefficients(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, n = self.A_log.shape
        u, dt, b = jnp.split(z, [h, 2 * h], axis=-1)
        dt = jax.nn.softplus(dt)
        rates = -jnp.exp(lax.broadcast_to_rank(self.A_log[...], z.ndim + 1))
        a = jnp.exp(dt[..., None] * rates)
        b = (dt * u)[..., None] * b[..., None, :]
        return tuple(each.reshape(*z.shape[:-1], h * n) for each in (a, b))

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        width, n = self.A_log.shape
        u, c = (
            scans.product(x, self.kernel[:, part], self.dtype)
            for part in (slice(width), slice(-n, None))
        )
        y = jnp.einsum("lbhn,lbn->lbh", h.reshape(*h.shape[:2], width, n), c)
        return y + u * self.D[...].reshape(1, 1, -1)


class DeltaState(NamedTuple):
    """The state of a DeltaNet: its output h [B, H], and S [B, heads, values, keys]."""

    h: jax.Array
    S: jax.Array


class DeltaNet(Cell):
    """A memory of keys and values, corrected by the delta rule; (F + 1) (3 H + M) parameters.

    q_t, k_t = unit(silu(x_t W + b)), v_t = silu(x_t W + b), β_t = σ(x_t W + b)
    S_t = S_{t-1} + β_t (v_t - S_{t-1} k_t) k_tᵀ
    h_t = S_t q_t

    There are M = `num_heads` memories, each for H / M of the channels, with a β of its own. unit(x)
    is x / sqrt(‖x‖² + 1e-6). Side by side: q, k, v, β; initially, each W is Glorot uniform and
    b = 0. It reads step by step; the paper's form for chunks of a sequence is left out.

    Source: I. Schlag et al., Linear transformers are secretly fast weight programmers, arXiv
    2102.11174; in this form S. Yang et al., arXiv 2406.06484.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rngs: nnx.Rngs,
        num_heads: Annotated[int, "[1, 1024]"] = 1,
    ):
        if hidden_size % num_heads:
            raise UserError(
                f"config.model.cell_options.num_heads={num_heads} does not divide hidden_size="
                f"{hidden_size}; choose another"
            )
        widths, self.num_heads = (*[hidden_size] * 3, num_heads), num_heads
        self.kernel = _glorot(rngs, input_size, widths)
        self.bias = nnx.Param(jnp.zeros(sum(widths)))

    def initial_state(self, batch_size: int) -> DeltaState:
        hidden_size, dtype = (self.bias.shape[0] - self.num_heads) // 3, self.bias.dtype
        size = hidden_size // self.num_heads
        memory = jnp.zeros((batch_size, self.num_heads, size, size), dtype)
        return DeltaState(jnp.zeros((batch_size, hidden_size), dtype), memory)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., 3·H + M]: q, k, v and β, side by side."""
        q, k, v, beta = self._split(super().project(x))
        q, k, v = (jax.nn.silu(each) for each in (q, k, v))
        squares = ((each * each).sum(-1, keepdims=True) for each in (q, k))
        q, k = (each * lax.rsqrt(s + 1e-6) for each, s in zip((q, k), squares, strict=True))
        flat = (each.reshape(*x.shape[:-1], -1) for each in (q, k, v))
        return jnp.concatenate([*flat, jax.nn.sigmoid(beta)], axis=-1)

    def step(self, state: DeltaState, z: jax.Array) -> DeltaState:
        q, k, v, beta = self._split(z)
        error = beta[..., None] * (v - jnp.einsum("bmvk,bmk->bmv", state.S, k))
        memory = state.S + error[..., None] * k[..., None, :]
        h = jnp.einsum("bmvk,bmk->bmv", memory, q)
        return DeltaState(h.reshape(state.h.shape), memory)

    def _split(self, z):
        """Returns q, k and v, [..., M, H / M], and β [..., M]."""
        qkv, beta = z[..., : -self.num_heads], z[..., -self.num_heads :]
        qkv = qkv.reshape(*z.shape[:-1], 3 * self.num_heads, -1)
        return *jnp.split(qkv, 3, axis=-2), beta
