"""Runs one job as several processes of this machine, as several hosts would.

Example:
  python -m tools.launch_local --processes=2 -- --workdir=runs/two --config=experiments/notebook.py

The processes connect through 127.0.0.1. Each gets one GPU, if there are any: process i gets entry i
of CUDA_VISIBLE_DEVICES if it is set, else GPU i. Lines of all processes but the first are printed
with the number of their process. If a process fails, the others end as well.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent import futures

from seqmnist.training import distributed
from tools import cli

# Seconds that the others have to report an error of their own after a process has failed.
GRACE = distributed.PATIENCE + 10


def launch(arguments: Sequence[list[str]]) -> list[subprocess.Popen]:
    """Starts a process for each list of arguments of `seqmnist.main`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={len(arguments)}"]
    each = ",".join(map(str, range(len(arguments))))
    environment = dict(os.environ)
    gpus = environment.get("CUDA_VISIBLE_DEVICES", each).split(",")
    # gRPC asks a proxy even for this machine. JAX warns of each such variable, so only if need be.
    if not {"grpc_proxy", "https_proxy", "http_proxy"}.isdisjoint(environment):
        direct = environment.get("no_grpc_proxy") or environment.get("no_proxy", "")
        environment["no_grpc_proxy"] = f"{direct},127.0.0.1".lstrip(",")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "seqmnist.main", *common, f"--process_id={i}", *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environment, "CUDA_VISIBLE_DEVICES": "".join(gpus[i : i + 1])},
            process_group=0,  # Ctrl-C in a terminal reaches it once, through `_main`
        )
        for i, rest in enumerate(arguments)
    ]


def wait(processes: list[subprocess.Popen]) -> int:
    """Waits for all processes; returns 0, or the exit code of the first that failed."""
    code, deadline = 0, math.inf
    while None in (codes := [process.poll() for process in processes]):
        if not code and any(codes):
            code, deadline = next(filter(None, codes)), time.monotonic() + GRACE
            print(
                f"launch_local: process {codes.index(code)} ended with exit code {code}; the "
                f"others end within {GRACE} seconds",
                flush=True,
            )
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    code = code or next(filter(None, codes), 0)
    return code if code >= 0 else 128 - code


def _show(number, process):
    try:
        for line in process.stdout:
            print(f"[{number}] {line}" if number else line, end="", flush=True)
    finally:
        process.stdout.read()  # a pipe that is not read blocks the process


def _main(arguments):
    rest = [argument for argument in arguments.arguments if argument != "--"]
    processes = launch([rest] * arguments.processes)

    def pass_on(received, _):
        for process in processes:
            process.send_signal(received)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, pass_on)
    with futures.ThreadPoolExecutor(len(processes)) as pool:
        shown = pool.map(_show, range(len(processes)), processes)
        code = wait(processes)
    if not code:
        list(shown)  # raises what they raised
    return {"processes": arguments.processes, "exit_code": code}, code


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--processes", type=cli.positive, default=2, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="flags of seqmnist.main"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
