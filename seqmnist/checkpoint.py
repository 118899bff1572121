"""Checkpoints: a `TrainState` in a workdir, saved and restored whole by Orbax."""

import pathlib

import jax

from seqmnist.errors import UserError
from seqmnist.steps import TrainState

DIRECTORY = "checkpoints"


def save(workdir: pathlib.Path, state: TrainState) -> None:
    """Saves the state under its step, replacing what that step held."""
    import orbax.checkpoint as ocp  # here, not above: it takes long to import

    with ocp.CheckpointManager(workdir / DIRECTORY) as manager:
        manager.save(int(state.step), args=ocp.args.StandardSave(state), force=True)


def restore(workdir: pathlib.Path, like: TrainState) -> TrainState:
    """Restores the newest state.

    Args:
      workdir: where `save` put it.
      like: a state, or its shapes and dtypes, of the same structure.

    Raises:
      UserError: there is none, or it is damaged or of another structure.
    """
    import orbax.checkpoint as ocp

    directory = workdir / DIRECTORY
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; train with this --workdir first")
    like = jax.eval_shape(lambda: like)
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{directory} holds no checkpoint; train with this --workdir first")
        try:
            return manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{directory / str(step)} cannot be restored ({reason})") from error
