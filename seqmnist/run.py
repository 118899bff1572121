"""A run: trains a network and writes the results.

`train` is one loop over named events: epoch begun, progress, epoch ended, stop asked, diverged,
finished. `Session` passes each of them to the parts that listen: display, records, checkpoints
and profile, which do not know each other. Nothing here changes a setting of the process.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmnist import config as config_lib
from seqmnist.checkpoints import DAMAGED, DIRECTORY, Checkpoints, Saved, best_step
from seqmnist.config import Config
from seqmnist.display import Display
from seqmnist.errors import UserError, explain_storage
from seqmnist.events import Events
from seqmnist.stop import StopRequest
from seqmnist.study import profiling
from seqmnist.training import batches, devices, divergence, members, stopping
from seqmnist.training.loop import Progress
from seqmnist.training.metrics import parameter_norm
from seqmnist.training.steps import own_choices
from seqmnist.training.task import Program, Task, as_trained, check_memory, compose
from seqmnist.workdir import (
    METRICS,
    PROFILE,
    RESULTS,
    STEPS,
    Workdir,
    append_line,
    as_json,
    versions,
    write_json,
)


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    overwrite: bool = False,
    debug_nans: bool = False,
    stop: StopRequest | None = None,
    display: Display | None = None,
    withhold_test: bool = False,
) -> dict[str, Any]:
    """Trains a network, or resumes the run in the workdir; returns what `results.json` holds.

    Args:
      overwrite: replace the run in the workdir.
      debug_nans: name the operation that gives the first NaN; not with members.
      stop: ends the run early, with its state saved.
      display: shows the run; by default, on standard output.
      withhold_test: do not score the test set; its scores are None. In a sweep, only the setting
        that validation chooses is ever scored on it.

    Raises:
      UserError: the configuration, the data or the workdir cannot be used, or the run diverged.
      SystemExit: `stop` asked for it.
    """
    began = time.monotonic()
    config = config_lib.validated(config)
    workdir, display, stop = Workdir(workdir), display or Display(), stop or StopRequest()
    with devices.together():
        workdir.check_usable()
        workdir.recover()
        finished = {} if overwrite else _read_finished(config, workdir)
    if finished and not _changes_data(config, workdir):
        return _show_finished(display, workdir, finished)
    task = compose(config, display.say)
    if (own := own_choices(config)) and not config.plugins:
        display.notice(
            f"{', '.join(own.values())}: no file of config.plugins adds it, so that other "
            "processes cannot read this run; name the file there"
        )
    if finished:
        _check_data(task, workdir, finished["dataset"]["fingerprint"])
        return _show_finished(display, workdir, finished)
    with _open_session(task, workdir, display, stop, overwrite) as run:
        for epoch in run.remaining_epochs():
            with contextlib.closing(run.train_epoch(epoch)) as progresses:
                for progress in progresses:
                    run.advance(progress, debug_nans)
            run.end_epoch(epoch, debug_nans)
        results = run.finish(began, withhold_test)
    display.results(results)
    return results


def evaluate(
    config: Config, workdir: str | os.PathLike, checkpoint: str = "newest"
) -> dict[str, Any]:
    """Scores the parameters of a checkpoint in a workdir on the test set; writes nothing.

    `checkpoint` is "newest", "best" by validation loss, or the number of a step. Returns {"loss",
    "accuracy"}, lists of S values when there are several members.

    Raises:
      UserError: there is no usable checkpoint, the data are not those of the run, or the run is a
        sweep in which no setting has been chosen.
    """
    workdir, display = Workdir(workdir), Display()
    config_lib.check_same_network(workdir.read_config(), config)
    workdir.check_plugins(config)
    results = workdir.read_results()
    checkpoints = Checkpoints(workdir.path)
    if not checkpoints.steps():
        raise UserError(f"{checkpoints.directory} holds no checkpoint; train with this workdir")
    task = compose(as_trained(config, results), display.say)
    state, _ = task.template()
    expect = _expect(task, workdir, state.params)
    params, facts = checkpoints.restore_params(expect, display.notice, checkpoint)
    display.say(f"Checkpoint: step {facts['step']}")
    unseen = _diverged(facts["history"])
    if len(task.members) > config.members.num:
        chosen = (results.get("ensemble") or {}).get("members")
        if not chosen and results.get("best") is not None:
            raise UserError(
                f"the test set was withheld from the sweep in {workdir}; train the setting that it "
                "chose in another --workdir"
            )
        if not chosen:
            raise UserError(
                f"{workdir} holds a sweep in which validation has not chosen a setting, the only "
                "one that is scored on the test set; finish the run, or train it again with "
                "config.data.validation_fraction above 0"
            )
        unseen = ~np.isin(np.arange(len(task.members)), chosen)
    test = task.evaluate(params, "test", unseen)
    dataset = task.describe_data()
    if results:
        dataset["notice"] = results["dataset"].get("notice")
    display.results({"dataset": dataset, "test": test})
    return test


class Session:
    """A run in progress: passes each event to the parts that listen."""

    def __init__(
        self,
        task: Task,
        workdir: Workdir,
        display: Display,
        stop: StopRequest,
        checkpoints: Checkpoints,
        profile: profiling.Profile,
        saved: Saved,
        programs: dict[str, Program],
    ):
        self._task, self._workdir, self._display, self._stop = task, workdir, display, stop
        self._checkpoints, self._profile, self._programs = checkpoints, profile, programs
        self._saved = saved
        self._saved_step = saved.step  # of the newest checkpoint
        self._is_writer = jax.process_index() == 0
        logged = workdir.read_steps(saved.step)
        self._events = Events(workdir, task.config, saved.history, logged, saved.seconds)
        self._began = time.monotonic() - saved.seconds  # as if there had been no interruption
        self._update_bar = None
        self._pace = 0, 0.0  # steps of the current epoch that this process took, and their seconds

    def remaining_epochs(self) -> Iterator[int]:
        """Yields the remaining epochs, counted from 0, until all members have stopped."""
        while not self._is_over():
            yield len(self._saved.history)

    def train_epoch(self, epoch: int) -> Iterator[Progress]:
        """Epoch begun: trains what is left of it, and yields its progress."""
        task, first = self._task, epoch * self._task.steps_per_epoch
        config, steps = task.config, range(first, first + task.steps_per_epoch)
        every = config.checkpoint.every_steps, config.train.log_every_steps
        due = {step for step in steps if any(_divides(n, step) for n in every)}
        breaks = [step - first for step in due.union(self._profile.breaks)]
        begin = Progress(self._saved.state, self._saved.sums, self._saved.step - first)
        rows = task.epoch_rows(epoch)
        self._stop_if_asked()
        show = self._display.epoch(epoch + 1, config.train.num_epochs, task.steps_per_epoch)
        with show as self._update_bar:
            progresses = task.loop.train(begin, rows, breaks)
            timed = self._timed(progresses, begin.step)
            yield from self._profile.watch(timed, first, task.steps_per_epoch, begin.step)

    def advance(self, progress: Progress, debug_nans: bool) -> None:
        """Progress: shows it, ends the run if it diverged, saves what is due, stops if asked."""
        history, steps_per_epoch = self._saved.history, self._task.steps_per_epoch
        self._saved = self._saved._replace(
            state=progress.state,
            sums=progress.sums,
            step=len(history) * steps_per_epoch + progress.step,
            seconds=time.monotonic() - self._began,
        )
        means = _train_means(progress.sums)
        self._update_bar(progress.step, means)
        self._end_if_diverged(means["loss"], debug_nans)
        self._log_step(progress)  # before the checkpoint, which counts it as logged
        if progress.step < steps_per_epoch:  # else `end_epoch` follows, and saves
            if _divides(self._task.config.checkpoint.every_steps, self._saved.step):
                self._save()
            self._stop_if_asked()

    def end_epoch(self, epoch: int, debug_nans: bool) -> None:
        """Epoch ended: validates, ends the run if it diverged, records, saves if due, stops."""
        validation = self._validate(debug_nans)
        task, saved, settings = self._task, self._saved, self._task.config.checkpoint
        train_means = _train_means(saved.sums)
        seconds = time.monotonic() - self._began - _seconds(saved.history)
        record = {
            "epoch": epoch + 1,
            "step": saved.step,
            **{f"train/{key}": value for key, value in train_means.items()},
            **{f"validation/{key}": value for key, value in validation.items()},
            **_norms(saved, task.steps_per_epoch),
            "seconds": round(seconds, 3),
        }
        history = [*saved.history, record]
        sums = task.loop.start(saved.state, saved.sums).sums
        self._saved = saved._replace(sums=sums, history=history, seconds=_seconds(history))
        num_epochs = task.config.train.num_epochs
        self._display.epoch_line(num_epochs, task.steps_per_epoch, record, *self._pace)
        self._write(METRICS, record)
        if task.config.train.early_stopping:
            self._take_back_best()
        is_best = settings.keep_best and best_step(history) == saved.step
        counts = ((epoch + 1, settings.every_epochs), (saved.step, settings.every_steps))
        is_due = any(_divides(every, count) for count, every in counts)
        if is_due or is_best or self._is_over():
            self._save()
        self._stop_if_asked()

    def finish(self, began: float, withhold_test: bool) -> dict[str, Any]:
        """Finished: completes the last checkpoint, scores the network, writes the results."""
        task, saved = self._task, self._saved
        self._close()
        self._stop_if_asked()
        results = as_json({
            "dataset": task.describe_data(),
            "sequence": task.describe_sequence(),
            "parameters": _num_parameters(saved.state.params) // len(task.members),
            "epochs": len(saved.history),
            "steps": saved.step,
            **_score(task, saved, withhold_test),
            "seconds": {
                "train": round(saved.seconds, 3), "total": round(time.monotonic() - began, 3)
            },
            "programs": {
                name: {"compile_seconds": round(program.seconds, 3)}
                | profiling.program_cost(program.compiled)
                for name, program in self._programs.items()
            },
            "devices": [f"{device.platform}:{device.id}" for device in task.mesh.devices.flat],
            "versions": versions(),
        })  # fmt: skip
        self._stop_if_asked()
        if self._is_writer:
            with _explain_writing(self._workdir):
                self._events.close()
                write_json(self._workdir.path / RESULTS, results)
        return results

    def _validate(self, debug_nans):
        """Returns validation scores; a network whose loss is not finite has diverged."""
        task, saved, sums = self._task, self._saved, devices.gather(self._saved.sums)
        scores = task.evaluate(saved.state.params, "validation", np.isnan(sums.loss))
        if not task.splits["validation"]:
            return scores
        is_finite = np.isfinite(scores["loss"])  # not if the last update spoiled the parameters
        loss = np.where(is_finite, sums.loss, np.nan).astype(sums.loss.dtype)
        self._saved = saved._replace(sums=sums._replace(loss=loss))
        self._end_if_diverged(loss, debug_nans, steps_ago=1)
        return {key: np.where(is_finite, x, np.nan).tolist() for key, x in scores.items()}

    def _end_if_diverged(self, loss, debug_nans, steps_ago=0):
        """Ends the run if no loss is a number; the step to blame is the next, or so many before."""
        if np.isnan(loss).all():
            self._close()
            steps = self._checkpoints.steps()
            newest = f"{DIRECTORY}/{steps[-1]}" if steps else "none"
            state = self._saved.state
            state = state._replace(step=state.step - steps_ago)
            reason = divergence.explain(self._task, state, newest, debug_nans)
            raise divergence.DivergedError(reason)

    def _is_over(self):
        history, train = self._saved.history, self._task.config.train
        if not history or not train.early_stopping:
            return len(history) == train.num_epochs
        ended = stopping.has_stopped(history, train.early_stopping) | _diverged(history)
        return len(history) == train.num_epochs or ended.all()

    def _take_back_best(self):
        """Keeps each member's best parameters; restores them when it stops or the run ends."""
        saved, patience = self._saved, self._task.config.train.early_stopping
        best_epochs = stopping.best_epochs(saved.history)
        is_best = best_epochs == len(saved.history) - 1
        stopped = stopping.has_stopped(saved.history, patience)
        stops = (stopped | self._is_over()) & ~_diverged(saved.history)
        if self._is_over() and stops.any():
            epochs = ", ".join(map(str, np.unique(best_epochs[stops] + 1)))
            what = "Stopped early; restored" if stopped.all() else "Restored"
            self._display.say(f"{what} the parameters of epoch {epochs}")
        best = stopping.choose(is_best, saved.state.params, saved.best)
        params = stopping.choose(stops, best, saved.state.params)
        sums = devices.gather(saved.sums)
        sums = sums._replace(loss=np.where(stops, np.inf, sums.loss).astype(sums.loss.dtype))
        state = saved.state._replace(params=params)
        start = self._task.loop.start(state, sums)
        self._saved = saved._replace(state=start.state, sums=start.sums, best=best)

    def _timed(self, progresses, first):
        """Counts the steps after step `first` and their seconds, without the work between them."""
        seconds, began = 0.0, time.monotonic()
        for progress in progresses:
            seconds += time.monotonic() - began
            self._pace = progress.step - first, seconds
            yield progress
            began = time.monotonic()

    def _log_step(self, progress):
        """Writes loss and norms of the newest step, if that step is to be logged."""
        if not _divides(self._task.config.train.log_every_steps, self._saved.step):
            return
        last = devices.gather(progress.last)
        record = {
            "step": self._saved.step,
            "loss": last.means()["loss"],
            **last.norms(),
            "train_seconds": round(self._saved.seconds, 3),
        }
        self._write(STEPS, record)

    def _write(self, name, record):
        """Adds a record to a file of lines, and to TensorBoard's."""
        if self._is_writer:
            with _explain_writing(self._workdir):
                append_line(self._workdir.path / name, record)
                self._events.add(record)

    def _save(self):
        if self._saved.step != self._saved_step:
            with _explain_writing(self._workdir):
                self._checkpoints.save(self._saved)
            self._saved_step = self._saved.step

    def _close(self):
        with _explain_writing(self._workdir):
            self._checkpoints.close()

    def _stop_if_asked(self):
        """If a stop was asked of any process, saves the state and ends the run."""
        number = devices.agree(self._stop.number)
        if not number:
            return
        self._save()
        self._close()
        what = f"after step {self._saved.step} and saved" if self._saved.step else "before step 1"
        self._display.say(f"Stopped {what}; the same command resumes")
        raise SystemExit(128 + number)


