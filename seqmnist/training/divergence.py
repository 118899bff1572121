"""Says where and why a run diverged."""

import pathlib
import traceback
from typing import Any

import jax
import numpy as np
import optax

from seqmnist.config import override
from seqmnist.errors import UserError
from seqmnist.training import batches, devices
from seqmnist.training.optim import make_schedule
from seqmnist.training.steps import TrainState, train_step
from seqmnist.training.task import Task


class DivergedError(UserError):
    """The network, or every member, has diverged."""


def explain(task: Task, state: TrainState, last_saved: str, debug_nans: bool) -> str:
    """Returns one line on the first step whose results were not finite, and what to do.

    `state` counts the steps before that one. It is the last good state, which `steps.guarded_step`
    has kept; if only validation found the divergence, its parameters are those after the step.
    `last_saved` is the name of the newest checkpoint. `debug_nans` repeats the step of a single
    network to find the operation.
    """
    step = int(np.max(devices.gather(state.step)))
    epoch, row = divmod(step, task.steps_per_epoch)
    where, is_single = "", len(task.members) == 1
    if debug_nans and is_single:
        where = _find_operation(task, state, task.epoch_rows(epoch)[row])
        where = where or "because a number became infinite, "
    scale = 1.0  # to which the schedule plateau has reduced the rate, of each member
    if task.config.optimizer.schedule == "plateau":
        scale = devices.gather(optax.tree.get(state.opt_state, "scale"))
    rates = np.array([_learning_rate(task, member, step) for member in task.members]) * scale
    rates = np.unique(rates)
    rate = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    who = "" if is_single else f"in all {len(task.members)} members "
    swept = task.members[0]
    rate_field, clip_field = (
        f"{name} in config.members.sweep" if name in swept else f"config.{name}"
        for name in ("optimizer.learning_rate", "optimizer.clip_norm")
    )
    hint = "; --debug_nans finds the operation" if is_single and not debug_nans else ""
    return (
        f"the loss or the training state is not finite {who}{where}after step {step + 1} (epoch "
        f"{epoch + 1}, learning rate {rate}); last good checkpoint: {last_saved}; train with a "
        f"smaller {rate_field} or with {clip_field} in another --workdir{hint}"
    )


def _learning_rate(task: Task, member: dict[str, Any], step: int) -> float:
    schedule = make_schedule(override(task.config, member).optimizer, task.num_steps)
    return float(schedule(step)) if callable(schedule) else schedule


def _find_operation(task, state, row):
    batch = batches.Records(*map(task.dataset.mapped, ("train", "test"))).read(row)
    with jax.debug_nans(True), jax.disable_jit():
        try:
            train_step(task.system, state, batch)
        except FloatingPointError as error:
            return f"({_blame(error)}) "
    return ""


def _blame(error):
    """Names the operation and the line of this package that an error comes from."""
    package = pathlib.Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    last = [f for f in frames if pathlib.Path(f.filename).is_relative_to(package)][-1]
    return f"{str(error).partition('.')[0]} ({pathlib.Path(last.filename).name}:{last.lineno})"
