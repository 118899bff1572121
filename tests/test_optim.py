import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import assert_close
from flax import nnx

from seqmnist.config import _ACTS_WITH, OptimizerConfig, override
from seqmnist.errors import UserError
from seqmnist.networks import cells
from seqmnist.training.optim import OPTIMIZERS, hyperparameter, make_optimizer, make_schedule


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
    assert_close(params, expected.astype(np.float32))


def test_momentum_and_weight_decay_act_on_one_optimizer_each():
    for name in ("momentum", "weight_decay"):
        _, acts, idle = _ACTS_WITH[f"optimizer.{name}"]
        assert {acts, *idle.split()} == OPTIMIZERS.keys()


def updates_of(config, params, grads, num_steps=None):
    optimizer = make_optimizer(config, num_steps)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def lru_params():
    params = nnx.state(cells.LRU(3, 4, rngs=nnx.Rngs(0)))
    return params, jax.tree.map(jnp.ones_like, params)


def test_recurrent_parameters_take_smaller_steps():
    params, grads = lru_params()
    whole = updates_of(OptimizerConfig(name="sgd"), params, grads)
    part = updates_of(OptimizerConfig(name="sgd", recurrent_factor=0.25), params, grads)
    for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im"):
        chex.assert_trees_all_close(part[name][...], 0.25 * whole[name][...])
    for name in ("C_re", "C_im"):
        chex.assert_trees_all_equal(part[name][...], whole[name][...])


@jax.numpy_dtype_promotion("standard")  # Optax's Adam is not strict
def test_only_kernels_outside_the_recurrence_decay():
    params, grads = lru_params()
    config = OptimizerConfig(name="adamw", weight_decay=0.5, learning_rate=0.1)
    still = jax.tree.map(jnp.zeros_like, grads)
    updates = updates_of(config, params, still)
    for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im"):
        assert not updates[name][...].any()
    chex.assert_trees_all_close(updates["C_re"][...], -0.05 * params["C_re"][...], rtol=1e-5)
    bias = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    ones = jax.tree.map(jnp.ones_like, bias)
    updates = updates_of(config, ones, jax.tree.map(jnp.zeros_like, bias))
    assert not updates["bias"][...].any()
    assert updates["kernel"][...].all()


def test_clipping_bounds_the_global_norm():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 30.0), "b": jnp.full(4, -40.0)}
    config = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=1.0, clip_norm=2.0)
    updates = updates_of(config, params, grads)
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-5)
    np.testing.assert_allclose(updates["a"] / updates["b"][:3], -0.75, rtol=1e-5)


def test_schedules_rise_and_fall():
    def rates(**fields):
        schedule = make_schedule(OptimizerConfig(learning_rate=0.1, **fields), num_steps=100)
        return [float(schedule(step)) for step in (0, 5, 10, 55, 100)]

    assert make_schedule(OptimizerConfig(learning_rate=0.1), num_steps=None) == 0.1
    warm = rates(warmup_fraction=0.1)
    np.testing.assert_allclose(warm, [0, 0.05, 0.1, 0.1, 0.1], atol=1e-7)
    cosine = rates(schedule="cosine", warmup_fraction=0.1)
    np.testing.assert_allclose(cosine, [0, 0.05, 0.1, 0.05, 0], atol=1e-7)
    np.testing.assert_allclose(rates(schedule="cosine")[0], 0.1)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_schedule_of_few_steps_is_finite(num_steps, warmup_fraction):
    config = OptimizerConfig(schedule="cosine", warmup_fraction=warmup_fraction)
    schedule = make_schedule(config, num_steps)
    rates = np.array([schedule(step) for step in range(num_steps + 1)])
    assert np.isfinite(rates).all()
    assert (rates <= config.learning_rate * (1 + 1e-6)).all()


@jax.numpy_dtype_promotion("standard")  # Optax's Adam is not strict
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
    params, optimizer = jnp.ones(3), make_optimizer(OptimizerConfig(name=name))
    state = optimizer.init(params)
    for _ in range(10):
        updates, state = optimizer.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.all(params < 1)


@jax.numpy_dtype_promotion("standard")  # Optax's Adam is not strict
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rmsprop", {"decay": 0.5, "eps": 0.1}, optax.rmsprop(1e-3, 0.5, 0.1, eps_in_sqrt=True)),
        ("adam", {"b1": 0.5, "b2": 0.6, "eps": 0.1}, optax.adam(1e-3, 0.5, 0.6, 0.1)),
        (
            "adamw",
            {"b1": 0.5, "b2": 0.6, "eps": 0.1},
            optax.adamw(1e-3, 0.5, 0.6, 0.1, weight_decay=1e-4),
        ),
        ("sgd", {"nesterov": True}, optax.sgd(1e-3, 0.9, nesterov=True)),
    ],
)
def test_every_option_reaches_optax(name, options, expected):
    optimizer, params = make_optimizer(OptimizerConfig(name, options)), jnp.ones((3, 4))
    state, other = optimizer.init(params), expected.init(params)
    for gradient in np.random.default_rng(0).normal(size=(3, 3, 4)):
        updates, state = optimizer.update(jnp.float32(gradient), state, params)
        wanted, other = expected.update(jnp.float32(gradient), other, params)
        assert_close(updates, wanted)


@jax.numpy_dtype_promotion("standard")  # Optax's Adam and its schedules are not strict
@pytest.mark.parametrize(
    ("field", "value", "config"),
    [
        ("learning_rate", 0.3, OptimizerConfig(name="rmsprop")),
        ("learning_rate", 0.3, OptimizerConfig(name="adam", schedule="cosine")),
        ("momentum", 0.3, OptimizerConfig(name="sgd")),
        ("weight_decay", 0.3, OptimizerConfig(name="adamw")),
        ("clip_norm", 0.3, OptimizerConfig(name="sgd")),
        ("options.decay", 0.3, OptimizerConfig(name="rmsprop")),
        ("options.b2", 0.3, OptimizerConfig(name="adamw")),
    ],
)
def test_a_swept_value_acts_as_a_fixed_one(field, value, config):
    kernel = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    grads = jax.tree.map(jnp.ones_like, kernel)
    fixed = make_optimizer(override(config, {field: value}), num_steps=10)
    swept = make_optimizer(config, num_steps=10, swept=(field,))
    state, other = fixed.init(kernel), swept.init(kernel)
    values = {**other.hyperparams, hyperparameter(field): jnp.float32(value)}
    other = other._replace(hyperparams=values)
    for _ in range(3):
        expected, state = fixed.update(grads, state, kernel)
        updates, other = swept.update(grads, other, kernel)
        assert_close(updates, expected)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"config.optimizer.name='rmsprob'.*rmsprop"):
        make_optimizer(OptimizerConfig(name="rmsprob"))
