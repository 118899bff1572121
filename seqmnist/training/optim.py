"""Optimizers: configuration -> `optax.GradientTransformation`."""

import dataclasses
import functools

import jax
import optax
from flax import nnx

from seqmnist.config import OptimizerConfig
from seqmnist.errors import choose
from seqmnist.networks.cells import RecurrentParam

_SWEEPABLE = ("learning_rate", "momentum", "weight_decay", "clip_norm")


def _mask(condition):
    """Returns a function of parameters: their tree, with `condition` of each variable."""
    return functools.partial(
        jax.tree.map, condition, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


_is_recurrent = _mask(lambda variable: isinstance(variable, RecurrentParam))
_decays = _mask(lambda variable: not isinstance(variable, RecurrentParam) and variable.ndim > 1)

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

    `num_steps` is the length of the run, for schedules; without it the learning rate is constant.
    Values of the `swept` fields live in the optimizer's state, under `hyperparams`, so that each
    member has its own. Raises UserError if there is no optimizer of that name.
    """
    if swept:

        def build(learning_rate, momentum, weight_decay, clip_norm):
            values = (learning_rate, momentum, weight_decay, clip_norm)
            one = dataclasses.replace(config, **dict(zip(_SWEEPABLE, values, strict=True)))
            return make_optimizer(one, num_steps)

        values = {name: getattr(config, name) for name in _SWEEPABLE} | dict.fromkeys(swept, 1.0)
        return optax.inject_hyperparams(build, set(_SWEEPABLE) - set(swept))(**values)
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
