"""Newton's method over time against the recurrence step by step, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module

from seqmnist.networks import newton, scans
from seqmnist.networks.cells import CELLS

F, H, T, B = 5, 7, 40, 3
INPUTS = np.random.default_rng(0).normal(size=(T, B, F))


def make(cell):
    return random_module(lambda rngs: cell(F, H, rngs=rngs))


@pytest.fixture(params=["simple_rnn", "gru", "lstm", "slstm"])
def recurrence(request):
    """Gates, U, c, a state and z, in float64."""
    cell = make(CELLS[request.param])
    z = cell.project(INPUTS.astype(np.float32))
    with jax.enable_x64(True):
        rest = (*cell.recurrence(), cell.initial_state(B), z)
        yield type(cell).gates, *jax.tree.map(lambda x: x.astype(jnp.float64), rest)


def test_values_and_gradients_are_those_step_by_step(recurrence):
    gates, *rest = recurrence

    def loss(read, *arguments):
        last, h = read(gates, *arguments)
        return jnp.sum(jnp.sin(h)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(last))

    some = tuple(i for i, x in enumerate(rest, 1) if x is not None)
    expected, actual = (
        jax.jit(jax.value_and_grad(loss, some), static_argnums=0)(read, *rest)
        for read in (scans.gated, newton.gated)
    )
    assert_close(actual, expected, 1e-12)


def test_all_steps_are_solved_sooner_if_the_past_is_forgotten(recurrence):
    gates, kernel, bias, state, z = recurrence
    _, exact = scans.gated(gates, kernel, bias, state, z)
    states, number = newton.solve(gates, kernel, bias, state, z)
    assert_close(jax.tree.leaves(states)[0], exact, 1e-12)
    assert number <= T
    # Weak connections are soon forgotten.
    assert newton.solve(gates, kernel / 10, bias, state, z)[1] <= 0.75 * T


@pytest.mark.parametrize("recurrence", ["simple_rnn", "gru"], indirect=True)
def test_units_without_cross_connections_are_solved_as_fast_as_newtons_method_is(recurrence):
    gates, kernel, *rest = recurrence
    kernel = kernel * jnp.tile(jnp.eye(H), kernel.shape[1] // H)  # then J is diagonal
    assert newton.solve(gates, kernel, *rest)[1] <= 8


def test_a_cell_of_ones_own_reads_in_parallel():
    class ParallelGRU(CELLS["gru"]):
        def recur(self, state, z):
            return newton.gated(type(self).gates, *self.recurrence(), state, z)

    x = jnp.asarray(INPUTS, jnp.float32)
    assert_close(make(ParallelGRU)(x), make(CELLS["gru"])(x))
