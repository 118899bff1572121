"""The command line, as a user's shell sees it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import MNIST, REPOSITORY, seqmnist

KEYS = ["epoch", "step", "train/loss", "train/accuracy"]
KEYS += ["validation/loss", "validation/accuracy", "seconds"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A workdir trained on the 5,000 digits for two epochs, and what was printed."""
    workdir = tmp_path_factory.mktemp("runs") / "a näme with spaces"
    config = "--config=experiments/mnist_5k.py"
    result = seqmnist(
        f"--workdir={workdir}",
        config,
        f"--config.data.data_dir={data_dir}",
        "--config.train.num_epochs=2",
    )
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def test_a_run_writes_what_it_promises(trained):
    workdir, _ = trained
    config = json.loads((workdir / "config.json").read_text())
    results = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert config["train"] == {"batch_size": 128, "num_epochs": 2, "augment": "none"}
    assert [list(line) for line in lines] == [KEYS, KEYS]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 25), (2, 50)]
    dataset = {key: results["dataset"][key] for key in ("name", "train", "validation", "test")}
    assert dataset == {"name": "mnist_5k", "train": 3200, "validation": 800, "test": 1000}
    assert (results["parameters"], results["epochs"], results["steps"]) == (6602, 2, 50)
    assert results["validation"]["loss"] == lines[-1]["validation/loss"]
    assert results["devices"] == ["cpu:0", "cpu:1"]  # half a batch each
    assert results["versions"]["jax"]
    assert set(results["programs"]) == {"train", "evaluate", "total"}
    assert all(cost["compile_seconds"] > 0 for cost in results["programs"].values())
    assert results["programs"]["train"]["hlo_flops"] > 0
    assert 0 < results["seconds"]["train"] < results["seconds"]["total"]
    assert (workdir / "checkpoints").is_dir()
    assert 0.3 < results["test"]["accuracy"] < 1


def test_a_run_tells_its_story_in_plain_lines(trained):
    workdir, stdout = trained
    results = json.loads((workdir / "results.json").read_text())
    assert "3,200 train, 800 validation, 1,000 test" in stdout
    assert "Device: cpu:0" in stdout
    assert "6,602" in stdout
    assert "\nEpoch 1/2 - 25/25 - " in stdout
    assert " - val_accuracy: " in stdout
    assert f"test_accuracy: {results['test']['accuracy']:.4f}" in stdout.splitlines()[-1]
    assert "\x1b" not in stdout
    assert "\r" not in stdout


def test_evaluate_gives_the_same_score(trained):
    workdir, stdout = trained
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = seqmnist(f"--workdir={workdir}", "--mode=evaluate")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == stdout.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_the_same_seed_gives_the_same_numbers(trained, data_dir, tmp_path):
    workdir, _ = trained
    again = tmp_path / "again"
    result = seqmnist(
        f"--workdir={again}",
        "--config=experiments/mnist_5k.py",
        f"--config.data.data_dir={data_dir}",
        "--config.train.num_epochs=2",
        "--config.data.input_mode=stream",
    )
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((w / "results.json").read_text()) for w in (workdir, again))
    assert first["test"] == second["test"]
    assert first["validation"] == second["validation"]


def test_auto_falls_back_loudly(data_dir, tmp_path, trained):
    # The proxy is a closed port: no machine reaches the public addresses through it.
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in proxy.items():
            patch.setenv(name, value)
        result = seqmnist(
            f"--workdir={tmp_path}",
            f"--config.data.data_dir={data_dir}",
            "--config.train.num_epochs=1",
        )
        insisting = seqmnist(
            f"--workdir={tmp_path / 'mnist'}",
            "--config.data.name=mnist",
            f"--config.data.data_dir={data_dir}",
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NOTICE: ") == 2  # before training, and beside the score
    dataset = json.loads((tmp_path / "results.json").read_text())["dataset"]
    assert (dataset["name"], dataset["requested"]) == ("mnist_5k", "auto")
    assert "manual_dir" in dataset["notice"]
    evaluated = seqmnist(f"--workdir={tmp_path}", "--mode=evaluate")
    assert "NOTICE: " in evaluated.stdout
    assert insisting.returncode == 2
    assert re.fullmatch(r"error: .*mnist.*\n", insisting.stderr)
    assert not (tmp_path / "mnist").exists()


def imported(code):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *code], capture_output=True, text=True, cwd=REPOSITORY
    )
    return {
        line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()
    }


def test_help_imports_nothing_heavy():
    names = imported(["-m", "seqmnist.main", "--helpfull"])
    assert "seqmnist" in names
    assert not names & {"tensorflow", "tensorflow_datasets", "jax", "orbax", "matplotlib", "pandas"}


def test_the_package_imports_nothing_heavy():
    names = imported(["-c", "import seqmnist"])
    assert "seqmnist" in names
    assert not names & {"tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "pandas"}


@pytest.mark.skipif(not MNIST.is_dir(), reason="the full MNIST archives are not on this machine")
def test_the_notebook_on_full_mnist(tmp_path):
    result = seqmnist(
        f"--workdir={tmp_path / 'run'}",
        "--config=experiments/notebook.py",
        f"--config.data.manual_dir={MNIST}",
        f"--config.data.data_dir={tmp_path / 'data'}",
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    counts = [results["dataset"][name] for name in ("train", "validation", "test")]
    assert counts == [48000, 12000, 10000]
    assert (results["parameters"], results["steps"]) == (6602, 1875)
    assert results["test"]["accuracy"] > 0.87
    accuracy = [
        json.loads(line)["train/accuracy"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert np.all(np.diff(accuracy) > 0)
