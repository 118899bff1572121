"""Checkpoints: all that a run needs to resume, saved and restored by Orbax.

A checkpoint is a folder `checkpoints/STEP`: arrays (the `TrainState`, the sums of the epoch so far
and, with early stopping, the best parameters) and, as JSON, the finished epochs, the settings, what
is known of the data, and a SHA-256 of everything. It is restored as it was written and only then
compared with what the configuration needs, so that an error can tell damage from another network or
version.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from seqmnist.config import CheckpointConfig
from seqmnist.errors import (
    UserError,
    explain_storage,
    no_warnings_of,
    one_line,
    storage_reason,
)
from seqmnist.spec import MNIST
from seqmnist.training import devices
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import TrainState

DIRECTORY, DAMAGED = "checkpoints", "damaged"

# What Orbax raises for content that is missing or cannot be decoded.
_UNDECODABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
_UNDECODABLE += (FileNotFoundError,)
# How TensorStore begins a ValueError that has other causes.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED", "CANCELLED")


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: after `step` steps.
      sums: of the epoch so far.
      step: steps of the run that are done.
      history: a record for each finished epoch, as in `metrics.jsonl`.
      fingerprint: of the dataset.
      seconds: spent on training so far.
      images: the dataset's `ImageSpec.to_dict()`.
      settings: see `config.settings`.
      best: the parameters with the lowest validation loss; None without early stopping.
    """

    state: TrainState
    sums: Sums
    step: int
    history: list[dict[str, Any]]
    fingerprint: str
    seconds: float
    images: dict[str, Any]
    settings: dict[str, Any]
    best: Any = None


def validation_losses(history: list[dict[str, Any]]) -> dict[int, float]:
    """Returns the validation loss by step, of the epochs that have one.

    The best state of a run is that with the lowest loss. With members, the loss is the mean over
    those that have not diverged by the end of the history.
    """
    losses = {}
    for record in history:
        values = np.array(record["validation/loss"], float)
        is_good = np.isfinite(values) & ~np.isnan(np.array(history[-1]["train/loss"], float))
        if is_good.any():
            losses[record["step"]] = float(values[is_good].mean())
    return losses


def best_step(history: list[dict[str, Any]]) -> int | None:
    """Returns the step with the lowest validation loss, the first of equals; None without any."""
    losses = validation_losses(history)
    return min(losses, key=losses.get, default=None)


class _DamagedError(Exception):
    """Content is missing, undecodable or differs from its digest."""


