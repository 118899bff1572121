"""Members: settings and seeds, and what is told of them."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from seqmnist import config as config_lib
from seqmnist import run
from seqmnist.config import Config, MembersConfig
from seqmnist.errors import UserError
from seqmnist.training import members


def config_of(num=1, sweep=None, seed=0):
    sweep = "{}" if sweep is None else sweep if isinstance(sweep, str) else json.dumps(sweep)
    return dataclasses.replace(Config(), seed=seed, members=MembersConfig(num, sweep))


def test_a_grid_times_seeds():
    config = config_of(2, {"optimizer.learning_rate": [0.1, 1], "optimizer.momentum": [0]}, 5)
    rates, momentum = ("optimizer.learning_rate", "optimizer.momentum")
    assert members.plan(config) == [
        {"seed": seed, rates: rate, momentum: 0.0} for rate in (0.1, 1.0) for seed in (5, 6)
    ]
    assert members.plan(config_of()) == [{"seed": 0}]


def test_a_list_of_settings():
    sweep = [{"optimizer.learning_rate": rate, "optimizer.clip_norm": 1} for rate in (1, 2)]
    assert [m["optimizer.learning_rate"] for m in members.plan(config_of(1, sweep))] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{", "is not JSON"),
        ("3", "neither a grid nor a list"),
        ("[]", "neither a grid nor a list"),
        ({"optimizer.learning_rate": 0.1}, "needs a list of values"),
        ({"optimizer.learning_rate": []}, "needs a list of values"),
        ({"optimizer.learning_rate": [0]}, "has 0, which"),
        ({"optimizer.learning_rate": [True]}, "has True, which"),
        ({"optimizer.momentum": [1.0]}, "has 1.0, which"),
        ({"model.hidden_size": [1]}, "model.hidden_size"),
        ([{"optimizer.momentum": 0}, {}], "names other fields"),
    ],
)
def test_what_is_not_a_sweep_is_refused(sweep, message):
    with pytest.raises(UserError, match=message):
        members.settings(config_of(1, sweep))


def test_seeds_do_not_wrap_around():
    with pytest.raises(UserError, match="beyond 4294967295"):
        members.plan(config_of(2, seed=2**32 - 1))


def test_the_best_setting_is_that_of_validation():
    config = config_of(3, {"optimizer.learning_rate": [1, 2]})
    accuracy = [0.7, 0.8, 0.9, 0.91, 0.92, 0.93]
    validation = {"loss": accuracy, "accuracy": accuracy}
    test = {"loss": accuracy[::-1], "accuracy": accuracy[::-1]}
    summary = members.summarize(config, validation, test)
    assert summary["best"] == 1
    spread = summary["settings"][0]["validation"]["accuracy"]
    interval = stats.t.interval(0.95, 2, np.mean(accuracy[:3]), stats.sem(accuracy[:3]))
    np.testing.assert_allclose(spread["interval"], interval)
    assert spread["mean"] == pytest.approx(0.8)
    assert members.summarize(config, None, test)["best"] is None


def test_members_of_a_run_equal_lone_runs(data_dir, tmp_path):
    common = {
        "data": {"name": "mnist_5k", "data_dir": str(data_dir)},
        "model": {"hidden_size": 8},
        "train": {"num_epochs": 2},
    }
    sweep = json.dumps({"optimizer.learning_rate": [0.001, 0.01, 3e38]})
    together = run.train(
        config_lib.from_dict({**common, "members": {"num": 2, "sweep": sweep}}), tmp_path / "all"
    )
    alone = run.train(
        config_lib.from_dict({**common, "seed": 1, "optimizer": {"learning_rate": 0.01}}),
        tmp_path / "one",
    )
    assert [m["seed"] for m in together["members"]] == [0, 1, 0, 1, 0, 1]
    for split in ("validation", "test"):
        for key in ("loss", "accuracy"):
            assert together[split][key][3] == pytest.approx(alone[split][key], abs=1e-5)
    # A setting that diverges harms no other, and is never the best.
    last = json.loads((tmp_path / "all" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/loss"][4] is None
    assert together["best"] in (0, 1)
    assert together["parameters"] == alone["parameters"]
    ensemble = together["ensemble"]
    assert ensemble["members"] == [2 * together["best"], 2 * together["best"] + 1]
    best = together["settings"][together["best"]]["test"]["loss"]["mean"]
    assert ensemble["test"]["loss"] <= best + 1e-6  # by Jensen's inequality
    config = config_lib.from_dict({**common, "members": {"num": 2, "sweep": sweep}})
    scores = run.evaluate(config, tmp_path / "all")
    assert scores["accuracy"] == together["test"]["accuracy"]
