"""Scores from many seeds: ours are those of a run, and two samples are compared."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from seqmnist import interface, run
from seqmnist.config import Config
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from tools import cli, keras_parity, seed_distribution


@pytest.mark.slow
def test_seeds_score_as_their_runs_do(data_dir, tmp_path, monkeypatch, capsys):
    parser = seed_distribution._make_parser()
    command = ["--seeds=2", "--keras_seeds=0", "--data_name=mnist_5k", f"--data_dir={data_dir}"]
    command += [f"--json={tmp_path / 'scores.json'}", f"--figure={tmp_path / 'scores.png'}"]
    monkeypatch.setattr(sys, "argv", ["seed_distribution", *command])
    assert cli.call(parser, seed_distribution._main) == 0
    assert "test accuracy ours    2 seeds: 0." in capsys.readouterr().out
    Image.open(tmp_path / "scores.png").load()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["dataset"] == "mnist_5k"
    assert list(written["scores"]) == ["ours"]
    config = Config(seed=1)
    config.data.name, config.data.data_dir = "mnist_5k", str(data_dir)
    alone = run.train(config, tmp_path / "alone")["test"]
    for name, values in written["scores"]["ours"].items():
        assert values[1] == pytest.approx(alone[name], abs=2e-3)
        assert values[0] != values[1]


def test_without_keras_nothing_is_trained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "keras", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["seed_distribution", "--seeds=2"])
    assert cli.call(seed_distribution._make_parser(), seed_distribution._main) == 2
    output = capsys.readouterr()
    assert output.err == "error: Keras is not installed; pip install 'keras>=3.9'\n"
    assert not output.out


@pytest.mark.parametrize("tool", [keras_parity, seed_distribution])
def test_images_that_the_notebook_does_not_read_are_refused(tool, monkeypatch):
    digits = types.SimpleNamespace(name="digits", spec=ImageSpec(8, 8, 1, MNIST.class_names))
    monkeypatch.setattr(interface, "load_data", lambda *_, **__: digits)
    with pytest.raises(UserError, match="digits does not have the size"):
        tool._main(tool._make_parser().parse_args([]))


def test_the_summary_of_two_samples():
    samples = {"ours": [0.1, 0.2, 0.3, 0.4], "keras": [0.15, 0.25, 0.35]}
    same = seed_distribution.summarize(samples, notebook=0.3)
    assert same["ours"]["mean"] == pytest.approx(0.25)
    assert same["ours"]["notebook_percentile"] == pytest.approx(62.5)
    assert same["p_value"] > 0.5
    samples = {"ours": [0.1] * 9 + [0.2], "keras": [0.8] * 9 + [0.9]}
    assert seed_distribution.summarize(samples, notebook=0.3)["p_value"] < 0.01


def test_the_summary_of_one_seed():
    summary = seed_distribution.summarize({"ours": [0.9]}, notebook=0.3)
    assert summary["ours"]["max"] == 0.9
    assert np.isnan(summary["ours"]["sd"])
    assert "p_value" not in summary
