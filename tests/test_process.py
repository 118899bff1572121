"""Settings of a whole process, in a process of their own."""

import os
import subprocess
import sys
import textwrap

import pytest
from conftest import REPOSITORY, seqmnist

from seqmnist import process


@pytest.mark.parametrize("description", [None, "A word or two.\n\nExample:\n  a command"])
def test_help_fits_a_terminal_of_any_width(description, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2")
    assert "usage" in process.Parser(prog="x", description=description).format_help()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "expected"),
    [("", 2), ("mesh.data=4", 4), ("mesh.member=3 members.num=3", 3), ("mesh.data=9", 6)],
)
def test_cores_become_as_many_devices_as_are_asked_for(fields, expected):
    code = """
        import sys
        from seqmnist import config, process
        fields = dict(each.split("=") for each in sys.argv[1:])
        fields = {name: int(value) for name, value in fields.items()}
        process.num_cores = lambda: 6
        process.set_up_jax(config.override(config.Config(), fields))
        import jax
        print(len(jax.devices()))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), *fields.split()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == f"{expected}\n", result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_platform_without_devices_is_refused(platform, tmp_path):
    result = seqmnist("--workdir=a", cwd=tmp_path, JAX_PLATFORMS=platform, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: JAX finds no device of JAX_PLATFORMS={platform}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cache_of_an_earlier_version_does_not_disturb_the_new_one(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = tmp_path / "seqmnist" / "jit_train-0123-cache"  # without the time that a limit needs
    old.parent.mkdir()
    old.write_bytes(b"a program")
    code = "from seqmnist import config, process; process.set_up_jax(config.Config()); "
    code += "import jax; jax.jit(lambda x: x + 1)(1.0)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert list((tmp_path / "seqmnist" / "programs").glob("*-cache"))
    assert old.read_bytes() == b"a program"
