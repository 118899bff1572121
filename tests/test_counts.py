"""What a run costs, counted and not timed: compilations, transfers, FLOPs, memory."""

import dataclasses

import jax
import numpy as np
import pytest

from seqmnist.config import Config, ModelConfig
from seqmnist.study import profiling
from seqmnist.training import batches
from seqmnist.training.loop import Resident, Streamed
from seqmnist.training.steps import init_state, make_system


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


def test_only_the_first_epoch_compiles(digits, compilations):
    system = make_system(Config())
    resident = Resident(system, *digits)
    state, counts = init_state(Config(), system, 0), []
    held_out = batches.batch_rows(np.arange(100, 130), 8)
    for epoch in range(4):
        before = len(compilations)
        rows = batches.batch_rows(batches.epoch_order(0, epoch, 100), 8)
        *_, progress = resident.train(resident.start(state), rows)
        state = progress.state
        resident.evaluate(state.params, held_out).means()
        counts.append(len(compilations) - before)
    assert counts[0] > 0
    assert counts[2:] == [0, 0]


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_what_is_compiled_ahead_is_not_compiled_again(mode, digits, compilations):
    system, state = make_system(Config()), init_state(Config(), make_system(Config()), 0)
    images, labels = digits
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    looped = Resident(system, *digits) if mode == "resident" else Streamed(system, records)
    rows, held_out = (batches.batch_rows(np.arange(n), 8) for n in (100, 30))
    start = looped.start(state)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (start.state, start.sums),
    )
    for program in looped.programs(*shapes, rows.shape, held_out.shape).values():
        program.compile()
    before = len(compilations)
    *_, progress = looped.train(start, rows)
    looped.evaluate(progress.state.params, held_out)
    assert len(compilations) == before


def test_evaluation_moves_nothing_to_the_device(digits):
    system = make_system(Config())
    resident = Resident(system, *digits)
    params = init_state(Config(), system, 0).params
    rows = batches.batch_rows(np.arange(130), 8)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(resident.evaluate(params, rows))


@pytest.mark.parametrize(("cell", "num_gates"), [("simple_rnn", 1), ("gru", 3), ("lstm", 4)])
def test_a_step_costs_its_matrix_products(cell, num_gates):
    config = dataclasses.replace(Config(), model=ModelConfig(cell=cell))
    cost = profiling.step_cost(config)
    steps, batch, features, hidden, classes = 28, 128, 28, 64, 10
    width = num_gates * hidden
    # Two products with W (z and dW: images need no gradient), three with U (r, dr U^T and dU).
    products = 2 * steps * batch * width * (2 * features + 3 * hidden)
    products += 3 * 2 * batch * hidden * classes
    # The elementwise work is some ten operations a gate and time step.
    assert products < cost["flops"] < 1.1 * products
    # What the backward pass needs, and its cotangents: a few [T, B, K·H].
    assert cost["temporary_bytes"] < 8 * 4 * steps * batch * width
