"""The benchmark's arithmetic and its one-line errors; its timings are for a quiet machine."""

import json
import sys

import numpy as np
import pytest

from tools import benchmark, cli


def test_ratios_are_ours_over_theirs():
    ours, keras = {"seconds": 1.0, "peak_mib": 300.0}, {"seconds": 4.0, "peak_mib": 600.0}
    figures = {
        "job": {"ours, cold": ours, "ours, warm": ours, "keras, cold": keras},
        "epoch": {"gru rows": {"ours": ours, "keras": keras}},
    }
    names = {"job cold / keras, cold", "job warm / keras, cold", "epoch gru rows / keras"}
    assert benchmark.ratios(figures) == {name: {"seconds": 0.25, "peak_mib": 0.5} for name in names}


def test_a_worker_answers_and_reports_its_memory(digits, tmp_path):
    file = tmp_path / "images.npz"
    images, labels = digits
    test = {"test_images": images, "test_labels": labels}
    np.savez(file, train_images=images, train_labels=labels, **test)
    case = {**benchmark.NOTEBOOK, "batch_size": 8, "hidden_size": 4}
    figures = benchmark.time_in_turns(["ours"], case, ["train", 2], file, repeats=1)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["ours"]["seconds"] > 0
    assert figures["ours"]["peak_mib"] > 50


def test_an_unknown_section_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--sections=epochs"])
    with pytest.raises(SystemExit) as caught:
        cli.run(benchmark._make_parser(), benchmark._main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert (
        error
        == "error: --sections: 'epochs' is none of job, epoch, stream, evaluate, growth, floor\n"
    )
