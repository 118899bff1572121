"""Metrics: masked sums and counts that are divided once, at the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Sums(NamedTuple):
    """Running totals, [], or [S] with members; sums over examples add over batches and devices."""

    loss: jax.Array  # float: summed cross-entropy in nats
    correct: jax.Array  # int32: number of correct predictions
    count: jax.Array  # int32: number of examples
    gradient_norm: jax.Array  # float: L2 norms of gradients, summed over steps; 0 in an evaluation
    update_norm: jax.Array  # float: the same of updates

    @classmethod
    def zeros(cls, dtype=jnp.float32, shape: tuple[int, ...] = ()) -> "Sums":
        """Returns the totals of no examples, in NumPy: they compile nothing."""
        kinds = (dtype, jnp.int32, jnp.int32, dtype, dtype)
        return cls(*(np.zeros(shape, kind) for kind in kinds))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def restart(self) -> "Sums":
        """Returns zeros for the next epoch, but keeps a loss that is not finite.

        A member that has diverged (NaN) or stopped early (infinity) stays marked, and
        `steps.guarded_step` leaves its state alone.
        """
        zeros = Sums(*map(np.zeros_like, self))
        return zeros._replace(loss=np.where(np.isfinite(self.loss), zeros.loss, self.loss))

    def means(self) -> dict[str, float | list[float]]:
        """Returns {"loss", "accuracy"} per example: floats, or lists of S values."""
        loss, correct, count = (np.asarray(x, np.float64) for x in self[:3])
        return {"loss": (loss / count).tolist(), "accuracy": (correct / count).tolist()}

    def norms(self, num_steps: int = 1) -> dict[str, float | list[float]]:
        """Returns {"gradient_norm", "update_norm"} per step; NaN where the loss is not finite."""
        norms = {"gradient_norm": self.gradient_norm, "update_norm": self.update_norm}
        return {
            name: np.where(np.isfinite(self.loss), np.float64(norm) / num_steps, np.nan).tolist()
            for name, norm in norms.items()
        }


def parameter_norm(params: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Returns the L2 norm of all parameters, arrays [*shape, …]: float64 [*shape], in NumPy."""
    leaves = [np.asarray(x, np.float64).reshape(*shape, -1) for x in jax.tree.leaves(params)]
    return np.sqrt(sum(np.square(leaf).sum(-1) for leaf in leaves))


def classification_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Returns the totals of a batch: logits [B, C], labels int32 [B], mask bool [B].

    False in `mask` marks padding, which is not counted.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
    return Sums.zeros(losses.dtype)._replace(
        loss=jnp.sum(jnp.where(mask, losses, 0)),
        correct=jnp.sum(hits & mask, dtype=jnp.int32),
        count=jnp.sum(mask, dtype=jnp.int32),
    )
