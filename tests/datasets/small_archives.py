"""Small archives of known content, as a folder of four files."""

import gzip

import numpy as np

from seqmnist.datasets import archives


def make_splits(num_train=30, num_test=12, seed=0):
    rng = np.random.default_rng(seed)
    return archives.Splits(
        *(
            (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8))
            for n in (num_train, num_test)
        )
    )


def write_archives(folder, splits):
    folder.mkdir(exist_ok=True)
    for split, (images_name, labels_name) in archives.NAMES.items():
        images, labels = getattr(splits, split)
        (folder / images_name).write_bytes(idx(0x803, images))
        (folder / labels_name).write_bytes(idx(0x801, labels))
    return folder


def idx(magic, array):
    return gzip.compress(
        np.array([magic, *array.shape], ">u4").tobytes() + array.tobytes(), mtime=0
    )
