"""Shows where the time of some training steps went, from a profiler's trace, without TensorBoard.

Example:
  python -m seqmnist.main --workdir=runs/profiled --config.profile.steps=400:500
  python -m tools.trace_summary runs/profiled

Busy time adds up all operations on all threads; idle is the share of the wall time in which no
operation ran. The floor is the shortest time in which the device could compute the matrix products
of the steps, at the rate of a large one, which was measured with the trace.
"""

import collections
import os
import warnings

from seqmnist.errors import UserError, explain_any
from seqmnist.study import profiling
from seqmnist.workdir import PROFILE, Workdir, fits, read_json
from tools import cli

NUM_OPERATIONS = 15

_KINDS = {"steps": [int], "scopes": dict, "flops": int, "bytes": int, "flops_per_second": float}
_REMEDY = "train with --config.profile.steps=START:STOP"


def summarize(workdir: str | os.PathLike) -> dict:
    """Summarizes the newest trace of a workdir; raises UserError if there is none, or no valid one.

    Returns, over all traced steps, in seconds: wall, idle, floor and scopes (busy); and operations,
    the longest first, each with its scope, seconds and count.
    """
    from jax.profiler import ProfileData

    directory = Workdir(workdir).path / PROFILE
    traces = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    summary = directory / profiling.SUMMARY
    if not traces or not summary.is_file():
        raise UserError(f"{directory} holds no trace; {_REMEDY}")
    cost = read_json(summary)
    are_kinds = fits(cost, _KINDS) and all(isinstance(x, dict) for x in cost["scopes"].values())
    if not are_kinds or not cost["steps"][0] < cost["steps"][-1] or cost["flops_per_second"] <= 0:
        raise UserError(f"{summary} is not what a profiled run writes; {_REMEDY}")
    num_steps = cost["steps"][-1] - cost["steps"][0]
    with explain_any(f"{traces[-1]} cannot be read", _REMEDY):
        trace = ProfileData.from_file(str(traces[-1]))
    markers, operations = _read_events(trace, cost["scopes"])
    inside = [each for each in operations if any(a <= each[0] < b for a, b in markers)]
    if not inside:
        raise UserError(f"{traces[-1]} holds no operation of a step; {_REMEDY}")
    seconds, counts = collections.Counter(), collections.Counter()
    for start, stop, *operation in inside:
        seconds[tuple(operation)] += (stop - start) / 1e9
        counts[tuple(operation)] += 1
    scopes = dict.fromkeys((*profiling.SCOPES, "other"), 0.0)
    for (_, scope), busy in seconds.items():
        scopes[scope] += busy
    wall = sum(end - begin for begin, end in markers) / 1e9
    floor = num_steps * cost["flops"] / cost["flops_per_second"]
    return {
        "num_steps": num_steps,
        "wall": wall,
        "idle": wall - _union(each[:2] for each in inside) / 1e9,
        "floor": floor,
        "floor_share": floor / wall,
        "flops_per_step": cost["flops"],
        "bytes_per_step": cost["bytes"],
        "scopes": scopes,
        "operations": [
            {"name": name, "scope": scope, "seconds": busy, "count": counts[name, scope]}
            for (name, scope), busy in seconds.most_common(NUM_OPERATIONS)
        ],
    }


def _read_events(trace, scopes):
    """Returns the intervals of the step markers, and (start, stop, name, scope) of operations."""
    markers, operations = [], []
    lines = (line for plane in trace.planes for line in plane.lines)
    for event in (event for line in lines for event in line.events):
        interval = event.start_ns, event.start_ns + event.duration_ns
        if event.name == profiling.MARKER:
            markers.append(interval)
            continue
        with warnings.catch_warnings(action="ignore"):  # about a type of jaxlib, in Python 3.12
            stats = dict(event.stats)
        name = stats.get("hlo_op")
        scope = scopes.get(stats.get("hlo_module"), {}).get(name)
        if scope and event.duration_ns:
            operations.append((*interval, name, scope))
    return markers, operations


def _union(intervals):
    """Returns the length of the union of intervals."""
    total, reached = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _main(arguments):
    figures = summarize(arguments.workdir)
    num_steps, wall = figures["num_steps"], figures["wall"]
    busy = sum(figures["scopes"].values())

    def per_step(seconds):
        return f"{1000 * seconds / num_steps:.3f}"

    print(
        f"{num_steps} steps, {per_step(wall)} ms per step; floor {per_step(figures['floor'])} ms, "
        f"{figures['floor_share']:.0%} of that; idle {figures['idle'] / wall:.0%}"
    )
    rows = [(name, per_step(x), f"{x / busy:.0%}") for name, x in figures["scopes"].items()]
    cli.print_table(("scope", "ms per step", "share of busy time"), rows)
    rows = [
        (each["name"], each["scope"], per_step(each["seconds"]), f"{each['count'] / num_steps:g}")
        for each in figures["operations"]
    ]
    cli.print_table(("operation", "scope", "ms per step", "per step"), rows)
    return figures


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("workdir", metavar="DIR", help="workdir of a profiled run")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
