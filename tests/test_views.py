import jax.numpy as jnp
import numpy as np

from seqmnist import views


def test_rows_are_the_rows_over_255(digits):
    images = digits[0][:3]
    sequence = views.rows(jnp.array(images))
    assert sequence.shape == (3, 28, 28)
    assert sequence.dtype == jnp.float32
    np.testing.assert_allclose(sequence[1, 20], images[1, 20] / 255, rtol=2e-7)


def test_views_keep_the_dtype_asked_for(digits):
    assert views.rows(jnp.array(digits[0]), jnp.bfloat16).dtype == jnp.bfloat16
