import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from seqmnist.config import Config, ModelConfig
from seqmnist.training import batches, loop
from seqmnist.training.loop import Loop, Resident, Streamed
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import eval_step, guarded_step, init_state, make_system, train_step

CONFIG = Config(model=ModelConfig(hidden_size=8))
HELD_OUT = batches.batch_rows(np.arange(100, 130), 8)


def make_feed(mode, digits):
    images, labels = digits
    if mode == "resident":
        return Resident(images, labels)
    return Streamed(batches.Records((images[:100], labels[:100]), (images[100:], labels[100:])))


@pytest.fixture(scope="module")
def system():
    return make_system(CONFIG)


@pytest.fixture(scope="module")
def initial(system):
    """The state before the first step, in NumPy, since a loop donates what it is given."""
    return jax.tree.map(np.asarray, jax.jit(functools.partial(init_state, CONFIG, system, 0))())


@pytest.fixture(scope="module", params=["resident", "stream"])
def each_loop(request, system, digits):
    return Loop(system, make_feed(request.param, digits))


def rows_of(epoch, size=100, batch_size=8):
    return batches.batch_rows(batches.epoch_order(0, epoch, size), batch_size)


def run_epochs(one_loop, state, num_epochs):
    for epoch in range(num_epochs):
        *_, progress = one_loop.train(one_loop.start(state), rows_of(epoch))
        state = progress.state
    return progress


@pytest.mark.slow
def test_resident_equals_streamed_bit_for_bit(system, initial, digits):
    loops = [Loop(system, make_feed(mode, digits)) for mode in ("resident", "stream")]
    ends = [run_epochs(one_loop, initial, 3) for one_loop in loops]
    chex.assert_trees_all_equal(*ends)
    scores = [
        one_loop.evaluate(end.state.params, HELD_OUT)
        for one_loop, end in zip(loops, ends, strict=True)
    ]
    chex.assert_trees_all_equal(*scores)
    assert int(scores[0].count) == 30


@pytest.mark.slow
def test_an_epoch_is_its_steps_one_after_the_other(each_loop, system, initial, digits):
    progress = run_epochs(each_loop, initial, 1)
    step, score = (jax.jit(f, static_argnums=0) for f in (train_step, eval_step))
    state, sums, scores = initial, Sums.zeros(), Sums.zeros()
    arrays = [jnp.array(x) for x in digits]
    for row in rows_of(0):
        state, batch_sums = step(system, state, batches.take(*arrays, row))
        sums += batch_sums
    for row in HELD_OUT:
        scores += score(system, state.params, batches.take(*arrays, row))
    assert_close(progress.state, state)
    assert_close(progress.sums, sums)
    assert_close(each_loop.evaluate(progress.state.params, HELD_OUT), scores)
    assert int(progress.sums.count) == 100
    assert int(progress.state.step) == progress.step == 13


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_whole_run_is_traced_once(mode, system, initial, digits, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(loop, "guarded_step", chex.assert_max_traces(guarded_step, n=1))
    monkeypatch.setattr(loop, "eval_step", chex.assert_max_traces(eval_step, n=1))
    one_loop = Loop(system, make_feed(mode, digits))
    progress = run_epochs(one_loop, initial, 3)
    for _ in range(2):
        one_loop.evaluate(progress.state.params, HELD_OUT)


def test_an_ensemble_may_have_64_bits(digits):
    with jax.enable_x64(True):
        wide = make_system(Config(model=ModelConfig(hidden_size=4)))
        states = [init_state(Config(model=ModelConfig(hidden_size=4)), wide, i) for i in (0, 1)]
        params = jax.tree.map(lambda *x: np.stack(x), *(state.params for state in states))
        one_loop = Loop(wide, make_feed("resident", digits), has_members=True)
        sums = one_loop.evaluate_ensemble(params, HELD_OUT, np.array([0.5, 0.5], np.float32))
        assert sums.loss.dtype == jnp.float64
        assert int(sums.count) == 30


@pytest.mark.parametrize(
    ("seconds_per_step", "sizes"),
    [(0.001, [8, 42]), (0.12, [8, *[4] * 10, 2]), (2.0, [8, *[1] * 42])],
)
def test_spans_take_half_a_second(seconds_per_step, sizes, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    spans = []
    for start, stop in loop._spans(10, 60):
        now[0] += seconds_per_step * (stop - start)
        spans.append((start, stop))
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(10, 60))
    assert [stop - start for start, stop in spans] == sizes


def test_spans_end_at_breaks(monkeypatch):
    monkeypatch.setattr(loop.time, "monotonic", lambda: 0.0)
    spans = list(loop._spans(0, 40, breaks=(3, 3, 20, 90)))
    assert spans[0] == (0, 3)
    assert {20, 40} <= {stop for _, stop in spans}
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(40))


