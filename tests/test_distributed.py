"""Several processes that run one job: the same numbers, and an end when one of them fails."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from conftest import REPOSITORY, seqmnist
from datasets import small_archives

from seqmnist.training import distributed
from tools import launch_local

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def lone_device(monkeypatch):
    flags = os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", flags.replace("device_count=8", "device_count=1"))


@pytest.fixture
def launch():
    """`launch_local.launch`; what still runs at the end of a failed test is killed."""
    started = []

    def launch(*arguments):
        processes = launch_local.launch(arguments)
        started.extend(processes)
        return processes

    yield launch
    for process in started:
        process.kill()


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


def wait_for_a_checkpoint(processes, workdir):
    while not list((workdir / "checkpoints").glob("[0-9]*5")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)


@contextlib.contextmanager
def launcher(*arguments):
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.launch_local", "--processes=2", "--", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGHUP, handler)
    try:
        yield process
    finally:  # a second signal ends a job at once
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_port(workdir):
    """The coordinator's port of the job that writes a workdir."""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            line = path.read_text()
            if str(workdir) in line and "--coordinator" in line:
                return int(re.search(r"--coordinator=127\.0\.0\.1:(\d+)", line)[1])
    raise AssertionError("no such job")


def listening_addresses(port):
    """The local addresses on which any process listens at a port, as the kernel writes them."""
    tables = [pathlib.Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.read_text().splitlines()]
    sockets = [line[1].split(":") for line in lines if line[3] == "0A"]  # TCP_LISTEN
    # IPv4 addresses in the table of IPv6 have a prefix.
    return {
        address.removeprefix("0000000000000000FFFF0000")
        for address, number in sockets
        if int(number, 16) == port
    }


def test_two_processes_agree_with_one(finished_run, data_dir, tmp_path, launch):
    one = json.loads((finished_run / "results.json").read_text())
    for input_mode in ("resident", "stream"):
        workdir = tmp_path / input_mode
        own = [f"--config.data.input_mode={input_mode}", "--config.model.hidden_size=8"]
        code, outputs = finish(launch(*[arguments(workdir, data_dir, 1, *own)] * 2))
        assert code == 0, outputs
        assert "test_accuracy" in outputs[0]
        assert "test_accuracy" not in outputs[1]
        two = json.loads((workdir / "results.json").read_text())
        for split in ("validation", "test"):
            np.testing.assert_allclose(two[split]["loss"], one[split]["loss"], rtol=1e-4)
            # Rounding may change one prediction of 1,000.
            assert abs(two[split]["accuracy"] - one[split]["accuracy"]) <= 1.5e-3
        assert len(two["devices"]) == 2


def test_a_launched_job_keeps_to_itself_and_passes_signals_on(data_dir, tmp_path, launch):
    workdir = tmp_path / "run"
    with launcher(*arguments(workdir, data_dir, 3000)) as job:
        wait_for_a_checkpoint([job], workdir)
        assert listening_addresses(find_port(workdir)) == {"0100007F"}  # 127.0.0.1

        began = time.monotonic()
        second = launch(*[arguments(workdir, data_dir, 3000)] * 2)
        _, outputs = finish(second)
        assert [process.returncode for process in second] == [2, 2], outputs
        assert "is in use by another process" in outputs[0]
        assert time.monotonic() - began < 45  # most of it to start two processes

        job.send_signal(signal.SIGHUP)  # a terminal that closes
        output, _ = job.communicate()
    assert job.returncode == 128 + signal.SIGHUP, output
    assert "Stopped after step" in output


def test_all_stop_when_one_is_asked_to(data_dir, tmp_path, launch):
    workdir = tmp_path / "run"
    processes = launch(*[arguments(workdir, data_dir, 3000)] * 2)
    wait_for_a_checkpoint(processes, workdir)
    processes[1].terminate()
    _, outputs = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "Stopped after step" in outputs[0]


def test_the_others_of_a_process_that_is_stopped_end(data_dir, tmp_path, launch):
    """Process 0, which the others ask; a test below lets another one be silent."""
    workdir = tmp_path / "run"
    processes = launch(*[arguments(workdir, data_dir, 3000)] * 2)
    wait_for_a_checkpoint(processes, workdir)
    began = time.monotonic()
    os.kill(processes[0].pid, signal.SIGSTOP)
    output, _ = processes[1].communicate()
    assert time.monotonic() - began < 45
    processes[0].kill()
    (line,) = re.findall("error: .*", output)
    assert "process 0 of this job does not answer" in line
    assert output.endswith(f"{line}\n")


