"""Recurrent layers as Flax NNX modules, and the `CELLS` table.

A cell has two halves. `project` does all the input products of all time steps at once, as
one large matrix product; `step` does what has to wait for the step before. Shapes: B batch,
T time steps, F features a step, H hidden units.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x W + b: [..., F] with [F, H] and [H] -> [..., H]."""
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


class SimpleRNN(nnx.Module):
    r"""The Elman network, as Keras's `SimpleRNN`.

    h_t = tanh(x_t W + b + h_{t-1} U), h_0 = 0; H (F + H + 1) parameters.

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990); parameter
    names and initializers are Keras's.

    Attributes:
      kernel: W, [F, H], Glorot uniform.
      recurrent_kernel: U, [H, H], orthogonal.
      bias: b, [H], zeros.
    """

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            nnx.initializers.glorot_uniform()(rngs.params(), (input_size, hidden_size))
        )
        self.recurrent_kernel = nnx.Param(
            nnx.initializers.orthogonal()(rngs.params(), (hidden_size, hidden_size))
        )
        self.bias = nnx.Param(jnp.zeros(hidden_size))

    def initial_carry(self, batch_size: int) -> jax.Array:
        """Returns h_0: zeros, [B, H]."""
        return jnp.zeros((batch_size, self.bias.shape[-1]), self.bias.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., H]: x_t W + b for every time step."""
        return affine(x, self.kernel[...], self.bias[...])

    def step(self, carry: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """([B, H], [B, H]) -> (h_t, h_t)."""
        h = jnp.tanh(z + carry @ self.recurrent_kernel[...])
        return h, h


CELLS = {"simple_rnn": SimpleRNN}
