"""Optimizers: configuration -> `optax.GradientTransformation`."""

import functools
from collections.abc import Iterable
from inspect import Parameter, Signature
from typing import Annotated

import jax
import optax
import optax.contrib
from flax import nnx

from seqmnist.config import LARGEST, SMALLEST, OptimizerConfig, checked_options, override
from seqmnist.errors import Table, choose
from seqmnist.networks.cells import RecurrentParam


def _mask(condition):
    """Returns a function of parameters: their tree, with `condition` of each variable."""
    return functools.partial(
        jax.tree.map, condition, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


_is_recurrent = _mask(lambda variable: isinstance(variable, RecurrentParam))
_decays = _mask(lambda variable: not isinstance(variable, RecurrentParam) and variable.ndim > 1)

_Share, _Positive = Annotated[float, "[0, 1)"], Annotated[float, f"[{SMALLEST}, {LARGEST}]"]


def rmsprop(config, rate, *, decay: _Share = 0.9, eps: _Positive = 1e-7):
    """RMSprop as Keras 3 computes it, with epsilon inside the root."""
    return optax.rmsprop(rate, decay=decay, eps=eps, eps_in_sqrt=True)


def adam(config, rate, *, b1: _Share = 0.9, b2: _Share = 0.999, eps: _Positive = 1e-8):
    """Adam, without weight decay."""
    return optax.adam(rate, b1, b2, eps)


def adamw(config, rate, *, b1: _Share = 0.9, b2: _Share = 0.999, eps: _Positive = 1e-8):
    """Adam with decoupled weight decay."""
    return optax.adamw(rate, b1, b2, eps, weight_decay=config.weight_decay, mask=_decays)


def sgd(config, rate, *, nesterov: bool = False):
    """Gradient descent with momentum."""
    return optax.sgd(rate, momentum=config.momentum, nesterov=nesterov)


# (OptimizerConfig, learning rate or schedule, *, options) -> optax.GradientTransformation
OPTIMIZERS = Table({"rmsprop": rmsprop, "adam": adam, "adamw": adamw, "sgd": sgd})


def hyperparameter(name: str) -> str:
    """Returns the name under which a swept field of `OptimizerConfig` is kept in `hyperparams`."""
    return name.removeprefix("optimizer.").replace(".", "_")


def make_optimizer(
    config: OptimizerConfig,
    num_steps: int | None = None,
    swept: Iterable[str] = (),
    steps_per_epoch: int = 1,
) -> optax.GradientTransformation:
    """Builds the optimizer that the configuration names, for an `nnx.State` of parameters.

    `num_steps` is the length of the run, for schedules; without it the learning rate is constant.
    Updates take the loss of the batch as `value`, which the schedule plateau averages over the
    `steps_per_epoch`. Values of the `swept` fields live in the optimizer's state, under
    `hyperparams`, so that each member has its own. Raises UserError if there is no optimizer of
    that name.
    """
    if swept:
        names = {hyperparameter(name): name.removeprefix("optimizer.") for name in swept}

        def build(**values):
            values = {names[name]: value for name, value in values.items()}
            return make_optimizer(override(config, values), num_steps, (), steps_per_epoch)

        keywords = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
        build.__signature__ = Signature(keywords)  # by which Optax knows the hyperparameters
        return optax.inject_hyperparams(build)(**dict.fromkeys(names, 1.0))
    rate = make_schedule(config, num_steps)
    function = choose(OPTIMIZERS, config.name, "optimizer.name")
    choice = f"optimizer.name={config.name}"
    options = checked_options(function, config.options, "optimizer.options", choice)
    parts = [function(config, rate, **options)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.recurrent_factor != 1:
        parts.append(optax.masked(optax.scale(config.recurrent_factor), _is_recurrent))
    if config.schedule == "plateau" and num_steps is not None:
        factor, patience = config.plateau_factor, config.plateau_patience
        parts.append(
            optax.contrib.reduce_on_plateau(factor, patience, accumulation_size=steps_per_epoch)
        )
    optimizer = optax.chain(*parts) if parts[1:] else parts[0]
    return optax.with_extra_args_support(optimizer)


def make_schedule(config: OptimizerConfig, num_steps: int | None) -> optax.ScalarOrSchedule:
    """Returns the learning rate as a function of the step, or a number where it is constant."""
    peak = config.learning_rate
    is_constant = config.schedule != "cosine" and not config.warmup_fraction
    if is_constant or num_steps is None:
        return peak
    warmup = round(config.warmup_fraction * num_steps)
    schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup))
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, schedule], [warmup]) if warmup else schedule