class Checkpoints:
    """The checkpoints of a workdir. With several processes, all must call every method."""

    # Orbax takes signals of one save of a process for those of another, and waits for ever: the
    # runs of several threads save one after the other.
    _lock, _saving = threading.Lock(), None

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
        """Takes the workdir's path and, for saving, what to keep; reads and writes nothing yet."""
        self._workdir, self._config = workdir, config
        self.directory = workdir / DIRECTORY
        self._best: int | None = None

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the newest last."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp  # imported here: it takes long to import
        from orbax.checkpoint import checkpoint_managers as policies

        checkpoints = self

        class Kept(policies.PreservationPolicy):
            """The newest and the best; Orbax's own policy forgets losses when a run resumes."""

            def should_preserve(self, infos, *, context):
                steps = sorted(info.step for info in infos)
                kept = {*steps[-checkpoints._config.keep :], checkpoints._best}
                return [info.step in kept for info in infos]

        options = ocp.CheckpointManagerOptions(
            preservation_policy=Kept(), cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def save(self, saved: Saved) -> None:
        """Saves a step that has not been saved yet, in the background."""
        import orbax.checkpoint as ocp

        if self._config.keep_best:
            self._best = best_step(saved.history)
        # Copies on the host: the state is donated to the next step while Orbax writes.
        facts = saved._asdict()
        arrays = (facts.pop("state"), facts.pop("sums"), facts.pop("best"))
        arrays = jax.tree.map(np.array, devices.gather(arrays))
        facts["sha256"] = _digest(_by_name(arrays), facts)
        # The warnings are about saving that takes longer than an epoch.
        with no_warnings_of("absl"), Checkpoints._lock:
            if Checkpoints._saving not in (None, self):
                with contextlib.suppress(Exception):  # which that run raises, too
                    Checkpoints._saving._manager.wait_until_finished()
            Checkpoints._saving = self
            self._manager.save(
                saved.step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts)
                ),
                force=True,
            )

    def restore(
        self, expect: Callable[[dict[str, Any]], Any], notice: Callable[[str], None]
    ) -> Saved | None:
        """Restores the newest undamaged checkpoint; moves damaged ones to `damaged/`.

        Args:
          expect: takes a checkpoint's facts, a dict of the other fields of `Saved`, and returns
            shapes, dtypes and shardings of its (state, sums, best), or raises UserError.
          notice: called with a line about each damaged checkpoint.

        Returns None if nothing has been saved yet. Raises UserError if one cannot be read or is of
        another network, or if all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            reason, leaves, facts = self._try_read(step)
            if not reason:
                if others := facts.keys() - set(Saved._fields):
                    raise UserError(
                        f"checkpoints/{step} was written by a newer version (it holds "
                        f"{', '.join(sorted(others))}); install that one"
                    )
                state, sums, best = _fitted(step, _with_norms(leaves), expect(facts))
                return Saved(state, sums, **facts, best=best)
            aside = _unused(self._workdir / DAMAGED / str(step))
            notice(f"checkpoints/{step} is damaged ({reason}); moved to {DAMAGED}/{aside.name}")
            if jax.process_index() == 0:
                with explain_storage(str(aside.parent), "move what is there"):
                    aside.parent.mkdir(exist_ok=True)
                    (self.directory / str(step)).rename(aside)
        if steps:
            raise UserError(
                f"all checkpoints of {self._workdir} are damaged and were moved to {DAMAGED}; run "
                "the same command again to train from the start"
            )
        return None

    def restore_params(
        self,
        expect: Callable[[dict[str, Any]], Any],
        notice: Callable[[str], None],
        which: str = "newest",
    ) -> tuple[Any, dict[str, Any]]:
        """Restores the parameters of a checkpoint; writes nothing.

        `expect` and `notice` are those of `restore`, but `expect` returns shapes and dtypes of the
        parameters only. `which` is "newest", "best" (see `validation_losses`) or the number of a
        step. If the newest or the best is damaged, the next one is used.

        Returns the parameters and the facts. Raises UserError if there is no such checkpoint, or
        it cannot be read, or is of another network.
        """
        steps = self.steps()[::-1]
        if which == "best":
            steps = self._by_loss(notice)
        elif which != "newest":
            if which not in map(str, steps):
                there = ", ".join(map(str, steps[::-1]))
                raise UserError(
                    f"--checkpoint={which} does not exist; choose newest, best or one of: {there}"
                )
            steps = [int(which)]
        for step in steps:
            reason, leaves, facts = self._try_read(step)
            if not reason:
                return _fitted(step, leaves, expect(facts), "0.params."), facts
            damaged = f"{self.directory / str(step)} is damaged ({reason})"
            if which not in ("newest", "best"):
                raise UserError(f"{damaged}; choose another with --checkpoint")
            if (self.directory / str(step)).exists():
                notice(damaged if step == steps[-1] else f"{damaged}; another one is tried")
        if self.steps() and not set(steps) & set(self.steps()):  # a run that trains replaced them
            return self.restore_params(expect, notice, which)
        raise UserError(f"{self.directory} holds no usable checkpoint; train with this workdir")

    def _by_loss(self, notice):
        """Returns the steps that were kept and validated, the best one first."""
        contents = map(self._try_read, self.steps()[::-1])
        undamaged = (content for content in contents if not content[0])
        _, leaves, newest = next(undamaged, ("", {}, {"history": []}))
        losses = validation_losses(newest["history"])
        if not losses:
            raise UserError(f"{self.directory} holds no validated epoch; use --checkpoint=newest")
        best, kept = best_step(newest["history"]), set(self.steps())
        if _is_restored(leaves):
            best, losses = newest["step"], losses | {newest["step"]: -math.inf}
        if not kept & losses.keys():
            raise UserError(
                f"{self.directory} keeps no state of a validated epoch; use --checkpoint=newest"
            )
        if best not in kept:
            notice(
                f"the best state, of step {best}, was not kept; the best of the others is used; "
                "train with config.checkpoint.keep_best=true to keep it"
            )
        return sorted(kept & losses.keys(), key=losses.get)

    def close(self) -> None:
        """Waits until all is written."""
        if "_manager" in self.__dict__:
            with Checkpoints._lock:
                self._manager.close()
                if Checkpoints._saving is self:
                    Checkpoints._saving = None

    def _try_read(self, step):
        """Returns why a checkpoint is damaged, or "", and its arrays and facts; see `_read`."""
        reason, content = "", ({}, {})
        with devices.together():
            try:
                content = _read(self.directory / str(step))
            except _DamagedError as error:
                reason = one_line(error)[:200]
        is_damaged = devices.collect(bool(reason))
        if any(is_damaged) and not all(is_damaged):
            raise UserError(
                f"{self.directory / str(step)} can be read by some processes only; put the workdir "
                "on a disk that all hosts share"
            )
        return reason, *content


def _read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a checkpoint as it was written: its arrays by name, and its facts."""
    import orbax.checkpoint as ocp

    restore = ocp.args.Composite(arrays=ocp.args.StandardRestore(), facts=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            content = checkpointer.restore(folder, args=restore)
        leaves, facts = _by_name(content.arrays), dict(content.facts)
        is_whole = facts.pop("sha256") == _digest(leaves, facts)
        # Earlier versions saved no settings, and at first no images, which were like MNIST's.
        facts = {"images": MNIST.to_dict(), "settings": {}} | facts
    except _UNDECODABLE as error:
        _check_readable(folder)
        if str(error).startswith(_NOT_DAMAGE):
            raise
        raise _DamagedError(one_line(error)) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not is_whole or facts["step"] != int(folder.name):
        raise _DamagedError("its content has changed since it was written")
    return leaves, facts


def _is_restored(leaves):
    """Returns whether early stopping has restored the best parameters of all that are finite."""
    best = {name.removeprefix("2."): x for name, x in leaves.items() if name.startswith("2.")}
    return bool(best) and all(
        np.array_equal(leaves[f"0.params.{name}"][is_good], x[is_good])
        for is_good in [~np.isnan(leaves["1.loss"])]
        for name, x in best.items()
    )


def _with_norms(leaves):
    """Adds sums of norms, which earlier versions did not save: NaN in the middle of an epoch."""
    loss = leaves["1.loss"]
    unknown = np.where(loss == 0, 0, np.nan).astype(loss.dtype)
    return {"1.gradient_norm": unknown, "1.update_norm": unknown} | leaves


def _check_readable(folder):
    """Raises UserError if the system refuses to read a file: that is not damage."""
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                path.read_bytes()
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder, error):
    reason = storage_reason(error) or one_line(error)
    return UserError(
        f"{error.filename or folder} cannot be read ({reason}); make it readable; nothing was "
        "changed"
    )


