"""The classifier: view, cells over time, readout."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from seqmnist import scans
from seqmnist.cells import CELLS
from seqmnist.config import ModelConfig
from seqmnist.errors import choose
from seqmnist.views import VIEWS

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10


class SequenceClassifier(nnx.Module):
    """Reads an image as a sequence and names its class.

    It computes in the dtype of its parameters.

    Attributes:
      layers: the cells, first to last.
      readout: H -> C, on the last state of the last layer.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.view = choose(VIEWS, config.view, "model.view")
        cell = choose(CELLS, config.cell, "model.cell")
        images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.uint8)
        input_size = jax.eval_shape(self.view, images).shape[-1]
        sizes = [input_size] + [config.hidden_size] * config.num_layers
        self.layers = nnx.List([cell(*pair, rngs=rngs) for pair in itertools.pairwise(sizes)])
        self.readout = nnx.Linear(
            sizes[-1], NUM_CLASSES, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits [B, C] for images uint8 [B, 28, 28]."""
        x = self.view(images, dtype=self.readout.kernel.dtype)
        x = jnp.swapaxes(x, 0, 1)  # time first: what a scan runs over
        for layer in self.layers:
            carry = layer.initial_carry(x.shape[1])
            _, x = scans.sequential(layer.step, carry, layer.project(x))
        return self.readout(x[-1])