@contextlib.contextmanager
def _open_session(task, workdir, display, stop, overwrite) -> Iterator[Session]:
    """Locks the workdir, compiles and restores, and only then writes the first file."""
    programs: dict[str, Program] = {}
    profile = profiling.Profile(
        task.config,
        workdir.path / PROFILE,
        task.num_steps,
        lambda: [program.compiled.as_text() for program in programs.values()],
        task.dataset.spec,
    )
    state, sums = task.template()
    check_memory(task.mesh, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explain_memory())
        is_writer = jax.process_index() == 0
        with devices.together():
            if is_writer:
                stack.enter_context(workdir.hold(display.notice))
            if not overwrite:  # another process may have trained here since
                _read_finished(task.config, workdir)
        checkpoints = Checkpoints(workdir.path, task.config.checkpoint)
        # One program after the other: compiling one keeps several cores busy, and takes 60 MB.
        pool = futures.ThreadPoolExecutor(max_workers=1)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        pool.submit(batches.epoch_order, 0, 0, len(task.splits["train"]))  # compiles the shuffle
        ahead = task.compile_ahead(pool, state, sums)
        saved = None
        if not overwrite:
            best = state.params if task.config.train.early_stopping else None
            expect = _expect(task, workdir, (state, sums, best))
            saved = checkpoints.restore(expect, display.notice)
        display.setup(task, nnx.filter_state(state.params, nnx.Param))
        if saved and saved.step == task.num_steps:
            display.say("Resuming after the last epoch")
        elif saved:
            epoch, step = divmod(saved.step, task.steps_per_epoch)
            display.say(f"Resuming in epoch {epoch + 1}, after {step} of its steps")
        else:
            start = task.start()
            if not overwrite and workdir.has_metrics():
                display.notice(f"{checkpoints.directory} is empty; the run begins anew")
            facts = task.dataset.fingerprint, 0.0, task.dataset.spec.to_dict()
            saved = Saved(start.state, start.sums, 0, [], *facts, config_lib.settings(task.config))
            if task.config.train.early_stopping:
                saved = saved._replace(best=jax.tree.map(jnp.copy, saved.state.params))
        programs |= {name: program.result() for name, program in ahead.items()}
        check_memory(task.mesh, max(map(_num_bytes, programs.values())))
        session = Session(task, workdir, display, stop, checkpoints, profile, saved, programs)
        stack.enter_context(profile)
        stop.defer()
        if is_writer:
            with _explain_writing(workdir):
                if overwrite:
                    workdir.replace(task.config)
                else:
                    workdir.begin(task.config, saved.history, saved.step)
        try:
            yield session
        except KeyboardInterrupt:  # in a notebook, which may run this again at once
            checkpoints.close()
            raise


