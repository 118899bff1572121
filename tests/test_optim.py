import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmnist.config import OptimizerConfig
from seqmnist.errors import UserError
from seqmnist.optim import make_optimizer


def test_rmsprop_follows_its_formula_in_float64():
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01))
    params = jnp.array(rng.normal(size=20), jnp.float32)
    expected, velocity = np.asarray(params, np.float64), np.zeros(20)
    state = optimizer.init(params)
    for _ in range(50):
        gradient = rng.normal(size=20) * 10.0 ** rng.integers(-6, 2, 20)
        updates, state = optimizer.update(jnp.array(gradient, jnp.float32), state)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + 0.1 * gradient**2
        expected -= 0.01 * gradient / np.sqrt(velocity + 1e-7)
    np.testing.assert_allclose(params, expected, atol=1e-5)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"config.optimizer.name='rmsprob'.*rmsprop"):
        make_optimizer(OptimizerConfig(name="rmsprob"))
