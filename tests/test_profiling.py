"""Profiles: exactly the steps asked for, and operations by scope."""

import dataclasses

import pytest

from seqmnist import config as config_lib
from seqmnist import records
from seqmnist.config import Config, ProfileConfig
from seqmnist.errors import UserError
from seqmnist.study import profiling
from seqmnist.training import batches, loop
from seqmnist.training.steps import init_state, make_system
from tools import trace_summary


@pytest.mark.parametrize("steps", ["3", "5:3", "0:14", "3:3"])
def test_impossible_steps_are_refused(steps, tmp_path):
    def make():
        return profiling.Profile(
            config_lib.from_dict({"profile": {"steps": steps}}), tmp_path, num_steps=13
        )

    with pytest.raises(UserError, match=r"config\.profile\.steps.*START:STOP"):
        make()


def test_stretches_pause_at_breaks():
    stretches = list(loop._stretches(0, 375, (-1, 100, 117)))
    assert [i for start, stop in stretches for i in range(start, stop)] == list(range(375))
    assert {100, 117} < {stop for _, stop in stretches}


def test_a_trace_holds_exactly_its_steps(digits, tmp_path):
    config = dataclasses.replace(Config(), profile=ProfileConfig("11:15"))
    system = make_system(config)
    resident = loop.Resident(system, *digits)
    state = init_state(config, system, 0)
    profile = profiling.Profile(config, tmp_path, 26)
    for epoch in range(2):
        rows = batches.batch_rows(batches.epoch_order(0, epoch, 100), 8)
        first = 13 * epoch
        progresses = resident.train(resident.start(state), rows, profile.breaks(first))
        for progress in profile.follow(progresses, first, 13):
            state = progress.state
    assert int(state.step) == 26

    summary = records.read_json(tmp_path / "profile" / profiling.SUMMARY)
    assert set(summary["scopes"]["jit_train"].values()) == {*profiling.SCOPES, "other"}
    figures = trace_summary.summarize(tmp_path)
    assert figures["num_steps"] == 4
    counts = {operation["count"] for operation in figures["operations"]}
    assert counts <= {4, 4 * 27, 4 * 28, 4 * 29}
    assert 0 < figures["scopes"]["recurrence"] <= figures["wall"] * 2