def _fitted(step, leaves: Mapping[str, np.ndarray], template, prefix=""):
    """Returns the arrays under a prefix in the template's structure, unless they do not fit it.

    Raises UserError if names, shapes or dtypes differ.
    """
    holds = {name: leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    needs = {prefix + name: leaf for name, leaf in _by_name(template).items()}
    for name in (*needs, *sorted(holds)):
        found, needed = _kind(holds.get(name)), _kind(needs.get(name))
        if found != needed:
            raise UserError(
                f"checkpoints/{step} holds {found} for {name} where config.json and the installed "
                f"versions need {needed}; restore the config.json and the versions that it was "
                "trained with; nothing was changed"
            )
    arrays = [_place(holds[name], like) for name, like in needs.items()]
    return jax.tree.unflatten(jax.tree.structure(template), arrays)


def _kind(array):
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"


def _place(array, like):
    sharding = getattr(like, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)


def _by_name(tree) -> dict[str, Any]:
    """Returns the leaves of a tree by path, e.g. "0.params.readout.bias.value", in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(leaves: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of facts and arrays; the order of the arrays follows from their names."""

    def order(name):
        index, *rest = name.split(".")
        fields = (TrainState._fields, Sums._fields, ())[int(index)]
        place = fields.index(rest.pop(0)) if rest[0] in fields else len(fields)
        keys = [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in rest]
        return int(index), place, keys

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(leaves, key=order):
        digest.update(leaves[name].tobytes())
    return digest.hexdigest()


def _unused(path):
    others = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return next(each for each in itertools.chain([path], others) if not each.exists())
