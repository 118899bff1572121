"""A run: data, state, loop, checkpoints and records composed. The one place that knows all."""

import contextlib
import importlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from seqmnist import checkpoints as checkpoint_lib
from seqmnist import config as config_lib
from seqmnist import records
from seqmnist import workdir as workdir_lib
from seqmnist.checkpoints import Checkpoints, Saved
from seqmnist.config import Config
from seqmnist.datasets import sources
from seqmnist.display import Display
from seqmnist.errors import UserError
from seqmnist.networks.views import permutation, permutation_sha256, sequence_shape
from seqmnist.study import profiling
from seqmnist.training import batches, devices, members
from seqmnist.training.loop import Loop, Progress, Resident, Streamed
from seqmnist.training.metrics import Sums
from seqmnist.training.optim import make_schedule
from seqmnist.training.steps import System, init_state, make_system, train_step


class Parts(NamedTuple):
    """What a run is made of, but for its state.

    Attributes:
      config: the configuration.
      dataset: where the data is.
      splits: "train", "validation" and "test", ranges of example numbers.
      plan: what tells members apart; one entry of a lone run.
      steps_per_epoch: steps an epoch.
      system: the fixed half of a run.
      mesh: where it runs.
      loop: what trains and evaluates.
      rows: of "validation" and "test".
    """

    config: Config
    dataset: sources.Prepared
    splits: dict[str, range]
    plan: list[dict[str, float]]
    steps_per_epoch: int
    system: System
    mesh: jax.sharding.Mesh
    loop: Loop
    rows: dict[str, np.ndarray]

    def like(self) -> Saved:
        """Returns the shapes, dtypes and shardings of what a checkpoint of this run holds."""
        state = jax.eval_shape(self._init)
        axes = ("member",) if len(self.plan) > 1 else ()
        place = jax.NamedSharding(self.mesh, jax.P(*axes))
        dtype = jax.tree.leaves(state.params)[0].dtype
        sums = jax.eval_shape(lambda: Sums.zeros(dtype, state.step.shape))
        arrays = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, sums)
        )
        return Saved(*arrays, 0, [], "", 0.0)

    def start(self, like: Saved) -> Saved:
        """Returns the beginning of the run."""
        shardings = jax.tree.map(lambda x: x.sharding, like.state)
        # It runs once: a third of the time to compile is worth more than how fast it runs.
        options = {"xla_backend_optimization_level": 0}
        init = jax.jit(self._init, out_shardings=shardings, compiler_options=options)
        progress = self.loop.start(init())
        return Saved(progress.state, progress.sums, 0, [], self.dataset.fingerprint, 0.0)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Returns the batches of an epoch: int32 [steps, B], or [S, steps, B]."""
        seeds = [int(member["seed"]) for member in self.plan]
        rows = [_epoch_rows(s, epoch, len(self.splits["train"]), self.config) for s in set(seeds)]
        if len(self.plan) == 1:
            return rows[0]
        by_seed = dict(zip(set(seeds), rows, strict=True))
        return np.stack([by_seed[seed] for seed in seeds])

    def compile_ahead(self, pool: futures.Executor, like: Saved) -> dict[str, futures.Future]:
        """Begins to compile what the run will need: {program: its `profiling.program_cost`}.

        The compiler leaves Python's lock alone, and so runs beside this thread. Tracing does not,
        and it follows settings of JAX that hold for this thread alone.
        """
        own = (len(self.plan),) if len(self.plan) > 1 else ()
        programs = self.loop.programs(
            like.state,
            like.sums,
            (*own, self.steps_per_epoch, self.config.train.batch_size),
            self.rows["test"].shape,
        )
        return {name: pool.submit(profiling.program_cost, each) for name, each in programs.items()}

    def _init(self):
        """Lone states are drawn one by one, so that members equal lone runs."""
        if len(self.plan) == 1:
            return init_state(self.config, self.system, self.config.seed)
        swept = members.swept_fields(self.config)
        seeds = np.array([member["seed"] for member in self.plan], np.uint32)
        values = {name: np.array([m[name] for m in self.plan], np.float32) for name in swept}
        return lax.map(
            lambda member: init_state(self.config, self.system, *member), (seeds, values)
        )


def train(
    config: Config, workdir: pathlib.Path, *, overwrite: bool = False, debug_nans: bool = False
) -> dict[str, Any]:
    """Trains a network, or goes on with what the workdir holds, and writes what comes out.

    Args:
      config: the configuration.
      workdir: where everything is written; made if it does not exist.
      overwrite: remove the run that the workdir holds, and start afresh.
      debug_nans: name the operation that gave the first number that is not finite.

    Returns:
      What `results.json` holds.

    Raises:
      UserError: the configuration, the data or the workdir cannot be used, or the loss is not
        finite.
      SystemExit: a signal has stopped the run; its state is saved.
    """
    began = time.monotonic()
    _set_up_jax(config)
    display = Display()
    make_system(config, num_steps=1)  # what names nothing is refused before data is fetched
    workdir_lib.check(workdir)
    if not overwrite:
        results = _check_resumable(config, workdir)
        if results:
            display.say(f"{workdir} holds this run, finished; --overwrite trains it again")
            _show_test(display, results)
            return results
    parts = _compose(config, display)
    profile = profiling.Profile(config, workdir, config.train.num_epochs * parts.steps_per_epoch)
    is_writer = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if is_writer:
            workdir_lib.make(workdir)
            stack.enter_context(workdir_lib.hold(workdir))
        stack.enter_context(workdir_lib.explain_failure(workdir))
        if overwrite and is_writer:
            workdir_lib.clear(workdir)
        # Closed where the run ends in order, not in a `with`: closing waits for other processes,
        # and one of them may have died.
        # One program after the other: each keeps several cores busy, and takes 60 MB.
        with futures.ThreadPoolExecutor(max_workers=1) as pool:
            like = parts.like()
            ahead = parts.compile_ahead(pool, like)
            checkpoints = Checkpoints(workdir, config.checkpoint)
            saved = checkpoints.restore(like, display.notice)
            if saved and saved.fingerprint != parts.dataset.fingerprint:
                raise UserError(
                    f"--workdir={workdir} was trained on other data than {parts.dataset.name} in "
                    f"{parts.dataset.directory}; name the same dataset, or start with --overwrite"
                )
            display.setup(config, parts.dataset, parts.splits, like.state.params, parts.mesh)
            if saved:
                epoch, step = len(saved.history) + 1, saved.step % parts.steps_per_epoch
                display.say(f"Resuming in epoch {epoch}, after {step} of its steps")
            saved = saved or parts.start(like)
            batches.epoch_order(0, 0, len(parts.splits["train"]))  # compiles what draws it
            threading.Thread(target=_import_ahead).start()
        costs = {name: cost.result() for name, cost in ahead.items()}
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(saved.state.params))
        events = records.Events(workdir, saved.history) if is_writer else None
        if is_writer:
            (workdir / records.RESULTS).unlink(missing_ok=True)
            records.write_json(workdir / records.CONFIG, config_lib.to_dict(config))
            records.write_lines(workdir / records.METRICS, saved.history)
        with _stop_requests() as received:
            for saved in _epochs(parts, saved, profile, display, received):  # noqa: B020
                if not np.isfinite(devices.gather(saved.sums.loss)).any():
                    checkpoints.close()
                    raise UserError(_explain_nonfinite(parts, saved, workdir, debug_nans))
                if is_writer and saved.history and saved.step == saved.history[-1]["step"]:
                    records.append_line(workdir / records.METRICS, saved.history[-1])
                    events.add(saved.history[-1])
                # Of several processes all stop, whichever of them was asked to.
                number = devices.agree(received[0] if received else 0)
                if _is_due(parts, saved) or number:
                    checkpoints.save(saved)
                if number:
                    checkpoints.close()
                    display.say(
                        f"Stopped after step {saved.step}, and saved; the same command goes on"
                    )
                    raise SystemExit(128 + number)
        scores = _scores(parts, saved)
        checkpoints.close()
        if is_writer:
            events.close()
        results = {
            "dataset": _describe(parts.dataset, parts.splits),
            "sequence": _describe_sequence(config.model),
            "parameters": num_parameters // len(parts.plan),
            "epochs": config.train.num_epochs,
            "steps": saved.step,
            **scores,
            "seconds": {
                "total": round(time.monotonic() - began, 3),
                "train": round(saved.seconds, 3),
            },
            "programs": costs,
            "devices": [f"{device.platform}:{device.id}" for device in parts.mesh.devices.flat],
            "versions": records.versions(),
        }
        if is_writer:
            records.write_json(workdir / records.RESULTS, results)
    _show_test(display, results)
    return results


def evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores the parameters that a workdir holds on the test set; writes nothing.

    Args:
      config: the workdir's configuration.
      workdir: where `train` has written.

    Returns:
      {"loss", "accuracy"}, of members lists.

    Raises:
      UserError: the workdir holds no usable checkpoint, or the data cannot be had.
    """
    _set_up_jax(config)
    display = Display()
    make_system(config, num_steps=1)
    config_lib.check_same_network(records.read_config(workdir), config)
    checkpoint_lib.check(workdir)
    parts = _compose(config, display)
    state = checkpoint_lib.restore(workdir, parts.like().state)
    test = _means(parts.loop.evaluate(state.params, parts.rows["test"]))
    display.test_line(_describe(parts.dataset, parts.splits), test)
    return test