def _explain_writing(workdir):
    remedy = "correct that and run the same command again: it resumes from the last checkpoint"
    return explain_storage(f"--workdir={workdir}", remedy)


@contextlib.contextmanager
def _explain_memory():
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "there is not enough memory; make config.model.hidden_size, config.train.batch_size "
            "or config.members.num smaller"
        ) from error


def _read_finished(config, workdir) -> dict[str, Any]:
    """Returns the results of the run that the workdir holds if nothing is left to do, else {}.

    Raises:
      UserError: the workdir holds a run that this configuration cannot resume.
    """
    if not workdir.has_config():
        if Checkpoints(workdir.path).steps():
            raise UserError(
                f"--workdir={workdir} holds checkpoints but no config.json; choose another, or "
                "replace this run with --overwrite"
            )
        return {}
    config_lib.check_resumable(workdir.read_config(), config)
    workdir.check_plugins(config)
    results = workdir.read_results()
    is_over = results.get("epochs") == config.train.num_epochs or "early_stopping" in results
    was_damaged = (workdir.path / DAMAGED).exists()  # then it was said that it begins anew
    if results and not is_over and not Checkpoints(workdir.path).steps() and not was_damaged:
        raise UserError(
            f"--workdir={workdir} holds the results of a run but no checkpoint to resume from; "
            "choose another, or replace this run with --overwrite"
        )
    return results if is_over else {}


