"""What a trained network does while it reads: beliefs, states and gradients by time step.

Shapes: B batch, T time steps, W outputs of the top layer, C classes, D directions (2 if layers are
bidirectional, else 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from seqmnist.networks.cells import Cell
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

    Args:
      system: the fixed half of the run.
      params: its parameters.
      images: uint8 [B, 28, 28].

    Returns:
      Probabilities [T, B, C]; the last are those of the whole image.
    """
    model = nnx.merge(system.graphdef, params)
    x = model.sequence(images)
    if not model.config.bidirectional:
        return jax.nn.softmax(model.readout(_PREFIX_READOUTS[model.config.readout](_run(model, x))))

    def after(length):
        return jax.nn.softmax(_classify_prefix(system, params, x, length))

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
    what it read before.

    Args:
      system, params, images: as `beliefs`.
      labels: int32 [B].

    Returns:
      ‖∂loss/∂h_t‖ of each example's cross-entropy, [D, T, B]; h_t is the whole state: of an LSTM, h
      and c. The second direction reads from the end to time step t.
    """
    model = nnx.merge(system.graphdef, params)
    x = model.sequence(images)

    def total_loss(nudges):
        model = nnx.merge(system.graphdef, params)
        pending = iter(nudges)

        def nudge(cell, _):
            return _ModifiedCell(cell, lambda h, by: jax.tree.map(jnp.add, h, by), next(pending))

        model.layers[-1] = _replace_cells(model.layers[-1], nudge)
        losses = optax.softmax_cross_entropy_with_integer_labels(model.classify(x), labels)
        return jnp.sum(losses)  # no example's loss depends on another's state

    nudges = []

    def add_zeros(cell, _):
        carry = cell.initial_carry(x.shape[1])
        nudges.append(
            jax.tree.map(lambda leaf: jnp.zeros((len(x), *leaf.shape), leaf.dtype), carry)
        )
        return cell

    _replace_cells(model.layers[-1], add_zeros)
    norms = [
        jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2, -1) for leaf in jax.tree.leaves(grad)))
        for grad in jax.grad(total_loss)(nudges)
    ]
    return jnp.stack([norms[0], *(norm[::-1] for norm in norms[1:])])


class ClassScores(NamedTuple):
    """Precision, recall and F1 of each class, float64 [C], and its examples, int64 [C].

    0 stands for 0 / 0.
    """

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

    return ClassScores(
        precision=ratio(correct, predicted),
        recall=ratio(correct, support),
        f1=ratio(2 * correct, support + predicted),
        support=support,
    )


class _ModifiedCell(Cell):
    """A cell whose carry is modified after each time step."""

    def __init__(self, cell: Cell, modify: Callable[[Any, Any], Any], by: Any):
        """`modify`: (carry, by[t]) -> carry; `by` is in the order of reading."""
        self.cell, self.modify, self.by = cell, modify, nnx.data(by)

    def states(self, x):
        def step(carry, at_t):
            z_t, by_t = at_t
            carry = self.modify(self.cell.step(carry, z_t)[0], by_t)
            return carry, jax.tree.leaves(carry)[0]

        initial = self.cell.initial_carry(x.shape[1])
        return lax.scan(step, initial, (self.cell.project(x), self.by))[1]

    def emit(self, h, x):
        return self.cell.emit(h, x)


def _replace_cells(layer, replace):
    """Replaces each cell of a layer by `replace(cell, is_backward)`."""
    if isinstance(layer, ResidualBlock):
        layer.layer = _replace_cells(layer.layer, replace)
    elif isinstance(layer, Bidirectional):
        layer.forward, layer.backward = replace(layer.forward, False), replace(layer.backward, True)
    else:
        layer = replace(layer, False)
    return layer


def _run(model: SequenceClassifier, x):
    """Returns the outputs of the top layer: [T, B, F] -> [T, B, W]."""
    if model.encoder is not None:
        x = model.encoder(x)
    for layer in model.layers:
        x = layer(x)
    return x


def _classify_prefix(system, params, x, length):
    """Returns the logits of x[:length], where `length` may be traced.

    Cells that read from the end keep their initial state until they reach x[length - 1]; outputs
    after that time step are ignored.
    """
    model = nnx.merge(system.graphdef, params)

    def wait(cell, is_backward):
        if not is_backward:
            return cell
        initial = cell.initial_carry(x.shape[1])

        def modify(carry, t):
            has_begun = t >= len(x) - length
            return jax.tree.map(lambda new, old: jnp.where(has_begun, new, old), carry, initial)

        return _ModifiedCell(cell, modify, jnp.arange(len(x)))

    for i, layer in enumerate(model.layers):
        model.layers[i] = _replace_cells(layer, wait)
    y, readout = _run(model, x), model.config.readout
    if readout == "last" and isinstance(model.layers[-1], Bidirectional):
        forward, backward = jnp.split(y, 2, axis=-1)
        return model.readout(jnp.concatenate([forward[length - 1], backward[0]], axis=-1))
    return model.readout(_PREFIX_READOUTS[readout](y)[length - 1])