def _set_up_jax(config):
    """Chooses CPU devices, and keeps compiled programs for the next process."""
    devices.use_cores(len(members.plan(config)), config.train.batch_size)
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "seqmnist"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _import_ahead():
    """Imports what the end of an epoch needs, while devices compile or train."""
    for name in ("orbax.checkpoint", "tensorboard.summary.writer.event_file_writer"):
        importlib.import_module(name)


def _check_resumable(config, workdir) -> dict[str, Any] | None:
    """Compares with what the workdir holds; returns its results where nothing is left to do."""
    if not (workdir / records.CONFIG).is_file():
        if any((workdir / checkpoint_lib.DIRECTORY).glob("[0-9]*")):
            raise UserError(
                f"--workdir={workdir} holds checkpoints but no {records.CONFIG}; choose another, "
                "or start afresh with --overwrite"
            )
        return None
    before = records.read_config(workdir)
    config_lib.check_resumable(before, config)
    if not (workdir / records.RESULTS).is_file():
        return None
    results = records.read_json(workdir / records.RESULTS)
    return results if results.get("epochs") == config.train.num_epochs else None


def _compose(config: Config, display: Display) -> Parts:
    dataset = sources.prepare(
        config.data.name,
        data_dir=config.data.data_dir,
        manual_dir=config.data.manual_dir,
        verify_checksums=config.data.verify_checksums,
        say=display.say,
    )
    splits = batches.make_splits(
        dataset.num_examples("train"),
        dataset.num_examples("test"),
        config.data.validation_fraction,
    )
    plan = members.plan(config)
    batch_size = config.train.batch_size
    mesh = devices.make_mesh(*devices.plan(config.mesh, len(plan), batch_size, len(jax.devices())))
    steps_per_epoch = batches.num_batches(len(splits["train"]), batch_size)
    system = make_system(config, config.train.num_epochs * steps_per_epoch)
    if config.data.input_mode == "stream":
        if len(plan) > 1:
            raise UserError(
                f"config.data.input_mode='stream' feeds one member, not {len(plan)}; use 'resident'"
            )
        reader = batches.Records(dataset.mapped("train"), dataset.mapped("test"))
        loop = Streamed(system, reader, mesh)
    else:
        arrays = zip(*(dataset.arrays(split) for split in ("train", "test")), strict=True)
        loop = Resident(system, *map(batches.join, arrays), mesh, len(plan) > 1)
    rows = _evaluation_rows(splits, batch_size)
    return Parts(config, dataset, splits, plan, steps_per_epoch, system, mesh, loop, rows)


