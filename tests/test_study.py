"""Studies: what is planned, chosen and compared, and the tool from end to end."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from scipy import stats

from seqmnist import config as config_lib
from seqmnist import run
from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import compare, plan
from seqmnist.study.plan import Study
from seqmnist.training import divergence
from seqmnist.training.steps import init_state, make_system
from seqmnist.workdir import PLAN, Workdir, write_json
from tools import study as study_tool

RATES = {"optimizer.learning_rate": [0.001, 0.01, 0.1]}


def config_of(**fields):
    return config_lib.override(Config(), fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "options", "budget", "spec"),
    [
        ("simple_rnn", {}, 6602, MNIST),
        ("gru", {}, 50_000, MNIST),
        ("lru", {}, 50_000, ImageSpec(32, 32, 3, tuple("abc"))),
        ("delta_net", {"num_heads": 3}, 50_000, MNIST),
    ],
)
def test_hidden_sizes_are_the_largest_within_the_budget(cell, options, budget, spec):
    config = Config(
        model=ModelConfig(cell=cell, num_layers=2, bidirectional=True, cell_options=options)
    )

    def count(units):
        sized = config_lib.override(config, {"model.hidden_size": units})
        system = make_system(sized, spec=spec)
        params = jax.eval_shape(lambda: init_state(sized, system, 0)).params
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    units = plan.fit(config, spec, budget).model.hidden_size
    assert count(units) <= budget < count(units + options.get("num_heads", 1))


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(UserError, match="lstm with hidden_size=1 exceed the budget of 10"):
        plan.fit(Config(model=ModelConfig(cell="lstm")), MNIST, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection_seeds": range(5, 7)}, "overlap"),
        ({"seeds": range(0)}, "must be a range"),
        ({"seeds": range(0, 10, 2)}, "must be a range"),
        ({"seeds": [1, 2]}, "must be a range"),
        ({"entries": {}}, "at least one"),
        ({"entries": {"a/b": Config()}}, "name of a folder"),
        ({"entries": {"a": Config(seed=3)}}, "config.seed is set by the study"),
        ({"entries": {"a": config_of(**{"data.validation_fraction": 0.0})}}, "never by test"),
        (
            {"entries": {"a": Config(), "b": config_of(**{"data.validation_fraction": 0.1})}},
            "differ in config.data.validation_fraction",
        ),
        ({"budget": {"gru": 1000}}, "not in both: a, gru"),
        ({"budget": {"a": 1000, "gru": 1000}}, "not in both: gru"),
        *(({"budget": wrong}, "whole number above zero") for wrong in (0, -1, 1e3, "x", True)),
        ({"budget": {"a": 0}}, "whole number above zero"),
        ({"select": {"optimizer.learning_rate": []}}, "needs a list of values"),
        ({"select": {"optimizer.learning_rate": 0.1}}, "needs a list of values"),
        ({"select": {"optimiser.learning_rate": [0.1]}}, "does not exist"),
        *(({"select": {name: [1, 2]}}, "is not a choice") for name in ("seed", "members.num")),
        ({"select": {"data.size": [8]}}, "is not a choice"),
        ({"select": {"train.batch_size": [8, 9, np.int64(8)]}}, "batch_size has 8 twice"),
        ({"select": {"model.hidden_size": [8]}, "budget": 100}, "is not a choice: budget"),
    ],
)
def test_an_unfair_comparison_is_refused(change, message):
    fair = {"entries": {"a": Config()}, "seeds": range(6, 9), "select": RATES}
    Study(**fair)
    with pytest.raises(UserError, match=message):
        Study(**{**fair, **change})


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({}, {"budget": 10}, "exceed the budget of 10"),
        ({"train.num_epochs": "a"}, {}, "a: config.train.num_epochs"),
        ({"model.cell": "grru"}, {}, "model.cell='grru'"),
        ({}, {"select": {"optimizer.learning_rate": ["b"]}}, "has 'b' for optimizer"),
        ({}, {"select": {"optimizer.learning_rate": [-1.0]}}, "learning_rate must lie in"),
        ({}, {"select": {"optimizer.learning_rate": [0.1, 0.1 + 1e-12]}}, "a setting twice"),
        ({}, {"select": {"model.hidden_size": [-1]}}, "hidden_size"),
    ],
)
def test_a_study_that_cannot_run_leaves_no_trace(fields, change, message, tmp_path):
    fields = {"data.name": "digits", "data.data_dir": str(tmp_path / "data"), **fields}
    study = Study({"a": config_of(**fields)}, range(6, 9), **change)
    with pytest.raises(UserError, match=message) as caught:
        study_tool.perform(study, tmp_path / "study")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_entries_are_of_the_same_data(data_dir, tmp_path, capsys):
    digits = {"data.data_dir": str(tmp_path / "data"), "data.name": "digits"}
    first = {"data.data_dir": str(data_dir), "data.name": "mnist_5k"}
    study = Study({"a": config_of(**first), "b": config_of(**digits)}, range(6, 9))
    with pytest.raises(UserError, match="a is of mnist_5k and b of digits"):
        study_tool.perform(study, tmp_path / "study")
    with pytest.raises(UserError, match="storage libraries"):
        study_tool.perform(Study({"a*b": config_of(**digits)}, range(6, 9)), tmp_path / "study")
    assert not (tmp_path / "study").exists()
    smaller = config_of(**digits, **{"data.size": 6})
    jobs = study_tool._jobs(Study({"a": config_of(**digits), "b": smaller}, range(2)), tmp_path)
    assert [job.data.spec.height for job in jobs] == [8, 6]


def test_data_may_move_but_not_change(tmp_path):
    planned = Study({"a": config_of(**{"data.manual_dir": tmp_path})}, range(6, 9)).to_dict()
    moved = Study({"a": config_of(**{"data.manual_dir": "elsewhere"})}, range(6, 9)).to_dict()
    write_json(tmp_path / PLAN, planned | {"fingerprints": {"a": "1"}})
    study_tool._check(moved, tmp_path)
    study_tool._check(moved | {"fingerprints": {"a": "1"}}, tmp_path)
    for other in ({"fingerprints": {"a": "2"}}, {"seeds": [6, 8]}):
        with pytest.raises(UserError, match="another study, or one of other data or plugins"):
            study_tool._check(moved | other, tmp_path)
    write_json(tmp_path / PLAN, planned)  # as earlier versions did
    study_tool._check(moved | {"fingerprints": {"a": "1"}}, tmp_path)


@pytest.mark.parametrize("content", [[], None, {}, {"scores": {}}, {"scores": 3}])
def test_an_entry_that_no_study_writes_is_refused(content, tmp_path):
    job, file = types.SimpleNamespace(name="a"), tmp_path / "select" / "a" / "entry.json"
    runs = types.SimpleNamespace(_workdir=tmp_path)
    file.parent.mkdir(parents=True)
    write_json(file, content)
    with pytest.raises(UserError, match=r"entry\.json is not what a study writes; remove it"):
        study_tool._Runs.entry(runs, job)


def test_the_folder_of_a_run_is_not_that_of_a_study(tmp_path):
    Workdir(tmp_path).begin(Config(), [])
    with pytest.raises(UserError, match="holds a run"):
        study_tool.perform(Study({"a": Config()}, range(6, 9)), tmp_path)


def test_what_can_be_swept_is_one_program():
    select = {**RATES, "model.num_layers": [1, 2], "train.batch_size": [32, 64]}
    study = Study({"a": Config()}, range(9, 12), select, range(2), 6602)
    runs = plan.selection(study, "a", MNIST)
    assert [fixed for fixed, _ in runs] == [
        {"model.num_layers": layers, "train.batch_size": size}
        for layers, size in itertools.product([1, 2], [32, 64])
    ]
    for fixed, config in runs:
        assert json.loads(config.members.sweep) == RATES
        assert (config.seed, config.members.num) == (0, 2)
        assert plan.num_parameters(config, MNIST) <= 6602
        assert config.model.num_layers == fixed["model.num_layers"]
    assert plan.widest(study).members.num == 3 * 2  # the members of one selection run
    job = study_tool._Job("a", MNIST, runs, plan.final(study, "a", {}, MNIST), flops=1)
    assert job.work(runs[0][1]) == 2 * job.work(job.final) == 5 * 6
    final = plan.final(study, "a", {**runs[-1][0], "optimizer.learning_rate": 0.1}, MNIST)
    assert (final.seed, final.members.num, final.members.sweep) == (9, 3, "{}")
    assert (final.optimizer.learning_rate, final.train.batch_size) == (0.1, 64)


def tried(*losses, diverged=(0, 0, 0), test=(0, 0, 0)):
    return {
        "settings": [
            {
                "optimizer.learning_rate": rate,
                "diverged": bad,
                "validation": {"loss": {"mean": loss}},
                "test": {"loss": {"mean": hidden}},
            }
            for rate, loss, bad, hidden in zip(
                RATES["optimizer.learning_rate"], losses, diverged, test, strict=True
            )
        ]
    }


def test_validation_chooses_and_test_is_not_seen():
    study = Study({"a": Config()}, range(9, 12), {**RATES, "model.num_layers": [1, 2]})
    one, two = {"model.num_layers": 1}, {"model.num_layers": 2}

    def choose(*pairs):
        setting = plan.choose(study, "a", pairs)
        return setting["model.num_layers"], setting["optimizer.learning_rate"]

    planted = tried(0.3, 0.2, 0.4, test=(9, 9, 0.001))  # wins on test, loses on validation
    assert choose((one, planted), (two, tried(0.5, 0.5, 0.5))) == (1, 0.01)
    assert choose((one, planted), (two, tried(0.5, 0.5, 0.1))) == (2, 0.1)
    assert choose((one, tried(0.3, 0.1, 0.4, diverged=(0, 1, 0))), (two, {})) == (1, 0.001)
    assert choose((one, {}), (two, tried(None, 0.7, None, diverged=(2, 0, 2)))) == (2, 0.01)
    assert choose((one, {}), (two, tried(None, 0.7, None, diverged=(3, 2, 3)))) == (2, 0.01)
    with pytest.raises(UserError, match="a: all networks diverged in every setting"):
        choose((one, {}), (two, {}))
    assert plan.at_edges(study, {"optimizer.learning_rate": 0.1, "model.num_layers": 2}) == [
        "optimizer.learning_rate"
    ]
    assert not plan.at_edges(study, {"optimizer.learning_rate": 0.01, "model.num_layers": 1})


def test_a_grid_may_hold_none_and_numbers_of_numpy():
    grid = {"optimizer.clip_norm": [None, 1.0], "model.num_layers": np.arange(1, 4).tolist()}
    study = Study({"a": Config()}, range(9, 12), grid)
    runs = [setting for setting, _ in plan.selection(study, "a", MNIST)]
    assert [setting["optimizer.clip_norm"] for setting in runs] == [None] * 3 + [1.0] * 3
    layers = {"model.num_layers": list(np.arange(1, 4))}
    assert plan.at_edges(Study({"a": Config()}, range(9, 12), layers), {"model.num_layers": 3})


def test_a_seed_that_diverged_is_counted():
    study = Study({"a": Config()}, range(9, 12))
    scores = {"loss": [0.2, None, 0.4], "accuracy": [0.9, None, 0.7]}
    results = {"validation": scores, "test": scores, "parameters": 6602}
    results |= {"sequence": {"time_steps": 28}, "dataset": {"name": "mnist"}}
    entry = plan.describe(study, {}, [], study.entries["a"], results, MNIST)
    assert entry["diverged"] == 1
    assert entry["scores"]["test/accuracy"] == [0.9, None, 0.7]
    assert entry["test/accuracy"]["mean"] == pytest.approx(0.8)


def test_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(mean, 0.01, 10) for name, mean in zip("abc", (0.9, 0.91, 0.93))}  # noqa: B905
    rows = compare.differences(scores)
    assert [row["entries"] for row in rows] == [["a", "b"], ["a", "c"], ["b", "c"]]
    p_values = []
    for row in rows:
        test = stats.ttest_rel(*(scores[name] for name in row["entries"]))
        p_values.append(test.pvalue)
        np.testing.assert_allclose(row["p"], test.pvalue)
        np.testing.assert_allclose(row["interval"], test.confidence_interval(0.95))
    smallest, middle, largest = sorted(p_values)
    expected = [3 * smallest, max(3 * smallest, 2 * middle)]
    expected.append(max(expected[1], largest))
    np.testing.assert_allclose(sorted(row["p_holm"] for row in rows), expected)


def test_what_diverged_is_in_no_pair():
    (row,) = compare.differences({"a": [0.5, None, 0.7, 0.9], "b": [0.4, 0.1, None, 0.7]})
    assert row["pairs"] == 2
    assert row["mean"] == pytest.approx(0.15)
    (row,) = compare.differences({"a": [None, 0.5], "b": [0.4, None]})
    assert (row["mean"], row["p"], row["is_significant"]) == (None, None, False)
    (row,) = compare.differences({"a": [0.9, 0.8], "b": [0.8, 0.7]})  # equal but for rounding
    assert (row["p"], row["is_significant"]) == (None, False)
    (row,) = compare.differences({"a": [0.5, 0.5], "b": [0.5, 0.5]})
    assert (row["mean"], row["p"]) == (0, None)


@pytest.mark.slow
def test_false_discoveries_are_as_rare_as_stated():
    """1,000 studies of four equal networks: at most one in 20 finds any difference."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(1000):
        common = rng.normal(0.94, 0.01, 10)  # a seed draws the order of examples of all alike
        scores = {name: common + rng.normal(0, 0.005, 10) for name in "abcd"}
        found += any(row["is_significant"] for row in compare.differences(scores))
    assert 10 <= found <= 1000 * compare.LEVEL + 3 * np.sqrt(1000 * 0.05 * 0.95)


