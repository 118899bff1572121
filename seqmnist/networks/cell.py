"""What a recurrent layer is: the contract of all cells, as Flax NNX modules.

A cell has a time-parallel half and a recurrent half. `project` computes the input products of
several time steps at once, as one large matrix product; `step` computes what depends on the
previous step; `emit` turns states into outputs, again for several time steps at once. A new cell is
a subclass of `Cell` with `step`, an entry in `cells.CELLS`, an oracle in the tests, and its step in
JavaScript for exported pages, in `study/page.js`.

Shapes: B batch, T time steps, L time steps that are read in one go, F features per step, H hidden
units, K gates.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist.networks import scans

TimeScale = Annotated[float, "[2, 1000000000]"]  # in steps, an option


class RecurrentParam(nnx.Param):
    """A parameter that sets how long a linear recurrence remembers.

    The papers train it with a smaller learning rate and no weight decay; see `optim`.
    """


class Constant(nnx.Variable):
    """A number that a cell computes with and that is not trained, such as an option to be swept."""

    def __init__(self, value: Any, **metadata: Any):
        super().__init__(jnp.asarray(value, jnp.float32), **metadata)


def log_odds(t_max: float | jax.Array, hidden_size: int) -> jax.Array:
    """Returns log(t - 1) [H] for time scales t from 2 to t_max, evenly.

    A unit that keeps the share σ(log(t - 1)) = 1 - 1 / t of its state remembers t time steps.
    """
    return jnp.log1p((t_max - 2) * jnp.arange(0.5, hidden_size) / hidden_size)


class Cell(nnx.Module):
    """A recurrent layer, constructed as `cell(F, H, rngs=rngs)` with options as further keywords.

    A subclass defines `step`, and either a `kernel` W [F, K·H] and a `bias` b [K·H], or `project`
    and `initial_state` of its own; the rest follows. Reading a sequence in one go, in parts or step
    by step gives the same numbers.

    Its options are keywords of `__init__` with a default; each is a field of the configuration,
    `model.cell_options.NAME`. A float may be an array, if it is swept; keep it as a `Constant` if
    it is needed after initialization.
    """

    num_gates = 1
    # The dtype to which the factors of products with parameters are rounded, if it is not None; the
    # network sets it, and a cell hands it to `scans.product` or `scans.matmul`.
    dtype: jnp.dtype | None = None
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

    @property
    def stretch_to_last(self) -> int:
        """As `stretch`, for a network of one layer of which only the last output is needed."""
        return self.stretch

    def initial_state(self, batch_size: int) -> Any:
        """Returns the state before the first step, a pytree of [B, …] whose first array is h_0."""
        return jnp.zeros((batch_size, self.bias.shape[0] // self.num_gates), self.bias.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """[..., F] -> z [..., K·H]: what the inputs contribute; by default x W + b."""
        y = scans.product(x, self.kernel[...], self.dtype)
        return y + jax.lax.broadcast_to_rank(self.bias[...], y.ndim)

    def step(self, state: Any, z: jax.Array) -> Any:
        """(state, z_t [B, K·H]) -> the next state, whose first array is h_t."""
        raise NotImplementedError(f"{type(self).__name__} does not define step")

    def recur(self, state: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        """(state, z [L, B, K·H]) -> (state, h [L, B, H]): `step` over time, or a faster equivalent.

        `jax.jvp` needs `scans.plain`, which `read` uses where it has a mask, and no `dtype`.
        """
        return scans.plain(self.step, state, z)

    def emit(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """(h, x [L, B, F]) -> outputs [L, B, H]: h itself, unless overridden."""
        return h

    def read(
        self, state: Any, x: jax.Array, mask: jax.Array | None = None, last: bool = False
    ) -> tuple[Any, jax.Array]:
        """Reads the next time steps: (state, x [L, B, F]) -> (state, outputs [L, B, H]).

        Where the mask, bool [L, B], is False, the state stays, and the output has no meaning. With
        `last`, only the last output is returned, [1, B, H].
        """
        with jax.named_scope("project"):
            z = self.project(x)
        with jax.named_scope("recurrence"):
            # Under `jax.disable_jit`, a debugger must stop in `step`.
            if mask is None and not jax.config.jax_disable_jit:
                state, h = self.recur(state, z)
            else:
                state, h = scans.plain(self.step, state, z, mask)
        with jax.named_scope("emit"):
            return state, self.emit(h[-1:], x[-1:]) if last else self.emit(h, x)

    def __call__(
        self, x: jax.Array, lengths: jax.Array | None = None, truncate: int = 0
    ) -> jax.Array:
        """Returns the outputs for whole sequences: [T, B, F] -> [T, B, H].

        With `lengths`, int [B], only the first `lengths[b]` time steps of example b are read, and
        its further outputs have no meaning. `truncate` is as in `scans.in_stretches`.
        """

        def read(state, at_t):
            return self.read(state, *at_t)

        state, at_t = self.initial_state(x.shape[1]), (x, scans.mask(x, lengths))
        return scans.in_stretches(read, state, at_t, self.stretch, truncate)[1]
