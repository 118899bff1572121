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
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from seqmnist.training import batches, devices
from seqmnist.training.metrics import Sums, classification_sums
from seqmnist.training.steps import System, TrainState, eval_step, guarded_step

# LLVM's higher levels, the default among them, make code of copies that takes twice as long. On
# rows, SimpleRNN(64) trains a tenth faster at this level, a minimal GRU a sixth, an LRU 3 % slower;
# on pixels there is no difference; everything compiles sooner.
_COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}}


class Progress(NamedTuple):
    """Where an epoch stands.

    Attributes:
      state: after the steps so far.
      sums: over the examples so far, each as it was before its update; see `guarded_step` for
        what is not finite.
      step: how many of the epoch's steps are done.
    """

    state: TrainState
    sums: Sums
    step: int


class Loop(Protocol):
    """What runs epochs; `rows` are example numbers, int32 [steps, B], as `data` makes them."""

    def start(self, state: TrainState) -> Progress:
        """Returns the beginning of an epoch."""

    def train(
        self, progress: Progress, rows: np.ndarray, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """Takes a step for each row from `progress.step` on; donates the state.

        Reports about twice a second, and when `step` is one of `breaks`.
        """

    def evaluate(self, params, rows: np.ndarray) -> Sums:
        """Returns the sums over all examples of `rows`."""

    def programs(
        self, state: TrainState, sums: Sums, rows: tuple[int, ...], held_out: tuple[int, ...]
    ) -> dict[str, jax.stages.Lowered]:
        """Returns "train", "evaluate" and what else there is, to be compiled ahead of first calls.

        Args:
          state, sums: shapes, dtypes and shardings, as `start` places them.
          rows: the shape of an epoch's rows.
          held_out: the shape of an evaluation's rows.
        """


class Resident:
    """A loop over a dataset that lives in device memory as bytes."""

    def __init__(
        self,
        system: System,
        images: np.ndarray,
        labels: np.ndarray,
        mesh: jax.sharding.Mesh | None = None,
        has_members: bool = False,
    ):
        """Takes all examples, uint8 [N, 28, 28] and int32 [N]; the mesh is one device by default.

        With members, states, rows of training and sums have a leading axis S, which is spread over
        the mesh; rows of an evaluation are common to all members.
        """
        self._mesh = mesh or devices.make_mesh(1, 1)
        self._axes = ("member",) if has_members else ()
        self._arrays = devices.spread(self._mesh, (images, labels))

        def train(state, sums, rows, arrays, start, stop):
            def body(i, carry):
                return guarded_step(system, *carry, batches.take(*arrays, rows[i]), "data")

            return lax.fori_loop(start, stop, body, (state, sums))

        def evaluate(params, arrays, rows):
            def body(sums, row):
                return sums + eval_step(system, params, batches.take(*arrays, row)), None

            sums = lax.scan(body, _no_sums(params), rows)[0]
            return devices.add_up(sums, "data")

        def classify(params, arrays, row):
            return jax.nn.softmax(system.apply(params, batches.take(*arrays, row).image))

        over_mesh = functools.partial(devices.over_mesh, mesh=self._mesh, has_members=has_members)
        train = over_mesh(train, own=(P(), P(), P(None, "data")), shared=(P(), P(), P()), out=P())
        evaluate = over_mesh(evaluate, own=(P(),), shared=(P(), P(None, "data")), out=P())
        classify = over_mesh(classify, own=(P(),), shared=(P(), P("data")), out=P("data"))

        def evaluate_ensemble(params, arrays, rows, weights):
            def body(sums, row):
                mixture = jnp.tensordot(weights, classify(params, arrays, row), 1)
                batch = batches.take(*arrays, row)
                return sums + classification_sums(jnp.log(mixture), batch.label, batch.mask), None

            return lax.scan(body, Sums.zeros(weights.dtype), rows)[0]

        place = jax.NamedSharding(self._mesh, P(*self._axes))
        jit = _jit(self._mesh)
        self._train = jit(train, donate_argnums=(0, 1), out_shardings=place)
        self._evaluate = jit(evaluate)
        self._evaluate_ensemble = jit(evaluate_ensemble)

    def start(self, state: TrainState) -> Progress:
        """See `Loop`."""
        sums = _no_sums(state.params, state.step.shape)
        return Progress(*devices.spread(self._mesh, (state, sums), *self._axes), 0)

    def train(
        self, progress: Progress, rows: np.ndarray, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """See `Loop`."""
        state, sums, first = progress
        rows = devices.spread(self._mesh, np.asarray(rows), *self._axes, None, "data")
        for start, stop in _stretches(first, rows.shape[-2], breaks):
            state, sums = self._train(state, sums, rows, self._arrays, start, stop)
            yield Progress(state, jax.block_until_ready(sums), stop)

    def evaluate(self, params, rows: np.ndarray) -> Sums:
        """See `Loop`."""
        return self._evaluate(params, self._arrays, self._place(rows))

    def evaluate_ensemble(self, params, rows: np.ndarray, weights: np.ndarray) -> Sums:
        """Returns the sums of the members' mean prediction.

        Args:
          params: of S members.
          rows: int32 [steps, B].
          weights: float [S], of each member in the mean; their sum is 1.
        """
        return self._evaluate_ensemble(params, self._arrays, self._place(rows), weights)

    def programs(self, state, sums, rows, held_out):
        """See `Loop`."""
        rows = self._like(rows, *self._axes, None, "data")
        held_out = self._like(held_out, None, "data")
        return {
            "train": self._train.lower(state, sums, rows, self._arrays, 0, 1),
            "evaluate": self._evaluate.lower(state.params, self._arrays, held_out),
        }

    def _like(self, shape, *axes):
        place = jax.NamedSharding(self._mesh, P(*axes))
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=place)

    def _place(self, rows):
        return devices.spread(self._mesh, np.asarray(rows), None, "data")


class Streamed:
    """A loop over batches that a reader brings while the device computes."""

    def __init__(
        self, system: System, records: batches.Records, mesh: jax.sharding.Mesh | None = None
    ):
        """Takes the reader of all examples, and a mesh, by default of one device."""
        self._records, self._mesh = records, mesh or devices.make_mesh(1, 1)

        def train(state, sums, window, start, stop):
            def body(i, carry):
                batch = jax.tree.map(lambda x: x[i], window)
                return guarded_step(system, *carry, batch, "data")

            return lax.fori_loop(start, stop, body, (state, sums))

        def evaluate(params, sums, window):
            def body(sums, batch):
                return sums + eval_step(system, params, batch), None

            return lax.scan(body, sums, window)[0]

        def total(sums):
            return devices.add_up(jax.tree.map(lambda x: x[0], sums), "data")

        over_mesh = functools.partial(
            devices.over_mesh, mesh=self._mesh, shared=(), has_members=False
        )
        train = over_mesh(train, own=(P(), P(), P(None, "data"), P(), P()), out=P())
        # Each device keeps sums of its own, [1], until all windows are read.
        evaluate = over_mesh(evaluate, own=(P(), P("data"), P(None, "data")), out=P("data"))
        total = over_mesh(total, own=(P("data"),), out=P())
        jit = _jit(self._mesh)
        self._train = jit(train, donate_argnums=(0, 1))
        self._evaluate = jit(evaluate, donate_argnums=1)
        self._total = jit(total)

    def start(self, state: TrainState) -> Progress:
        """See `Loop`."""
        return Progress(devices.spread(self._mesh, state), self._no_sums(state.params), 0)

    def train(
        self, progress: Progress, rows: np.ndarray, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """See `Loop`."""
        state, sums, first = progress
        windows = batches.stream(self._records, rows[first:], self._mesh)
        begin = end = first  # of the window at hand
        for start, stop in _stretches(first, len(rows), breaks):
            while start < stop:
                if start == end:
                    window, begin, end = next(windows), end, end + batches.WINDOW
                until = min(stop, end)
                state, sums = self._train(state, sums, window, start - begin, until - begin)
                start = until
            yield Progress(state, jax.block_until_ready(sums), stop)

    def evaluate(self, params, rows: np.ndarray) -> Sums:
        """See `Loop`."""
        sums = self._no_sums(params, "data")
        for window in batches.stream(self._records, rows, self._mesh):
            sums = self._evaluate(params, sums, window)
        return self._total(sums)

    def programs(self, state, sums, rows, held_out):
        """See `Loop`."""
        del held_out  # windows are all alike
        place, shape = jax.NamedSharding(self._mesh, P(None, "data")), (batches.WINDOW, rows[-1])
        window = batches.Batch(
            jax.ShapeDtypeStruct((*shape, 28, 28), np.uint8, sharding=place),
            jax.ShapeDtypeStruct(shape, np.int32, sharding=place),
            jax.ShapeDtypeStruct(shape, np.bool_, sharding=place),
        )
        own = self._no_sums(state.params, "data")
        return {
            "train": self._train.lower(state, sums, window, 0, 1),
            "evaluate": self._evaluate.lower(state.params, own, window),
            "total": self._total.lower(own),
        }

    def _no_sums(self, params, *axes):
        shape = [self._mesh.shape[axis] for axis in axes]
        return devices.spread(self._mesh, _no_sums(params, tuple(shape)), *axes)


def _jit(mesh):
    options = _COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    return functools.partial(jax.jit, compiler_options=options)


def _no_sums(params, shape=()):
    return Sums.zeros(jax.tree.leaves(params)[0].dtype, shape)


def _stretches(
    start: int, num_steps: int, breaks: Collection[int] = ()
) -> Iterator[tuple[int, int]]:
    """Cuts an epoch into stretches (start, stop), each as long as fits in half a second.

    No stretch goes beyond one of `breaks`. A few steps tell the pace: a short epoch is two calls,
    and a long one can show its progress and answer a signal.
    """
    size = 8
    while start < num_steps:
        began = time.monotonic()
        ends = [step for step in (*breaks, num_steps) if step > start]
        stop = min(start + size, *ends)
        yield start, stop
        pace = (stop - start) / max(time.monotonic() - began, 1e-9)
        # Agreed on, or processes would reduce gradients of different steps.
        size = devices.agree(max(1, int(min(pace / 2, num_steps))))
        start = stop
