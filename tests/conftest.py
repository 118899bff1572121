"""Strict arithmetic, several fake devices and caches of programs, before JAX is imported."""

import gc
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import filelock
import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
MNIST = REPOSITORY.parent / "shared" / "data" / "mnist"

os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# What is compiled here runs briefly: quick compilers halve the time of many tests.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones refuse the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["KERAS_BACKEND"] = "jax"
# Where libtpu is installed, every process would look for a TPU and say that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the caches of the session
    _CACHES = tempfile.TemporaryDirectory(prefix="seqmnist-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHES.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHES.name}/jax"
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # every process would compile JAX's modules
        os.environ["PYTHONPYCACHEPREFIX"] = f"{_CACHES.name}/bytecode"
        sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Shells make background processes ignore interrupts, and their child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Fixtures that train: tests that use one of them are slow.
_TRAINED = {"finished_run", "together", "trained"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks tests as slow by their fixtures, before `-m` is evaluated."""
    for item in items:
        if _TRAINED.intersection(item.fixturenames):
            item.add_marker("slow")


def pytest_collection_finish():
    """Leaves what is imported and collected out of garbage collection: an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def seqmnist(*arguments, cwd=REPOSITORY, **environment):
    """Runs the command line as a user's shell does; returns what it printed, and its exit code."""
    # The devices that a user has.
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": QUICK, **environment}
    return subprocess.run(
        [sys.executable, "-m", "seqmnist.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def digits():
    """A toy dataset: images uint8 [130, 28, 28] that show their label, and labels int32."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 130, dtype=np.int32)
    images = rng.integers(0, 50, (130, 28, 28), dtype=np.uint8)
    images[np.arange(130), :, labels] = 255
    images[np.arange(130), labels + 10] = 255
    return images, labels


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all processes of this test session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def data_dir(shared_folder):
    """A folder with mnist_5k, prepared; tests must not change it."""
    from seqmnist.config import DataConfig
    from seqmnist.datasets import sources

    folder = shared_folder / "tensorflow_datasets"  # several processes may prepare it together
    sources.prepare(DataConfig("mnist_5k", folder))
    return folder


@pytest.fixture(scope="session")
def full_mnist(shared_folder):
    """A folder with full MNIST, prepared; tests must not change it."""
    from seqmnist.config import DataConfig
    from seqmnist.datasets import sources

    if not MNIST.is_dir():
        pytest.skip("the full MNIST archives are not on this machine")
    folder = shared_folder / "full_mnist"  # several processes may prepare it together
    sources.prepare(DataConfig("mnist", folder, MNIST))
    return folder


@pytest.fixture(scope="session")
def finished_run(shared_folder, data_dir):
    """The workdir of a network after an epoch over the 5,000 digits; tests must not change it."""
    from seqmnist import run
    from seqmnist.config import Config, DataConfig, ModelConfig, TrainConfig

    workdir = shared_folder / "finished" / "run"
    config = Config(
        data=DataConfig(name="mnist_5k", data_dir=str(data_dir)),
        model=ModelConfig(hidden_size=8),
        train=TrainConfig(num_epochs=1),
    )
    with filelock.FileLock(shared_folder / "finished.lock"):
        if not (workdir / "results.json").exists():
            run.train(config, workdir)
    return workdir
