"""Epochs: compiled calls over many steps, and evaluation. The one place that jits and donates.

A `Loop` takes its batches from a feed. `Resident` keeps the dataset in device memory; `Streamed`
brings batches from a reader. Both visit the same batches and give the same parameters and
scores, bit for bit.
"""

import functools
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from seqmnist.training import batches, devices
from seqmnist.training.metrics import Sums, classification_sums
from seqmnist.training.steps import System, TrainState, eval_step, guarded_step

# Higher LLVM levels generate copy loops that run at half the speed. On rows, SimpleRNN(64) trains
# a tenth faster at this level, a minimal GRU a sixth, an LRU 3 % slower; on pixels there is no
# difference; everything compiles sooner.
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


class Feed(Protocol):
    """Where a loop takes its batches from.

    A window holds consecutive batches, split along the mesh axis "data"; rows are example numbers,
    int32 [steps, B], or [S, steps, B] for S members.
    """

    def place(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns the arrays on the devices that all steps read."""

    def windows(
        self, mesh: jax.sharding.Mesh, rows: np.ndarray, first: int, axes: tuple[str, ...] = ()
    ) -> Iterator[tuple[int, int, Any]]:
        """Yields (begin, end, window) for the steps from `first` on; `axes` spread the members."""

    def batch(self, element: Any, arrays: Any) -> batches.Batch:
        """Returns a batch, inside a compiled call, from its element of a window."""

    def window_shapes(
        self, mesh: jax.sharding.Mesh, rows: tuple[int, ...], axes: tuple[str, ...] = ()
    ) -> Any:
        """Returns shapes, dtypes and shardings of the windows of rows of this shape."""


class Resident(NamedTuple):
    """A feed from a dataset in device memory: images uint8 [N, 28, 28] and labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def place(self, mesh):
        return devices.spread(mesh, (self.images, self.labels))

    def windows(self, mesh, rows, first, axes=()):
        yield 0, rows.shape[-2], devices.spread(mesh, np.asarray(rows), *axes, None, "data")

    def batch(self, element, arrays):
        return batches.take(*arrays, element)

    def window_shapes(self, mesh, rows, axes=()):
        place = jax.NamedSharding(mesh, P(*axes, None, "data"))
        return jax.ShapeDtypeStruct(rows, np.int32, sharding=place)


class Streamed(NamedTuple):
    """A feed from a reader, which brings batches while the device computes."""

    records: batches.Records

    def place(self, mesh):
        return ()

    def windows(self, mesh, rows, first, axes=()):
        for window in batches.stream(self.records, rows[first:], mesh):
            yield first, first + batches.WINDOW, window
            first += batches.WINDOW

    def batch(self, element, arrays):
        return element

    def window_shapes(self, mesh, rows, axes=()):
        place, shape = jax.NamedSharding(mesh, P(None, "data")), (batches.WINDOW, rows[-1])
        return batches.Batch(
            jax.ShapeDtypeStruct((*shape, 28, 28), np.uint8, sharding=place),
            jax.ShapeDtypeStruct(shape, np.int32, sharding=place),
            jax.ShapeDtypeStruct(shape, np.bool_, sharding=place),
        )


class Loop:
    """Runs epochs and evaluations of a system on a mesh."""

    def __init__(
        self,
        system: System,
        feed: Feed,
        mesh: jax.sharding.Mesh | None = None,
        has_members: bool = False,
    ):
        """Places the feed's arrays; the mesh is one device by default.

        With members, states, sums and rows of training have a leading axis S, which is spread over
        the mesh; rows of an evaluation are common to all members.
        """
        self._feed, self._mesh = feed, mesh or devices.make_mesh(1, 1)
        self._axes = ("member",) if has_members else ()
        self._arrays = feed.place(self._mesh)

        def train(state, sums, window, start, stop, arrays):
            def body(i, carry):
                batch = feed.batch(jax.tree.map(lambda x: x[i], window), arrays)
                return guarded_step(system, *carry, batch, "data")

            return lax.fori_loop(start, stop, body, (state, sums))

        def evaluate(params, sums, window, arrays):
            def body(sums, element):
                return sums + eval_step(system, params, feed.batch(element, arrays)), None

            return lax.scan(body, sums, window)[0]

        def total(sums):
            return devices.add_up(jax.tree.map(lambda x: x[0], sums), "data")

        over_mesh = functools.partial(devices.over_mesh, mesh=self._mesh, has_members=has_members)
        batch, all_alike = P(None, "data"), (P(), P(), P())
        train = over_mesh(train, own=(P(), P(), batch), shared=all_alike, out=P())
        # Each device keeps sums of its own, [1], until all windows are read.
        evaluate = over_mesh(evaluate, own=(P(), P("data")), shared=(batch, P()), out=P("data"))
        total = over_mesh(total, own=(P("data"),), shared=(), out=P())
        place = jax.NamedSharding(self._mesh, P(*self._axes))
        self._train = self._jit(train, donate_argnums=(0, 1), out_shardings=place)
        self._evaluate = self._jit(evaluate, donate_argnums=1)
        self._total = self._jit(total)
        self._evaluate_ensemble = self._jit(self._make_ensemble(system, over_mesh))

    def start(self, state: TrainState, sums: Sums | None = None) -> Progress:
        """Returns the beginning of an epoch, with the members of `sums` that diverged marked."""
        no_sums = _no_sums(state.params, state.step.shape)
        sums = no_sums if sums is None else devices.gather(sums).restart()
        return Progress(*devices.spread(self._mesh, (state, sums), *self._axes), 0)

    def train(
        self, progress: Progress, rows: np.ndarray, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """Takes a step for each row from `progress.step` on; donates the state.

        Reports about twice a second, and when `step` is one of `breaks`.
        """
        state, sums, first = progress
        windows, end = self._feed.windows(self._mesh, rows, first, self._axes), -1
        for start, stop in _spans(first, rows.shape[-2], breaks):
            while start < stop:
                if start >= end:
                    begin, end, window = next(windows)
                until = min(stop, end)
                span = (start - begin, until - begin)
                state, sums = self._train(state, sums, window, *span, self._arrays)
                start = until
            yield Progress(state, jax.block_until_ready(sums), stop)

    def evaluate(self, params: Any, rows: np.ndarray) -> Sums:
        """Returns the sums over all examples of rows int32 [steps, B]."""
        sums = self._partial_sums(params)
        for _, _, window in self._feed.windows(self._mesh, rows, 0):
            sums = self._evaluate(params, sums, window, self._arrays)
        return self._total(sums)

    def evaluate_ensemble(self, params: Any, rows: np.ndarray, weights: np.ndarray) -> Sums:
        """Returns the sums of the members' mean prediction.

        Args:
          params: of S members.
          rows: int32 [steps, B].
          weights: float [S], of each member in the mean; their sum is 1. A member of weight 0
            has no influence, even if it is not finite.
        """
        ((_, _, window),) = self._feed.windows(self._mesh, rows, 0)
        return self._evaluate_ensemble(params, self._arrays, window, weights)

    def programs(
        self, state: TrainState, sums: Sums, rows: tuple[int, ...], held_out: tuple[int, ...]
    ) -> dict[str, jax.stages.Lowered]:
        """Returns "train", "evaluate" and "total", to be compiled before their first calls.

        Args:
          state, sums: shapes, dtypes and shardings, as `start` places them.
          rows: the shape of an epoch's rows.
          held_out: the shape of an evaluation's rows.
        """
        shapes = functools.partial(self._feed.window_shapes, self._mesh)
        partial = self._partial_sums(state.params)
        training, evaluation = shapes(rows, self._axes), shapes(held_out)
        return {
            "train": self._train.lower(state, sums, training, 0, 1, self._arrays),
            "evaluate": self._evaluate.lower(state.params, partial, evaluation, self._arrays),
            "total": self._total.lower(partial),
        }

    def _make_ensemble(self, system, over_mesh):
        feed = self._feed

        def classify(params, arrays, element):
            return jax.nn.softmax(system.apply(params, feed.batch(element, arrays).image))

        classify = over_mesh(classify, own=(P(),), shared=(P(), P("data")), out=P("data"))

        def evaluate(params, arrays, window, weights):
            def body(sums, element):
                is_in = (weights > 0).reshape(-1, 1, 1)
                probabilities = jnp.where(is_in, classify(params, arrays, element), 0)
                log_mean = jnp.log(jnp.tensordot(weights, probabilities, 1))
                batch = feed.batch(element, arrays)
                return sums + classification_sums(log_mean, batch.label, batch.mask), None

            return lax.scan(body, Sums.zeros(weights.dtype), window)[0]

        return evaluate

    def _jit(self, function, **options):
        compiler_options = _COMPILER_OPTIONS.get(self._mesh.devices.flat[0].platform)
        return jax.jit(function, compiler_options=compiler_options, **options)

    def _partial_sums(self, params):
        """No sums, for each member and device along "data"."""
        num_members = jax.tree.leaves(params)[0].shape[: len(self._axes)]
        sums = _no_sums(params, (*num_members, self._mesh.shape["data"]))
        return devices.spread(self._mesh, sums, *self._axes, "data")


def _no_sums(params, shape=()):
    return Sums.zeros(jax.tree.leaves(params)[0].dtype, shape)


def _spans(start: int, num_steps: int, breaks: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """Cuts an epoch into spans (start, stop), each as long as fits in half a second.

    No span goes beyond one of `breaks`. A few steps tell the pace: a short epoch is two calls,
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
