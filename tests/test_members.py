"""Members: settings and seeds, and what is told of them."""

import json

import jax
import numpy as np
import pytest
from close import assert_close
from scipy import stats

from seqmnist import config as config_lib
from seqmnist import run
from seqmnist.config import Config, MembersConfig, OptimizerConfig
from seqmnist.errors import UserError
from seqmnist.study import trained
from seqmnist.training import members
from seqmnist.training.task import compose
from seqmnist.workdir import Workdir


def config_of(num=1, sweep="{}", seed=0):
    sweep = sweep if isinstance(sweep, str) else json.dumps(sweep)
    return Config(seed=seed, members=MembersConfig(num, sweep), optimizer=OptimizerConfig("sgd"))


def test_a_grid_times_seeds():
    config = config_of(2, {"optimizer.learning_rate": [0.1, 1], "optimizer.momentum": [0]}, 5)
    rates, momentum = ("optimizer.learning_rate", "optimizer.momentum")
    assert members.list_members(config) == [
        {"seed": seed, rates: rate, momentum: 0.0} for rate in (0.1, 1.0) for seed in (5, 6)
    ]
    assert members.list_members(config_of()) == [{"seed": 0}]


def test_a_list_of_settings():
    sweep = [{"optimizer.learning_rate": rate, "optimizer.clip_norm": 1} for rate in (1, 2)]
    found = members.list_members(config_of(1, sweep))
    assert [member["optimizer.learning_rate"] for member in found] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{", "is not JSON"),
        ("3", "neither a grid nor a list"),
        ("[]", "neither a grid nor a list"),
        ({"optimizer.learning_rate": 0.1}, "needs a list of values"),
        ({"optimizer.learning_rate": []}, "needs a list of values"),
        ({"optimizer.learning_rate": [0]}, "learning_rate must lie in .* got 0"),
        (
            {"optimizer.learning_rate": [True]},
            "has True for optimizer.learning_rate, which must be a number",
        ),
        ({"optimizer.momentum": [1.0]}, "momentum must lie in .* got 1.0"),
        ({"model.hidden_size": [1]}, "model.hidden_size"),
        ({"optimizer.learning_rate": [1e-60]}, "must lie in .* got 1e-60"),
        ({"optimizer.learning_rate": [1e39]}, r"must lie in .* got 1e\+39"),
        ({"optimizer.learning_rate": [10**400]}, "must lie in .* a number of 1329 bits"),
        ({"optimizer.weight_decay": [0.1]}, "weight_decay does nothing with optimizer.name=sgd"),
        ({"optimizer.learning_rate": [1.0] * 5000}, "more than 4096 settings"),
        ('{"optimizer.momentum": [0], "optimizer.momentum": [0.1]}', "optimizer.momentum twice"),
        ('[{"optimizer.momentum": 0, "optimizer.momentum": 0.1}]', "optimizer.momentum twice"),
        ({"optimizer.momentum": [0, 0.0]}, "a setting twice"),
        ({"optimizer.learning_rate": [0.001, 0.0010000000001]}, "a setting twice"),
        ([{"optimizer.momentum": 0.1}, {"optimizer.momentum": 0.1}], "a setting twice"),
        ({"train.num_epochs": [1]}, "train.num_epochs, which cannot be swept"),
        ("[" * 100_000, "is not JSON"),
        ([{"optimizer.momentum": 0}, {}], "names other fields"),
    ],
)
def test_what_is_not_a_sweep_is_refused(sweep, message):
    with pytest.raises(UserError, match=message) as caught:
        members.settings(config_of(1, sweep))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_seeds_do_not_wrap_around():
    with pytest.raises(UserError, match="beyond 4294967295"):
        members.list_members(config_of(2, seed=2**32 - 1))


def test_too_many_members_are_refused():
    with pytest.raises(UserError, match="more than 4096 members"):
        members.list_members(
            config_of(3, {"optimizer.learning_rate": [1 + i / 2000 for i in range(2000)]})
        )


def test_the_best_setting_is_that_of_validation():
    config = config_of(3, {"optimizer.learning_rate": [1, 2]})
    accuracy = [0.7, 0.8, 0.9, 0.91, 0.92, 0.93]
    fine = np.zeros(6, bool)
    assert members.best_setting(config, np.array(accuracy[::-1]), fine) == 1
    assert members.best_setting(config, np.array(accuracy), fine) == 0
    assert members.best_setting(config, None, fine) is None
    test = {"loss": accuracy, "accuracy": accuracy}
    settings = members.summarize(config, fine, None, test)
    assert settings[0]["validation"] is None
    spread = settings[0]["test"]["accuracy"]
    interval = stats.t.interval(0.95, 2, np.mean(accuracy[:3]), stats.sem(accuracy[:3]))
    np.testing.assert_allclose(spread["interval"], interval)
    assert spread["mean"] == pytest.approx(0.8)
    assert spread["sd"] == pytest.approx(0.1)


