"""What a trained network does while it reads, by time step; how accurate and how confident it is.

Shapes: B batch, T time steps, U outputs of the top layer, C classes, D directions (2 if layers are
bidirectional, else 1).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from seqmnist.networks import scans
from seqmnist.networks.model import Bidirectional, ResidualBlock
from seqmnist.training.steps import System


def beliefs(system: System, params: Any, images: jax.Array) -> jax.Array:
    """Returns what the network would predict if its sequence ended after each time step.

    One pass if the network reads forwards. A bidirectional layer also reads from the end, which
    is different for every time step: T passes.

    `images` are uint8 [B, *spec.shape]. Returns probabilities [T, B, C]; the last are those of the
    whole image.
    """
    network = nnx.merge(system.graphdef, params)
    x = network.sequence(images)
    if network.config.bidirectional:
        lengths = jnp.broadcast_to(jnp.arange(1, len(x) + 1).reshape(-1, 1), x.shape[:2])
        logits = lax.map(lambda lengths: network.classify(x, lengths), lengths)
    else:

        def step(state, x_t):
            state = network.read(state, x_t[None])
            return state, network.answer(state)

        logits = lax.scan(step, network.initial_state(x.shape[1]), x)[1]
    return jax.nn.softmax(logits)


def hidden_states(system: System, params: Any, images: jax.Array) -> jax.Array:
    """Returns the outputs of the top layer at all time steps, [T, B, U]; arguments as `beliefs`.

    The second half of a bidirectional layer's outputs comes from reading from the end to that
    time step.
    """
    network = nnx.merge(system.graphdef, params)
    return network.run(network.sequence(images))


def gradient_norms(system: System, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how much the loss changes with the state of the top layer at each time step.

    This gradient flows backwards through time: where it vanishes, the network cannot learn from
    what it read before. `labels` are int32 [B]; the other arguments as `beliefs`.

    Returns ‖∂loss/∂h_t‖ of each example's cross-entropy, [D, T, B]; h_t is the whole state: h and c
    for an LSTM. The second direction reads from the end to time step t.
    """
    network = nnx.merge(system.graphdef, params)
    x = network.sequence(images)
    below, top = network.run(x, num_layers=-1), network.layers[-1]
    is_block = isinstance(top, ResidualBlock)
    cell, inputs = (top.layer, top.prepare(below)) if is_block else (top, below)
    cells = [cell.forward, cell.backward] if isinstance(cell, Bidirectional) else [cell]

    def total_loss(nudges):
        halves = zip(cells, (1, -1), nudges, strict=False)
        halves = [_nudged(cell, inputs[::sign], nudge)[::sign] for cell, sign, nudge in halves]
        y = jnp.concatenate(halves, axis=-1)
        logits = network.classify_outputs(top.finish(below, y) if is_block else y)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses)  # no example's loss depends on another's state

    states = [cell.initial_state(x.shape[1]) for cell in cells]
    nudges = jax.tree.map(lambda leaf: jnp.zeros((len(x), *leaf.shape), leaf.dtype), states)
    norms = [
        jnp.sqrt(sum(jnp.sum(leaf**2, range(2, leaf.ndim)) for leaf in jax.tree.leaves(grad)))
        for grad in jax.grad(total_loss)(nudges)
    ]
    return jnp.stack([norms[0], *(norm[::-1] for norm in norms[1:])])


def _nudged(cell, x, nudge):
    """Returns the outputs of a cell for x [T, B, F], with `nudge` added to its states."""

    def step(state, at_t):
        z_t, nudge_t = at_t
        return jax.tree.map(jnp.add, cell.step(state, z_t), nudge_t)

    z = (cell.project(x), nudge)
    return cell.emit(scans.plain(step, cell.initial_state(x.shape[1]), z)[1], x)


class ClassScores(NamedTuple):
    """Scores of each class, float64 [C], with 0 / 0 as 0; its number of examples, int64 [C]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pairs of label and prediction, int [N] each: int64 [C, C], a row for each label."""
    pairs = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Returns the scores of each class from a `confusion_matrix`."""
    correct, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def ratio(a, b):
        return np.divide(a, b, out=np.zeros(len(a)), where=b != 0)

    f1 = ratio(2 * correct, support + predicted)
    return ClassScores(ratio(correct, predicted), ratio(correct, support), f1, support)


class Calibration(NamedTuple):
    """Predictions in bins of their probability, float64 [bins], NaN in empty ones."""

    confidence: np.ndarray  # mean probability of the predicted class
    accuracy: np.ndarray
    counts: np.ndarray  # int64 [bins]
    error: float  # the expected calibration error: mean |accuracy - confidence| over examples


def calibration(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 15) -> Calibration:
    """Compares the confidence of predictions with their accuracy; takes int [N] and float [N, C].

    Bins divide 0 to 1 evenly. Source: C. Guo et al., On calibration of modern neural networks,
    arXiv 1706.04599.
    """
    sure = probabilities.max(-1).astype(np.float64)
    bins = np.clip(np.ceil(sure * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    is_right = probabilities.argmax(-1) == labels
    sums = (np.bincount(bins, weights, num_bins) for weights in (sure, is_right))
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (total / counts for total in sums)
    error = np.nansum(np.abs(accuracy - confidence) * counts) / len(labels)
    return Calibration(confidence, accuracy, counts, float(error))
