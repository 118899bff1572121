import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmnist.training.metrics import Sums, classification_sums


def numpy_sums(logits, labels, mask):
    """The same totals, example by example in float64."""
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


def test_padding_counts_for_nothing_even_where_it_is_not_finite():
    logits = jnp.array([[0.0, 1.0], [jnp.nan, jnp.inf]])
    sums = classification_sums(logits, jnp.array([1, 0]), jnp.array([True, False]))
    assert sums.means() == {"loss": float(np.log1p(np.exp(np.float32(-1)))), "accuracy": 1.0}


def test_sums_add_field_by_field_and_divide_once():
    one = Sums(jnp.float32(3.0), jnp.int32(1), jnp.int32(2))
    two = Sums(jnp.float32(1.0), jnp.int32(1), jnp.int32(6))
    assert (one + two).means() == {"loss": 0.5, "accuracy": 0.25}
    chex.assert_trees_all_equal(Sums.zeros() + one, one)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.jit(Sums.zeros)(), one)
