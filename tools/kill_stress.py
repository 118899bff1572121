"""Kills training runs at random moments, resumes them, and compares what comes out, bit for bit.

Example:
  python -m tools.kill_stress --kills=100 --data_dir=DIR

For each way of input, one run is left alone; others are killed by SIGKILL at random moments, while
they start, compile, train or write a checkpoint, and started again by the same command until they
finish. Parameters, optimizer state, metrics (but for seconds) and scores must be equal.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import logging
from rich.console import Console

from seqmnist import checkpoints as checkpoint_lib
from seqmnist import records
from seqmnist.errors import UserError
from tools import cli

SETTINGS = {"train.num_epochs": 30, "checkpoint.every_steps": 7, "data.name": "mnist_5k"}
INPUT_MODES = ("resident", "stream")


def start(workdir: pathlib.Path, data_dir: str | None, input_mode: str) -> subprocess.Popen:
    """Starts, or goes on with, the run of `workdir`."""
    settings = {**SETTINGS, "data.input_mode": input_mode}
    if data_dir:
        settings["data.data_dir"] = data_dir
    return subprocess.Popen(
        [sys.executable, "-m", "seqmnist.main", f"--workdir={workdir}"]
        + [f"--config.{name}={value}" for name, value in settings.items()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(workdir: pathlib.Path) -> dict:
    """Returns all that must not depend on how often a run was killed."""
    import orbax.checkpoint as ocp

    logging.set_verbosity(logging.ERROR)
    lines = [json.loads(line) for line in (workdir / records.METRICS).read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    results = records.read_json(workdir / records.RESULTS)
    with ocp.CheckpointManager(
        workdir / checkpoint_lib.DIRECTORY, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        step = manager.latest_step()
        folder = workdir / checkpoint_lib.DIRECTORY / str(step) / "arrays"
    arrays = ocp.StandardCheckpointer().restore(folder)
    return {
        "metrics": lines,
        "scores": [results["validation"], results["test"]],
        "step": step,
        "arrays": [np.asarray(leaf).tobytes() for leaf in _leaves(arrays)],
    }


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _finish(process):
    _, message = process.communicate()
    if process.returncode:
        raise UserError(f"a run ended with exit code {process.returncode}: {message[-500:]}")


def _moment(workdir):
    """Says what a process was doing, from what its workdir holds."""
    folder = workdir / checkpoint_lib.DIRECTORY
    if not folder.is_dir():
        return "before training"
    names = [path.name for path in folder.iterdir()]
    return "while a checkpoint was written" if any("tmp" in n for n in names) else "later"


def _main(arguments):
    console, generator = Console(highlight=False), random.Random(arguments.seed)
    kills, runs, different = {}, 0, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        references, durations = {}, {}
        for mode in INPUT_MODES:
            _finish(start(folder / mode, arguments.data_dir, mode))  # fills the caches
            began = time.monotonic()
            _finish(start(folder / f"{mode}-again", arguments.data_dir, mode))
            durations[mode] = time.monotonic() - began
            references[mode] = outcome(folder / mode)
            if outcome(folder / f"{mode}-again") != references[mode]:
                different.append(f"{mode}, left alone")
        if references["stream"] != references["resident"]:
            different.append("stream and resident")
        while sum(kills.values()) < arguments.kills:
            mode = INPUT_MODES[runs % 2]
            workdir = folder / f"{mode}-{runs}"
            for _ in range(10):
                began = time.monotonic()
                process = start(workdir, arguments.data_dir, mode)
                try:
                    process.wait(generator.uniform(0.1, 0.9) * durations[mode])
                    durations[mode] = time.monotonic() - began  # the machine is faster than before
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    moment = _moment(workdir)
                    kills[moment] = kills.get(moment, 0) + 1
            else:
                process = start(workdir, arguments.data_dir, mode)
            _finish(process)
            runs += 1
            if outcome(workdir) != references[mode]:
                different.append(f"{mode}, run {runs}")
            console.print(
                f"{sum(kills.values())} kills, {runs} runs, {len(different)} different", end="\r"
            )
    console.print(f"{sum(kills.values())} kills: {kills}")
    console.print(
        f"{runs} runs were killed and resumed; different from one left alone: {different}"
    )
    if different:
        raise UserError("resumed runs differ from undisturbed ones; see above")
    return {"kills": kills, "runs": runs, "different": different, "cores": os.cpu_count()}


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--kills", type=cli.positive, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--data_dir", help="as --config.data.data_dir")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