def _changes_data(config, workdir):
    changed = config_lib.changes(workdir.read_config(), config)
    return any(name.startswith("data.") for name in changed if name != "data.input_mode")


def _check_data(task, workdir, fingerprint):
    """Raises UserError unless the task's data are those that the workdir's run was trained on."""
    if fingerprint != task.dataset.fingerprint:
        name = "config.data.name"
        if task.config.data.name == "auto":  # which then found the other one
            name += "=mnist_5k" if task.dataset.name == "mnist" else "=mnist"
        raise UserError(
            f"--workdir={workdir} was trained on other data than {task.dataset.name} in "
            f"{task.dataset.directory}; set {name}, manual_dir, size and grayscale as in that run, "
            "or choose another --workdir"
        )


def _expect(task, workdir, template):
    """Returns the `expect` of `Checkpoints`: it checks a checkpoint's data; gives `template`."""

    def expect(facts):
        workdir.check_settings(facts["settings"])
        _check_data(task, workdir, facts["fingerprint"])
        return template

    return expect


def _show_finished(display, workdir, results):
    display.say(f"{workdir} holds this run, already finished; --overwrite replaces it")
    display.results(results)
    return results


def _score(task, saved, withhold_test):
    """Returns validation and test scores; with members, also their summary and the ensemble's."""
    diverged, patience = _diverged(saved.history), task.config.train.early_stopping
    last = saved.history[-1]
    validation = {key: last[f"validation/{key}"] for key in ("loss", "accuracy")}
    if patience:  # of the parameters that were restored
        epochs = stopping.best_epochs(saved.history)
        for key in validation:
            values = np.array([record[f"validation/{key}"] for record in saved.history], float)
            values = np.take_along_axis(values, epochs[None], axis=0)[0]
            validation[key] = np.where(diverged, np.nan, values).tolist()
    held_out = validation if task.splits["validation"] else None
    best = members.best_setting(task.config, held_out and held_out["loss"], diverged)
    num, chosen = task.config.members.num, ~np.asarray(diverged) & (not withhold_test)
    if len(task.members) > num:  # a sweep: only the chosen setting's scores may be seen
        chosen &= np.arange(len(task.members)) // num == (-1 if best is None else best)
    test = task.evaluate(saved.state.params, "test", ~chosen)
    scores = {"validation": validation, "test": test}
    if patience:
        stopped = stopping.has_stopped(saved.history, patience)
        scores["early_stopping"] = {
            "best_epochs": (epochs + 1).tolist(),
            "stopped": stopped.tolist(),
        }
    if len(task.members) == 1:
        return scores
    ensemble = {"loss": None, "accuracy": None}
    if chosen.any():
        weights = chosen / np.float32(chosen.sum())
        sums = task.loop.evaluate_ensemble(saved.state.params, task.rows["test"], weights)
        ensemble = devices.gather(sums).means()
    return {
        **scores,
        "members": task.members,
        "settings": members.summarize(task.config, diverged, held_out, test),
        "best": best,
        "ensemble": {"members": np.flatnonzero(chosen).tolist(), "test": ensemble},
    }


