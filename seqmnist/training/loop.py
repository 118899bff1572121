"""Epochs: compiled calls over many steps, and evaluation. The one place that donates.

A `Loop` takes its batches from a feed: `Resident` keeps the dataset in device memory, `Streamed`
brings batches from a reader. Both visit the same batches and give the same parameters and scores,
bit for bit. A window holds consecutive batches, placed by a sharding that splits them along the
mesh axis "data"; rows are example numbers, int32 [steps, B], or [S, steps, B] for S members.
"""

import bisect
import functools
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P, lax

from seqmnist.training import batches, devices
from seqmnist.training.metrics import Sums, classification_sums
from seqmnist.training.steps import System, TrainState, eval_step, guarded_step

# Higher LLVM levels generate copy loops that run at half the speed. On rows, SimpleRNN(64) trains
# a tenth faster at this level, a minimal GRU a sixth, an LRU 3 % slower; on pixels there is no
# difference; everything compiles sooner.
_COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 1}}


class Progress(NamedTuple):
    """Where an epoch stands after `step` of its steps.

    `sums` are over the examples so far, each as it was before its update; see `guarded_step` for
    what is not finite. `last` are those of the last step alone, None before the first.
    """

    state: TrainState
    sums: Sums
    step: int
    last: Sums | None = None


