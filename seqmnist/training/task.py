"""A task: everything in a run that training does not change, composed from its configuration."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.datasets import sources
from seqmnist.errors import UserError
from seqmnist.networks import views
from seqmnist.training import batches, devices, members
from seqmnist.training.loop import Loop, Progress, Resident, Streamed
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import System, TrainState, check_names, init_state, make_system


class Program(NamedTuple):
    """A compiled program, and the seconds that compiling took; few if it was in the cache."""

    compiled: jax.stages.Compiled
    seconds: float


class Task(NamedTuple):
    """What a run is made of, except its state."""

    config: Config
    dataset: sources.Prepared
    splits: dict[str, range]  # "train", "validation" and "test": example numbers
    members: list[dict[str, float]]  # what tells members apart; one entry for a single run
    steps_per_epoch: int
    system: System
    mesh: jax.sharding.Mesh
    loop: Loop
    rows: dict[str, np.ndarray]  # batches of "validation" and "test", int32 [steps, B] each

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.config.train.num_epochs * self.steps_per_epoch

    def template(self) -> tuple[TrainState, Sums]:
        """Returns the shapes, dtypes and shardings of the state and of an epoch's sums."""
        state = jax.eval_shape(self._init)
        sums = Sums.zeros(jax.tree.leaves(state.params)[0].dtype, state.step.shape)
        return devices.placed_shapes((state, sums), self.loop.placement)

    def start(self) -> Progress:
        """Returns the beginning of the run."""
        # It runs once, so that quick compilation is worth more than a fast program.
        options = {"xla_backend_optimization_level": 0}
        init = jax.jit(self._init, out_shardings=self.loop.placement, compiler_options=options)
        return self.loop.start(init())

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Returns the batches of an epoch: int32 [steps, B], or [S, steps, B]."""
        size, batch_size = len(self.splits["train"]), self.config.train.batch_size
        seeds = [int(member["seed"]) for member in self.members]
        orders = {seed: batches.epoch_order(seed, epoch, size) for seed in set(seeds)}
        rows = {seed: batches.batch_rows(order, batch_size) for seed, order in orders.items()}
        return rows[seeds[0]] if len(seeds) == 1 else np.stack([rows[seed] for seed in seeds])

    def programs(self, state: TrainState, sums: Sums) -> dict[str, jax.stages.Traced]:
        """Returns "train" and "evaluate" for what `template` returns; see `Loop.programs`."""
        num_members = [len(self.members)] if len(self.members) > 1 else []
        rows = (*num_members, self.steps_per_epoch, self.config.train.batch_size)
        return self.loop.programs(state, sums, rows, self.rows["test"].shape)

    def compile_ahead(
        self, pool: futures.Executor, state: TrainState, sums: Sums
    ) -> dict[str, futures.Future]:
        """Begins to compile what the run will need: {name: future of a `Program`}.

        The compiler releases Python's lock, and so runs in parallel to this thread; tracing does
        not.
        """

        def compiled(lowered):
            began = time.perf_counter()
            return Program(lowered.compile(), time.perf_counter() - began)

        programs = self.programs(state, sums)
        return {name: pool.submit(compiled, traced.lower()) for name, traced in programs.items()}

    def evaluate(
        self, params: Any, split: str, diverged: np.ndarray | bool = False
    ) -> dict[str, Any]:
        """Returns {"loss", "accuracy"} on "validation" or "test"; None on an empty split.

        With members, both are lists; scores of those that `diverged`, bool [S], become NaN.
        """
        if not self.splits[split]:
            return {"loss": None, "accuracy": None}
        means = self.loop.evaluate(params, self.rows[split]).means()
        return {name: np.where(diverged, np.nan, value).tolist() for name, value in means.items()}

    def describe_data(self) -> dict[str, Any]:
        """Returns what `results.json` says about the dataset."""
        facts = ("name", "requested", "notice", "fingerprint")
        counts = {name: len(split) for name, split in self.splits.items()}
        named = {fact: getattr(self.dataset, fact) for fact in facts}
        return named | {"images": self.dataset.spec.to_dict()} | counts

    def describe_sequence(self) -> dict[str, Any]:
        """Returns what `results.json` says about the sequences that the network reads."""
        view, spec = self.config.model.view, self.dataset.spec
        num_steps, num_features = views.sequence_shape(self.config.model, spec)
        description = {"view": view, "time_steps": num_steps, "features": num_features}
        if view in views.ORDERS:
            order = views.ORDERS[view](spec.height, spec.width)
            description["permutation_sha256"] = views.permutation_sha256(order)
        return description

    def _init(self):
        """Returns the initial state; members one by one, so that each equals a separate run."""
        if len(self.members) == 1:
            return init_state(self.config, self.system, self.config.seed)
        swept = members.settings(self.config)[0]
        seeds = np.array([member["seed"] for member in self.members], np.uint32)
        values = {name: np.array([m[name] for m in self.members], np.float32) for name in swept}
        return lax.map(lambda one: init_state(self.config, self.system, *one), (seeds, values))


def compose(
    config: Config, say: Callable[[str], None], described: Sequence[jax.Device] | None = None
) -> Task:
    """Composes a task; prepares its dataset if need be, and calls `say` with what takes long.

    `described` are devices to compile for, in place of those to train on. Raises UserError if the
    configuration names something that does not exist or does not fit, or if the data cannot be
    used.
    """
    batch_size = config.train.batch_size
    with devices.together():  # names that do not exist are refused before data are fetched
        each = members.list_members(config)
        check_names(config)
        if config.data.input_mode == "stream" and len(each) > 1:
            raise UserError(
                f"config.data.input_mode='stream' feeds one member, not {len(each)}; use 'resident'"
            )
        shape = devices.mesh_shape(config.mesh, len(each), batch_size, described or jax.devices())
    examples, parts = batch_size // shape[1], config.train.accumulate
    if examples % parts:
        alternative = "" if batch_size % parts else ", or set config.mesh.data=1"
        raise UserError(
            f"config.train.accumulate={parts} does not divide the {examples} examples of a step on "
            f"each device; choose another{alternative}"
        )
    mesh = devices.make_mesh(*shape, described)
    with devices.together():
        dataset = sources.prepare(config.data, say)
    if not devices.is_same(dataset.fingerprint):
        raise UserError(
            f"the processes of this job found different data; this one found {dataset.name} in "
            f"{dataset.directory}: name one dataset with config.data.name and config.data.data_dir"
        )
    sizes = [dataset.num_examples(split) for split in ("train", "test")]
    splits = batches.make_splits(*sizes, config.data.validation_fraction)
    steps_per_epoch = batches.num_batches(len(splits["train"]), batch_size)
    num_steps = config.train.num_epochs * steps_per_epoch
    if num_steps >= 2**31:
        raise UserError(
            f"config.train.num_epochs={config.train.num_epochs} are {num_steps:,} steps; choose "
            f"at most {(2**31 - 1) // steps_per_epoch:,}"
        )
    system = make_system(config, num_steps, dataset.spec)
    streams = config.data.input_mode == "stream"
    train, test = map(dataset.mapped if streams else dataset.arrays, ("train", "test"))
    if found := sources.notices(*train, splits, dataset.spec):
        found = [dataset.notice, *found] if dataset.notice else found
        dataset = dataclasses.replace(dataset, notice="; ".join(found))
    if streams:
        feed = Streamed(batches.Records(train, test))
    else:
        feed = Resident(*map(batches.join, zip(train, test, strict=True)))
    loop = Loop(system, feed, mesh, len(each) > 1)
    # Both evaluations have one shape, so that they compile once.
    steps = batches.num_batches(max(len(splits["validation"]), len(splits["test"])), batch_size)
    rows = {
        name: batches.batch_rows(splits[name], batch_size, steps) for name in ("validation", "test")
    }
    return Task(config, dataset, splits, each, steps_per_epoch, system, mesh, loop, rows)


def as_trained(config: Config, results: Mapping[str, Any]) -> Config:
    """Returns a configuration with the dataset to which "auto" resolved when the run was trained.

    `results` are those of the run, empty if it has not finished.
    """
    fell_back = results and results["dataset"]["name"].startswith("mnist_5k")
    if config.data.name == "auto" and fell_back:
        return config_lib.override(config, {"data.name": "mnist_5k"})
    return config


def check_memory(mesh: jax.sharding.Mesh, num_bytes: float) -> None:
    """Raises UserError if the CPU devices of a mesh need more memory than the machine has.

    Accelerators refuse by themselves; a CPU's operating system would end the process.
    """
    if mesh.devices.flat[0].platform != "cpu" or not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > there:
        raise UserError(
            f"this run needs {num_bytes / 2**30:,.0f} GiB of memory, and the machine has "
            f"{there / 2**30:,.0f}; make config.model.hidden_size, config.model.num_layers, "
            "config.train.batch_size or config.members.num smaller"
        )