def test_a_step_that_is_not_finite_changes_nothing(each_loop, initial):
    spoiled = initial._replace(params=jax.tree.map(lambda x: x + np.inf, initial.params))
    progress = run_epochs(each_loop, spoiled, 1)
    assert np.isnan(progress.sums.loss)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, progress.state), spoiled)


def test_a_member_that_diverges_in_mid_epoch_stays_as_it_was(system, initial, digits):
    """Member 1 meets a step that is not finite in its fourth batch; member 0 never does."""
    images, labels = digits
    spoiled = labels.copy()
    spoiled[99] = 10  # above the classes: a loss of NaN
    one_loop = Loop(system, Resident(images, spoiled), has_members=True)
    good = np.concatenate([np.arange(99), np.arange(5)])
    bad = np.concatenate([np.arange(30), [99], np.arange(73)])
    rows = np.stack([batches.batch_rows(order, 8) for order in (good, bad)])
    states = jax.tree.map(lambda x: np.stack([x, x]), initial)
    *_, first = one_loop.train(one_loop.start(states), rows)
    at_end = jax.tree.map(np.asarray, first.state)
    assert at_end.step.tolist() == [13, 3]
    assert np.isfinite(first.sums.loss).tolist() == [True, False]
    assert all(np.isfinite(leaf[1]).all() for leaf in jax.tree.leaves(at_end.params))
    rows[1] = rows[0]  # from now on only batches that a fresh member could train on
    *_, second = one_loop.train(one_loop.start(first.state, first.sums), rows)
    assert np.asarray(second.state.step).tolist() == [26, 3]
    assert np.isfinite(second.sums.loss).tolist() == [True, False]
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[1], s) for s in (at_end, second.state)))


def test_a_member_outside_the_ensemble_has_no_influence(system, initial, digits):
    one_loop = Loop(system, make_feed("resident", digits), has_members=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=(3, *x.shape)).astype(x.dtype), initial.params)
    params["readout"]["bias"][...][1] = np.nan
    assert np.isnan(params["readout"]["bias"][...][1]).all()
    sums = one_loop.evaluate_ensemble(params, HELD_OUT, np.array([0.5, 0, 0.5], np.float32))
    apply, images = jax.jit(system.apply), jnp.array(digits[0][100:])
    logits = [apply(jax.tree.map(lambda x, i=i: x[i], params), images) for i in (0, 2)]
    mean = np.mean([jax.nn.softmax(each) for each in logits], 0)
    labels = digits[1][100:]
    np.testing.assert_allclose(sums.loss, -np.log(mean[np.arange(30), labels]).sum(), rtol=1e-5)
    assert int(sums.correct) == (mean.argmax(-1) == labels).sum()
    assert int(sums.count) == 30


def test_an_ensemble_of_members_that_are_surely_wrong_has_a_finite_loss(system, initial, digits):
    """Their probabilities of the label, exp(-200), are zero in float32."""
    one_loop = Loop(system, make_feed("resident", digits), has_members=True)
    params = jax.tree.map(lambda x: np.zeros((2, *x.shape), x.dtype), initial.params)
    params["readout"]["bias"][...][:, 0] = 200
    sums = one_loop.evaluate_ensemble(params, HELD_OUT, np.array([0.5, 0.5], np.float32))
    num_wrong = (digits[1][100:] != 0).sum()
    assert num_wrong > 20
    np.testing.assert_allclose(sums.loss, 200 * num_wrong, rtol=1e-5)
    assert int(sums.correct) == 30 - num_wrong


def test_an_epoch_resumes_where_it_stopped(each_loop, initial):
    rows = rows_of(0)
    *_, whole = each_loop.train(each_loop.start(initial), rows)
    for middle in each_loop.train(each_loop.start(initial), rows, breaks=(5,)):
        if middle.step == 5:
            break
    *_, resumed = each_loop.train(middle, rows)
    chex.assert_trees_all_equal(resumed, whole)
    assert resumed.step == 13
