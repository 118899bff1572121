"""Times this project against Flax, Keras 3 on JAX and PyTorch, and an earlier version of itself.

Example:
  python -m tools.benchmark --json=benchmark.json --figure=benchmark.png
  python -m tools.benchmark --sections=job,epoch --baseline=CHECKOUT

Contestants take turns, and medians are compared; a ratio below 1 means that ours is faster or
smaller. Keras and PyTorch take part if they are installed, `torch.compile` if g++ is, too.
Sections: `job`, the notebook's whole job as a process, with an empty compilation cache (cold) and a
filled one (warm); `epoch`, training; `stream`, streamed against resident input; `evaluate`, the
test set; `growth`, a step of ours by T, H and batch size; `floor`, how close a step comes to the
time of its matrix products alone; `cells`, a step of every cell. CHECKOUT is a folder with another
version of this project, the contestant "baseline".
"""

# Measured on two CPU cores and left out, because it gains less than 5 % or loses:
#   gates and states of a GRU or LSTM in place of their inputs (XLA copies whole arrays per time
#     step): 1.4 times as slow for rows, 40 times for a GRU's pixels;
#   a batch as two independent loops of one program (XLA runs them in turn): no faster;
#   `xla_cpu_use_fusion_emitters=false`: compiles a third faster, trains 8 % slower;
#   `xla_cpu_prefer_vector_width=512`; an all-gather or a permutation of gradients instead of an
#     all-reduce; evaluation in batches of 512; reading data while compiling: no difference;
#   Eigen's products (`xla_cpu_experimental_ynn_fusion_type=`): a sixth slower than YNNPACK's;
#   a kernel's gradient as the sum of two halves of the time steps: 9 % slower.

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

from seqmnist import paths
from seqmnist.errors import UserError, explain_storage
from tools import cli
from tools.peers import NOTEBOOK, PEERS

