"""What a trained network does while it reads: beliefs, states and gradients by time step.

Shapes: B batch, T time steps, W outputs of the top layer, C classes, D directions: 1, or 2 where
layers are bidirectional.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from seqmnist.config import ScanConfig
from seqmnist.networks.cells import Cell
from seqmnist.networks.model import Bidirectional, ResidualBlock, SequenceClassifier
from seqmnist.training.steps import System

# What a readout takes from the outputs [T, B, W] of the top layer, had it ended at each time step.
_PREFIX_READOUTS = {
    "last": lambda y: y,
    "mean": lambda y: jnp.cumsum(y, 0) / jnp.arange(1, len(y) + 1, dtype=y.dtype)[:, None, None],
    "max": lax.cummax,
}


def beliefs(system: System, params: Any, images: jax.Array) -> jax.Array:
    """What the network would answer if its sequence ended after each time step.

    Of a network that reads forwards this costs one pass. Bidirectional layers begin at the end as
    well, and every time step gives them another end: T passes, each over a part of the sequence.

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
        return jax.nn.softmax(_classify_beginning(system, params, x, length))

    return lax.map(after, jnp.arange(1, len(x) + 1))


def hidden_states(system: System, params: Any, images: jax.Array) -> jax.Array:
    """Returns the outputs of the top layer at all time steps, [T, B, W]; see `beliefs`.

    Of a bidirectional layer the second half stands at the time step that it has just read, on
    its way from the end.
    """
    model = nnx.merge(system.graphdef, params)
    return _run(model, model.sequence(images))


def gradient_norms(system: System, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How much the loss would change if the top layer's state changed after each time step.

    This is the gradient that travels backwards through time: where it vanishes, the network
    cannot learn from what it read before.

    Args:
      system: the fixed half of the run.
      params: its parameters.
      images: uint8 [B, 28, 28].
      labels: int32 [B].

    Returns:
      ‖∂loss/∂h_t‖ of each example's own cross-entropy, [D, T, B]; h_t is the whole state: of an
      LSTM, h and c. The second direction's stand at the time step that it has just read.
    """

    def total_loss(nudges):
        model = nnx.merge(system.graphdef, params)
        pending = iter(nudges)

        def nudge(cell, is_backward):
            del is_backward
            return _Amended(cell, lambda carry, by: jax.tree.map(jnp.add, carry, by), next(pending))

        model.layers[-1] = _replace_cells(model.layers[-1], nudge)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.classify(model.sequence(images)), labels
        )
        return jnp.sum(losses)  # no example's loss depends on another's state

    model = nnx.merge(system.graphdef, params)
    num_steps = len(model.sequence(images))
    directions: list[Any] = []

    def no_nudge(cell, is_backward):
        del is_backward
        carry = cell.initial_carry(len(images))
        zeros = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), carry)
        directions.append(zeros)
        return cell

    _replace_cells(model.layers[-1], no_nudge)
    grads = jax.grad(total_loss)(directions)
    norms = [
        jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2, -1) for leaf in jax.tree.leaves(grad)))
        for grad in grads
    ]
    return jnp.stack([norms[0], *(norm[::-1] for norm in norms[1:])])


class ClassScores(NamedTuple):
    """How well each class is told from the others; 0 where nothing is there to divide by.

    Attributes:
      precision: the share of answers "c" that are right, float64 [C].
      recall: the share of examples of c that are answered "c", [C].
      f1: the harmonic mean of both, [C].
      support: examples of c, int64 [C].
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def confusion_matrix(labels: np.ndarray, answers: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pairs of label and answer, int [N] each: int64 [C, C], a row a label."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(answers, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Returns the scores of each class, of what `confusion_matrix` returns."""
    hits, support, answered = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def share(part, whole):
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole != 0)

    return ClassScores(
        share(hits, answered), share(hits, support), share(2 * hits, support + answered), support
    )


class _Amended:
    """A cell whose state is amended after each time step, read as a `Cell` is.

    It relies on what holds for every cell: the first array of its carry is the state h_t.
    """

    def __init__(self, cell: Cell, amend: Callable[[Any, Any], Any], by: Any):
        """`amend`: (carry, what `by` holds at t) -> carry; `by` is in the order of reading."""
        self._cell, self._amend, self._by = cell, amend, by

    def __call__(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        return self._cell.emit(self._states(x), x)

    def last(self, x: jax.Array, scan: ScanConfig) -> jax.Array:
        return self._cell.emit(self._states(x)[-1:], x[-1:])[0]

    def _states(self, x):
        def step(carry, at_t):
            z_t, by_t = at_t
            carry = self._amend(self._cell.step(carry, z_t)[0], by_t)
            return carry, jax.tree.leaves(carry)[0]

        first = self._cell.initial_carry(x.shape[1])
        return lax.scan(step, first, (self._cell.project(x), self._by))[1]


def _replace_cells(layer, replace):
    """Puts `replace(cell, is_backward)` in the place of each cell of a layer."""
    if isinstance(layer, ResidualBlock):
        layer.layer = _replace_cells(layer.layer, replace)
    elif isinstance(layer, Bidirectional):
        layer.forward, layer.backward = replace(layer.forward, False), replace(layer.backward, True)
    else:
        layer = replace(layer, False)
    return layer


def _run(model: SequenceClassifier, x):
    """The outputs of the top layer: [T, B, F] -> [T, B, W]."""
    if model.encoder is not None:
        x = model.encoder(x)
    for layer in model.layers:
        x = layer(x, model.scan)
    return x


def _classify_beginning(system, params, x, length):
    """Logits of x[:length], where `length` may be traced.

    What reads backwards stays in its first state until it comes to the beginning; what anything
    gives after it is not looked at.
    """
    model = nnx.merge(system.graphdef, params)
    steps = jnp.arange(len(x))

    def wait(cell, is_backward):
        if not is_backward:
            return cell
        first = cell.initial_carry(x.shape[1])

        def amend(carry, t):
            has_begun = t >= len(x) - length
            return jax.tree.map(lambda new, old: jnp.where(has_begun, new, old), carry, first)

        return _Amended(cell, amend, steps)

    for i, layer in enumerate(model.layers):
        model.layers[i] = _replace_cells(layer, wait)
    y, readout = _run(model, x), model.config.readout
    if readout == "last" and isinstance(model.layers[-1], Bidirectional):
        there, back = jnp.split(y, 2, axis=-1)
        return model.readout(jnp.concatenate([there[length - 1], back[0]], axis=-1))
    return model.readout(_PREFIX_READOUTS[readout](y)[length - 1])
