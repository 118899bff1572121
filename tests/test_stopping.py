"""Early stopping and plateaus, against their definitions."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmnist import checkpoints, run
from seqmnist import config as config_lib
from seqmnist.config import OptimizerConfig
from seqmnist.errors import UserError
from seqmnist.study import card, trained
from seqmnist.training import divergence, stopping
from seqmnist.training.optim import make_optimizer
from seqmnist.training.steps import init_state, make_system


@pytest.fixture
def make_config(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(num_epochs, **groups):
        data = {"name": "mnist_5k", "data_dir": str(data_dir)}
        groups = {"data": data, "model": {"hidden_size": 8}, **groups}
        train = {"num_epochs": num_epochs, "early_stopping": 2, **groups.pop("train", {})}
        return config_lib.from_dict({**groups, "train": train})

    return make


@pytest.fixture
def losses_from(monkeypatch):
    """Makes validation losses those of a list, once each, and the last one from then on."""
    evaluate = run.Task.evaluate

    def use(losses):
        drawn = list(losses)

        def listed(task, params, split, diverged=False):
            means = evaluate(task, params, split, diverged)
            if split == "test":
                return means
            loss = drawn.pop(0) if len(drawn) > 1 else drawn[0]
            return {**means, "loss": loss}

        monkeypatch.setattr(run.Task, "evaluate", listed)

    return use


def stops_after(losses, patience):
    """The definition, epoch by epoch: returns the best epoch, and the number of epochs trained."""
    lowest, best = np.inf, 0
    for epoch, loss in enumerate(losses):
        if loss < lowest:
            lowest, best = loss, epoch
        if epoch - best >= patience:
            return best, epoch + 1
    return best, len(losses)


@pytest.mark.parametrize("seed", range(50))
def test_what_stops_follows_from_the_history(seed):
    rng = np.random.default_rng(seed)
    patience, losses = int(rng.integers(1, 4)), rng.integers(0, 6, (8, 3)).astype(float)
    losses[rng.random(losses.shape) < 0.1] = np.nan
    expected = [stops_after(column, patience) for column in losses.T]
    for epochs in range(1, 9):
        history = [{"validation/loss": row.tolist()} for row in losses[:epochs]]
        stopped = stopping.has_stopped(history, patience)
        for member, (best, number) in enumerate(expected):
            is_over = epochs >= number and number - 1 - best >= patience
            if epochs <= number:  # later losses are those of the restored parameters
                assert stopped[member] == is_over
            if epochs == number:
                assert stopping.best_epochs(history)[member] == best


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [0, 10])
def test_the_best_parameters_are_restored(every_steps, make_config, losses_from, capsys):
    losses_from([0.5, 0.2, 0.4, 0.3, 0.1])
    checkpoint = {"keep": 100, "every_steps": every_steps}
    results = run.train(make_config(9, checkpoint=checkpoint), "a")
    assert results["epochs"] == 4
    assert results["early_stopping"] == {"best_epochs": 2, "stopped": True}
    assert results["validation"]["loss"] == 0.2
    assert card.facts(make_config(9), results, None)["training"].startswith("4 epochs")
    best = trained.load("a", checkpoint="50")
    jax.tree.map(np.testing.assert_array_equal, trained.load("a").params, best.params)
    assert results["test"] == run.evaluate(make_config(9), "a")
    assert "restored the parameters of epoch 2" in capsys.readouterr().out
    shutil.copytree("a", "fewer")
    shutil.rmtree("fewer/checkpoints/50")
    notices = []
    for folder in ("a", "fewer"):  # the newest holds the best parameters, too
        newest = trained.load(folder, say=notices.append, checkpoint="best")
        jax.tree.map(np.testing.assert_array_equal, newest.params, best.params)
        assert newest.step == 100
    assert not notices
    again = run.train(make_config(9, checkpoint=checkpoint), "a")
    assert again == json.loads(pathlib.Path("a/results.json").read_text())


@pytest.mark.slow
def test_they_are_restored_at_the_end_too(make_config, losses_from, capsys):
    losses_from([0.5, 0.2, 0.4])
    results = run.train(make_config(3, checkpoint={"keep": 3}), "a")
    assert results["early_stopping"] == {"best_epochs": 2, "stopped": False}
    assert "\nRestored the parameters of epoch 2\n" in capsys.readouterr().out
    best = trained.load("a", checkpoint="50")
    jax.tree.map(np.testing.assert_array_equal, trained.load("a").params, best.params)


def test_a_member_that_diverged_has_no_part_in_what_is_best():
    """Before it diverged, its losses were the highest."""
    history = [
        {"step": 1, "train/loss": [1.0, 2.0], "validation/loss": [2.0, 1e30]},
        {"step": 2, "train/loss": [1.0, 2.0], "validation/loss": [3.0, 5.0]},
        {"step": 3, "train/loss": [np.inf, np.nan], "validation/loss": [2.0, np.nan]},
    ]
    assert checkpoints.best_step(history) == 1
    leaves = {"0.params.w": np.array([[1.0], [2.0]]), "2.w": np.array([[1.0], [3.0]])}
    assert checkpoints._is_restored(leaves | {"1.loss": np.array([np.inf, np.nan])})
    assert not checkpoints._is_restored(leaves | {"1.loss": np.array([np.inf, np.inf])})


@pytest.mark.slow
def test_members_stop_one_by_one(make_config, losses_from):
    together = [[0.5, 0.1, 0.9], [0.4, 0.3, 0.8], [0.3, 0.3, 0.7], [0.2, 0.1, 0.6], [0.1, 0.1, 0.5]]
    losses_from(together)
    members = {"members": {"num": 3}, "checkpoint": {"keep": 9}}
    results = run.train(make_config(5, **members), "a")
    assert results["early_stopping"] == {"best_epochs": [5, 1, 5], "stopped": [False, True, False]}
    first = trained.load("a", 1, checkpoint="25")
    for step in ("75", "100", "125"):  # frozen from then on
        frozen = trained.load("a", 1, checkpoint=step)
        jax.tree.map(np.testing.assert_array_equal, frozen.params, first.params)
    lines = [json.loads(line) for line in pathlib.Path("a/metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"][1] is None for line in lines] == [False, False, False, True, True]
    assert results["test"]["loss"][1] is not None
    assert results["settings"][0]["diverged"] == 0
    # The other members train as they would without it.
    losses_from([[0.5] * 3, [0.4] * 3, [0.3] * 3, [0.2] * 3, [0.1] * 3])
    run.train(make_config(5, **members, train={"early_stopping": 0}), "c")
    for member in (0, 2):
        jax.tree.map(
            np.testing.assert_array_equal,
            trained.load("a", member).params,
            trained.load("c", member).params,
        )


@pytest.mark.slow
def test_a_run_that_resumes_stops_as_one_that_does_not(make_config, monkeypatch):
    stop = run.StopRequest()
    config = make_config(
        8,
        train={"early_stopping": 1},
        checkpoint={"every_steps": 7},
        optimizer={"learning_rate": 0.03},
    )
    whole = run.train(config, "whole")
    advance, seen = run.Session.advance, []

    def interrupted(session, progress, debug_nans):
        advance(session, progress, debug_nans)
        seen.append(progress)
        if len(seen) % 7 == 0:
            stop.number = 15

    monkeypatch.setattr(run.Session, "advance", interrupted)
    for _ in range(100):
        stop = run.StopRequest()
        try:
            parts = run.train(config, "parts", stop=stop)
            break
        except SystemExit:
            continue
    for key in ("epochs", "steps", "validation", "test", "early_stopping"):
        assert parts[key] == whole[key]


def test_it_needs_a_validation_set_and_a_fixed_number_of_epochs(make_config):
    config = make_config(3)
    config.data.validation_fraction = 0.0
    with pytest.raises(UserError, match="early_stopping does nothing"):
        config_lib.validated(config)
    with pytest.raises(UserError, match="num_epochs: 3 → 4"):
        config_lib.check_resumable(make_config(3), make_config(4))


@jax.numpy_dtype_promotion("standard")  # Optax's schedule is not strict
def test_a_plateau_lowers_the_learning_rate():
    config = OptimizerConfig(
        name="sgd",
        momentum=0.0,
        learning_rate=1.0,
        schedule="plateau",
        plateau_factor=0.5,
        plateau_patience=2,
    )
    optimizer = make_optimizer(config, 40, steps_per_epoch=4)
    params = jnp.zeros(3)
    state, seen = optimizer.init(params), []
    for epoch in range(8):
        for step in range(4):  # the mean over an epoch falls in the first two only
            loss = [2.0, 1.0, 1.0][min(epoch, 2)] + (0.5 if step % 2 else -0.5)
            updates, state = optimizer.update(jnp.ones(3), state, params, value=jnp.float32(loss))
        seen.append(-float(updates[0]))
    np.testing.assert_allclose(seen, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125])


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_a_run_with_a_plateau_trains(make_config):
    config = make_config(
        3, train={"early_stopping": 0}, optimizer={"schedule": "plateau", "plateau_patience": 1}
    )
    results = run.train(config, "a")
    first = optax.tree.get(make_optimizer(config.optimizer, 75).init(jnp.zeros(3)), "best_value")
    assert np.isinf(first)  # which a run replaces, or nothing would train
    assert results["test"]["loss"] < 2.28
    system = make_system(config)  # whose run has no length, and so no plateau
    assert optax.tree.get(init_state(config, system, 0).opt_state, "best_value") is None


def test_a_divergence_names_the_rate_that_the_plateau_has_left(make_config):
    config = make_config(1, optimizer={"schedule": "plateau", "learning_rate": 0.002})
    task = run.compose(config, print)
    state = task.start().state
    halved = optax.tree.set(state.opt_state, scale=jnp.float32(0.5))
    line = divergence.explain(task, state._replace(opt_state=halved), "none", False)
    assert "learning rate 0.001)" in line
