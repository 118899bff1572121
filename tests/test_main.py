"""The command line, as a user's shell sees it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, seqmnist

import seqmnist as package
from seqmnist import config as config_lib
from seqmnist import main, run
from seqmnist.workdir import Workdir

KEYS = ["epoch", "step", "train/loss", "train/accuracy"]
KEYS += ["validation/loss", "validation/accuracy"]
KEYS += ["train/gradient_norm", "train/update_norm", "parameter_norm", "seconds"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A workdir trained on the 5,000 digits for two epochs, and what was printed."""
    workdir = tmp_path_factory.mktemp("runs") / "a näme with spaces"
    result = seqmnist(
        f"--workdir={workdir}",
        "--config=experiments/mnist_5k.py",
        f"--config.data.data_dir={data_dir}",
        "--config.train.num_epochs=2",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return workdir, result.stdout


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_writes_what_it_promises(trained):
    workdir, _ = trained
    config, results = read(workdir / "config.json"), read(workdir / "results.json")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = {"batch_size": 128, "num_epochs": 2, "accumulate": 1, "truncate": 0, "augment": "none"}
    assert config["train"] | kept == config["train"]
    assert [list(line) for line in lines] == [KEYS, KEYS]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 25), (2, 50)]
    dataset = {key: results["dataset"][key] for key in ("name", "train", "validation", "test")}
    assert dataset == {"name": "mnist_5k", "train": 3200, "validation": 800, "test": 1000}
    assert (results["parameters"], results["epochs"], results["steps"]) == (6602, 2, 50)
    assert results["validation"]["loss"] == lines[-1]["validation/loss"]
    assert results["versions"]["jax"]
    assert set(results["programs"]) == {"train", "evaluate"}
    assert all(cost["compile_seconds"] > 0 for cost in results["programs"].values())
    assert results["programs"]["train"]["hlo_flops"] > 0
    assert 0 < results["seconds"]["train"] < results["seconds"]["total"]
    assert (workdir / "checkpoints" / "50").is_dir()
    assert 0.3 < results["test"]["accuracy"] < 1


@pytest.mark.slow
def test_each_of_two_cores_takes_half_a_batch(trained):
    from seqmnist import process

    names = [f"cpu:{i}" for i in range(min(2, process.num_cores()))]
    assert read(trained[0] / "results.json")["devices"] == names


def test_a_run_shows_its_progress_in_plain_lines(trained):
    workdir, stdout = trained
    results = read(workdir / "results.json")
    assert "3,200 train, 800 validation, 1,000 test" in stdout
    assert "Device: cpu:0" in stdout
    assert "6,602" in stdout
    assert "\nEpoch 1/2 - 25/25 - " in stdout
    assert " - val_accuracy: " in stdout
    assert f"test_accuracy: {results['test']['accuracy']:.4f}" in stdout.splitlines()[-1]
    assert "\x1b" not in stdout
    assert "\r" not in stdout


@pytest.mark.slow
def test_evaluate_gives_the_same_score(trained):
    workdir, stdout = trained
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    result = seqmnist(f"--workdir={workdir}", "--mode=evaluate")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == stdout.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


@pytest.fixture
def without_network(monkeypatch):
    """The proxy is a closed port: no machine reaches the public addresses through it."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.slow
def test_auto_falls_back_loudly(without_network, data_dir, tmp_path, capsys):
    result = seqmnist(
        f"--workdir={tmp_path}",
        f"--config.data.data_dir={data_dir}",
        "--config.train.num_epochs=1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NOTICE: ") == 2  # before training, and beside the score
    dataset = read(tmp_path / "results.json")["dataset"]
    assert (dataset["name"], dataset["requested"]) == ("mnist_5k", "auto")
    assert "manual_dir" in dataset["notice"]
    run.evaluate(Workdir(tmp_path).read_config(), tmp_path)
    assert "NOTICE: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_dataset_that_cannot_be_had_is_refused(without_network, data_dir, tmp_path):
    result = seqmnist(
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=mnist",
        f"--config.data.data_dir={data_dir}",
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*mnist.*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


HEAVY = {"tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "pandas", "scipy"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["-m", "seqmnist.main", "--help"], HEAVY | {"jax", "flax", "numpy", "rich"}),
        (["-m", "seqmnist.main", "--wrokdir=x"], HEAVY | {"jax", "flax", "numpy", "rich"}),
        (["-c", "import seqmnist"], HEAVY | {"jax", "flax", "numpy", "rich"}),
        (["-c", "import seqmnist.run"], HEAVY),
    ],
)
def test_nothing_heavy_is_imported(arguments, heavy):
    result = run_python("-X", "importtime", *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "seqmnist" in names
    assert not names & heavy


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_package_answers_as_its_main_module_does(flag):
    first, second = (run_python("-m", name, flag) for name in ("seqmnist", "seqmnist.main"))
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert first.stderr == second.stderr == ""
    assert "python -m seqmnist.main --workdir=" in first.stdout


def test_the_version_is_printed():
    result = run_python("-m", "seqmnist", "--version")
    assert (result.returncode, result.stdout) == (0, f"{package.__version__}\n")


@pytest.mark.parametrize("name", config_lib.fields())
def test_the_help_lists_a_field_with_its_default_and_meaning(name):
    text, field = " ".join(main.make_parser().format_help().split()), config_lib.fields()[name]
    own = text.rpartition(f"--config.{name} ")[2].partition("--config.")[0]
    default = "none" if field.default is None else field.default
    assert f"default: {default})" in own
    assert " ".join(field.metadata["meaning"].split()) in own


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.model.reverse", True),
        ("--config.model.reverse=false", False),
        ("--config.model.reverse=1", True),
        ("--config.optimizer.clip_norm=none", None),
        ("--config.optimizer.clip_norm=1", 1.0),
        ("--config.data.manual_dir=None", None),
        ("--config.profile.steps=1:2", "1:2"),
    ],
)
def test_flags_become_values(flag, expected):
    flags = vars(main.make_parser().parse_args([flag]))
    assert flags[flag.removeprefix("--").partition("=")[0]] == expected


@pytest.mark.slow
def test_the_notebook_on_full_mnist(full_mnist, tmp_path):
    result = seqmnist(
        f"--workdir={tmp_path / 'run'}",
        "--config=experiments/notebook.py",
        f"--config.data.data_dir={full_mnist}",
    )
    assert result.returncode == 0, result.stderr
    results = read(tmp_path / "run" / "results.json")
    counts = [results["dataset"][name] for name in ("train", "validation", "test")]
    assert counts == [48000, 12000, 10000]
    assert (results["parameters"], results["steps"]) == (6602, 1875)
    assert results["test"]["accuracy"] > 0.87
    accuracy = [
        json.loads(line)["train/accuracy"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert np.all(np.diff(accuracy) > 0)
