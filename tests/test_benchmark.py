"""The benchmark's arithmetic, its contestants and its errors; its timings need a quiet machine."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

from tools import benchmark, cli


def make_setup(tmp_path, digits, folders):
    file = tmp_path / "images.npz"
    images, labels = digits
    test = {"test_images": images, "test_labels": labels}
    np.savez(file, train_images=images, train_labels=labels, **test)
    case = {**benchmark.NOTEBOOK, "batch_size": 8, "hidden_size": 4}
    data = ["--config.data.name=mnist_5k"]
    return benchmark.Setup(file, data, folders, {"simple_rnn rows": (case, 2)}, rounds=1)


def make_checkout(folder):
    """A checkout whose programs all take 7 seconds and 9 MiB, as they say."""
    for package, module, code in (
        ("tools", "peers", 'for _ in sys.stdin: print(\'{"seconds": 7, "peak_mib": 9}\')'),
        ("seqmnist", "main", "open(sys.argv[-1].partition('=')[2], 'w').write(sys.argv[1])"),
    ):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        code = f"import functools, sys\nprint = functools.partial(print, flush=True)\n{code}\n"
        (folder / package / f"{module}.py").write_text(code)
    return folder


def test_ratios_are_ours_over_theirs():
    ours, keras = {"seconds": 1.0, "peak_mib": 300.0}, {"seconds": 4.0, "peak_mib": 600.0}
    figures = {
        "job": {"cold": {"ours": ours, "keras": keras}, "warm": {"ours": ours, "baseline": ours}},
        "epoch": {"gru rows": {"ours": ours, "keras": keras}},
        "growth": {"T": {28: 1.0}},
    }
    better = {"seconds": 0.25, "peak_mib": 0.5}
    assert benchmark.ratios(figures) == {
        "job cold / keras": better,
        "job warm / baseline": {"seconds": 1.0, "peak_mib": 1.0},
        "epoch gru rows / keras": better,
    }


@pytest.mark.slow
def test_a_peer_and_a_baseline_take_turns(tmp_path, digits):
    folders = {"flax": REPOSITORY, "baseline": make_checkout(tmp_path / "earlier")}
    setup = make_setup(tmp_path, digits, folders)
    figures = benchmark.epoch(setup)["simple_rnn rows"]
    assert json.loads(json.dumps(figures)) == figures
    assert figures["flax"]["seconds"] > 0
    assert figures["flax"]["peak_mib"] > 50
    assert figures["baseline"] == {"seconds": 7, "peak_mib": 9}


@pytest.mark.slow
def test_flax_learns_as_well(tmp_path, digits):
    case = {**benchmark.NOTEBOOK, "batch_size": 16}
    with benchmark.worker(make_setup(tmp_path, digits, {}), "flax", case) as ask:
        first = ask("evaluate")["answer"]
        for _ in range(10):
            ask("train", 8)
        last = ask("evaluate")["answer"]
    assert first < 0.5 < 0.9 < last


def test_a_baseline_does_its_own_job(tmp_path, digits):
    folders = {"baseline": make_checkout(tmp_path / "earlier")}
    figures = benchmark.job(make_setup(tmp_path, digits, folders))
    assert {state: list(times) for state, times in figures.items()} == {
        "cold": ["baseline"],
        "warm": ["baseline"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections=epochs"], "--sections: no section 'epochs'; choose from job, epoch, "),
        (
            ["--cases=gru columns"],
            "--cases: no case has 'gru columns'; choose from simple_rnn rows",
        ),
        (["--baseline={}"], "--baseline={} is not a checkout of this project"),
        (["--figure={}/no/figure.png"], "--figure={}/no/figure.png: there is no folder {}/no"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    arguments = [argument.format(tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    assert cli.call(benchmark._make_parser(), benchmark._main) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(tmp_path, tmp_path)}")
    assert error.count("\n") == 1


def test_help_needs_no_module_of_unix():
    code = "import runpy, sys; sys.modules['resource'] = None; sys.argv[1:] = ['--help']; "
    code += "runpy.run_module('tools.benchmark', run_name='__main__')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--baseline CHECKOUT" in result.stdout