def test_a_member_that_diverged_counts_for_nothing():
    config = config_of(3, {"optimizer.learning_rate": [1, 2, 3]})
    nan = float("nan")
    accuracy = [0.9, 0.8, 0.7, nan, 0.8, 0.9, nan, nan, nan]
    losses = np.array([0.9, 0.8, 0.7, nan, 0.2, 0.1, nan, nan, nan])  # the second would be the best
    scores = {"loss": losses.tolist(), "accuracy": accuracy}
    settings = members.summarize(config, np.isnan(losses), scores, scores)
    assert [setting["diverged"] for setting in settings] == [0, 1, 3]
    assert members.best_setting(config, losses, np.isnan(losses)) == 0
    one, none = (settings[i]["test"]["accuracy"] for i in (1, 2))
    assert one["mean"] == pytest.approx(0.85)
    assert one["sd"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert np.isfinite(one["interval"]).all()
    assert none == {"mean": None, "sd": None, "interval": None}


# At this rate a few steps are finite, then the loss overflows.
DIVERGES = 1e35
RATES = [0.001, 0.01, DIVERGES]


@pytest.fixture(scope="module")
def make_config(data_dir):
    def make(num_epochs, seed=0, rate=0.001, rates=None, num=1):
        sweep = json.dumps({"optimizer.learning_rate": rates} if rates else {})
        return config_lib.from_dict(
            {
                "seed": seed,
                "data": {"name": "mnist_5k", "data_dir": str(data_dir)},
                "model": {"hidden_size": 8},
                "optimizer": {"learning_rate": rate},
                "train": {"num_epochs": num_epochs},
                "members": {"num": num, "sweep": sweep},
            }
        )

    return make


@pytest.fixture(scope="module")
def together(make_config, tmp_path_factory):
    """A workdir of 3 settings × 2 seeds after two epochs and, resumed, after three.

    Members 4 and 5 diverge in the first epoch. Also returned: the parameters after two epochs.
    """
    workdir = tmp_path_factory.mktemp("members") / "run"
    run.train(make_config(2, rates=RATES, num=2), workdir)
    params = [params_of(workdir, member) for member in range(6)]
    run.train(make_config(3, rates=RATES, num=2), workdir)
    return workdir, params


def params_of(workdir, member):
    return jax.tree.map(np.asarray, trained.load(workdir, member).params)


@pytest.mark.slow
@pytest.mark.parametrize(("member", "seed", "rate"), [(3, 1, 0.01), (0, 0, 0.001)])
def test_a_member_equals_a_separate_run(member, seed, rate, together, make_config, tmp_path):
    results = Workdir(together[0]).read_results()
    assert results["members"][member] == {"seed": seed, "optimizer.learning_rate": rate}
    alone = run.train(make_config(3, seed=seed, rate=rate), tmp_path / "alone")
    assert_close(params_of(together[0], member), params_of(tmp_path / "alone", None), 1e-3)
    for split in ("validation", "test"):
        loss, accuracy = (results[split][key][member] for key in ("loss", "accuracy"))
        if split == "test" and member // 2 != results["best"]:
            assert loss is None
            continue
        assert loss == pytest.approx(alone[split]["loss"], rel=1e-4)
        assert accuracy == pytest.approx(alone[split]["accuracy"], abs=0.003)
    assert results["parameters"] == alone["parameters"]


@pytest.mark.slow
def test_a_member_that_diverges_takes_steps_and_then_stays_as_it_is(together, make_config):
    workdir, after_two = together
    task = compose(make_config(1, rates=RATES, num=2), print)
    *_, progress = task.loop.train(task.start(), task.epoch_rows(0))
    steps = np.asarray(progress.state.step)
    assert (steps[:4] == 25).all()
    assert ((steps[4:] > 1) & (steps[4:] < 25)).all()
    for member in range(6):
        same = jax.tree.map(np.array_equal, params_of(workdir, member), after_two[member])
        assert all(jax.tree.leaves(same)) if member >= 4 else not any(jax.tree.leaves(same))


@pytest.mark.slow
def test_the_scores_of_a_member_that_diverged_are_null(together):
    lines = Workdir(together[0]).read_metrics()
    results = Workdir(together[0]).read_results()
    assert len(lines) == 3
    for line in lines:
        for name in ("train/loss", "train/accuracy", "validation/loss", "validation/accuracy"):
            assert [value is None for value in line[name]] == 4 * [False] + 2 * [True]
    for values in results["validation"].values():
        assert [value is None for value in values] == 4 * [False] + 2 * [True]


def test_only_the_chosen_setting_is_scored_on_the_test_set(together):
    results = Workdir(together[0]).read_results()
    losses = np.array(results["validation"]["loss"][:4]).reshape(2, 2).mean(1)
    assert results["best"] == losses.argmin()
    for values in results["test"].values():
        seen = {i for i, value in enumerate(values) if value is not None}
        assert seen == {2 * results["best"], 2 * results["best"] + 1}


def test_a_member_that_diverged_is_in_no_summary(together):
    results = Workdir(together[0]).read_results()
    assert [setting["diverged"] for setting in results["settings"]] == [0, 0, 2]
    empty = {"mean": None, "sd": None, "interval": None}
    assert results["settings"][2]["test"] == {"loss": empty, "accuracy": empty}
    best = results["best"]
    assert results["settings"][1 - best]["test"] == {"loss": empty, "accuracy": empty}
    spread = results["settings"][best]["test"]["accuracy"]
    of_seeds = results["test"]["accuracy"][2 * best : 2 * best + 2]
    assert spread["mean"] == pytest.approx(np.mean(of_seeds))
    assert spread["sd"] == pytest.approx(np.std(of_seeds, ddof=1))
    ensemble = results["ensemble"]
    assert ensemble["members"] == [2 * best, 2 * best + 1]
    mean_loss = results["settings"][best]["test"]["loss"]["mean"]
    assert 0 < ensemble["test"]["loss"] < mean_loss * (1 + 1e-6)  # by Jensen's inequality


def test_the_same_command_shows_and_evaluates_what_diverged(together, make_config, capsys):
    config, results = make_config(3, rates=RATES, num=2), Workdir(together[0]).read_results()
    capsys.readouterr()
    assert run.train(config, together[0]) == results
    shown = capsys.readouterr().out
    assert "2 of 6 members diverged" in shown
    assert f"test_accuracy: {results['ensemble']['test']['accuracy']:.4f}" in shown
    scores, expected = run.evaluate(config, together[0]), results["test"]["accuracy"]
    np.testing.assert_array_equal(scores["accuracy"], np.array(expected, float))


@pytest.mark.slow
def test_without_validation_no_setting_is_chosen_or_scored(make_config, tmp_path, capsys):
    config = make_config(1, rates=[0.001, DIVERGES])
    config.data.validation_fraction = 0.0
    results = run.train(config, tmp_path / "run")
    assert results["best"] is None
    assert results["ensemble"] == {"members": [], "test": {"loss": None, "accuracy": None}}
    assert Workdir(tmp_path / "run").read_results()["test"] == {
        "loss": 2 * [None],
        "accuracy": 2 * [None],
    }
    assert "not scored" in capsys.readouterr().out
    with pytest.raises(UserError, match="validation has not chosen"):
        run.evaluate(config, tmp_path / "run")


@pytest.mark.slow
def test_the_test_set_is_left_alone_if_asked(make_config, tmp_path, capsys):
    for num in (1, 2):
        workdir = tmp_path / str(num)
        results = run.train(make_config(1, num=num), workdir, withhold_test=True)
        assert results == Workdir(workdir).read_results()
        scores = results["test"]
        assert scores["loss"] == (None if num == 1 else [None, None])
    sweep = make_config(1, rates=[0.001, 0.01])
    run.train(sweep, tmp_path / "sweep", withhold_test=True)
    assert capsys.readouterr().out.count("not scored: the test set was withheld\n") == 3
    with pytest.raises(UserError, match="was withheld from the sweep"):
        run.evaluate(sweep, tmp_path / "sweep")


@pytest.mark.slow
def test_a_run_ends_when_all_members_have_diverged(make_config, tmp_path):
    config = make_config(2, rates=[DIVERGES, 1e36])
    words = r"rate 1e\+35 to 1e\+36.* smaller optimizer.learning_rate in config.members.sweep or"
    with pytest.raises(UserError, match=words):
        run.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
