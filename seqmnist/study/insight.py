"""What a trained network does while it reads: beliefs, states and gradients by time step.

Shapes: B batch, T time steps, W outputs of the top layer, C classes, D directions (2 if layers are
bidirectional, else 1).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from seqmnist.networks.model import Bidirectional, ResidualBlock, SequenceClassifier
from seqmnist.training.steps import System

# What a readout takes from outputs [T, B, W] of the top layer, for each end of the sequence.
_PREFIX_READOUTS = {
    "last": lambda y: y,
    "mean": lambda y: jnp.cumsum(y, 0) / jnp.arange(1, len(y) + 1, dtype=y.dtype)[:, None, None],
    "max": lax.cummax,
}


def beliefs(system: System, params: Any, images: jax.Array) -> jax.Array:
    """Returns what the network would predict if its sequence ended after each time step.

    One pass if the network reads forwards. A bidirectional layer also reads from the end, which
    is different for every time step: T passes, each over a part of the sequence.

    `images` are uint8 [B, 28, 28]. Returns probabilities [T, B, C]; the last are those of the whole
    image.
    """
    model = nnx.merge(system.graphdef, params)
    x = model.sequence(images)
    if not model.config.bidirectional:
        return jax.nn.softmax(model.readout(_PREFIX_READOUTS[model.config.readout](_run(model, x))))

    def after(length):
        return jax.nn.softmax(_classify_prefix(nnx.merge(system.graphdef, params), x, length))

    return lax.map(after, jnp.arange(1, len(x) + 1))


def hidden_states(system: System, params: Any, images: jax.Array) -> jax.Array:
    """Returns the outputs of the top layer at all time steps, [T, B, W]; arguments as `beliefs`.

    The second half of a bidirectional layer's outputs comes from reading from the end to that
    time step.
    """
    model = nnx.merge(system.graphdef, params)
    return _run(model, model.sequence(images))


def gradient_norms(system: System, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how much the loss changes with the state of the top layer at each time step.

    This gradient flows backwards through time: where it vanishes, the network cannot learn from
    what it read before. `labels` are int32 [B]; the other arguments as `beliefs`.

    Returns ‖∂loss/∂h_t‖ of each example's cross-entropy, [D, T, B]; h_t is the whole state: of an
    LSTM, h and c. The second direction reads from the end to time step t.
    """
    model = nnx.merge(system.graphdef, params)
    x = model.sequence(images)

    def total_loss(nudges):
        model = nnx.merge(system.graphdef, params)
        for cell, nudge in zip(_cells(model.layers[-1]), nudges, strict=True):
            _modify_carry(cell, functools.partial(jax.tree.map, jnp.add), nudge)
        losses = optax.softmax_cross_entropy_with_integer_labels(model.classify(x), labels)
        return jnp.sum(losses)  # no example's loss depends on another's state

    carries = [cell.initial_carry(x.shape[1]) for cell in _cells(model.layers[-1])]
    nudges = jax.tree.map(lambda leaf: jnp.zeros((len(x), *leaf.shape), leaf.dtype), carries)
    norms = [
        jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2, -1) for leaf in jax.tree.leaves(grad)))
        for grad in jax.grad(total_loss)(nudges)
    ]
    return jnp.stack([norms[0], *(norm[::-1] for norm in norms[1:])])


class ClassScores(NamedTuple):
    """Scores of each class, float64 [C], 0 for 0 / 0; its number of examples, int64 [C]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pairs of label (row) and prediction (column), int [N] each: int64 [C, C]."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Returns the scores of each class from a `confusion_matrix`."""
    correct, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def ratio(a, b):
        return np.divide(a, b, out=np.zeros(len(a)), where=b != 0)

    f1 = ratio(2 * correct, support + predicted)
    return ClassScores(ratio(correct, predicted), ratio(correct, support), f1, support)


def _cells(layer):
    """Returns the cell of a layer; of a bidirectional one, the forward and the backward cell."""
    if isinstance(layer, ResidualBlock):
        layer = layer.layer
    return [layer.forward, layer.backward] if isinstance(layer, Bidirectional) else [layer]


def _modify_carry(cell, modify, by):
    """Makes a cell call modify(carry, by[t]) -> carry after each time step t that it reads."""

    def step(carry, at_t):
        z_t, by_t = at_t
        carry = modify(cell.step(carry, z_t)[0], by_t)
        return carry, jax.tree.leaves(carry)[0]

    cell.scan = lambda carry, z: lax.scan(step, carry, (z, by))[1]


def _run(model: SequenceClassifier, x):
    """Returns the outputs of the top layer: [T, B, F] -> [T, B, W]."""
    if model.encoder is not None:
        x = model.encoder(x)
    for layer in model.layers:
        x = layer(x)
    return x


def _classify_prefix(model, x, length):
    """Returns the logits of x[:length], where `length` may be traced; modifies the model.

    Cells that read from the end keep their initial state until they reach x[length - 1]; outputs
    after that time step are ignored.
    """
    has_begun = jnp.arange(len(x)) >= len(x) - length
    for layer in model.layers:
        _, backward = _cells(layer)
        initial = backward.initial_carry(x.shape[1])

        def wait(carry, has_begun, initial=initial):
            return jax.tree.map(functools.partial(jnp.where, has_begun), carry, initial)

        _modify_carry(backward, wait, has_begun)
    y, readout = _run(model, x), model.config.readout
    if readout == "last" and isinstance(model.layers[-1], Bidirectional):
        forward, backward = jnp.split(y, 2, axis=-1)
        return model.readout(jnp.concatenate([forward[length - 1], backward[0]], axis=-1))
    return model.readout(_PREFIX_READOUTS[readout](y)[length - 1])
