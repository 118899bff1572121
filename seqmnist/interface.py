"""What Python users need besides the library's own functions: data as arrays, and batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.datasets import sources
from seqmnist.errors import UserError
from seqmnist.training import batches


def load_data(name: str = "auto", **settings: Any) -> sources.Prepared:
    """Loads a dataset, preparing it first if need be.

    `data.arrays("train")` and `data.arrays("test")` return images uint8 [N, *data.spec.shape], 0 to
    255, and labels int32 [N]. "train" is the whole training archive, whose tail `train` holds out
    for validation. `name` and `settings` are the fields of `config.data`, for example
    `load_data("npz", manual_dir="my.npz")`.

    Raises:
      UserError: the dataset is not available, or a field does not exist.
    """
    values = {f"data.{key}": x for key, x in {"name": name, **settings}.items()}
    config = config_lib.validated(config_lib.override(Config(), values))
    data = sources.prepare(config.data, print)
    if data.notice:
        print(f"NOTICE: {data.notice}")
    return data


def epoch_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int = 128, seed: int = 0, epoch: int = 0
) -> Iterator[batches.Batch]:
    """Returns each example once, in batches for `train_step`; the last one is padded.

    Takes images uint8 [N, …] and labels int [N]. The seed and the epoch, counted from 0, determine
    the order, the same in which `train` visits N training examples. Raises UserError if the arrays
    are not of these types, or not of one length.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if (
        images.dtype != np.uint8
        or labels.dtype.kind not in "iu"
        or labels.shape != images.shape[:1]
    ):
        raise UserError(
            "images uint8 [N, …], 0 to 255, and labels int [N] are needed; got "
            f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    config_lib.checked("train.batch_size", batch_size)
    labels = labels.astype(np.int32)
    records = batches.Records((images, labels), (images[:0], labels[:0]))
    order = batches.epoch_order(seed, epoch, len(labels))
    return map(records.read, batches.batch_rows(order, batch_size))
