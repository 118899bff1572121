"""The classifier: view, layers over time, readout.

Shapes: B batch, T time steps, L time steps that are read in one go, F features per step, H hidden
units, U outputs of a layer (H, or 2 H if it is bidirectional), C classes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist.config import ModelConfig, checked_options
from seqmnist.errors import Table, UserError, choose
from seqmnist.networks import scans
from seqmnist.networks.cells import CELLS, Cell
from seqmnist.networks.views import sequence, sequence_shape
from seqmnist.spec import MNIST, ImageSpec

_glorot = nnx.initializers.glorot_uniform()


def _float():
    """Returns the dtype of parameters, JAX's own for floats: float64 if it is enabled."""
    return jnp.result_type(float)


def _linear(size, width, rngs):
    return nnx.Linear(size, width, kernel_init=_glorot, param_dtype=_float(), rngs=rngs)


class Bidirectional(nnx.Module):
    """Two cells that read in opposite directions: x [T, B, F] -> [T, B, 2 H].

    The output of `backward` at a time step is its output after reading from the end to that step.
    It is not causal: it reads whole sequences only, each direction in stretches of its own.
    """

    def __init__(self, forward: Cell, backward: Cell):
        self.forward, self.backward = forward, backward

    def __call__(
        self, x: jax.Array, lengths: jax.Array | None = None, truncate: int = 0
    ) -> jax.Array:
        """As `Cell.__call__`."""
        y = self.backward(scans.backwards(x, lengths), lengths, truncate)
        return jnp.concatenate(
            [self.forward(x, lengths, truncate), scans.backwards(y, lengths)], axis=-1
        )


