"""Sums over examples, against a plain count."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmnist.training.metrics import Sums, classification_sums


def numpy_sums(logits, labels, mask):
    """The totals, example by example in float64."""
    loss, correct, count = 0.0, 0, 0
    for row, label, kept in zip(logits.astype(np.float64), labels, mask, strict=True):
        if kept:
            loss += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[label]
            correct += int(np.argmax(row) == label)
            count += 1
    return loss, correct, count


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_masked_sums_equal_a_plain_count(seed, kept):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (17, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 17, dtype=np.int32)
    mask = rng.random(17) < kept
    sums = classification_sums(jnp.array(logits), jnp.array(labels), jnp.array(mask))
    loss, correct, count = numpy_sums(logits, labels, mask)
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5, atol=1e-5)
    assert (int(sums.correct), int(sums.count)) == (correct, count)


def test_padding_is_not_counted_even_if_it_is_not_finite():
    logits = jnp.array([[0.0, 1.0], [jnp.nan, jnp.inf]])
    sums = classification_sums(logits, jnp.array([1, 0]), jnp.array([True, False]))
    means = {"loss": np.log1p(np.exp(-1)), "accuracy": 1.0}
    assert sums.means() == pytest.approx(means, rel=1e-6)


def test_sums_add_field_by_field_and_divide_once():
    one = Sums(jnp.float32(3.0), jnp.int32(1), jnp.int32(2), jnp.float32(4.0), jnp.float32(0.5))
    two = Sums(jnp.float32(1.0), jnp.int32(1), jnp.int32(6), jnp.float32(2.0), jnp.float32(1.0))
    assert (one + two).means() == {"loss": 0.5, "accuracy": 0.25}
    assert (one + two).norms(num_steps=2) == {"gradient_norm": 3.0, "update_norm": 0.75}
    chex.assert_trees_all_equal(Sums.zeros() + one, one)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.jit(Sums.zeros)(), one)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_restart_at_zero_but_what_has_ended_stays_marked(dtype):
    losses = jnp.array([3.0, jnp.nan, jnp.inf, 0.0], dtype)
    norms = jnp.arange(4, dtype=dtype)
    sums = Sums(losses, norms.astype(jnp.int32), jnp.full(4, 9, jnp.int32), norms, norms)
    expected = Sums.zeros(dtype, (4,))._replace(loss=jnp.array([0, jnp.nan, jnp.inf, 0], dtype))
    chex.assert_trees_all_equal(sums.restart(), expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(sums.restart(), sums)
    next_epoch = sums.restart() + sums
    np.testing.assert_array_equal(np.isfinite(next_epoch.loss), [True, False, False, True])
    np.testing.assert_array_equal(next_epoch.norms()["update_norm"], [0, np.nan, np.nan, 3])
