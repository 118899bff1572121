"""The classifier: view, cells over time, readout.

Shapes: B batch, T time steps, F features per step, H hidden units, W outputs of a layer (H, or
2 H if it is bidirectional), C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist.config import ModelConfig
from seqmnist.errors import UserError, choose
from seqmnist.networks.cells import CELLS, Cell
from seqmnist.networks.views import sequence, sequence_shape

NUM_CLASSES = 10

_glorot = nnx.initializers.glorot_uniform()


class Bidirectional(nnx.Module):
    """Two cells that read in opposite directions: [T, B, F] -> [T, B, 2 H].

    The output of `backward` at a time step is its state after reading from the end to that step,
    but `last` gives, as [B, 2 H], what each cell returns after the whole sequence.
    """

    def __init__(self, forward: Cell, backward: Cell):
        self.forward, self.backward = forward, backward

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.forward(x), self.backward(x[::-1])[::-1]], axis=-1)

    def last(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.forward.last(x), self.backward.last(x[::-1])], axis=-1)


class ResidualBlock(nnx.Module):
    """Normalization, cell, gate and a skip connection: [T, B, W] -> [T, B, W].

    y = x + v_1 σ(v_2), v = gelu(cell(norm(x))) V + b; W (2 W + 4) parameters beside the cell's.

    Source: A. Orvieto et al., arXiv 2303.06349, figure 1, with S5's gate (arXiv 2208.04933).
    """

    def __init__(self, layer: Cell | Bidirectional, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.layer = layer
        self.gate = nnx.Linear(width, 2 * width, kernel_init=_glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        v, gate = jnp.split(self.gate(jax.nn.gelu(self.layer(self.norm(x)))), 2, axis=-1)
        return x + v * jax.nn.sigmoid(gate)

    def last(self, x: jax.Array) -> jax.Array:
        return self(x)[-1]


READOUTS = {
    "last": lambda layer, x: layer.last(x),
    "mean": lambda layer, x: layer(x).mean(0),
    "max": lambda layer, x: layer(x).max(0),
}


class SequenceClassifier(nnx.Module):
    """Reads an image as a sequence and classifies it, in the dtype of its parameters.

    Attributes:
      encoder: F -> W, before residual blocks; else None.
      layers: first to last, each [T, B, F or W] -> [T, B, W].
      readout: W -> C, applied to what `ModelConfig.readout` takes from the last layer.

    Raises UserError if the view, cell or readout does not exist, or if there are fewer than two
    time steps.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        cell = choose(CELLS, config.cell, "model.cell")
        choose(READOUTS, config.readout, "model.readout")
        num_steps, size = sequence_shape(config)
        if num_steps < 2:
            raise UserError(
                f"config.model.subsample={config.subsample} leaves {num_steps} time step of "
                f"config.model.view={config.view}; choose a smaller subsample"
            )
        width = config.hidden_size * (2 if config.bidirectional else 1)
        encoder = None
        if config.block == "residual":
            encoder = nnx.Linear(size, width, kernel_init=_glorot, rngs=rngs)
            size = width
        self.encoder = encoder
        self.layers = nnx.List([])
        for _ in range(config.num_layers):
            layer = cell(size, config.hidden_size, rngs=rngs)
            if config.bidirectional:
                layer = Bidirectional(layer, cell(size, config.hidden_size, rngs=rngs))
            if config.block == "residual":
                layer = ResidualBlock(layer, width, rngs=rngs)
            self.layers.append(layer)
            size = width
        self.readout = nnx.Linear(width, NUM_CLASSES, kernel_init=_glorot, rngs=rngs)

    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Classifies images: uint8 [B, 28, 28] -> logits [B, C].

        `dropout_keys` [B], one per image, are given in training; without them, no dropout.
        """
        return self.classify(self.sequence(images), dropout_keys)

    def sequence(self, images: jax.Array) -> jax.Array:
        """Returns the input of the layers, time first: uint8 [B, 28, 28] -> [T, B, F]."""
        return jnp.swapaxes(sequence(self.config, images, self.readout.kernel.dtype), 0, 1)

    def classify(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Classifies sequences of any length: [T, B, F] -> logits [B, C]."""
        if self.encoder is not None:
            x = self.encoder(x)
        *lower, top = self.layers
        for i, layer in enumerate(lower):
            x = self._drop_out(layer(x), dropout_keys, i)
        x = READOUTS[self.config.readout](top, x)
        x = self._drop_out(x, dropout_keys, len(lower))
        with jax.named_scope("readout"):
            return self.readout(x)

    def _drop_out(self, x, keys, layer):  # x [..., B, W]
        if keys is None:
            return x
        drop_out = nnx.Dropout(self.config.dropout)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        return jax.vmap(lambda x, key: drop_out(x, rngs=key), (-2, 0), -2)(x, keys)
