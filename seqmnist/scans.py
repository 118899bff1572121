"""Recurrences over time, on plain arrays, time first."""

from collections.abc import Callable
from typing import Any

import jax


def sequential(step: Callable, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """Applies a recurrence step by step.

    Args:
      step: (carry, z_t) -> (carry, h_t), with z_t [B, K·H] and h_t [B, H].
      carry: the state before the first step.
      inputs: z, [T, B, K·H].

    Returns:
      The state after the last step, and h, [T, B, H].
    """
    return jax.lax.scan(step, carry, inputs)
