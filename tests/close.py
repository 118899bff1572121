"""Comparison of arrays relative to their size, since another processor rounds differently."""

import chex
import jax
import numpy as np


def assert_close(got, expected, tolerance=1e-5):
    """Compares trees of arrays; `tolerance` is a share of the largest number of each array."""

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    chex.assert_trees_all_equal_structs(got, expected)
    jax.tree.map(compare, got, expected)
