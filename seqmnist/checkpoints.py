"""Checkpoints: all that a run needs to go on, saved and restored whole by Orbax.

A checkpoint is a step of `DIR/checkpoints`: the `TrainState`, the sums of the epoch so far, and,
as JSON, the epochs that are done and a SHA-256 of everything, so that damage is noticed wherever
it is.
"""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from seqmnist.config import CheckpointConfig
from seqmnist.errors import UserError
from seqmnist.training import devices
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import TrainState

DIRECTORY, DAMAGED = "checkpoints", "damaged"


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: after `step` steps.
      sums: of the epoch so far.
      step: steps of the run that are done.
      history: a record for each epoch that is done, as in `metrics.jsonl`.
      fingerprint: of the dataset.
      seconds: spent on training so far.
    """

    state: TrainState
    sums: Sums
    step: int
    history: list[dict[str, Any]]
    fingerprint: str
    seconds: float


class Checkpoints:
    """The checkpoints of a workdir, for the run that writes them; close it to finish writing."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        """Touches nothing yet."""
        self._workdir, self._config = workdir, config

    @functools.cached_property
    def _manager(self):
        return _manager(self._workdir, self._config)

    def save(self, saved: Saved) -> None:
        """Saves in the background; a step that is saved already stays as it is."""
        import orbax.checkpoint as ocp  # here, not above: it takes long to import

        if saved.step in self._manager.all_steps():
            return
        arrays, facts = _split(saved)
        # Copies on the host: the state is donated to the next step while Orbax writes.
        arrays = jax.tree.map(np.array, devices.gather(arrays))
        facts["sha256"] = _digest(arrays, facts)
        accuracy = saved.history[-1]["validation/accuracy"] if saved.history else None
        mean = _mean(accuracy)
        self._manager.save(
            saved.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts)
            ),
            metrics=None if mean is None else {"accuracy": mean},
            force=True,
        )

    def restore(self, like: Saved, say: Callable[[str], None]) -> Saved | None:
        """Restores the newest checkpoint that is whole; damaged ones are set aside.

        Args:
          like: what it holds, or its shapes, dtypes and shardings.
          say: is told of each damaged one.

        Returns:
          None where nothing has been saved yet.

        Raises:
          UserError: all are damaged.
        """
        # Agreed on: another process may be removing an old run, or has not seen it removed.
        if not devices.agree((self._workdir / DIRECTORY).exists()):
            return None
        found = None
        for step, saved, reason in _newest_first(self._manager, like):
            if saved:
                return saved
            found = self._workdir / DAMAGED / str(step)
            if jax.process_index() == 0:
                say(f"checkpoints/{step} is damaged ({reason}); set aside as {DAMAGED}/{step}")
                found.parent.mkdir(exist_ok=True)
                (self._workdir / DIRECTORY / str(step)).rename(_unused(found))
        self.close()
        del self._manager  # it knows those that are set aside
        if found:
            raise UserError(
                f"no checkpoint of {self._workdir} is whole; train from the start with --overwrite"
            )
        return None

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()


def check(workdir: pathlib.Path) -> None:
    """Sees to it that a workdir may hold checkpoints, before anything else is done.

    Raises:
      UserError: it does not.
    """
    if not (workdir / DIRECTORY).is_dir():
        raise UserError(f"{workdir / DIRECTORY} does not exist; train with this --workdir first")


def restore(workdir: pathlib.Path, like: TrainState) -> TrainState:
    """Restores the newest state that is whole, and writes nothing.

    Args:
      workdir: where a run has written.
      like: a state, or its shapes and dtypes, of the same structure.

    Raises:
      UserError: there is none, or all are damaged or of another structure.
    """
    check(workdir)
    directory = workdir / DIRECTORY
    dtype = jax.tree.leaves(like.params)[0].dtype
    sums = jax.eval_shape(lambda: Sums.zeros(dtype, like.step.shape))
    reason = "it is empty"
    manager = _manager(workdir, None)
    try:
        for step, saved, why in _newest_first(manager, Saved(like, sums, 0, [], "", 0.0)):
            if saved:
                return saved.state
            reason = f"{step}: {why}"
    finally:
        manager.close()
    raise UserError(f"{directory} holds no usable checkpoint ({reason}); train again")


def _manager(workdir, config):
    """A manager that writes as configured, or one that only reads."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    if config is None:
        options = ocp.CheckpointManagerOptions(read_only=True)
    else:
        keep = [policies.LatestN(config.keep)]
        if config.keep_best:
            best = policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1)
            keep.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )
    return ocp.CheckpointManager(workdir / DIRECTORY, options=options)


def _newest_first(manager, like) -> Iterator[tuple[int, Saved | None, str]]:
    """Yields (step, what it holds, "") or (step, None, what is wrong with it)."""
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            yield step, _read(manager, step, like), ""
        except Exception as error:  # whatever the layers below make of damaged files
            yield step, None, str(error).partition("\n")[0][:200] or type(error).__name__


def _read(manager, step, like):
    import orbax.checkpoint as ocp

    arrays, _ = _split(like)
    read = manager.restore(
        step,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore(arrays), facts=ocp.args.JsonRestore()
        ),
    )
    facts = dict(read.facts)
    sha256 = facts.pop("sha256")
    if _digest(read.arrays, facts) != sha256 or facts["step"] != step:
        raise ValueError("its content has changed since it was written")
    return Saved(*read.arrays, **facts)


def _split(saved):
    """Arrays on one side, facts for JSON on the other."""
    facts = saved._asdict()
    return (facts.pop("state"), facts.pop("sums")), facts


def _digest(arrays, facts):
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for leaf in jax.tree.leaves(devices.gather(arrays)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _mean(accuracy):
    return sum(accuracy) / len(accuracy) if isinstance(accuracy, list) else accuracy


def _unused(path):
    others = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(each for each in itertools.chain([path], others) if not each.exists())
