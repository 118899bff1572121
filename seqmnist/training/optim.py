"""Optimizers: configuration -> `optax.GradientTransformation`."""

import dataclasses

import jax
import optax
from flax import nnx

from seqmnist.config import OptimizerConfig
from seqmnist.errors import choose
from seqmnist.networks.cells import RecurrentParam

OPTIMIZERS = {
    # RMSprop as Keras 3 computes it: decay 0.9, and epsilon 1e-7 inside the root.
    "rmsprop": lambda config, rate: optax.rmsprop(rate, decay=0.9, eps=1e-7, eps_in_sqrt=True),
    "adam": lambda config, rate: optax.adam(rate),
    "adamw": lambda config, rate: optax.adamw(rate, weight_decay=config.weight_decay, mask=_decays),
    "sgd": lambda config, rate: optax.sgd(rate, momentum=config.momentum),
}

_SWEEPABLE = ("learning_rate", "momentum", "weight_decay", "clip_norm")


def make_optimizer(
    config: OptimizerConfig, num_steps: int | None = None, swept: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Builds the optimizer that the configuration names, for an `nnx.State` of parameters.

    Args:
      config: the configuration.
      num_steps: the length of the run, for schedules; without it the learning rate is constant.
      swept: fields whose values live in the optimizer's state, under `hyperparams`, so that each
        member has its own.

    Raises:
      UserError: there is no optimizer of that name.
    """
    if swept:
        static = [name for name in _SWEEPABLE if name not in swept]

        def build(learning_rate, momentum, weight_decay, clip_norm):
            values = (learning_rate, momentum, weight_decay, clip_norm)
            one = dataclasses.replace(config, **dict(zip(_SWEEPABLE, values, strict=True)))
            return make_optimizer(one, num_steps)

        values = {name: 1.0 if name in swept else getattr(config, name) for name in _SWEEPABLE}
        return optax.inject_hyperparams(build, static_args=static)(**values)
    rate = make_schedule(config, num_steps)
    parts = [choose(OPTIMIZERS, config.name, "optimizer.name")(config, rate)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.recurrent_factor != 1:
        parts.append(optax.masked(optax.scale(config.recurrent_factor), _is_recurrent))
    return optax.chain(*parts) if parts[1:] else parts[0]


def make_schedule(config: OptimizerConfig, num_steps: int | None) -> optax.ScalarOrSchedule:
    """Returns the learning rate as a function of the step, or a number where it is constant."""
    peak = config.learning_rate
    is_constant = config.schedule == "constant" and not config.warmup_fraction
    if is_constant or num_steps is None:
        return peak
    warmup = round(config.warmup_fraction * num_steps)
    schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup))
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, schedule], [warmup]) if warmup else schedule


def _is_recurrent(params):
    return _map_variables(lambda variable: isinstance(variable, RecurrentParam), params)


def _decays(params):
    return _map_variables(
        lambda variable: not isinstance(variable, RecurrentParam) and variable.ndim > 1, params
    )


def _map_variables(function, params):
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