class Resident(NamedTuple):
    """A feed from a dataset in device memory: images uint8 [N, …] and labels int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def arrays(self) -> Any:
        """What all steps read, and every device holds."""
        return self.images, self.labels

    def windows(
        self, rows: np.ndarray, first: int, place: NamedSharding
    ) -> Iterator[tuple[int, int, Any]]:
        """Yields (begin, end, window) for the steps from `first` on."""
        yield 0, rows.shape[-2], devices.place(rows, place)

    def window_shapes(self, rows: tuple[int, ...], place: NamedSharding) -> Any:
        """Returns shapes, dtypes and shardings of the windows of rows of this shape."""
        return jax.ShapeDtypeStruct(rows, np.int32, sharding=place)

    def batch(self, element: Any, arrays: Any) -> batches.Batch:
        """Returns a batch, inside a compiled call, from its element of a window."""
        return batches.take(*arrays, element)


class Streamed(NamedTuple):
    """A feed from a reader, with the members of `Resident`; it reads while the device computes."""

    records: batches.Records

    @property
    def arrays(self):
        return ()

    def windows(self, rows, first, place):
        for window in batches.stream(self.records, rows[first:], place.mesh):
            yield first, first + batches.WINDOW, window
            first += batches.WINDOW

    def window_shapes(self, rows, place):
        image = self.records.train[0].shape[1:]
        return batches.shapes((batches.WINDOW, rows[-1]), image, place)

    def batch(self, element, arrays):
        return element


class Loop:
    """Runs epochs and evaluations of a system on a mesh, by default of one device.

    With members, states, sums and rows of training have a leading axis S, which is spread over
    the mesh; rows of an evaluation are common to all members. `placement` is that of states and
    sums. Nothing is placed before a first step, so the mesh may be of devices that are only
    described, to compile for.
    """

    def __init__(
        self,
        system: System,
        feed: Resident | Streamed,
        mesh: jax.sharding.Mesh | None = None,
        has_members: bool = False,
    ):
        self._feed, self._mesh = feed, mesh or devices.make_mesh(1, 1)
        self._axes = ("member",) if has_members else ()
        self.placement = NamedSharding(self._mesh, P(*self._axes))
        self._train_place = NamedSharding(self._mesh, P(*self._axes, None, "data"))
        self._evaluation_place = NamedSharding(self._mesh, P(None, "data"))
        self._partial_place = NamedSharding(self._mesh, P(*self._axes, "data"))
        self._everywhere = NamedSharding(self._mesh, P())
        over_mesh = functools.partial(devices.over_mesh, mesh=self._mesh, has_members=has_members)
        compiler_options = _COMPILER_OPTIONS.get(self._mesh.devices.flat[0].platform)
        jit = functools.partial(jax.jit, compiler_options=compiler_options)

        def train(state, sums, window, start, stop, arrays):
            def body(i, carry):
                batch = feed.batch(jax.tree.map(lambda x: x[i], window), arrays)
                return guarded_step(system, *carry[:2], batch, "data")

            carry = (state, sums, jax.tree.map(jnp.zeros_like, sums))
            return lax.fori_loop(start, stop, body, carry)

        def evaluate(params, sums, window, arrays):
            def body(sums, element):
                return sums + eval_step(system, params, feed.batch(element, arrays)), None

            return lax.scan(body, sums, window)[0]

        batch, all_alike = P(None, "data"), (P(), P(), P())
        train = over_mesh(
            train, member_specs=(P(), P(), batch), shared_specs=all_alike, out_specs=P()
        )
        # Each device keeps sums of its own, [1].
        evaluate = over_mesh(
            evaluate,
            member_specs=(P(), P("data")),
            shared_specs=(batch, P()),
            out_specs=P("data"),
        )
        self._train = jit(train, donate_argnums=(0, 1), out_shardings=self.placement)
        self._evaluate = jit(evaluate, donate_argnums=1)
        self._evaluate_ensemble = jit(_make_ensemble(system, feed, over_mesh))

    def start(self, state: TrainState, sums: Sums | None = None) -> Progress:
        """Returns the beginning of an epoch, with the members of `sums` that diverged marked."""
        no_sums = Sums.zeros(_dtype(state.params), state.step.shape)
        sums = no_sums if sums is None else devices.gather(sums).restart()
        return Progress(*devices.place((state, sums), self.placement), 0)

    def train(
        self, progress: Progress, rows: np.ndarray, breaks: Collection[int] = ()
    ) -> Iterator[Progress]:
        """Takes a step for each row from `progress.step` on; donates the state.

        Reports about twice a second, and when `step` is one of `breaks`.
        """
        state, sums, first, _ = progress
        windows, end = self._feed.windows(rows, first, self._train_place), -1
        for start, stop in _spans(first, rows.shape[-2], breaks):
            while start < stop:
                if start >= end:
                    begin, end, window = next(windows)
                until = min(stop, end)
                span = (start - begin, until - begin)
                state, sums, last = self._train(state, sums, window, *span, self._arrays)
                start = until
            yield Progress(state, jax.block_until_ready(sums), stop, last)

    def evaluate(self, params: Any, rows: np.ndarray) -> Sums:
        """Returns the sums over all examples of rows int32 [steps, B], in NumPy."""
        sums = devices.place(self._partial_sums(params), self._partial_place)
        for _, _, window in self._feed.windows(rows, 0, self._evaluation_place):
            sums = self._evaluate(params, sums, window, self._arrays)
        return jax.tree.map(lambda x: x.sum(-1, dtype=x.dtype), devices.gather(sums))

    def evaluate_ensemble(self, params: Any, rows: np.ndarray, weights: np.ndarray) -> Sums:
        """Returns the sums of the mean prediction of S members over rows int32 [steps, B].

        `weights`, float [S], are those of the mean, with a sum of 1. A member of weight 0 has no
        influence, even if it is not finite. The feed must be `Resident`.
        """
        ((_, _, window),) = self._feed.windows(rows, 0, self._evaluation_place)
        weights = np.asarray(weights, _dtype(params))
        return self._evaluate_ensemble(params, self._arrays, window, weights)

    def programs(
        self, state: TrainState, sums: Sums, rows: tuple[int, ...], held_out: tuple[int, ...]
    ) -> dict[str, jax.stages.Traced]:
        """Returns "train" and "evaluate", to be compiled before their first calls.

        `state` and `sums` are shapes, dtypes and shardings, as `start` places them; `rows` and
        `held_out` the shapes of an epoch's rows and an evaluation's.
        """
        arrays = devices.placed_shapes(self._feed.arrays, self._everywhere)
        partial = devices.placed_shapes(self._partial_sums(state.params), self._partial_place)
        training = self._feed.window_shapes(rows, self._train_place)
        evaluation = self._feed.window_shapes(held_out, self._evaluation_place)
        return {
            "train": self._train.trace(state, sums, training, 0, 1, arrays),
            "evaluate": self._evaluate.trace(state.params, partial, evaluation, arrays),
        }

    @functools.cached_property
    def _arrays(self):
        return devices.place(self._feed.arrays, self._everywhere)

    def _partial_sums(self, params):
        """No sums, for each member and device along "data", in NumPy."""
        num_members = jax.tree.leaves(params)[0].shape[: len(self._axes)]
        return Sums.zeros(_dtype(params), (*num_members, self._mesh.shape["data"]))


def _make_ensemble(system, feed, over_mesh):
    def classify(params, arrays, element):
        return jax.nn.log_softmax(system.apply(params, feed.batch(element, arrays).image))

    classify = over_mesh(
        classify, member_specs=(P(),), shared_specs=(P(), P("data")), out_specs=P("data")
    )

    def evaluate(params, arrays, window, weights):
        def body(sums, element):
            each, batch = classify(params, arrays, element), feed.batch(element, arrays)
            # In logarithms: probabilities may be too small. Weights of 0 leave out even NaN.
            log_mean = jax.nn.logsumexp(each, axis=0, b=weights.reshape(-1, 1, 1))
            return sums + classification_sums(log_mean, batch.label, batch.mask), None

        return lax.scan(body, Sums.zeros(weights.dtype), window)[0]

    return evaluate


def _dtype(params):
    return jax.tree.leaves(params)[0].dtype


def _spans(start: int, num_steps: int, breaks: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """Cuts an epoch into spans (start, stop), each as long as fits in half a second.

    No span goes beyond one of `breaks`. A few steps tell the pace: a short epoch is two calls,
    and a long one can show its progress and answer a signal.
    """
    size, ends = 8, sorted({*breaks, num_steps})
    while start < num_steps:
        began = time.monotonic()
        stop = min(start + size, ends[bisect.bisect(ends, start)])
        yield start, stop
        pace = (stop - start) / max(time.monotonic() - began, 1e-9)
        # Agreed on, or processes would reduce gradients of different steps.
        size = devices.agree(max(1, int(min(pace / 2, num_steps))))
        start = stop
