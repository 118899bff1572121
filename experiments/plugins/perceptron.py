"""A readout with two hidden layers, as the networks of Legendre memory units have."""

import jax
from flax import nnx

from seqmnist.networks import model


class Perceptron(model.Last):
    """Two layers of U rectified units on the last output; U (U + 3) parameters.

    u = relu(norm(y_T)), relu(u V + b)

    The output product of a linear cell is the first layer's: only its last time step is nonlinear.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, state: jax.Array) -> jax.Array:
        return jax.nn.relu(self.hidden(jax.nn.relu(self.norm(state))))


model.READOUTS["perceptron"] = Perceptron
