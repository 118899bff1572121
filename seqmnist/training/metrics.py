"""Metrics: masked sums and counts that are divided once, at the end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sums(NamedTuple):
    """Running totals over examples, [] or of members [S]; they add over batches and devices."""

    loss: jax.Array  # float: summed cross-entropy in nats
    correct: jax.Array  # int32: number of correct predictions
    count: jax.Array  # int32: number of examples

    @classmethod
    def zeros(cls, dtype=jnp.float32, shape: tuple[int, ...] = ()) -> "Sums":
        """Returns the totals of no examples."""
        return cls(*(jnp.zeros(shape, kind) for kind in (dtype, jnp.int32, jnp.int32)))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def restart(self) -> "Sums":
        """Returns zeros for the next epoch, but the loss where it is not finite now.

        A member that has diverged (NaN) or stopped early (infinity) stays marked, and
        `steps.guarded_step` leaves its state alone.
        """
        zeros = Sums(*map(np.zeros_like, self))
        return zeros._replace(loss=np.where(np.isfinite(self.loss), zeros.loss, self.loss))

    def means(self) -> dict[str, float | list[float]]:
        """Returns {"loss", "accuracy"} per example: floats, or lists of S values."""
        loss, correct, count = (np.asarray(x, np.float64) for x in self)
        return {"loss": (loss / count).tolist(), "accuracy": (correct / count).tolist()}


def classification_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Returns the totals of a batch: logits [B, C], labels int32 [B], mask bool [B].

    False in `mask` marks padding, which is not counted.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return Sums(
        loss=jnp.sum(jnp.where(mask, losses, 0)),
        correct=jnp.sum(hits & mask, dtype=jnp.int32),
        count=jnp.sum(mask, dtype=jnp.int32),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Converts logits [..., C] into probabilities, in NumPy."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
