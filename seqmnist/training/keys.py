"""Randomness: every key is a pure function of the seed, a purpose and a counter."""

import jax

PURPOSES = ("params", "epoch_order", "dropout", "augment")


def key(seed: jax.Array | int, purpose: str, counter: jax.Array | int = 0) -> jax.Array:
    """Returns the key for one use of randomness.

    Args:
      seed: the run's seed, an integer scalar; may be traced.
      purpose: one of PURPOSES, whose order is part of every result: append, never reorder.
      counter: tells one use from the next, e.g. the epoch; may be traced.
    """
    purpose_key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(purpose_key, counter)


def per_example(key: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns a key for each example of a batch: by int32 positions [B] in the whole batch.

    So a part of a batch draws what the whole does.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
