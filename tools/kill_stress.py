"""Stops training runs at random moments by random signals, resumes them, and compares the results.

Example:
  python -m tools.kill_stress --kills=100 --data_dir=DIR

A moment may be anywhere in a run: start-up, training, saving, scoring, exit. The same command
resumes a run until it has finished. Then parameters, optimizer state, metrics (except seconds) and
scores must equal those of an uninterrupted run, bit for bit. No run may end with a traceback.
"""

import collections
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from seqmnist.errors import UserError
from seqmnist.workdir import Workdir
from tools import cli

SETTINGS = {"train.num_epochs": 12, "checkpoint.every_steps": 7, "data.name": "mnist_5k"}
KINDS = {
    "resident": {},
    "stream": {"data.input_mode": "stream"},
    "members": {"members.num": 2},
    "sweep": {"members.num": 2, "members.sweep": '{"optimizer.learning_rate": [0.001, 0.01]}'},
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
MOMENTS = ("start-up", "training", "scoring", "exit")


def start(workdir: pathlib.Path, data_dir: str | None, kind: str) -> subprocess.Popen:
    """Starts or resumes the run of `workdir`, one of `KINDS`."""
    settings = SETTINGS | KINDS[kind] | ({"data.data_dir": data_dir} if data_dir else {})
    command = [sys.executable, "-m", "seqmnist.main", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns everything of a finished run that must not depend on how often it was interrupted."""
    import orbax.checkpoint as ocp  # imported here: command lines answer --help without it

    run = Workdir(workdir)
    metrics, results = run.read_metrics(), run.read_results()
    for line in metrics:
        del line["seconds"]
    checkpoint = run.path / "checkpoints" / str(results["steps"]) / "arrays"
    arrays = ocp.StandardCheckpointer().restore(checkpoint)
    return {
        "metrics": metrics,
        "scores": [results.get(name) for name in ("validation", "test", "settings", "ensemble")],
        "arrays": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)],
    }


def _moment(workdir):
    """Returns what a run was doing; the start of a resumed one counts as training."""
    metrics = workdir / "metrics.jsonl"
    if not metrics.exists():
        return "start-up"
    if len(metrics.read_text().splitlines()) < SETTINGS["train.num_epochs"]:
        return "training"
    return "exit" if (workdir / "results.json").exists() else "scoring"


def _finish(process, number=0, seconds=None):
    """Ends a run by a signal, unless it finishes within some seconds; returns its exit code."""
    try:
        _, message = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, message = process.communicate()
    except BaseException:  # the folder will be removed
        process.kill()
        process.wait()
        raise
    # SIGINT can reach Python's own start-up, whose traceback names no file of this project.
    is_ours = "Traceback" in message and "seqmnist" in message
    if is_ours or process.returncode not in {0, 128 + number, -number}:
        raise UserError(f"a run ended with exit code {process.returncode}: {message[-500:]}")
    return process.returncode


def _stress(folder, arguments, names, kills):
    """Counts `kills` by signal and moment; returns the number of runs and what differed."""
    generator, num_runs, different = random.Random(arguments.seed), 0, []
    references, durations = {}, {}

    def finish(workdir, kind, number=0, seconds=None):
        began, is_new = time.monotonic(), not workdir.exists()
        code = _finish(start(workdir, arguments.data_dir, kind), number, seconds)
        if code == 0 and is_new:  # the first of a kind also fills the cache of programs
            lasted = time.monotonic() - began
            durations[kind] = min(lasted, durations.get(kind, lasted))
        return code

    while kills.total() < arguments.kills:
        kind = list(KINDS)[num_runs % len(KINDS)]
        if kind not in references:
            finish(folder / kind, kind)
            references[kind] = outcome(folder / kind)
            # Streamed input must give what resident input does.
            if kind == "stream" and references[kind] != references["resident"]:
                different.append("stream, uninterrupted")
        workdir = folder / f"{kind}-{num_runs}"
        for _ in range(10):  # kills per run at most
            name, seconds = generator.choice(names), generator.uniform(0, durations[kind])
            if finish(workdir, kind, getattr(signal, name), seconds) == 0:
                break
            kills[name, _moment(workdir)] += 1
            if kills.total() == arguments.kills:
                break
        _finish(start(workdir, arguments.data_dir, kind))
        num_runs += 1
        if outcome(workdir) != references[kind]:
            different.append(f"{kind}, run {num_runs}")
        print(f"{kills.total()} kills, {num_runs} runs, {len(different)} different", flush=True)
    return num_runs, different


def _main(arguments):
    names = arguments.signals.split(",")
    if not set(names) <= set(SIGNALS):
        raise UserError(f"--signals={arguments.signals} must be some of {','.join(SIGNALS)}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # child processes would ignore it, too
            signal.signal(number, signal.SIG_DFL)
    kills = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        num_runs, different = _stress(pathlib.Path(temporary), arguments, names, kills)
    for name in names:
        print(f"{name}: " + ", ".join(f"{kills[name, moment]} {moment}" for moment in MOMENTS))
    print(f"{num_runs} runs were interrupted and resumed; different: {different or 'none'}")
    if different:
        raise UserError("resumed runs differ from uninterrupted ones; see above")
    counts = {name: {moment: kills[name, moment] for moment in MOMENTS} for name in names}
    return {"kills": counts, "runs": num_runs, "different": different}


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--kills", type=cli.positive, default=100, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random moments (default: %(default)s)"
    )
    parser.add_argument("--data_dir", help="as --config.data.data_dir")
    parser.add_argument(
        "--signals", default=",".join(SIGNALS), help="to send (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
