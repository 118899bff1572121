"""README's commands for SLURM and Open MPI, as written, with two tasks on this machine."""

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
def launcher(request):
    """The command of a launcher, and the environment that it needs."""
    return COMMANDS[request.param], request.getfixturevalue(
        {"SLURM": "slurm", "Open MPI": "mpi"}[request.param]
    )


def start(command, environment, folder):
    python = pathlib.Path(sys.executable).parent
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {
        **os.environ,
        **environment,
        "HOME": str(folder),
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": flags,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, **pipes)


def find_tasks(workdir):
    """The processes that train in a workdir, by their number in the job."""
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        words = file.read_text().split("\0")
        if "seqmnist.main" in words and f"--workdir={workdir}" in words and "srun" not in words[0]:
            yield int(file.parent.name)


def test_two_tasks_train_together(launcher, tmp_path):
    output, _ = (process := start(*launcher, tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert "1 for members × 2 for each batch" in output
    assert output.count("test_accuracy") == 1


@pytest.mark.parametrize("received", [signal.SIGKILL, signal.SIGSTOP])
def test_a_task_that_is_lost_ends_the_job_and_one_process_resumes(received, launcher, tmp_path):
    command, environment = launcher
    workdir = re.search(r"--workdir=(\S+)", command)[1]
    process = start(f"{command} --config.train.num_epochs=3000", environment, tmp_path)
    checkpoints = tmp_path / workdir / "checkpoints"
    while not list(checkpoints.glob("[0-9]*5")):
        assert process.poll() is None
        time.sleep(0.2)
    began, tasks = time.monotonic(), sorted(find_tasks(workdir))
    os.kill(tasks[-1], received)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert time.monotonic() - began < 60, output
    assert not list(find_tasks(workdir)), output

    steps = max(int(path.name) for path in checkpoints.glob("[0-9]*[05]"))
    file = tmp_path / workdir / "config.json"
    record = json.loads(file.read_text())
    record["train"]["num_epochs"] = steps // 25 + 1
    file.write_text(json.dumps(record))
    result = seqmnist(f"--workdir={tmp_path / workdir}")
    assert result.returncode == 0, result.stderr
    assert f"Resuming in epoch {steps // 25 + 1}, after 0" in result.stdout