def _epochs(parts, saved, profile, display, received) -> Iterator[Saved]:
    """Trains on from `saved`; yields what could be saved, wherever something may be due."""
    config, num_steps = parts.config, parts.steps_per_epoch
    for epoch in range(len(saved.history), config.train.num_epochs):
        began, first = time.monotonic(), epoch * num_steps
        before = saved.seconds
        now = begin = Progress(saved.state, saved.sums, saved.step - first)
        rows = parts.epoch_rows(epoch)
        title = f"Epoch {epoch + 1}/{config.train.num_epochs}"
        due = [step - first for step in _due_steps(config, first, first + num_steps)]
        breaks = (*profile.breaks(first), *due)
        with display.epoch(title, num_steps) as update:
            progresses = parts.loop.train(begin, rows, breaks)
            for now in profile.follow(progresses, first, num_steps, begin.step):
                means = _means(now.sums)
                update(now.step, means)
                saved = saved._replace(
                    state=now.state,
                    sums=now.sums,
                    step=first + now.step,
                    seconds=before + time.monotonic() - began,
                )
                is_finite = np.isfinite(means["loss"]).any()
                if not is_finite or devices.agree(len(received)) or now.step in due:
                    yield saved
        train_means = _means(now.sums)
        validation = {"loss": None, "accuracy": None}
        if parts.splits["validation"]:
            validation = _means(parts.loop.evaluate(now.state.params, parts.rows["validation"]))
        seconds = time.monotonic() - began
        record = {
            "epoch": epoch + 1,
            "step": saved.step,
            **{f"train/{key}": value for key, value in train_means.items()},
            **{f"validation/{key}": value for key, value in validation.items()},
            "seconds": round(seconds, 3),
        }
        display.epoch_line(title, num_steps, record)
        saved = saved._replace(
            sums=parts.loop.start(now.state).sums,
            history=[*saved.history, record],
            seconds=before + seconds,
        )
        yield saved


def _due_steps(config, first, last) -> list[int]:
    every = config.checkpoint.every_steps
    return [step for step in range(first + 1, last) if step % every == 0] if every else []


