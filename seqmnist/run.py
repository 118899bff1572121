"""A run: data, state, loop, checkpoint and records composed. The one place that knows all."""

import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from seqmnist import checkpoint, data, profiling, records
from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.datasets import sources
from seqmnist.display import Display
from seqmnist.errors import UserError
from seqmnist.loop import Loop, Resident, Streamed
from seqmnist.steps import System, init_state, make_system
from seqmnist.views import permutation, permutation_sha256, sequence_shape


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a network, and writes its configuration, metrics, parameters and results.

    Args:
      config: the configuration.
      workdir: where everything is written; made if it does not exist.

    Returns:
      What `results.json` holds.

    Raises:
      UserError: the configuration, the data or the workdir cannot be used.
    """
    began = time.monotonic()
    display = Display()
    make_system(config, num_steps=1)  # what names nothing is refused before data is fetched
    _check_workdir(workdir)
    dataset = _prepare(config, display)
    splits = _splits(config, dataset)
    steps_per_epoch = data.num_batches(len(splits["train"]), config.train.batch_size)
    system = make_system(config, config.train.num_epochs * steps_per_epoch)
    profile = profiling.Profile(config, workdir, config.train.num_epochs * steps_per_epoch)
    loop = _make_loop(config, system, dataset)
    rows = _evaluation_rows(config, splits)
    state = jax.jit(lambda: init_state(config, system, config.seed))()
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    _make_workdir(workdir)
    display.setup(config, dataset, splits, state.params)
    records.write_json(workdir / records.CONFIG, config_lib.to_dict(config))
    (workdir / records.METRICS).write_text("")
    train_began = time.monotonic()
    for epoch in range(config.train.num_epochs):
        epoch_began = time.monotonic()
        title = f"Epoch {epoch + 1}/{config.train.num_epochs}"
        order = data.epoch_order(config.seed, epoch, len(splits["train"]))
        epoch_rows = data.batch_rows(order, config.train.batch_size)
        with display.epoch(title, len(epoch_rows)) as update:
            first = epoch * steps_per_epoch
            progresses = loop.train(state, epoch_rows, profile.breaks(first))
            for progress in profile.follow(progresses, first, steps_per_epoch):
                update(progress.step, progress.sums.means())
        state = progress.state
        means = {"train": progress.sums.means(), "validation": {"loss": None, "accuracy": None}}
        if splits["validation"]:
            means["validation"] = loop.evaluate(state.params, rows["validation"]).means()
        record = {
            "epoch": epoch + 1,
            "step": int(state.step),
            **{f"{name}/{key}": x for name, values in means.items() for key, x in values.items()},
            "seconds": round(time.monotonic() - epoch_began, 3),
        }
        records.append_line(workdir / records.METRICS, record)
        display.epoch_line(title, len(epoch_rows), record)
    train_seconds = time.monotonic() - train_began

    test = loop.evaluate(state.params, rows["test"]).means()
    checkpoint.save(workdir, state)
    results = {
        "dataset": _describe(dataset, splits),
        "sequence": _describe_sequence(config.model),
        "parameters": num_parameters,
        "epochs": config.train.num_epochs,
        "steps": int(state.step),
        "validation": means["validation"],
        "test": test,
        "seconds": {
            "total": round(time.monotonic() - began, 3),
            "train": round(train_seconds, 3),
        },
        "devices": [f"{device.platform}:{device.id}" for device in jax.devices()],
        "versions": records.versions(),
    }
    records.write_json(workdir / records.RESULTS, results)
    display.test_line(results["dataset"], test)
    return results


def evaluate(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Scores the parameters that a workdir holds on the test set; writes nothing.

    Args:
      config: the workdir's configuration.
      workdir: where `train` has written.

    Returns:
      {"loss", "accuracy"}.

    Raises:
      UserError: the workdir holds no usable checkpoint, or the data cannot be had.
    """
    system = make_system(config, num_steps=1)
    like = jax.eval_shape(lambda: init_state(config, system, config.seed))
    display = Display()
    state = checkpoint.restore(workdir, like)
    dataset = _prepare(config, display)
    splits = _splits(config, dataset)
    loop = _make_loop(config, system, dataset)
    test = loop.evaluate(state.params, _evaluation_rows(config, splits)["test"]).means()
    display.test_line(_describe(dataset, splits), test)
    return test


def _check_workdir(workdir):
    """Refuses early, before anything is made or downloaded, what `_make_workdir` would refuse."""
    nearest = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--workdir={workdir}: {nearest} is not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {nearest} is not writable; choose another")


def _make_workdir(workdir):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made ({error.strerror}); choose another"
        ) from None


def _prepare(config, display):
    return sources.prepare(
        config.data.name,
        data_dir=config.data.data_dir,
        manual_dir=config.data.manual_dir,
        verify_checksums=config.data.verify_checksums,
        say=display.say,
    )


def _splits(config, dataset):
    return data.make_splits(
        dataset.num_examples("train"),
        dataset.num_examples("test"),
        config.data.validation_fraction,
    )


def _make_loop(config: Config, system: System, dataset: sources.Prepared) -> Loop:
    if config.data.input_mode == "stream":
        return Streamed(system, data.Records(dataset.records("train"), dataset.records("test")))
    images, labels = zip(*(dataset.arrays(split) for split in ("train", "test")), strict=True)
    return Resident(system, np.concatenate(images), np.concatenate(labels))


def _evaluation_rows(config, splits):
    """Rows of both evaluations, padded to one shape so that they compile once."""
    most = max(len(splits[name]) for name in ("validation", "test"))
    return {
        name: data.batch_rows(
            np.pad(splits[name], (0, most - len(splits[name])), constant_values=data.PADDING),
            config.train.batch_size,
        )
        for name in ("validation", "test")
    }


def _describe(dataset, splits):
    return {
        "name": dataset.name,
        "requested": dataset.requested,
        "notice": dataset.notice,
        "fingerprint": dataset.fingerprint,
        **{name: len(split) for name, split in splits.items()},
    }


def _describe_sequence(model):
    num_steps, num_features = sequence_shape(model)
    description = {"view": model.view, "time_steps": num_steps, "features": num_features}
    if model.view == "permuted_pixels":
        description["permutation_sha256"] = permutation_sha256(permutation())
    return description
