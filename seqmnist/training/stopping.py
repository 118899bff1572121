"""Early stopping: what follows from the validation losses of the finished epochs.

Members stop one by one. All is computed from the records of epochs, so that a resumed run decides
as an uninterrupted one does. Shapes: [S] for S members, [] for a single network.
"""

import functools
from typing import Any

import jax
import numpy as np

from seqmnist.networks import scans


def best_epochs(history: list[dict[str, Any]]) -> np.ndarray:
    """Returns the epoch with the lowest validation loss, the first of equals, from 0: int [S]."""
    losses = np.array([record["validation/loss"] for record in history], float)
    return np.nan_to_num(losses, nan=np.inf).argmin(0)


def has_stopped(history: list[dict[str, Any]], patience: int) -> np.ndarray:
    """Returns which members saw `patience` epochs in a row without a lower loss: bool [S]."""
    return len(history) - 1 - best_epochs(history) >= patience


@jax.jit
def choose(mask: jax.Array, one: Any, other: Any) -> Any:
    """Chooses between two trees of arrays, by member: bool [S]."""
    return jax.tree.map(functools.partial(scans.where, mask), one, other)
