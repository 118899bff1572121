"""Metrics: masked sums and counts, divided once at the end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Sums(NamedTuple):
    """Running totals over examples; they add over batches, devices and hosts.

    Attributes:
      loss: float, the summed cross-entropy in nats.
      correct: int32, how many predictions were right.
      count: int32, how many examples were seen.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def zeros(cls, dtype=jnp.float32) -> "Sums":
        """Returns the totals over no example."""
        return cls(jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def means(self) -> dict[str, float]:
        """Returns {"loss", "accuracy"} over all examples counted, as Python floats."""
        loss, correct, count = (x.item() for x in self)
        return {"loss": loss / count, "accuracy": correct / count}


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
