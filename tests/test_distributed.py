"""Several processes that run one job: the same numbers, and an end when one dies."""

import json
import os
import signal
import time

import numpy as np
import pytest
from conftest import seqmnist

from tools import launch_local


@pytest.fixture
def lone_device(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")


def arguments(workdir, data_dir, num_epochs, *more):
    return [
        f"--workdir={workdir}",
        "--config=experiments/mnist_5k.py",
        f"--config.data.data_dir={data_dir}",
        f"--config.train.num_epochs={num_epochs}",
        *more,
    ]


def finish(processes):
    code = launch_local.wait(processes)
    return code, [process.communicate()[0] for process in processes]


@pytest.mark.parametrize("input_mode", ["resident", "stream"])
def test_two_processes_agree_with_one(input_mode, data_dir, tmp_path, lone_device):
    mode = f"--config.data.input_mode={input_mode}"
    code, outputs = finish(launch_local.launch(2, arguments(tmp_path / "two", data_dir, 2, mode)))
    assert code == 0, outputs
    assert "test_accuracy" in outputs[0]
    assert "test_accuracy" not in outputs[1]
    seqmnist(*arguments(tmp_path / "one", data_dir, 2))
    two, one = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("two", "one"))
    for split in ("validation", "test"):
        values = [[results[split][key] for key in ("loss", "accuracy")] for results in (two, one)]
        np.testing.assert_allclose(*values, atol=1e-5)
    assert len(two["devices"]) == 2


def test_all_stop_when_one_is_asked_to(data_dir, tmp_path, lone_device):
    workdir = tmp_path / "run"
    processes = launch_local.launch(2, arguments(workdir, data_dir, 3000))
    while not list((workdir / "checkpoints").glob("[0-9]*5")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].terminate()
    _, outputs = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "Stopped after step" in outputs[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_job_and_the_rest_can_go_on(victim, data_dir, tmp_path, lone_device):
    workdir = tmp_path / "run"
    processes = launch_local.launch(2, arguments(workdir, data_dir, 3000))
    while not list((workdir / "checkpoints").glob("[0-9]*5")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    os.kill(processes[victim].pid, signal.SIGKILL)
    _, outputs = finish(processes)
    assert processes[1 - victim].returncode != 0
    survivor = outputs[1 - victim]
    assert "another process of this job has ended" in survivor or "another task died" in survivor
    record = json.loads((workdir / "config.json").read_text())
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*[05]")]
    # Whatever was reached, one more epoch finishes the run.
    record["train"]["num_epochs"] = max(steps) // 25 + 1
    (workdir / "config.json").write_text(json.dumps(record))
    result = seqmnist(f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"Resuming in epoch {max(steps) // 25 + 1}, after 0" in result.stdout
