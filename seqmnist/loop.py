"""Epochs: compiled calls over many steps, and evaluation.

The one place that applies jit and donation. A `Loop` is fed in one of two ways: `Resident`
keeps the dataset in device memory and runs any stretch of an epoch as one compiled call;
`Streamed` takes batches from a reader. Both visit the same batches and give the same
parameters, bit for bit.
"""

import functools
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax import lax

from seqmnist import data, sharding
from seqmnist.metrics import Sums
from seqmnist.steps import System, TrainState, eval_step, train_step


class Progress(NamedTuple):
    """Where an epoch stands.

    Attributes:
      state: after the steps so far.
      sums: over the examples so far, each as it was before its update.
      step: how many of the epoch's steps are done.
    """

    state: TrainState
    sums: Sums
    step: int


class Loop(Protocol):
    """What runs epochs; `rows` are example numbers, int32 [steps, B], as `data` makes them."""

    def train(
        self, state: TrainState, rows: jax.Array, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """Takes a step for each row; donates `state`.

        Reports about twice a second, and when `step` is one of `breaks`.
        """

    def evaluate(self, params, rows: jax.Array) -> Sums:
        """Returns the sums over all examples of `rows`."""


class Resident:
    """A loop over a dataset that lives in device memory as bytes."""

    def __init__(
        self,
        system: System,
        images: np.ndarray,
        labels: np.ndarray,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Takes all examples, uint8 [N, 28, 28] and int32 [N].

        With a mesh, the loop trains S members: states, rows and sums gain a leading axis S,
        which is spread over the mesh; rows of an evaluation are common to all members.
        """
        self._arrays = jax.device_put((images, labels))

        def train(state, sums, rows, arrays, start, stop):
            def body(i, carry):
                state, sums = carry
                state, batch_sums = train_step(system, state, data.take(*arrays, rows[i]))
                return state, sums + batch_sums

            return lax.fori_loop(start, stop, body, (state, sums))

        def evaluate(params, arrays, rows):
            def body(sums, row):
                return sums + eval_step(system, params, data.take(*arrays, row)), None

            return lax.scan(body, _no_sums(params), rows)[0]

        if mesh:
            self._arrays = sharding.spread(mesh, self._arrays)
            train = sharding.over_members(train, mesh, num_shared=3)
            evaluate = sharding.over_members(evaluate, mesh, num_shared=2)
        self._train = jax.jit(train, donate_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)

    def train(
        self, state: TrainState, rows: jax.Array, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """See `Loop`."""
        sums = _no_sums(state.params, state.step.shape)
        for start, stop in _stretches(rows.shape[-2], breaks):
            state, sums = self._train(state, sums, rows, self._arrays, start, stop)
            yield Progress(state, jax.block_until_ready(sums), stop)

    def evaluate(self, params, rows: jax.Array) -> Sums:
        """See `Loop`."""
        return self._evaluate(params, self._arrays, rows)


class Streamed:
    """A loop over batches that a reader brings while the device computes."""

    def __init__(self, system: System, records: data.Records):
        """Takes the reader of all examples."""
        self._records = records

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train(state, sums, batch):
            state, batch_sums = train_step(system, state, batch)
            return state, sums + batch_sums

        @functools.partial(jax.jit, donate_argnums=1)
        def evaluate(params, sums, batch):
            return sums + eval_step(system, params, batch)

        self._train, self._evaluate = train, evaluate

    def train(
        self, state: TrainState, rows: jax.Array, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """See `Loop`."""
        sums = _no_sums(state.params)
        batches = data.stream(self._records, rows)
        for start, stop in _stretches(len(rows), breaks):
            for _ in range(start, stop):
                state, sums = self._train(state, sums, next(batches))
            yield Progress(state, jax.block_until_ready(sums), stop)

    def evaluate(self, params, rows: jax.Array) -> Sums:
        """See `Loop`."""
        sums = _no_sums(params)
        for batch in data.stream(self._records, rows):
            sums = self._evaluate(params, sums, batch)
        return sums


def _no_sums(params, shape=()):
    return Sums.zeros(jax.tree.leaves(params)[0].dtype, shape)


def _stretches(num_steps: int, breaks: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """Cuts an epoch into stretches (start, stop), each as long as fits in half a second.

    No stretch goes beyond one of `breaks`. A short epoch is a few calls that double in length; a
    long one can show its progress and answer a signal.
    """
    start, size = 0, 8
    while start < num_steps:
        began = time.monotonic()
        ends = [step for step in (*breaks, num_steps) if step > start]
        stop = min(start + size, *ends)
        yield start, stop
        size = 2 * size if time.monotonic() - began < 0.25 else max(1, size // 2)
        start = stop
