import chex
import jax
import numpy as np
import pytest

from seqmnist.config import Config
from seqmnist.training import batches, loop
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import eval_step, guarded_step, init_state, make_system, train_step

CONFIG = Config()


def make_loops(digits):
    images, labels = digits
    system = make_system(CONFIG)
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    return system, {
        "resident": loop.Resident(system, images, labels),
        "stream": loop.Streamed(system, records),
    }


def run_epochs(system, one_loop, num_epochs, size=100, batch_size=8):
    state = init_state(CONFIG, system, 0)
    for epoch in range(num_epochs):
        rows = batches.batch_rows(batches.epoch_order(0, epoch, size), batch_size)
        *_, progress = one_loop.train(one_loop.start(state), rows)
        state = progress.state
    return progress


def test_resident_equals_streamed_bit_for_bit(digits):
    system, loops = make_loops(digits)
    ends = {name: run_epochs(system, one_loop, 3) for name, one_loop in loops.items()}
    chex.assert_trees_all_equal(ends["resident"], ends["stream"])
    rows = batches.batch_rows(np.arange(100, 130), 8)
    params = ends["resident"].state.params
    scores = [one_loop.evaluate(params, rows) for one_loop in loops.values()]
    chex.assert_trees_all_equal(*scores)
    assert int(scores[0].count) == 30


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_an_epoch_is_its_steps_one_after_the_other(digits, mode):
    system, loops = make_loops(digits)
    progress = run_epochs(system, loops[mode], 1)
    state, sums = init_state(CONFIG, system, 0), Sums.zeros()
    images, labels = (jax.numpy.array(x) for x in digits)
    for row in batches.batch_rows(batches.epoch_order(0, 0, 100), 8):
        state, batch_sums = train_step(system, state, batches.take(images, labels, row))
        sums += batch_sums
    chex.assert_trees_all_close(progress.state, state, atol=1e-5)
    chex.assert_trees_all_close(progress.sums, sums, rtol=1e-5)
    assert int(progress.sums.count) == 100
    assert int(progress.state.step) == progress.step == 13


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_whole_run_compiles_once(digits, mode, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(loop, "guarded_step", chex.assert_max_traces(guarded_step, n=1))
    monkeypatch.setattr(loop, "eval_step", chex.assert_max_traces(eval_step, n=1))
    system, loops = make_loops(digits)
    progress = run_epochs(system, loops[mode], 3)
    for _ in range(2):
        loops[mode].evaluate(progress.state.params, batches.batch_rows(np.arange(130), 8))


@pytest.mark.parametrize(
    ("seconds_a_step", "sizes"),
    [(0.001, [8, 42]), (0.12, [8, *[4] * 10, 2]), (2.0, [8, *[1] * 42])],
)
def test_stretches_take_half_a_second(seconds_a_step, sizes, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    stretches = []
    for start, stop in loop._stretches(10, 60):
        now[0] += seconds_a_step * (stop - start)
        stretches.append((start, stop))
    assert [i for start, stop in stretches for i in range(start, stop)] == list(range(10, 60))
    assert [stop - start for start, stop in stretches] == sizes


def test_a_step_that_is_not_finite_changes_nothing(digits):
    system, loops = make_loops(digits)
    state = init_state(CONFIG, system, 0)
    poisoned = state._replace(
        params=jax.tree.map(lambda leaf: leaf.at[...].set(jax.numpy.inf), state.params)
    )
    before = jax.tree.map(np.asarray, poisoned)
    rows = batches.batch_rows(batches.epoch_order(0, 0, 100), 8)
    for one_loop in loops.values():
        start = one_loop.start(jax.tree.map(jax.numpy.array, before))
        *_, progress = one_loop.train(start, rows)
        assert np.isnan(progress.sums.loss)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, progress.state), before)


def test_an_epoch_goes_on_where_it_stopped(digits):
    for name, one_loop in make_loops(digits)[1].items():
        system = make_system(CONFIG)
        rows = batches.batch_rows(batches.epoch_order(0, 0, 100), 8)
        *_, whole = one_loop.train(one_loop.start(init_state(CONFIG, system, 0)), rows)
        for middle in one_loop.train(one_loop.start(init_state(CONFIG, system, 0)), rows, (5,)):
            if middle.step == 5:
                break
        *_, resumed = one_loop.train(middle, rows)
        chex.assert_trees_all_equal(resumed, whole)
        assert resumed.step == 13, name
