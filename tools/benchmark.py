"""Times this project against Keras 3 on JAX and PyTorch, where installed, in one run.

Example:
  python -m tools.benchmark --data_dir=DIR --json=benchmark.json --figure=benchmark.png

Contestants take turns, after a warm-up, and medians are compared; ratios below 1 mean that
ours is faster or smaller. Sections: `job`, the notebook's whole job as a process of its own;
`epoch`, steady training; `stream`, the same with streamed input, against the resident dataset;
`evaluate`, the test set; `growth`, ours by T, H and batch size;
`floor`, what the arithmetic alone would take at the rate of a large matrix product.

Measured on two CPU cores, and left out because it gains less than 5 % or loses:
  time steps written out (`scan.unroll`): none to 5 % slower, twice the time to compile;
  gates and states of a GRU or LSTM in the memory of their inputs, as `scans.ungated` does: XLA
    copies whole arrays at every time step, 1.4 times as slow for rows, 40 times for a GRU's pixels;
  a batch as two independent loops of one program: XLA runs them one after the other;
  `xla_cpu_use_fusion_emitters=false`: a third less to compile, 8 % more to train;
  `xla_cpu_prefer_vector_width=512`: no difference above the noise;
  Eigen's products instead of YNNPACK's (`xla_cpu_experimental_ynn_fusion_type=`): a sixth slower;
  an all-gather or a permutation of gradients instead of their all-reduce: no difference;
  a kernel's gradient as the sum of two halves of the time steps: 9 % slower;
  evaluation in batches of 512 instead of 128: no faster;
  reading the dataset beside compilation: the decoded copy is read in 1 % of a job's time;
  SciPy, which JAX's QR wants for orthogonal kernels, imported beside that reading: no difference.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from seqmnist.errors import UserError
from tools import cli
from tools.peers import NOTEBOOK

SECTIONS = ("job", "epoch", "stream", "evaluate", "growth", "floor")
CELLS = ("simple_rnn", "gru", "lstm")
# A case, and the steps of a timed stretch: an epoch of rows, a few steps of pixels.
CASES = {
    f"{cell} {view}": ({**NOTEBOOK, "cell": cell, "view": view, "hidden_size": size}, num_steps)
    for view, size, num_steps in (("rows", 64, 375), ("pixels", 128, 8))
    for cell in CELLS
}
GROWTH = {
    "T": [
        (784 // subsample, {**NOTEBOOK, "view": "pixels", "subsample": subsample})
        for subsample in (28, 14, 7, 4, 2, 1)
    ],
    "H": [(size, {**NOTEBOOK, "hidden_size": size}) for size in (64, 128, 256, 512, 1024)],
    "batch": [(size, {**NOTEBOOK, "batch_size": size}) for size in (32, 128, 512, 2048, 8192)],
}


class Worker:
    """A process that holds one peer ready and answers one request after the other."""

    def __init__(self, name, case, file):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.peers", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("make", case, str(file))

    def ask(self, *request):
        """Returns {"seconds", "peak_mib", "answer"}."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended while it did {request}")
        return json.loads(line)

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def time_in_turns(names, case, request, file, repeats):
    """Returns {name: {"seconds", "peak_mib"}}, medians over rounds in which all take turns."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = Worker(name, case, file)
            stack.callback(workers[name].close)
            workers[name].ask(*request)  # compiles
        rounds = [{n: w.ask(*request) for n, w in workers.items()} for _ in range(repeats)]
    return {
        name: {key: statistics.median(r[name][key] for r in rounds) for key in _MEASURES}
        for name in names
    }


def job(names, file, repeats, prepared):
    """Times whole processes, cold and with a warm compilation cache."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: ["tools.peers", name, f"--job={file}"] for name in names}
        commands["ours"] = ["seqmnist.main", "--config=experiments/notebook.py"]
        commands["ours"] += [f"--config.data.name={prepared.name}"]
        commands["ours"] += [f"--config.data.data_dir={prepared.directory.parents[2]}"]
        for i in range(repeats):
            figures = {}
            for state in ("cold", "warm"):
                for name, command in commands.items():
                    if (name, state) != ("torch", "warm"):
                        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache-{name}-{i}"}
                        workdir = [f"--workdir={folder}/{state}-{i}"] if name == "ours" else []
                        figures[f"{name}, {state}"] = _run([*command, *workdir], cache)
            runs.append(figures)
    return {
        name: {key: statistics.median(run[name][key] for run in runs) for key in _MEASURES}
        for name in runs[0]
    }


def growth(file, repeats, num_steps=6):
    """Times a training step of ours as one size grows: {"T": {size: seconds}, …}."""
    result = {}
    for what, cases in GROWTH.items():
        result[what] = {}
        for size, case in cases:
            with contextlib.closing(Worker("ours", case, file)) as worker:
                worker.ask("train", num_steps)
                worker.ask("steps", num_steps)
                seconds = [worker.ask("steps", num_steps)["seconds"] for _ in range(repeats)]
            result[what][size] = statistics.median(seconds) / num_steps
    return result


