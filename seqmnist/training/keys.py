"""Randomness: every key is a pure function of the seed, a purpose and a counter."""

import jax

PURPOSES = ("params", "epoch_order", "dropout", "augment")


def key(seed: jax.Array | int, purpose: str, counter: jax.Array | int = 0) -> jax.Array:
    """Returns the key for one use of randomness.

    The purpose is one of PURPOSES, whose order is part of every result: append, never reorder.
    The counter tells one use from the next, e.g. the epoch. Seed and counter may be traced.
    """
    first = jax.random.key(seed, impl="threefry2x32")  # whatever JAX's own default is
    return jax.random.fold_in(jax.random.fold_in(first, PURPOSES.index(purpose)), counter)