def _is_due(parts, saved) -> bool:
    settings, num_epochs = parts.config.checkpoint, len(saved.history)
    if saved.step == num_epochs * parts.steps_per_epoch:
        is_last = num_epochs == parts.config.train.num_epochs
        every = settings.every_epochs
        if is_last or (every and num_epochs % every == 0):
            return True
    return bool(settings.every_steps) and saved.step % settings.every_steps == 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects signals that ask for an end, for a step to finish; a second one ends at once."""
    received = []
    signals = (signal.SIGTERM, signal.SIGINT)

    def note(number, _):
        received.append(number)
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    previous = {each: signal.signal(each, note) for each in signals}
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _explain_nonfinite(parts, saved, workdir, debug_nans):
    """Says where a run went wrong; `guarded_step` has left the last good state."""
    step = int(np.max(devices.gather(saved.state.step)))
    schedule = make_schedule(parts.config.optimizer, parts.config.train.num_epochs * step)
    rate = float(schedule(step)) if callable(schedule) else schedule
    steps = sorted(int(path.name) for path in (workdir / checkpoint_lib.DIRECTORY).glob("[0-9]*"))
    last = f"checkpoints/{steps[-1]}" if steps else "none"
    epoch, row = divmod(step, parts.steps_per_epoch)
    where = ""
    if debug_nans and len(parts.plan) == 1:
        batch = _read_batch(parts, parts.epoch_rows(epoch)[row])
        with jax.debug_nans(True), jax.disable_jit():
            try:
                train_step(parts.system, saved.state, batch)
            except FloatingPointError as error:
                where = f" in {_blame(error)}"
    return (
        f"the loss or the parameters are not finite{where} after step {step + 1} (epoch "
        f"{epoch + 1}, learning rate {rate:g}); last good checkpoint: {last}; make "
        "config.optimizer.learning_rate smaller or set config.optimizer.clip_norm"
        + ("" if debug_nans else "; --debug_nans finds the operation")
    )


def _read_batch(parts, row):
    arrays = zip(*(parts.dataset.arrays(split) for split in ("train", "test")), strict=True)
    return batches.take(*map(np.concatenate, arrays), row)


def _blame(error):
    """Names the operation and the line of this project that an error comes from."""
    here, trace, place = pathlib.Path(__file__).parent, error.__traceback__, ""
    while trace:
        file = pathlib.Path(trace.tb_frame.f_code.co_filename)
        if file.parent == here:
            place = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{str(error).partition('.')[0]} ({place})"


def _scores(parts, saved):
    """Validation and test scores, and of members their summary and their ensemble's."""
    has_validation = bool(parts.splits["validation"])
    last = saved.history[-1]
    validation = {key: last[f"validation/{key}"] for key in ("loss", "accuracy")}
    test = _means(parts.loop.evaluate(saved.state.params, parts.rows["test"]))
    scores = {"validation": validation, "test": test}
    if len(parts.plan) == 1:
        return scores
    summary = members.summarize(parts.config, validation if has_validation else None, test)
    num, best = parts.config.members.num, summary["best"]
    chosen = range(len(parts.plan)) if best is None else range(best * num, (best + 1) * num)
    weights = np.isin(np.arange(len(parts.plan)), chosen) / np.float32(len(chosen))
    ensemble = parts.loop.evaluate_ensemble(saved.state.params, parts.rows["test"], weights)
    return {
        **scores,
        "members": parts.plan,
        **summary,
        "ensemble": {"members": list(chosen), "test": _means(ensemble)},
    }


def _show_test(display, results):
    if "members" in results:
        display.members_table(results)
    else:
        display.test_line(results["dataset"], results["test"])


def _means(sums):
    return devices.gather(sums).means()


def _epoch_rows(seed, epoch, size, config):
    order = batches.epoch_order(seed, epoch, size)
    return batches.batch_rows(order, config.train.batch_size)


def _evaluation_rows(splits, batch_size):
    """Rows of both evaluations, padded to one shape so that they compile once."""
    most = max(len(splits[name]) for name in ("validation", "test"))
    padded = {
        name: np.pad(splits[name], (0, most - len(splits[name])), constant_values=batches.PADDING)
        for name in ("validation", "test")
    }
    return {name: batches.batch_rows(numbers, batch_size) for name, numbers in padded.items()}


def _describe(dataset, splits):
    return {
        "name": dataset.name,
        "requested": dataset.requested,
        "notice": dataset.notice,
        "fingerprint": dataset.fingerprint,
        **{name: len(split) for name, split in splits.items()},
    }


def _describe_sequence(model):
    num_steps, num_features = sequence_shape(model)
    description = {"view": model.view, "time_steps": num_steps, "features": num_features}
    if model.view == "permuted_pixels":
        description["permutation_sha256"] = permutation_sha256(permutation())
    return description
