"""What a person sees: on a terminal of 80 columns, in a pipe, and in ASCII."""

import errno
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, seqmnist

from seqmnist.config import Config, MembersConfig, ModelConfig, OptimizerConfig
from seqmnist.display import Display, describe
from seqmnist.spec import MNIST
from seqmnist.training import members
from seqmnist.training.steps import init_state, make_system
from tools import cli

NAN = float("nan")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(loss, accuracy, val_loss, val_accuracy, epoch=1):
    return {
        "epoch": epoch,
        "train/loss": loss,
        "train/accuracy": accuracy,
        "validation/loss": val_loss,
        "validation/accuracy": val_accuracy,
        "seconds": 99.9,  # with what is no step: validation, checkpoints, the profiler
    }


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output pass for a color terminal of 80 columns."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)


def lines_of(capsys):
    """The lines that were printed, without colors; all but sentences fit into 80 columns."""
    lines = CONTROL.sub("", capsys.readouterr().out).replace("\r", "\n").splitlines()
    for line in lines:
        is_sentence = line.startswith(("Best by ", "Device: "))
        assert is_sentence or (len(line) <= 80 and "…" not in line), line
    return [line for line in lines if line.strip()]


def test_the_line_of_an_epoch_fits(terminal, capsys):
    Display().epoch_line(100, 1375, record(0.51234, 0.89, 0.45678, 0.9123, 100), 1375, 12.34)
    shown = " ".join(lines_of(capsys))
    expected = ["Epoch 100/100", "1375/1375", "12.3s 9.0ms/step", " loss: 0.5123"]
    expected += ["accuracy: 0.8900", "val_loss: 0.4568", "val_accuracy: 0.9123"]
    for words in expected:
        assert words in shown


def test_the_line_of_an_epoch_of_members_fits(terminal, capsys):
    scores = [0.1, 0.2, 0.3], [0.2, 0.4, 0.6], [1.0, 2.0, 3.0], [0.3, 0.5, 0.7]
    Display().epoch_line(100, 1375, record(*scores, 100), 1375, 12.34)
    shown = " ".join(lines_of(capsys))
    expected = ["Epoch 100/100", "1375/1375", "12.3s 9.0ms/step", " loss: 0.2000 ± 0.1000"]
    expected += ["accuracy: 0.4000 ± 0.2000", "val_loss: 2.0000 ± 1.0000"]
    expected += ["val_accuracy: 0.5000 ± 0.2000"]
    for words in expected:
        assert words in shown


def test_without_a_validation_set_there_are_no_scores_of_it(terminal, capsys):
    Display().epoch_line(1, 5, record(0.5, 0.8, None, None), 4, 12.34)
    (line,) = lines_of(capsys)
    assert line == "Epoch 1/1 - 5/5 - 12.3s 3085.0ms/step - loss: 0.5000 - accuracy: 0.8000"


@pytest.mark.parametrize("missing", [None, NAN])
def test_scores_that_are_missing_are_shown_as_nan(missing, capsys):
    def shown(*scores):
        Display().epoch_line(1, 5, record(*scores), 5, 1.0)
        return capsys.readouterr().out

    assert "loss: nan - accuracy: nan" in shown(missing, missing, missing, missing)
    assert "loss: nan - accuracy: nan" in shown(*4 * [[missing, missing]])
    assert "loss: 0.5000 - accuracy: 0.5000" in shown(*4 * [[0.5, missing]])
    several = shown(*4 * [[0.5, missing, 0.7]])
    assert "loss: 0.6000 ± 0.1414" in several
    assert "nan" not in several


def test_a_huge_loss_takes_no_more_room(capsys):
    Display().epoch_line(1, 5, record(1.6e31, 0.1, [1e30, 3e30], [0.1, 0.1]), 5, 1.0)
    shown = capsys.readouterr().out
    assert " loss: 1.6e+31 - " in shown
    assert "val_loss: 2e+30 ± 1.414e+30 - " in shown


