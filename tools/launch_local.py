"""Runs one job as several processes of this machine, as several hosts would.

Example:
  python -m tools.launch_local --processes=2 -- --workdir=runs/two --config=experiments/notebook.py

The processes find each other on 127.0.0.1, and reduce gradients by gloo on CPUs. Process 0 prints;
the others' lines are shown with their number. When one ends badly, so do the others.
"""

import argparse
import signal
import socket
import subprocess
import sys
import threading
import time

from seqmnist import distributed
from tools import cli

# Seconds that the others get to say why they end, once one has ended badly.
GRACE = distributed.PATIENCE + 20


def launch(num_processes: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Starts the processes of a job; `arguments` are those of `seqmnist.main`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "seqmnist.main", *common, f"--process_id={i}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]


def wait(processes: list[subprocess.Popen]) -> int:
    """Waits for all to end; returns 0, or the exit code of the first that ended badly."""
    failed, since = None, 0.0
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed, since = next(i for i, code in enumerate(codes) if code), time.monotonic()
            print(
                f"launch_local: process {failed} ended with exit code {codes[failed]}; the others "
                f"end within {GRACE} seconds"
            )
        if failed is not None and time.monotonic() - since > GRACE:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.returncode for process in processes]
    code = codes[failed] if failed is not None else next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


def _show(number, process):
    for line in process.stdout:
        print(f"[{number}] {line}" if number else line, end="", flush=True)


def _main(arguments):
    rest = [argument for argument in arguments.arguments if argument != "--"]
    processes = launch(arguments.processes, rest)

    def pass_on(received, _):
        for process in processes:
            process.send_signal(received)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, pass_on)
    threads = [threading.Thread(target=_show, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    code = wait(processes)
    for thread in threads:
        thread.join()
    if code:
        sys.exit(code)
    return {"processes": arguments.processes, "exit_code": code}


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--processes", type=cli.positive, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of seqmnist.main"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
