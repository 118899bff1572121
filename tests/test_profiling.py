"""Profiles: exactly the steps asked for, and operations by scope."""

import jax
import jax.numpy as jnp
import pytest

from seqmnist.config import Config, ProfileConfig
from seqmnist.errors import UserError
from seqmnist.spec import MNIST
from seqmnist.study import profiling
from seqmnist.training import batches
from seqmnist.training.loop import Loop, Resident
from seqmnist.training.steps import init_state, make_system
from seqmnist.workdir import PROFILE, read_json, write_json
from tools import trace_summary


def make_profile(steps, directory, num_steps, modules=list):
    return profiling.Profile(
        Config(profile=ProfileConfig(steps)), directory, num_steps, lambda: modules(), MNIST
    )


@pytest.mark.parametrize("steps", ["5:3", "0:14", "3:3", "999999999998:999999999999"])
def test_impossible_steps_are_refused(steps, tmp_path):
    with pytest.raises(UserError, match=r"config\.profile\.steps.*START:STOP.*13"):
        make_profile(steps, tmp_path, num_steps=13)


class Run:
    """Two epochs of 13 steps on the toy dataset."""

    def __init__(self, digits):
        system = make_system(Config())
        self.loop, self.state = Loop(system, Resident(*digits)), init_state(Config(), system, 0)

    def modules(self):
        begin, rows = self.loop.start(self.state), self.rows(0)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (begin.state, begin.sums),
        )
        programs = self.loop.programs(*shapes, rows.shape, rows.shape).values()
        return [program.lower().compile().as_text() for program in programs]

    def rows(self, epoch):
        return batches.batch_rows(batches.epoch_order(0, epoch, 100), 8)

    def train(self, profile, epochs=(0, 1), done=0):
        for epoch in epochs:
            first = 13 * epoch
            begin = self.loop.start(self.state)._replace(step=done)
            breaks = [step - first for step in profile.breaks]
            progresses = self.loop.train(begin, self.rows(epoch), breaks)
            for progress in profile.watch(progresses, first, 13, done):
                self.state = progress.state
                yield first + progress.step


@pytest.mark.slow
def test_a_trace_holds_exactly_its_steps(digits, tmp_path):
    run = Run(digits)
    profile = make_profile("11:15", tmp_path / PROFILE, 26, run.modules)
    assert {11, 15, 26} <= set(run.train(profile))
    assert int(run.state.step) == 26

    summary = read_json(tmp_path / PROFILE / profiling.SUMMARY)
    found = set(summary["scopes"]["jit_train"].values())
    assert {"project", "recurrence", "readout", "loss", "optimizer", "other"} <= found
    figures = trace_summary.summarize(tmp_path)
    assert figures["num_steps"] == 4
    counts = {operation["count"] for operation in figures["operations"]}
    # Once per step or once per time step; XLA may split a few operations among threads.
    assert 4 in counts
    assert counts & {4 * 27, 4 * 28, 4 * 29}
    assert min(counts) == 4
    assert max(counts) <= 4 * 29
    assert 0 < figures["scopes"]["recurrence"] <= figures["wall"] * 2


@pytest.mark.slow
def test_a_trace_may_begin_with_an_epoch(digits, tmp_path):
    run = Run(digits)
    (tmp_path / PROFILE).mkdir()
    summary = tmp_path / PROFILE / profiling.SUMMARY
    summary.write_text("of another trace")
    for step in run.train(make_profile("13:15", tmp_path / PROFILE, 26, run.modules)):
        assert step >= 15 or summary.exists() == (step <= 13)
    assert trace_summary.summarize(tmp_path)["num_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("process", "done"), [(1, 0), (0, 4)])
def test_other_processes_and_runs_resumed_in_between_trace_nothing(
    process, done, digits, tmp_path, monkeypatch
):
    run = Run(digits)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    profile = make_profile("3:6", tmp_path / PROFILE, 26, run.modules)
    assert list(run.train(profile, done=done, epochs=[0]))[-1] == 13
    assert not list(tmp_path.iterdir())


STEP = {"steps": [1, 3], "scopes": {}, "flops": 2, "bytes": 1, "flops_per_second": 1.0}


@pytest.mark.parametrize(
    ("change", "trace", "words"),
    [
        *(
            ({name: value}, b"", r"step\.json is not what a profiled run writes; train")
            for name, value in {"steps": 3, "scopes": [], "flops_per_second": 0.0}.items()
        ),
        ({"steps": [1, 1]}, b"", r"step\.json is not"),
        ({"scopes": {"jit_train": 3}}, b"", r"step\.json is not"),
        ({}, b"", r"a\.xplane\.pb holds no operation"),
        ({}, b"no trace", r"a\.xplane\.pb cannot be read \(.*; train with"),
    ],
)
def test_a_profile_that_no_run_writes_is_refused(change, trace, words, tmp_path):
    folder = tmp_path / PROFILE / "plugins" / "profile" / "1"
    folder.mkdir(parents=True)
    (folder / "a.xplane.pb").write_bytes(trace)
    write_json(tmp_path / PROFILE / profiling.SUMMARY, STEP | change)
    with pytest.raises(UserError, match=words):
        trace_summary.summarize(tmp_path)


def test_a_stopped_run_ends_its_trace(digits, tmp_path):
    for attempt in range(2):  # a trace that goes on would refuse the second one
        run = Run(digits)
        with make_profile("3:20", tmp_path / str(attempt), 26, run.modules) as profile:
            for step in run.train(profile):
                if step > 3:
                    break
        assert not (tmp_path / str(attempt) / profiling.SUMMARY).exists()


def test_a_folder_that_cannot_be_made_is_explained(digits, tmp_path):
    run, directory = Run(digits), tmp_path / PROFILE
    directory.write_text("a file where the folder should be")
    profile = make_profile("3:6", directory, 26, run.modules)
    with profile, pytest.raises(UserError, match=f"{directory}.*resumes"):
        list(run.train(profile))


@pytest.mark.slow
def test_a_summary_that_cannot_be_written_is_explained(digits, tmp_path):
    run, directory = Run(digits), tmp_path / PROFILE
    (directory / f"{profiling.SUMMARY}.partial").mkdir(parents=True)
    profile = make_profile("3:6", directory, 26, run.modules)
    with profile, pytest.raises(UserError, match=f"{directory}.*resumes"):
        list(run.train(profile))


def test_products_are_counted_through_loops_and_branches():
    square, wide = jnp.ones((4, 4)), jnp.ones((4, 16))

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ square, lambda x: (x @ wide) @ wide.T, x)

    def body(x, _):
        return jax.checkpoint(branches)(x), x @ wide

    def function(x):
        x, outputs = jax.lax.scan(jax.jit(body), x, length=3)
        jnp.tensordot(outputs, outputs, 3)  # nothing reads it
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ square, x)

    jaxpr = jax.make_jaxpr(function)(jnp.ones((2, 4))).jaxpr
    one = 2 * 2 * 4 * 4
    assert profiling.product_flops(jaxpr) == 3 * (8 * one + 4 * one) + 5 * one