@pytest.mark.parametrize("scores", [0.5, NAN, [0.25, 0.75], [NAN, NAN]])
def test_the_bar_fits(scores, terminal, capsys):
    with Display().epoch(100, 100, 1375) as update:
        update(700, {"loss": scores, "accuracy": scores})
    shown = "\n".join(lines_of(capsys))
    assert "Epoch 100/100" in shown
    assert "700/1375" in shown
    text = "nan" if np.isnan(scores).any() else "0.5000"
    assert f"loss: {text} accuracy: {text}" in shown


def results_of(sweep, scores):
    """Results of two settings of three seeds, with these scores of each member."""
    config = Config(
        members=MembersConfig(3, json.dumps(sweep)), optimizer=OptimizerConfig(name="sgd")
    )
    both = {"loss": scores, "accuracy": scores}
    return {
        "dataset": {"name": "mnist_5k", "test": 1000, "notice": None},
        "test": both,
        "members": members.list_members(config),
        "settings": members.summarize(config, np.isnan(scores), both, both),
        "best": members.best_setting(config, -np.array(scores), np.isnan(scores)),
        "ensemble": {"members": [0, 1, 2], "test": {"loss": 0.1234, "accuracy": 0.9876}},
    }


RATES = {"optimizer.learning_rate": [0.000123456, 0.01]}
MOMENTUM, CLIP_NORM = {"optimizer.momentum": [0.99]}, {"optimizer.clip_norm": [12345.6]}


@pytest.mark.parametrize("sweep", [RATES, RATES | MOMENTUM, RATES | MOMENTUM | CLIP_NORM])
def test_the_table_of_settings_fits(sweep, terminal, capsys):
    results = results_of(sweep, [0.11, 0.12, 0.13, 0.21, 0.23, 0.25])
    Display().results(results)
    lines = lines_of(capsys)
    *table, best, test, scores = lines
    numbers = [0.000123456, 0.01, *2 * [0.99, 12345.6][: len(sweep) - 1]]
    numbers += 2 * [0.12, 0.01, 0.23, 0.02]  # 80 columns have no room for the loss
    if len(sweep) == 1:
        numbers += [0.0952, 0.1448, 0.1803, 0.2797, 95]
    assert sorted(map(float, re.findall(r"[0-9.]{2,}", " ".join(table)))) == sorted(numbers)
    head = " ".join(table).split()
    for name in sweep:
        assert name.rpartition(".")[2] in head
    assert best.startswith("Best by validation: optimizer.learning_rate = 0.01")
    assert test.startswith("Test on mnist_5k (1,000 examples), mean prediction of 3 members")
    assert f"{test}{scores}".endswith("test_loss: 0.1234 - test_accuracy: 0.9876")


def test_the_table_of_settings_shows_what_diverged(terminal, capsys):
    Display().results(results_of(RATES, [0.1, NAN, 0.3, NAN, NAN, NAN]))
    shown = "\n".join(lines_of(capsys))
    for words in ("0.2000", "0.1414", "nan", "4 of 6 members diverged"):
        assert words in shown
    assert "Best by validation: optimizer.learning_rate = 0.000123456" in shown


def test_what_was_not_scored_is_left_blank(terminal, capsys):
    results = results_of(RATES, [0.1, 0.2, 0.3, 0.1, NAN, 0.3])
    for setting in results["settings"]:
        setting["test"] = {name: members.statistics([]) for name in ("loss", "accuracy")}
    Display().results(results)
    assert "nan" not in "\n".join(lines_of(capsys))


@pytest.mark.parametrize(("loss", "accuracy"), [(float("inf"), 0.1), ([NAN, NAN], [NAN, NAN])])
def test_an_evaluation_is_never_called_withheld(loss, accuracy, capsys):
    dataset = {"name": "mnist", "test": 10}
    Display().results({"dataset": dataset, "test": {"loss": loss, "accuracy": accuracy}})
    assert "test_loss: nan" in capsys.readouterr().out