def _diverged(history):
    """Which members, or whether the single network, diverged in the finished epochs."""
    return np.isnan(np.array(history[-1]["train/loss"], float)) if history else False


def _train_means(sums):
    """Returns the means of an epoch so far; NaN for those that diverged or have stopped early."""
    sums = devices.gather(sums)
    means = sums.means()
    accuracy = np.where(np.isfinite(sums.loss), means["accuracy"], np.nan).tolist()
    return means | {"accuracy": accuracy}


def _norms(saved, num_steps):
    """Returns an epoch's norms, as its record holds them; NaN if diverged or stopped."""
    sums = devices.gather(saved.sums)
    params = devices.gather(nnx.filter_state(saved.state.params, nnx.Param))
    norm = np.where(np.isfinite(sums.loss), parameter_norm(params, sums.loss.shape), np.nan)
    norms = {f"train/{key}": value for key, value in sums.norms(num_steps).items()}
    return norms | {"parameter_norm": norm.tolist()}


def _divides(every, count):
    """Returns whether `every` divides a count; 0 divides none."""
    return every and count % every == 0


def _seconds(history):
    return sum(record["seconds"] for record in history)


def _num_parameters(params):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(params, nnx.Param)))


def _num_bytes(program):
    cost = profiling.program_cost(program.compiled)
    return cost.get("argument_bytes", 0) + cost.get("temporary_bytes", 0)
