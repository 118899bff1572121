"""README's commands for SLURM and Open MPI, as written, with two tasks on this machine."""

import contextlib
import getpass
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import REPOSITORY, seqmnist

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| (SLURM|Open MPI) \| `(.*)` \|$", README, re.M))
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


def test_readme_has_a_command_for_each_launcher():
    assert list(COMMANDS) == ["SLURM", "Open MPI"]


def free_ports(number):
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def slurm():
    """A cluster of this machine; returns the environment that leads to it."""
    for name in ("munged", "slurmctld", "slurmd", "srun"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed; Debian's slurm-wlm has it")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has a limit
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    names = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser()}
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, ports=free_ports(2), **names))
    own = [f"--{name}={folder}/munge.{name[:4]}" for name in ("socket", "log-file", "seed-file")]
    own += [f"--key-file={key}", f"--pid-file={folder}/munge.pid"]
    daemons = [["munged", "--foreground", "--force", *own]]
    daemons += [[name, "-D", "-f", str(conf)] for name in ("slurmctld", "slurmd")]
    environment = {"SLURM_CONF": str(conf)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = []
    try:
        for daemon in daemons:
            started.append(subprocess.Popen(daemon, env={**os.environ, **environment}, **quiet))
            time.sleep(1)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder)


@pytest.fixture
def mpi():
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed; Debian's openmpi-bin has it")
    # A test may run as root in a container.
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(params=COMMANDS)
def start(request, tmp_path):
    """Starts the command of a launcher, with further flags; at the end, all is killed."""
    fixture = {"SLURM": "slurm", "Open MPI": "mpi"}[request.param]
    environment = {
        **os.environ,
        **request.getfixturevalue(fixture),
        "HOME": str(tmp_path),
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = COMMANDS[request.param].split()
    started = []

    def start(*flags):
        command = [*words, *flags]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[0]

    yield start
    for process in started:
        process.kill()
    for number in find_tasks(tmp_path):
        os.kill(number, signal.SIGKILL)


def find_tasks(folder):
    """The processes that train in a folder, by their numbers, ascending."""
    for file in sorted(pathlib.Path("/proc").glob("[0-9]*"), key=lambda file: int(file.name)):
        with contextlib.suppress(OSError):  # it has ended
            program = file.joinpath("cmdline").read_text().partition("\0")[0]
            if file.joinpath("cwd").readlink() == folder and "python" in program:
                yield int(file.name)


def test_two_tasks_train_together(start):
    output, _ = (process := start()).communicate(timeout=120)
    assert process.returncode == 0, output
    assert "1 for members × 2 for each batch" in output
    assert output.count("test_accuracy") == 1


@pytest.mark.parametrize("received", [signal.SIGKILL, signal.SIGSTOP])
def test_a_task_that_is_lost_ends_the_job_and_one_process_resumes(received, start, tmp_path):
    process = start("--config.train.num_epochs=3000")
    while not list(tmp_path.glob("runs/*/checkpoints/[0-9]*5")):
        assert process.poll() is None
        time.sleep(0.2)
    _, second = find_tasks(tmp_path)
    began = time.monotonic()
    os.kill(second, received)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert time.monotonic() - began < 60, output
    assert not list(find_tasks(tmp_path)), output
    assert "of this job" in output

    (workdir,) = tmp_path.glob("runs/*")
    steps = max(int(path.name) for path in workdir.glob("checkpoints/[0-9]*[05]"))
    record = json.loads((workdir / "config.json").read_text())
    record["train"]["num_epochs"] = steps // 25 + 1
    (workdir / "config.json").write_text(json.dumps(record))
    result = seqmnist(f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert f"Resuming in epoch {steps // 25 + 1}, after 0" in result.stdout
