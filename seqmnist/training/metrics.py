"""Metrics: masked sums and counts, divided once at the end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sums(NamedTuple):
    """Running totals over examples; they add over batches, devices and hosts.

    Of S members together, each field is [S].

    Attributes:
      loss: float, the summed cross-entropy in nats.
      correct: int32, how many predictions were right.
      count: int32, how many examples were seen.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def zeros(cls, dtype=jnp.float32, shape: tuple[int, ...] = ()) -> "Sums":
        """Returns the totals over no example, of one run or of `shape` runs."""
        return cls(*(jnp.zeros(shape, kind) for kind in (dtype, jnp.int32, jnp.int32)))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def means(self) -> dict[str, float | list[float]]:
        """Returns {"loss", "accuracy"} over all examples counted: floats, or lists of S."""
        loss, correct, count = (np.asarray(x, np.float64) for x in self)
        return {"loss": (loss / count).tolist(), "accuracy": (correct / count).tolist()}


def classification_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Totals of a batch.

    Args:
      logits: [B, C].
      labels: int32 [B].
      mask: bool [B]; False marks padding, which counts for nothing.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return Sums(
        loss=jnp.sum(jnp.where(mask, losses, 0)),
        correct=jnp.sum(hits & mask, dtype=jnp.int32),
        count=jnp.sum(mask, dtype=jnp.int32),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turns logits [..., C] into probabilities, on the host."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