@pytest.mark.parametrize(
    ("rounds", "reason"),
    [
        # seconds that pass, and what the other process tells of itself
        ([(1, str(i)) for i in range(50)], None),
        ([(1, "0")] * 30, "process 1 of this job does not answer"),
        ([(1, None)] * 30, "process 1 of this job does not answer"),
        ([(1, "0"), (40, "0"), (1, "0"), (1, "1")], None),  # both were paused
        ([(1, "0"), (40, "0"), *[(1, "0")] * 30], "process 1 of this job does not answer"),
    ],
)
def test_a_process_that_is_silent_is_told_from_a_pause_of_all(rounds, reason, monkeypatch):
    leaves, clock, told, ended = threading.Event(), [0.0], iter(rounds), []

    def sleep(_):
        if ended:
            raise SystemExit

    def read(_):
        try:
            seconds, value = next(told)
        except StopIteration:
            leaves.set()
            raise
        clock[0] += seconds
        own = ("alive/0", str(clock[0]))
        return [own, ("alive/1", value)] if value else [own]

    client = types.SimpleNamespace(key_value_set=lambda *_, **__: None, key_value_dir_get=read)
    job = types.SimpleNamespace(client=client, process_id=0, num_processes=2)
    fake = types.SimpleNamespace(
        monotonic=lambda: clock[0], monotonic_ns=lambda: int(1e9 * clock[0]), sleep=sleep
    )
    monkeypatch.setattr(distributed, "time", fake)
    monkeypatch.setattr(distributed, "_end", ended.append)
    with contextlib.suppress(SystemExit):
        distributed._watch(job, leaves)
    assert ended == ([reason] if reason else [])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_job_and_the_rest_can_go_on(victim, data_dir, tmp_path, launch):
    workdir = tmp_path / "run"
    processes = launch(*[arguments(workdir, data_dir, 3000)] * 2)
    wait_for_a_checkpoint(processes, workdir)
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


def test_processes_with_different_settings_refuse_to_train(data_dir, tmp_path, launch):
    began = time.monotonic()
    own = [[f"--config.seed={seed}", "--config.model.cell=gru"] for seed in (1, 2)]
    processes = launch(*(arguments(tmp_path / "run", data_dir, 1, *each) for each in own))
    _, outputs = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], outputs
    for seed, output in zip((1, 2), outputs, strict=True):
        (line,) = re.findall("error: .*", output)
        assert line.startswith(f"error: config.seed is {seed} in this process, and something else")
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


def test_processes_with_different_data_refuse_to_train(tmp_path, launch):
    each = []
    for i in range(2):
        splits = small_archives.make_splits(seed=i)
        folder = small_archives.write_archives(tmp_path / f"archives-{i}", splits)
        each.append(
            [
                f"--workdir={tmp_path / 'run'}",
                "--config.data.name=mnist",
                f"--config.data.data_dir={tmp_path / f'data-{i}'}",
                f"--config.data.manual_dir={folder}",
                "--config.data.verify_checksums=false",
                "--config.train.batch_size=8",
            ]
        )
    began = time.monotonic()
    processes = launch(*each)
    _, outputs = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert output.count("error: ") == 1, outputs
    assert "data" in outputs[0].partition("error: ")[2], outputs
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_launcher_shows_the_lines_of_all_and_fails_as_they_do(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with launcher(f"--workdir={file}") as job:
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    for number in ("", "[1] "):
        assert f"\n{number}error: --workdir={file}" in f"\n{output}"


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_waits_in_vain_says_so(process_id):
    code = f"""
from seqmnist.training import distributed
distributed.JOINING = 1
with distributed.joined(False, "127.0.0.1:{free_port()}", 2, {process_id}):
    print("joined")
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: not all processes have joined at 127.0.0.1:")


def test_a_process_whose_lines_cannot_be_shown_is_read_to_its_end(monkeypatch):
    process = types.SimpleNamespace(stdout=io.StringIO("one\ntwo\n"))
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            launch_local._show(0, process)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # it can be closed
    assert process.stdout.read() == ""


PROXY = {"http_proxy": "http://proxy:80"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (PROXY, "127.0.0.1"),
        (PROXY | {"no_proxy": ".lan,a"}, ".lan,a,127.0.0.1"),
        (PROXY | {"no_proxy": ".lan", "no_grpc_proxy": "b"}, "b,127.0.0.1"),
    ],
)
def test_processes_of_one_machine_connect_without_a_proxy(variables, expected, monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: env)
    for environment in launch_local.launch([[], []]):
        assert environment.get("no_grpc_proxy") == expected
        assert environment.get("no_proxy") == variables.get("no_proxy")


@pytest.mark.parametrize(("visible", "expected"), [(None, "01"), ("3,5", "35"), ("", ["", ""])])
def test_each_process_gets_one_gpu(visible, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: env)
    environments = launch_local.launch([[], []])
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == list(expected)