def floor(file, repeats):
    """Counts the arithmetic of a step of ours, and the share of its floor that is reached."""
    result = {}
    for name, (case, num_steps) in CASES.items():
        worker = Worker("ours", case, file)
        cost = worker.ask("cost")["answer"]
        worker.ask("train", num_steps)
        seconds = [worker.ask("train", num_steps)["seconds"] for _ in range(repeats)]
        worker.close()
        step = statistics.median(seconds) / num_steps
        least = cost["flops"] / cost["flops_per_second"]
        result[name] = cost | {"seconds": step, "floor_seconds": least, "share": least / step}
    return result


def ratios(figures):
    """Returns ours over each peer: {"section case / peer": {"seconds", "peak_mib"}}."""
    result = {}
    groups = {f"{s} {c}": g for s in _STEADY for c, g in figures.get(s, {}).items()}
    whole = figures.get("job", {})
    for state in ("cold", "warm"):
        if whole:
            theirs = {name: f for name, f in whole.items() if not name.startswith("ours")}
            groups[f"job {state}"] = {"ours": whole[f"ours, {state}"], **theirs}
    for group, entries in groups.items():
        for name, entry in entries.items():
            if name != "ours":
                ours = entries["ours"]
                result[f"{group} / {name}"] = {key: ours[key] / entry[key] for key in _MEASURES}
    return result


_MEASURES = ("seconds", "peak_mib")
_STEADY = ("epoch", "stream", "evaluate")


def _run(command, environment):
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
    )
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed: {message[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak_mib": usage.ru_maxrss / 1024}


def _main(arguments):
    sections = arguments.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        raise UserError(f"--sections: {sorted(unknown)[0]!r} is none of {', '.join(SECTIONS)}")
    prepared = cli.prepare_data(arguments)
    names = [name for name in ("keras", "torch") if importlib.util.find_spec(name)]
    repeats = 1 if arguments.quick else 5
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "images.npz"
        arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = prepared.arrays(split)
        np.savez(file, **arrays)
        cases = {n: c for n, c in CASES.items() if not arguments.quick or n.endswith("rows")}
        sides = ["ours", *names]
        if "job" in sections:
            figures["job"] = job(names, file, repeats, prepared)
        if "epoch" in sections:
            figures["epoch"] = {
                name: time_in_turns(sides, case, ["train", num_steps], file, repeats)
                for name, (case, num_steps) in cases.items()
            }
        if "stream" in sections:
            name = "simple_rnn rows"
            case, num_steps = CASES[name]
            loops = ["ours", "streamed"]
            times = time_in_turns(loops, case, ["train", num_steps], file, repeats)
            figures["stream"] = {name: {"ours": times["streamed"], "resident": times["ours"]}}
        if "evaluate" in sections:
            figures["evaluate"] = {
                name: time_in_turns(sides, case, ["evaluate"], file, repeats)
                for name, (case, _) in cases.items()
                if name.endswith("rows")
            }
        if "growth" in sections:
            figures["growth"] = growth(file, repeats)
        if "floor" in sections:
            figures["floor"] = floor(file, repeats)
    figures = {"ratios": ratios(figures), "dataset": prepared.name, **figures}
    _show(figures)
    if arguments.figure:
        _draw(figures, arguments.figure)
    return figures


def _show(figures):
    console = Console(highlight=False, width=100)

    def show(title, columns, rows):
        table = Table(*columns, title=title, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row))
        if rows:
            console.print(table)

    show(
        "Ours over a peer's; below 1, ours is better",
        ("what", "time", "memory"),
        [(name, *ratio.values()) for name, ratio in figures["ratios"].items()],
    )
    groups = {"job": figures.get("job", {})}
    groups |= {f"{s} {c}": g for s in _STEADY for c, g in figures.get(s, {}).items()}
    rows = [(group, name, *f.values()) for group, g in groups.items() for name, f in g.items()]
    show("Medians", ("what", "who", "seconds", "peak MiB"), rows)
    curves = figures.get("growth", {})
    rows = [(what, str(n), 1e3 * s) for what, curve in curves.items() for n, s in curve.items()]
    show("Growth of ours", ("of", "size", "ms a step"), rows)
    keys = ("flops", "bytes", "flops_per_second", "bytes_per_second", "seconds", "share")
    rows = [(name, *(f[key] for key in keys)) for name, f in figures.get("floor", {}).items()]
    show("Floor: FLOPs of a step over the rate of a large product", ("case", *keys), rows)


def _draw(figures, path):
    import matplotlib.pyplot as plt

    panels = figures.get("growth", {})
    canvas, axes = plt.subplots(1, 1 + len(panels), figsize=(5 * (1 + len(panels)), 4))
    first, *others = np.atleast_1d(axes)
    times = {name: ratio["seconds"] for name, ratio in figures["ratios"].items()}
    first.barh(list(times), list(times.values()))
    first.axvline(1, color="black", linewidth=1)
    first.set_xlabel("time of ours / theirs")
    for axis, (what, seconds) in zip(others, panels.items(), strict=True):
        axis.loglog(list(seconds), list(seconds.values()), marker="o")
        axis.set_xlabel(what)
        axis.set_ylabel("seconds a step")
    canvas.tight_layout()
    try:
        canvas.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--figure={path}: {error}") from None


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="one round, rows only")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="(default: %(default)s)")
    parser.add_argument("--figure", metavar="FILE", help="draw ratios and growth, e.g. to a PNG")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
