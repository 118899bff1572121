"""Batches: which examples a step sees, and how they reach the device.

All examples of a dataset have one numbering: the training archive first, then the test
archive. A split is a range of it. A batch is first of all its row of numbers, [B] int32,
where -1 marks padding; resident and streamed input both start from those rows, and so
visit the same examples in the same order.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist.errors import UserError
from seqmnist.training import devices, keys

PADDING = -1
CHUNK = 512  # most examples that are processed at once, except in training
WINDOW = 32  # batches that a stream brings at once; one by one, dispatch would take too long


class Batch(NamedTuple):
    """Examples on their way through a step."""

    image: jax.Array  # uint8 [B, H, W], or [B, H, W, channels]
    label: jax.Array  # int32 [B]
    mask: jax.Array  # bool [B]; False marks padding


def shapes(
    rows: tuple[int, ...], image: tuple[int, ...], sharding: jax.sharding.Sharding | None = None
) -> Batch:
    """Returns the shapes and dtypes of batches, of rows […, B] and images of a shape."""
    of = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return Batch(of((*rows, *image), np.uint8), of(rows, np.int32), of(rows, np.bool_))


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Joins arrays of one dtype along their first axis.

    The result begins at a multiple of 64 bytes: so all CPU devices share it, without a copy.
    """
    dtype, shape = parts[0].dtype, (sum(map(len, parts)), *parts[0].shape[1:])
    size = dtype.itemsize * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    joined = memory[start : start + size].view(dtype).reshape(shape)
    return np.concatenate(parts, out=joined)


def make_splits(num_train: int, num_test: int, validation_fraction: float) -> dict[str, range]:
    """Divides the examples of both archives into "train", "validation" and "test".

    Validation is the tail of the training archive, as in Keras. Raises UserError if nothing is left
    to train on.
    """
    boundary = math.floor(num_train * (1.0 - validation_fraction))
    if boundary == 0:
        raise UserError(
            f"config.data.validation_fraction={validation_fraction} leaves none of the "
            f"{num_train} training examples to train on; make it smaller"
        )
    return {
        "train": range(0, boundary),
        "validation": range(boundary, num_train),
        "test": range(num_train, num_train + num_test),
    }


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training set: int32 [size].

    It is that of `jax.random.permutation`, for sizes in the thousands, but sorted by NumPy, which
    takes a third of XLA's time on CPUs and compiles nothing.
    """
    order = np.arange(size, dtype=np.int32)
    for numbers in np.asarray(_numbers_to_sort_by(np.uint32(seed), epoch, size)):
        order = order[np.argsort(numbers, kind="stable")]
    return order


# Without optimization, and compiled while others are traced, as `run` does: a cold job of the
# notebook takes 0.96 of the time.
@functools.partial(
    jax.jit, static_argnums=2, compiler_options={"xla_backend_optimization_level": 0}
)
def _numbers_to_sort_by(seed, epoch, size):
    """Draws two rounds of sort keys, uint32 [2, size]: a single round may contain ties."""
    key, first = jax.random.split(keys.key(seed, "epoch_order", epoch))
    _, second = jax.random.split(key)
    return jnp.stack([jax.random.bits(subkey, (size,)) for subkey in (first, second)])


def num_batches(size: int, batch_size: int) -> int:
    """Returns how many batches hold `size` examples, the last one padded."""
    return -(-size // batch_size)


def batch_rows(order: Sequence[int], batch_size: int, steps: int | None = None) -> np.ndarray:
    """Cuts example numbers [N] into padded batches: int32 [steps, B], by default as few as fit."""
    steps = steps or num_batches(len(order), batch_size)
    padding = (0, steps * batch_size - len(order))
    order = np.pad(np.asarray(order, np.int32), padding, constant_values=PADDING)
    return order.reshape(steps, batch_size)


def take(images: jax.Array, labels: jax.Array, row: jax.Array) -> Batch:
    """Gathers the batch of a row int32 [B] from images uint8 [N, …] and labels int32 [N]."""
    mask = row != PADDING
    numbers = jnp.maximum(row, 0)
    return Batch(images[numbers], labels[numbers], mask)


def in_chunks(
    function: Callable[..., jax.Array], *arrays: np.ndarray, most: int = CHUNK, axis: int = 0
) -> np.ndarray:
    """Applies a function to any number of examples, in chunks of few sizes, to compile rarely.

    Takes arrays [N, …], N > 0, at most `most` examples at once; results have them along `axis`.
    """
    parts = []
    for start in range(0, len(arrays[0]), most):
        chunk = [array[start : start + most] for array in arrays]
        count = len(chunk[0])
        size = min(most, 1 << (count - 1).bit_length())
        padded = [np.concatenate([part, np.repeat(part[:1], size - count, 0)]) for part in chunk]
        parts.append(np.asarray(function(*padded)).take(range(count), axis))
    return np.concatenate(parts, axis)


class Records(NamedTuple):
    """All examples in the numbering of this module, for a streaming reader.

    An archive is images uint8 [N, …], which may be memory-mapped, and labels int32 [N].
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def read(self, row: np.ndarray) -> Batch:
        """Reads batches: int32 […, B] example numbers -> Batch of NumPy arrays […, B, …]."""
        numbers, mask = np.maximum(row, 0), row != PADDING
        shape = self.train[0].shape[1:]
        images, labels = np.empty((*row.shape, *shape), np.uint8), np.empty(row.shape, np.int32)
        first = 0
        for part_images, part_labels in self:
            here = (numbers >= first) & (numbers < first + len(part_labels))
            if here.all():  # as in training: copied once, not twice
                return Batch(part_images[numbers - first], part_labels[numbers - first], mask)
            images[here] = part_images[numbers[here] - first]
            labels[here] = part_labels[numbers[here] - first]
            first += len(part_labels)
        return Batch(images, labels, mask)


def stream(records: Records, rows: np.ndarray, mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """Reads windows of batches ahead of their use, in threads, and places them on devices.

    Yields a Batch of [WINDOW, B, …] for each WINDOW of rows int32 [steps, B]; the last one is
    filled up with padding. A process reads only the part of each batch that its devices hold.
    """
    import grain  # imported here: resident input never needs it

    rows = rows[:, devices.local_columns(mesh, rows.shape[1])]
    rows = np.pad(rows, ((0, -len(rows) % WINDOW), (0, 0)), constant_values=PADDING)
    rows = rows.reshape(-1, WINDOW, rows.shape[1])
    windows = grain.MapDataset.source(rows).map(records.read)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    place = jax.NamedSharding(mesh, jax.P(None, "data"))
    for window in windows.to_iter_dataset(options):
        yield jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), window)
