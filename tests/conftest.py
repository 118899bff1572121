"""Strict arithmetic and several fake devices, before anything imports JAX."""

import os
import pathlib

os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["KERAS_BACKEND"] = "jax"

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"


@pytest.fixture(scope="session")
def digits():
    """A toy dataset: images uint8 [130, 28, 28] that show their label, and labels int32."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 130, dtype=np.int32)
    images = rng.integers(0, 50, (130, 28, 28), dtype=np.uint8)
    images[np.arange(130), :, labels] = 255
    images[np.arange(130), labels + 10] = 255
    return images, labels
