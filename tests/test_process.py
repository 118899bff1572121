"""Settings of a whole process, in a process of their own."""

import pytest
from conftest import seqmnist

from seqmnist import process


@pytest.mark.parametrize("description", [None, "A word or two.\n\nExample:\n  a command"])
def test_help_fits_a_terminal_of_any_width(description, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2")
    assert "usage" in process.Parser(prog="x", description=description).format_help()


@pytest.mark.slow
def test_a_cache_of_an_earlier_version_does_not_disturb_the_new_one(
    tmp_path, data_dir, monkeypatch
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    old = tmp_path / "seqmnist" / "jit_train-0123-cache"  # without the time that a limit needs
    old.parent.mkdir()
    old.write_bytes(b"a program")
    result = seqmnist(
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=mnist_5k",
        f"--config.data.data_dir={data_dir}",
        "--config.train.num_epochs=1",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list((tmp_path / "seqmnist" / "programs").glob("*-cache"))) > 3
    assert old.read_bytes() == b"a program"
