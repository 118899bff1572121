"""README's shell commands, as written and in order, in a copy of the repository, as a newcomer."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands():
    """Every command in a block of `sh`; what follows the installation, which CI runs itself.

    A study takes a minute; test_study.py runs a smaller one. The extra tpu may not be there.
    """
    left_out = ["pytest", "tools.study"]
    if importlib.util.find_spec("libtpu") is None:
        left_out.append("tools.compile_for")
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.rpartition("&& ")[2] if line.startswith("pip install") else line
            if not any(name in command for name in left_out):
                yield command


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the files that the repository holds, and a home folder without anything."""
    folder = tmp_path_factory.mktemp("clone") / "seqmnist"
    names = ["README.md", "pyproject.toml", "seqmnist", "tools", "experiments"]
    for name in names:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


def run(command, folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_NUMPY", "XLA"))}
    environment |= {
        "HOME": str(folder.parent / "home"),
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    result = subprocess.run(
        ["bash", "-ec", f"exec {command}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not result.returncode, f"{command}\n{result.stdout}"
    assert "Traceback" not in result.stdout
    return result.stdout


FIRST, *REST = commands()
END = next(i for i, command in enumerate(REST) if "members" in command)


def test_there_are_commands():
    assert len(REST) > 15
    assert "--workdir=runs/first" in FIRST


@pytest.mark.slow
def test_the_first_run(copy):
    assert "test_accuracy" in run(FIRST, copy)
    assert (copy / "runs" / "first" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", [REST[:END], REST[END:]], ids=["one run", "many runs"])
def test_the_other_commands(part, copy):
    for command in part:
        output = run(command, copy)
        if "--float64" in command:  # training equals Keras's
            figures = dict(line.split()[:2] for line in output.splitlines() if "_" in line)
            assert float(figures["first_gradients"]) <= 1e-14
            assert float(figures["loss_all_steps"]) <= 1e-12
            assert float(figures["parameters_relative"]) <= 1e-12
