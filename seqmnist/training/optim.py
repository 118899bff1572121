"""Optimizers: configuration -> `optax.GradientTransformation`."""

import dataclasses
import inspect

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


def make_optimizer(
    config: OptimizerConfig, num_steps: int | None = None, swept: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """Builds the optimizer that the configuration names, for an `nnx.State` of parameters.

    Args:
      config: the configuration.
      num_steps: the length of the run, which schedules need.
      swept: fields whose values live in the optimizer's state, under `hyperparams`, so that each
        member has its own.

    Raises:
      UserError: there is no optimizer of that name.
    """
    if swept:

        def build(**values):
            return make_optimizer(dataclasses.replace(config, **values), num_steps)

        # inject_hyperparams takes the names from the signature.
        kind = inspect.Parameter.KEYWORD_ONLY
        build.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in swept])
        return optax.inject_hyperparams(build)(**dict.fromkeys(swept, 1.0))
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
    if config.schedule == "constant" and not config.warmup_fraction:
        return peak
    warmup = round(config.warmup_fraction * num_steps)
    schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, num_steps - warmup)
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
