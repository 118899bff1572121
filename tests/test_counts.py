"""What a run costs, counted and not timed: compilations, transfers, FLOPs, memory."""

import jax
import numpy as np
import pytest

from seqmnist.config import Config, MembersConfig, ModelConfig
from seqmnist.study import profiling
from seqmnist.training import batches
from seqmnist.training.loop import Loop, Resident, Streamed
from seqmnist.training.steps import init_state, make_system

CONFIG = Config(model=ModelConfig(hidden_size=8))
ROWS, HELD_OUT = batches.batch_rows(np.arange(100), 8), batches.batch_rows(np.arange(100, 130), 8)


@pytest.fixture
def compilations():
    """The list of compilations so far; grows while a test runs."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def system():
    return make_system(CONFIG)


@pytest.fixture(scope="module")
def initial(system):
    return jax.tree.map(np.asarray, jax.jit(lambda: init_state(CONFIG, system, 0))())


@pytest.mark.slow
def test_only_the_first_epoch_compiles(system, initial, digits, compilations):
    loop, state, counts = Loop(system, Resident(*digits)), initial, []
    for epoch in range(4):
        before = len(compilations)
        rows = batches.batch_rows(batches.epoch_order(0, epoch, 100), 8)
        *_, progress = loop.train(loop.start(state), rows)
        state = progress.state
        loop.evaluate(state.params, HELD_OUT).means()
        counts.append(len(compilations) - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_what_is_compiled_ahead_is_not_compiled_again(mode, system, initial, digits, compilations):
    images, labels = digits
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    loop = Loop(system, Resident(*digits) if mode == "resident" else Streamed(records))
    start = loop.start(initial)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (start.state, start.sums),
    )
    for program in loop.programs(*shapes, ROWS.shape, HELD_OUT.shape).values():
        program.lower().compile()
    before = len(compilations)
    *_, progress = loop.train(start, ROWS)
    loop.evaluate(progress.state.params, HELD_OUT)
    assert len(compilations) == before


def test_an_evaluation_brings_nothing_but_its_rows(system, initial, digits, monkeypatch):
    loop, placed = Loop(system, Resident(*digits)), []
    params = loop.start(initial).state.params
    loop.evaluate(params, HELD_OUT)  # places the dataset
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: placed.append(x.nbytes) or put(x, *to))
    with jax.transfer_guard("disallow"):  # except by device_put
        jax.block_until_ready(loop.evaluate(params, HELD_OUT))
    assert placed == [4, 4, 4, 4, 4, HELD_OUT.nbytes]  # zeros of the sums, and the rows


@pytest.mark.parametrize(("cell", "num_gates"), [("simple_rnn", 1), ("gru", 3), ("lstm", 4)])
def test_a_step_costs_its_matrix_products(cell, num_gates):
    cost = profiling.step_cost(Config(model=ModelConfig(cell=cell)))
    steps, batch, features, hidden, classes = 28, 128, 28, 64, 10
    width = num_gates * hidden
    # Two products with W (z and dW: images need no gradient), three with U (r, dr U^T and dU).
    products = 2 * steps * batch * width * (2 * features + 3 * hidden)
    products += 3 * 2 * batch * hidden * classes
    assert cost["flops"] == products
    two = Config(model=ModelConfig(cell=cell), members=MembersConfig(2))
    assert profiling.step_cost(two) == {name: 2 * value for name, value in cost.items()}
    # What the backward pass needs, and its cotangents: a few [T, B, K·H].
    assert cost["temporary_bytes"] < 8 * 4 * steps * batch * width
