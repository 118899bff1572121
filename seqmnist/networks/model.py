"""The classifier: view, cells over time, readout.

Shapes: B batch, T time steps, F features a step, H hidden units, W outputs of a layer (H, or
2 H where it is bidirectional), C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist.config import ModelConfig, ScanConfig
from seqmnist.errors import UserError, choose
from seqmnist.networks.cells import CELLS, Cell
from seqmnist.networks.views import sequence, sequence_shape

NUM_CLASSES = 10

_glorot = nnx.initializers.glorot_uniform()


class Bidirectional(nnx.Module):
    """Two cells that read in opposite directions: [T, B, F] -> [T, B, 2 H].

    Attributes:
      forward: reads from the first time step to the last.
      backward: reads from the last to the first; its outputs stand at the time steps that
        they have just read.
    """

    def __init__(self, forward: Cell, backward: Cell):
        self.forward, self.backward = forward, backward

    def __call__(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        """Returns the outputs of all time steps, [T, B, 2 H]."""
        backward = self.backward(x[::-1], scan)[::-1]
        return jnp.concatenate([self.forward(x, scan), backward], axis=-1)

    def last(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        """Returns what each cell gives when it has read everything, [B, 2 H]."""
        return jnp.concatenate(
            [self.forward.last(x, scan), self.backward.last(x[::-1], scan)], axis=-1
        )


class ResidualBlock(nnx.Module):
    """A cell between a normalization and a gate, beside a way around: [T, B, W] -> [T, B, W].

    y = x + v_1 σ(v_2), v = gelu(cell(norm(x))) V + b; W (2 W + 4) parameters beside the cell's.

    Source: A. Orvieto et al., arXiv 2303.06349, figure 1, with S5's gate (arXiv 2208.04933).

    Attributes:
      norm: layer normalization of x.
      layer: the cell, or two that read in opposite directions.
      gate: V and b, W -> 2 W.
    """

    def __init__(self, layer: Cell | Bidirectional, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.layer = layer
        self.gate = nnx.Linear(width, 2 * width, kernel_init=_glorot, rngs=rngs)

    def __call__(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        """Returns the outputs of all time steps, [T, B, W]."""
        v, gate = jnp.split(self.gate(jax.nn.gelu(self.layer(self.norm(x), scan))), 2, axis=-1)
        return x + v * jax.nn.sigmoid(gate)

    def last(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        """Returns the output of the last time step, [B, W]."""
        return self(x, scan)[-1]


READOUTS = {
    "last": lambda layer, x, scan: layer.last(x, scan),
    "mean": lambda layer, x, scan: layer(x, scan).mean(0),
    "max": lambda layer, x, scan: layer(x, scan).max(0),
}


class SequenceClassifier(nnx.Module):
    """Reads an image as a sequence and names its class.

    It computes in the dtype of its parameters.

    Attributes:
      encoder: F -> W, before residual blocks; else None.
      layers: first to last, each [T, B, F or W] -> [T, B, W].
      readout: W -> C, on what `ModelConfig.readout` takes from the last layer.
    """

    def __init__(self, config: ModelConfig, scan: ScanConfig, *, rngs: nnx.Rngs):
        """Draws the parameters.

        Raises:
          UserError: the configuration names a view, cell or readout that does not exist, or
            leaves less than two time steps.
        """
        self.config, self.scan = config, scan
        cell = choose(CELLS, config.cell, "model.cell")
        choose(READOUTS, config.readout, "model.readout")
        num_steps, size = sequence_shape(config)
        if num_steps < 2:
            raise UserError(
                f"config.model.subsample={config.subsample} leaves {num_steps} time step of "
                f"config.model.view={config.view}; make it smaller"
            )
        width = config.hidden_size * (2 if config.bidirectional else 1)
        has_blocks = config.block == "residual"
        encode = nnx.Linear(size, width, kernel_init=_glorot, rngs=rngs) if has_blocks else None
        self.encoder = encode
        size = width if has_blocks else size
        self.layers = nnx.List([])
        for _ in range(config.num_layers):
            layer = cell(size, config.hidden_size, rngs=rngs)
            if config.bidirectional:
                layer = Bidirectional(layer, cell(size, config.hidden_size, rngs=rngs))
            if has_blocks:
                layer = ResidualBlock(layer, width, rngs=rngs)
            self.layers.append(layer)
            size = width
        self.readout = nnx.Linear(width, NUM_CLASSES, kernel_init=_glorot, rngs=rngs)

    def __call__(self, images: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Classifies images.

        Args:
          images: uint8 [B, 28, 28].
          dropout_keys: of the dropout, in training, one for each image, [B]; None drops nothing.

        Returns:
          Logits [B, C].
        """
        return self.classify(self.sequence(images), dropout_keys)

    def sequence(self, images: jax.Array) -> jax.Array:
        """Returns what the layers read of images uint8 [B, 28, 28]: [T, B, F]."""
        x = sequence(self.config, images, self.readout.kernel.dtype)
        return jnp.swapaxes(x, 0, 1)  # time first: what a scan runs over

    def classify(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Classifies sequences of any length: [T, B, F] -> logits [B, C]; see `__call__`."""
        if self.encoder is not None:
            x = self.encoder(x)
        *lower, top = self.layers
        for i, layer in enumerate(lower):
            x = self._drop_out(layer(x, self.scan), dropout_keys, i)
        x = READOUTS[self.config.readout](top, x, self.scan)
        x = self._drop_out(x, dropout_keys, len(lower))
        with jax.named_scope("readout"):
            return self.readout(x)

    def _drop_out(self, x, keys, layer):
        """Drops outputs [..., B, W] of a layer."""
        if keys is None:
            return x
        drop_out = nnx.Dropout(self.config.dropout)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        return jax.vmap(lambda x, key: drop_out(x, rngs=key), (-2, 0), -2)(x, keys)