def test_the_table_of_parameters_fits(terminal, capsys):
    model = ModelConfig(cell="min_gru", num_layers=2, bidirectional=True, block="residual")
    config = Config(model=model)
    system = make_system(config)
    task = types.SimpleNamespace(
        dataset=types.SimpleNamespace(
            name="mnist", notice="look [here]", directory="/data", spec=MNIST
        ),
        splits={"train": range(48000), "test": range(10000)},
        mesh=jax.make_mesh((1, 1), ("member", "data"), devices=jax.devices()[:1]),
        config=config,
        members=[{"seed": 0}],
    )
    params = jax.eval_shape(lambda: init_state(config, system, 0).params)
    Display().setup(task, params)
    shown = lines_of(capsys)
    assert "NOTICE: look [here]" in shown
    assert "Data: mnist: 48,000 train, 10,000 test examples, from /data" in shown
    assert "Images: 28 × 28, in 10 classes" in shown
    counts = [leaf.size for leaf in jax.tree.leaves(params)]
    cells = " ".join(shown).split()
    for count in (*counts, sum(counts)):
        assert f"{count:,}" in cells


def test_a_network_in_one_line():
    assert describe(ModelConfig()) == "rows → 1 × simple_rnn(64) → last → logits"
    model = ModelConfig(
        view="pixels", subsample=3, reverse=True, bidirectional=True, block="residual"
    )
    steps = "pixels, reversed, 1 of 3 time steps"
    lru = ModelConfig(cell="lru", cell_options={"r_min": 0.5})
    assert describe(lru) == "rows → 1 × lru(64, r_min=0.5) → last → logits"
    assert describe(model) == f"{steps} → 1 × bidirectional residual simple_rnn(64) → last → logits"


def test_a_pipe_gets_plain_lines(capsys):
    display = Display()
    with display.epoch(1, 5, 375) as update:
        update(100, {"loss": 0.5, "accuracy": 0.5})
    display.epoch_line(5, 375, record(0.5, 0.8, 0.4, 0.9), 375, 1.0)
    display.say("[bold] is no markup")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("accuracy: 0.8000 - val_loss: 0.4000 - val_accuracy: 0.9000")
    assert second == "[bold] is no markup"


def test_a_full_disk_is_an_error_after_the_results(monkeypatch):
    results = {"dataset": {"name": "mnist", "test": 9}, "test": {"loss": 0.5, "accuracy": 0.5}}
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        display = Display()
        display.say("The run goes on")
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            display.results(results)


def run_python(code, **keywords):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **keywords,
    )


@pytest.mark.slow
def test_output_in_ascii_says_the_same():
    code = (
        "from seqmnist import process; process.prepare_output(); "
        "from seqmnist.display import Display; Display().say('rows → 1 × 2 ± 3… é')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_python(code, env=environment, stdout=subprocess.PIPE)
    assert (result.stdout, result.stderr) == ("rows -> 1 x 2 +/- 3... ?\n", "")


@pytest.mark.slow
def test_the_help_in_ascii():
    result = seqmnist("--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "--config.train.num_epochs" in result.stdout
    assert result.stdout.isascii()


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(closed_pipe):
    code = (
        "from seqmnist import process; process.prepare_output(); "
        "from seqmnist.display import Display; display = Display(); "
        "display.say('one'); display.say('two'); process.leave(0)"
    )
    result = run_python(code, stdout=closed_pipe)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads(closed_pipe, data_dir, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "seqmnist", f"--workdir={tmp_path / 'run'}"),
            *("--config.data.name=mnist_5k", f"--config.data.data_dir={data_dir}"),
            *("--config.model.hidden_size=8", "--config.train.num_epochs=1"),
            '--config.members.sweep={"optimizer.learning_rate": [0.001, 1e35]}',
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stdout=closed_pipe,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("columns", [60, 120])
def test_tables_are_as_wide_as_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    cli.print_table(("network", "test"), [["long name " * 20, "0.9"]])
    assert max(map(len, capsys.readouterr().out.splitlines())) == columns