class ResidualBlock(nnx.Module):
    """Normalization, cell, gate and a skip connection: x [L, B, U] -> [L, B, U].

    y = x + v_1 σ(v_2), v = gelu(cell(norm(x))) V + b; U (2 U + 4) parameters besides the cell's.

    Source: A. Orvieto et al., arXiv 2303.06349, figure 1, with S5's gate (arXiv 2208.04933).
    """

    def __init__(self, layer: Cell | Bidirectional, width: int, dtype=None, *, rngs: nnx.Rngs):
        self.dtype = dtype  # as `Cell.dtype`
        self.norm = nnx.LayerNorm(width, param_dtype=_float(), rngs=rngs)
        self.layer = layer
        self.gate = _linear(width, 2 * width, rngs)

    @property
    def stretch(self) -> int:
        return self.layer.stretch

    # It computes all outputs, whatever the cell needs: an LRU(64) on pixels, read in one stretch,
    # takes 2.3 times as long as in stretches of 14.
    stretch_to_last = stretch

    def initial_state(self, batch_size: int) -> Any:
        return self.layer.initial_state(batch_size)

    def read(
        self, state: Any, x: jax.Array, mask: jax.Array | None = None, last: bool = False
    ) -> tuple[Any, jax.Array]:
        """As `Cell.read`, if `layer` is a cell."""
        state, y = self.layer.read(state, self.prepare(x), mask, last)
        return state, self.finish(x[-1:] if last else x, y)

    def __call__(self, x: jax.Array, *arguments: Any) -> jax.Array:
        """As `Cell.__call__`."""
        return self.finish(x, self.layer(self.prepare(x), *arguments))

    def prepare(self, x: jax.Array) -> jax.Array:
        """Returns the inputs of `layer`."""
        with jax.named_scope("norm"):
            return self.norm(x)

    def finish(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the block's outputs from its inputs x and the outputs y of `layer`."""
        with jax.named_scope("gate"):
            # With nnx.Linear's product, four blocks of minGRU train 1.05 times as long on pixels.
            v = scans.product(jax.nn.gelu(y), self.gate.kernel[...], self.dtype)
            v, gate = jnp.split(v + self.gate.bias[...].reshape(1, 1, -1), 2, axis=-1)
            return x + v * jax.nn.sigmoid(gate)


class Last(nnx.Module):
    """Keeps the outputs of the last time step. A new readout must define all that is here."""

    reads_all = False  # if False, without a mask, `read` gets only the last output of each part

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.width = width

    def initial_state(self, batch_size: int, dtype: jnp.dtype) -> Any:
        """Returns what is kept before the first output, a pytree of [B, …]."""
        return jnp.zeros((batch_size, self.width), dtype)

    def read(self, state: Any, y: jax.Array, mask: jax.Array | None = None) -> Any:
        """Takes in the next outputs y [L, B, U], where the mask, bool [L, B], is True."""
        if mask is None:
            return y[-1]
        last = len(y) - 1 - jnp.argmax(mask[::-1], axis=0)
        chosen = jnp.take_along_axis(y, last.reshape(1, -1, 1), axis=0)[0]
        return scans.where(mask.any(0), chosen, state)

    def __call__(self, state: Any) -> jax.Array:
        """Returns the features that are classified, [B, U]."""
        return state


class Mean(Last):
    """Keeps the sum and the number of all outputs."""

    reads_all = True

    def initial_state(self, batch_size: int, dtype: jnp.dtype) -> Any:
        return super().initial_state(batch_size, dtype), jnp.zeros((batch_size, 1), dtype)

    def read(self, state: Any, y: jax.Array, mask: jax.Array | None = None) -> Any:
        ones = jnp.ones((*y.shape[:2], 1), y.dtype)
        if mask is not None:
            y, ones = (scans.where(mask, each, jnp.zeros_like(each)) for each in (y, ones))
        return state[0] + y.sum(0), state[1] + ones.sum(0)

    def __call__(self, state: Any) -> jax.Array:
        return state[0] / jnp.maximum(state[1], 1)


class Max(Last):
    """Keeps the largest output of each unit; 0 stands for that of an empty sequence."""

    reads_all = True

    def initial_state(self, batch_size: int, dtype: jnp.dtype) -> Any:
        return jnp.full((batch_size, self.width), -jnp.inf, dtype)

    def read(self, state: Any, y: jax.Array, mask: jax.Array | None = None) -> Any:
        if mask is not None:
            y = scans.where(mask, y, jnp.full_like(y, -jnp.inf))
        return jnp.maximum(state, y.max(0))

    def __call__(self, state: Any) -> jax.Array:
        return jnp.where(state == -jnp.inf, jnp.zeros_like(state), state)


READOUTS = Table({"last": Last, "mean": Mean, "max": Max})


def make_cell(config: ModelConfig, options: Mapping[str, Any] | None = None) -> Callable[..., Cell]:
    """Returns the cell that the configuration names, with its options; `options` override these.

    Raises UserError if there is no such cell or option, or a value is not valid.
    """
    cell = choose(CELLS, config.cell, "model.cell")
    values = {**config.cell_options, **(options or {})}
    choice = f"model.cell={config.cell}"
    return functools.partial(cell, **checked_options(cell, values, "model.cell_options", choice))


class State(NamedTuple):
    """All that a network remembers of what it has read: arrays with a leading axis B."""

    layers: tuple[Any, ...]
    outputs: Any  # what the readout keeps of the top layer's outputs


class SequenceClassifier(nnx.Module):
    """Reads an image as a sequence and classifies it, in the dtype of its parameters.

    A network that reads in one direction reads in parts of any length:

        state = network.initial_state(batch_size)
        state = network.read(state, x)  # x [L, B, F]
        logits = network.answer(state)  # [B, C], of what has been read so far

    Attributes:
      encoder: F -> U, before residual blocks; else None.
      layers: first to last, each [L, B, F or U] -> [L, B, U].
      pool: what `ModelConfig.readout` names; it reduces the last layer's outputs to [B, U].
      readout: U -> C, applied to these.

    Raises UserError if the view, cell or readout does not exist, or if there are fewer than two
    time steps.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: ImageSpec = MNIST,
        *,
        rngs: nnx.Rngs,
        cell_options: Mapping[str, Any] | None = None,
    ):
        """Takes `cell_options`, which may be arrays, to override those of the configuration."""
        self.config = config
        cell = make_cell(config, cell_options)
        pool = choose(READOUTS, config.readout, "model.readout")
        num_steps, size = sequence_shape(config, spec)
        if num_steps < 2:
            raise UserError(
                f"config.model.view={config.view} with config.model.subsample={config.subsample} "
                f"reads images of {spec.height} × {spec.width} pixels in {num_steps} time step; "
                "choose a smaller subsample or another view"
            )
        width = config.hidden_size * (2 if config.bidirectional else 1)
        is_residual = config.block == "residual"
        self.encoder = _linear(size, width, rngs) if is_residual else None
        size = width if is_residual else size
        dtype = None if config.dtype == "float32" else jnp.dtype(config.dtype)

        def make_layer():
            layer = cell(size, config.hidden_size, rngs=rngs)
            if dtype is not None:
                layer.dtype = dtype
            return layer

        self.layers = nnx.List([])
        for _ in range(config.num_layers):
            layer = make_layer()
            if config.bidirectional:
                layer = Bidirectional(layer, make_layer())
            if is_residual:
                layer = ResidualBlock(layer, width, dtype, rngs=rngs)
            self.layers.append(layer)
            size = width
        self.readout = _linear(width, spec.num_classes, rngs)
        self.pool = pool(width, rngs=rngs)

    def __call__(
        self, images: jax.Array, dropout_keys: jax.Array | None = None, truncate: int = 0
    ) -> jax.Array:
        """Classifies images: uint8 [B, *spec.shape] -> logits [B, C].

        `dropout_keys` [B], one per image, are given in training; without them, no dropout. If
        `truncate` is not 0, gradients stop after every `truncate` time steps.
        """
        return self.classify(self.sequence(images), None, dropout_keys, truncate)

    def sequence(self, images: jax.Array) -> jax.Array:
        """Returns the input of the layers, time first: uint8 [B, *spec.shape] -> [T, B, F]."""
        with jax.named_scope("view"):
            return jnp.swapaxes(sequence(self.config, images, self.readout.kernel.dtype), 0, 1)

    def classify(
        self,
        x: jax.Array,
        lengths: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        truncate: int = 0,
    ) -> jax.Array:
        """Classifies sequences: [T, B, F] -> logits [B, C].

        With `lengths`, int [B], only the first `lengths[b]` time steps of example b are read.
        `dropout_keys` and `truncate` are those of `__call__`.
        """
        keep = self._draw_kept(dropout_keys)
        if self.config.bidirectional:
            y = self.run(x, lengths, keep, truncate)
            return self.classify_outputs(y, lengths, keep)

        def read(state, at_t):
            return self.read(state, *at_t, keep), None

        def stop(state):  # not what the readout has gathered: all outputs have gradients
            return state._replace(layers=jax.lax.stop_gradient(state.layers))

        state, at_t = self.initial_state(x.shape[1]), (x, scans.mask(x, lengths))
        length = self.layers[0].stretch
        if len(self.layers) == 1 and lengths is None and not self.pool.reads_all:
            length = self.layers[0].stretch_to_last
        state, _ = scans.in_stretches(read, state, at_t, length, truncate, stop)
        return self.answer(state, keep)

    def initial_state(self, batch_size: int) -> State:
        """Returns the state of a network that has read nothing.

        Raises UserError if the network is bidirectional: it then reads whole sequences only.
        """
        if self.config.bidirectional:
            raise UserError(
                "a bidirectional network reads whole sequences; set config.model.bidirectional="
                "false to read in parts"
            )
        pool = self.pool.initial_state(batch_size, self.readout.kernel.dtype)
        return State(tuple(layer.initial_state(batch_size) for layer in self.layers), pool)

    def read(
        self, state: State, x: jax.Array, mask: jax.Array | None = None, keep: Any = None
    ) -> State:
        """Reads the next time steps x [L, B, F], where the mask, bool [L, B], is True.

        `keep`, [layers, B, U], multiplies the outputs of layers, for dropout.
        """
        if self.encoder is not None:
            x = self.encoder(x)
        states = []
        for i, layer in enumerate(self.layers):
            x = x if i == 0 else _drop(x, keep, i - 1)
            is_top = i == len(self.layers) - 1
            last = is_top and mask is None and not self.pool.reads_all
            after, x = layer.read(state.layers[i], x, mask, last)
            states.append(after)
        return State(tuple(states), self.pool.read(state.outputs, x, mask))

    def answer(self, state: State, keep: Any = None) -> jax.Array:
        """Returns logits [B, C] for what has been read."""
        features = _drop(self.pool(state.outputs), keep, -1)
        with jax.named_scope("readout"):
            return self.readout(features)

    def run(
        self,
        x: jax.Array,
        lengths: jax.Array | None = None,
        keep: Any = None,
        truncate: int = 0,
        num_layers: int | None = None,
    ) -> jax.Array:
        """Returns all outputs of the last layer of `layers[:num_layers]`: [T, B, F] -> [T, B, U].

        The other arguments are those of `classify` and `read`.
        """
        if self.encoder is not None:
            x = self.encoder(x)
        for i, layer in enumerate(self.layers[:num_layers]):
            x = layer(x if i == 0 else _drop(x, keep, i - 1), lengths, truncate)
        return x

    def classify_outputs(
        self, y: jax.Array, lengths: jax.Array | None = None, keep: Any = None
    ) -> jax.Array:
        """Classifies all outputs of the top layer: [T, B, U] -> logits [B, C]."""
        if self.config.bidirectional:  # each half in the direction in which its cell reads
            forward, backward = jnp.split(y, 2, axis=-1)
            y = jnp.concatenate([forward, scans.backwards(backward, lengths)], axis=-1)
        nothing = self.pool.initial_state(y.shape[1], y.dtype)
        return self.answer(State((), self.pool.read(nothing, y, scans.mask(y, lengths))), keep)

    def _draw_kept(self, keys):
        """Returns factors of the outputs of layers, [layers, B, U]: 0 for outputs that are dropped.

        They are the same for all time steps, as in S5: drawing them for each costs a fifth of a
        training step on pixels.
        """
        if keys is None:
            return None
        drop_out = nnx.Dropout(self.config.dropout)
        ones = jnp.ones(self.readout.kernel.shape[0], self.readout.kernel.dtype)

        def draw(key):
            each = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(self.layers)))
            return jax.vmap(lambda key: drop_out(ones, rngs=key))(each)

        return jax.vmap(draw, out_axes=1)(keys)


def _drop(x, keep, layer):
    with jax.named_scope("dropout"):
        return x if keep is None else x * jax.lax.broadcast_to_rank(keep[layer], x.ndim)