CELLS = ("simple_rnn", "gru", "lstm")
# A case, and the steps of a timed part: an epoch of rows, a few steps of pixels.
CASES = {
    f"{cell} {view}": ({**NOTEBOOK, "cell": cell, "view": view, "hidden_size": size}, num_steps)
    for view, size, num_steps in (("rows", 64, 375), ("pixels", 128, 8))
    for cell in CELLS
}
_PIXELS = {**NOTEBOOK, "view": "pixels"}
GROWTH = {
    "T": {784 // n: {**_PIXELS, "subsample": n} for n in (28, 14, 7, 4, 2, 1)},
    "H": {n: {**NOTEBOOK, "hidden_size": n} for n in (64, 128, 256, 512, 1024)},
    "batch": {n: {**NOTEBOOK, "batch_size": n} for n in (32, 128, 512, 2048, 8192)},
}
_MEASURES = ("seconds", "peak_mib")
_MODULES = {"ours": "seqmnist", "torch.compile": "torch"}  # of peers with other names
_ROOT = pathlib.Path(__file__).parents[1]


class Setup(NamedTuple):
    """What is measured, and how often."""

    file: pathlib.Path  # the images as .npz, for all contestants
    data: list[str]  # the flags that name them
    folders: dict[str, pathlib.Path]  # of contestants, from which they import this project
    cases: dict[str, tuple[dict, int]]  # of CASES
    rounds: int

    def start(self, name, arguments, cache="cache", **options):
        """Starts a Python process of a contestant, with a compilation cache of its own."""
        root, cache = str(self.folders.get(name, _ROOT)), self.file.with_name(f"{cache}-{name}")
        caches = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        variables = {"PYTHONPATH": root} | dict.fromkeys(caches, str(cache))
        command, environment = [sys.executable, "-m", *arguments], {**os.environ, **variables}
        return subprocess.Popen(command, cwd=root, env=environment, text=True, **options)


@contextlib.contextmanager
def _ended(process):
    """Yields a process, which does not outlive an interruption."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@contextlib.contextmanager
def worker(setup, name, case):
    """Yields a function that sends a request to a contestant in a process of its own.

    It returns {"seconds", "peak_mib", "answer"}.
    """
    arguments = ["tools.peers", "ours" if name == "baseline" else name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _ended(setup.start(name, arguments, **pipes)) as process:

        def ask(*request):
            print(json.dumps(request), file=process.stdin, flush=True)
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"a contestant ended during {request}")
            return json.loads(line)

        ask("make", case, str(setup.file))
        yield ask


def time_in_turns(setup, names, case, request):
    """Returns {name: {"seconds", "peak_mib"}}, medians over rounds in which all take turns."""
    with contextlib.ExitStack() as stack:
        asks = {name: stack.enter_context(worker(setup, name, case)) for name in names}
        num_rounds = 1 + setup.rounds  # the first one compiles
        rounds = [{name: ask(*request) for name, ask in asks.items()} for _ in range(num_rounds)]
    return {name: _medians([each[name] for each in rounds[1:]]) for name in names}


def job(setup):
    """Times whole processes: {"cold" or "warm": {name: {"seconds", "peak_mib"}}}."""
    runs = {"cold": {}, "warm": {}}
    ours = ["seqmnist.main", "--config=experiments/notebook.py", *setup.data]
    with tempfile.TemporaryDirectory() as folder:
        for i, state, name in itertools.product(range(setup.rounds), runs, setup.folders):
            if (name, state) != ("torch", "warm"):  # it has no cache
                arguments = ["tools.peers", name, f"--job={setup.file}"]
                if name in ("ours", "baseline"):
                    arguments = [*ours, f"--workdir={folder}/{name}-{state}-{i}"]
                measured = _time_process(setup, name, arguments, f"cache-of-round-{i}")
                runs[state].setdefault(name, []).append(measured)
    return {state: {n: _medians(m) for n, m in times.items()} for state, times in runs.items()}


def epoch(setup):
    """Times training: {case: {name: {"seconds", "peak_mib"}}}."""
    return {
        name: time_in_turns(setup, setup.folders, case, ["train", num_steps])
        for name, (case, num_steps) in setup.cases.items()
    }


def stream(setup):
    """Times streamed input, as "ours", and "resident" input."""
    case, num_steps = CASES["simple_rnn rows"]
    times = time_in_turns(setup, ["ours", "streamed"], case, ["train", num_steps])
    return {"simple_rnn rows": {"ours": times["streamed"], "resident": times["ours"]}}


def evaluate(setup):
    """Times the test set, read by rows."""
    return {
        name: time_in_turns(setup, setup.folders, case, ["evaluate"])
        for name, (case, _) in setup.cases.items()
        if case["view"] == "rows"
    }


def growth(setup):
    """Times a training step of ours as one size grows: {"T": {T: seconds}, …}."""
    return {
        what: {size: _time_step(setup, case, 6)["seconds"] for size, case in cases.items()}
        for what, cases in GROWTH.items()
    }


def floor(setup):
    """Compares a training step of ours with the time of its matrix products alone."""
    result = {}
    for name, (case, num_steps) in setup.cases.items():
        step = _time_step(setup, case, num_steps, with_cost=True)
        least = step["flops"] / step["flops_per_second"]
        result[name] = step | {"floor_seconds": least, "share": least / step["seconds"]}
    return result


def cells(setup):
    """Times a training step of each cell on pixels, in seconds."""
    from seqmnist.networks.cells import CELLS

    cases = {cell: {**_PIXELS, "cell": cell, "hidden_size": 128} for cell in CELLS}
    return {cell: _time_step(setup, case, 3)["seconds"] for cell, case in cases.items()}


COMPARED = {f.__name__: f for f in (job, epoch, stream, evaluate)}
SECTIONS = COMPARED | {f.__name__: f for f in (growth, floor, cells)}


def ratios(figures):
    """Returns ours over each other contestant: {"section case / name": {"seconds", "peak_mib"}}."""
    return {
        f"{section} {case} / {name}": {key: times["ours"][key] / time[key] for key in _MEASURES}
        for section in COMPARED
        for case, times in figures.get(section, {}).items()
        for name, time in times.items()
        if name != "ours"
    }


def _medians(measured):
    return {key: statistics.median(each[key] for each in measured) for key in _MEASURES}


def _time_process(setup, name, arguments, cache):
    began = time.perf_counter()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with _ended(setup.start(name, arguments, cache, **pipes)) as process:
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} failed: {message[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak_mib": usage.ru_maxrss / 1024}


def _time_step(setup, case, num_steps, with_cost=False):
    with worker(setup, "ours", case) as ask:
        ask("train", num_steps)
        num_steps = ask("steps", num_steps)["answer"]  # fewer if an epoch is shorter
        seconds = [ask("steps", num_steps)["seconds"] for _ in range(setup.rounds)]
        result = {"seconds": statistics.median(seconds) / num_steps}
        return result | (ask("cost")["answer"] if with_cost else {})


def _main(arguments):
    sections = arguments.sections.split(",")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise UserError(f"--sections: no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    modules = {name: _MODULES.get(name, name) for name in PEERS if name != "streamed"}
    names = [name for name, module in modules.items() if importlib.util.find_spec(module)]
    if not shutil.which("g++") and "torch.compile" in names:
        names.remove("torch.compile")
    folders = dict.fromkeys(names, _ROOT)
    if arguments.baseline:
        folders["baseline"] = paths.resolve(arguments.baseline, "--baseline")
        if not (folders["baseline"] / "tools" / "peers.py").is_file():
            raise UserError(f"--baseline={arguments.baseline} is not a checkout of this project")
    parts = (arguments.cases, "rows" if arguments.quick else "")
    cases = {name: case for name, case in CASES.items() if all(part in name for part in parts)}
    if not cases:
        raise UserError(f"--cases: no case has {arguments.cases!r}; choose from {', '.join(CASES)}")
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    dataset = cli.prepare_digits(arguments)
    name = dataset.name if dataset.requested == "auto" else dataset.requested
    data = [f"--config.data.name={name}"]
    for key, path in cli.places(arguments).items():  # contestants run in other folders
        data.append(f"--config.data.{key}={path and paths.resolve(path, f'--{key}')}")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(pathlib.Path(folder) / "images.npz", data, folders, cases, rounds)
        arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = dataset.arrays(split)
        np.savez(setup.file, **arrays)
        figures = {name: SECTIONS[name](setup) for name in SECTIONS if name in sections}
    figures = {"ratios": ratios(figures), "dataset": dataset.name, **figures}
    _show(figures)
    if arguments.figure:
        _draw(figures, arguments.figure)
    return figures


def _show(figures):
    title = "Ours divided by the other; below 1, ours is better"
    rows = [(name, *ratio.values()) for name, ratio in figures["ratios"].items()]
    cli.print_table(("case / other", "time", "memory"), rows, title)
    rows = [
        (f"{section} {case}", name, *measured.values())
        for section in COMPARED
        for case, times in figures.get(section, {}).items()
        for name, measured in times.items()
    ]
    cli.print_table(("case", "program", "seconds", "peak MiB"), rows, "Medians")
    curves = figures.get("growth", {})
    rows = [(what, str(n), 1e3 * s) for what, curve in curves.items() for n, s in curve.items()]
    cli.print_table(("of", "size", "ms per step"), rows, "Growth of a training step")
    keys = ("flops", "bytes", "flops_per_second", "bytes_per_second", "seconds", "share")
    rows = [(name, *(f[key] for key in keys)) for name, f in figures.get("floor", {}).items()]
    title = "Floor: FLOPs of a step at the rate of a large product"
    cli.print_table(("case", *keys), rows, title)
    rows = list(figures.get("cells", {}).items())
    cli.print_table(("cell", "seconds"), rows, "A training step on pixels, 128 units")


def _draw(figures, path):
    from matplotlib.figure import Figure

    curves = figures.get("growth", {})
    canvas = Figure((5 * (1 + len(curves)), 4), layout="tight")
    first, *others = canvas.subplots(1, 1 + len(curves), squeeze=False)[0]
    times = {name: ratio["seconds"] for name, ratio in figures["ratios"].items()}
    first.barh(list(times), list(times.values()))
    first.axvline(1, color="black", linewidth=1)
    first.set_xlabel("time of ours / other")
    for axis, (what, seconds) in zip(others, curves.items(), strict=True):
        axis.loglog(list(seconds), list(seconds.values()), marker="o")
        axis.set_xlabel(what)
        axis.set_ylabel("seconds per step")
    with explain_storage(f"--figure={path}", "choose another path"):
        canvas.savefig(path, format="png")


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument("--baseline", metavar="CHECKOUT", help="folder of another version")
    parser.add_argument("--rounds", type=cli.positive, help="how often to time (5; 1 with --quick)")
    parser.add_argument(
        "--cases",
        default="",
        metavar="TEXT",
        help="of epoch, evaluate and floor, only cases with TEXT in their name",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round by default, and of these cases only rows"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="(default: %(default)s)")
    cli.add_output_argument(parser, "--figure", "draw ratios and growth as a PNG image")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