def test_true_differences_are_found():
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        scores = {"a": rng.normal(0.94, 0.005, 10), "b": rng.normal(0.95, 0.005, 10)}
        found += compare.differences(scores)[0]["is_significant"]
    assert found > 190


STUDY = """
from seqmnist.config import Config
from seqmnist.study.plan import Study

def get_study():
    entries = {}
    for cell in ("simple_rnn", "min_gru"):
        config = Config()
        config.data.name = "mnist_5k"
        config.model.cell = cell
        config.train.num_epochs = 2
        config.checkpoint.every_steps = 7
        entries[cell] = config
    select = {"optimizer.learning_rate": [0.001, 0.01, 1e36]}
    return Study(entries, range(5, 8), select, range(2), 500)
"""


def study(data_dir, workdir, cwd):
    command = [sys.executable, "-m", "tools.study", str(cwd / "study.py"), f"--workdir={workdir}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*command, f"--data_dir={data_dir}"],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_study_that_is_stopped_ends_as_one_that_is_not(data_dir, tmp_path):
    (tmp_path / "study.py").write_text(STUDY)
    process = study(data_dir, "whole", tmp_path)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert "at the edge" not in text
    whole = tmp_path / "whole"
    found = json.loads((whole / "study.json").read_text())
    for entry in found["entries"].values():
        assert entry["parameters"] <= 500
        assert entry["setting"]["optimizer.learning_rate"] == 0.01
        assert len(entry["scores"]["test/accuracy"]) == 3
        assert all(each["diverged"] == 2 for each in entry["tried"][2::3])
    for path in whole.glob("select/*/*/results.json"):
        assert set(json.loads(path.read_text())["test"]["accuracy"]) == {None}
    assert "simple\\_rnn" in (whole / "study.tex").read_text()
    assert len((whole / "study.csv").read_text().splitlines()) == 3
    assert (whole / "study.html").read_text().count("<img") == 4

    rng = np.random.default_rng(0)
    for number in (signal.SIGINT, signal.SIGKILL):
        process = study(data_dir, "parts", tmp_path)
        time.sleep(rng.uniform(4, 9))
        process.send_signal(number)
        process.communicate(timeout=200)
    both = [study(data_dir, "parts", tmp_path) for _ in range(2)]  # they share the rest
    texts = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert (tmp_path / "parts/study.json").read_bytes() == (whole / "study.json").read_bytes()
    of_one, of_other, of_whole = (
        set(re.findall(r"^(.*): [\d.]+ s; about", each, re.M)) for each in (*texts, text)
    )
    assert not of_one & of_other
    assert of_one | of_other <= of_whole


@pytest.mark.slow
def test_an_entry_is_trained_once_and_by_one_process(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_tool, "_PATIENCE", 0)
    values = {"data.name": "mnist_5k", "data.data_dir": str(data_dir), "train.num_epochs": 1}
    (tmp_path / "plugin.py").touch()
    config = config_of(**values, **{"model.hidden_size": 4}, plugins=str(tmp_path / "plugin.py"))
    one = Study({"a": config}, range(1), {"train.batch_size": [400, 500]}, range(1, 2))
    train, trained = run.train, []

    def diverge_first(config, workdir, **options):
        trained.append(str(workdir))
        if workdir.name == "1":
            raise divergence.DivergedError("diverged")
        return train(config, workdir, **options)

    monkeypatch.setattr(run, "train", diverge_first)
    with Workdir(tmp_path / "select" / "a").hold(print), pytest.raises(SystemExit) as caught:
        study_tool.perform(one, tmp_path, types.SimpleNamespace(number=signal.SIGTERM))
    assert caught.value.code == 128 + signal.SIGTERM
    assert "Other processes train a\n" in capsys.readouterr().out
    assert not trained

    found = study_tool.perform(one, tmp_path)
    assert len(trained) == 3
    assert study_tool.perform(one, tmp_path) == found
    assert len(trained) == 3  # also what diverged, which has no results
    (tmp_path / "plugin.py").write_text("# another one\n")
    with pytest.raises(UserError, match="another study, or one of other data or plugins"):
        study_tool.perform(one, tmp_path)


@pytest.mark.slow
def test_another_study_in_the_workdir_is_refused(tmp_path):
    (tmp_path / "study.py").write_text(STUDY)
    (tmp_path / "a").mkdir()
    pathlib.Path(tmp_path, "a/plan.json").write_text("{}")
    process = study(tmp_path, "a", tmp_path)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert text.count("\n") == 1
    assert "holds another study" in text
