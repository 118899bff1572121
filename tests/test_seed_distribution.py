"""Many seeds trained by the tool are the lone runs of those seeds."""

import numpy as np
import pytest

from seqmnist import run
from seqmnist.config import Config, DataConfig, ModelConfig, TrainConfig
from seqmnist.datasets import sources
from seqmnist.training import batches
from tools import seed_distribution


def test_seeds_score_as_their_runs_do(data_dir, tmp_path):
    config = Config(
        data=DataConfig(name="mnist_5k", data_dir=str(data_dir)),
        model=ModelConfig(hidden_size=8),
        train=TrainConfig(num_epochs=2),
    )
    prepared = sources.prepare(
        "mnist_5k", data_dir=str(data_dir), manual_dir=None, verify_checksums=True
    )
    arrays = zip(*(prepared.arrays(split) for split in ("train", "test")), strict=True)
    splits = batches.make_splits(4000, 1000, 0.2)
    seeds = np.arange(2, dtype=np.uint32)
    scores = seed_distribution.train_here(config, seeds, *map(np.concatenate, arrays), splits)
    alone = run.train(config, tmp_path / "alone")["test"]
    for name, values in scores.items():
        assert values[0] == pytest.approx(alone[name], abs=2e-3)
        assert values[0] != values[1]
