"""Says where the time of some training steps went, from a profiler's trace, without TensorBoard.

Example:
  python -m seqmnist.main --workdir=runs/profiled --config.profile.steps=400:500
  python -m tools.trace_summary runs/profiled

Busy time is counted once for each operation, on whichever thread it ran; idle is the share of
the wall time in which no operation ran. The floor is the least time that the arithmetic of the
steps can take: FLOPs of the compiled step over the rate of a large matrix product, both
recorded with the trace.
"""

import collections
import pathlib

from rich import box
from rich.console import Console
from rich.table import Table

from seqmnist import records
from seqmnist.errors import UserError
from seqmnist.study import profiling
from tools import cli

NUM_OPERATIONS = 15


def summarize(workdir: pathlib.Path) -> dict:
    """Reads the newest trace of a workdir.

    Args:
      workdir: of a run with `--config.profile.steps`.

    Returns:
      Seconds over all traced steps: wall, idle, busy by scope, the floor; and operations, the
      longest first, each with its scope, seconds and count.

    Raises:
      UserError: there is no trace.
    """
    from jax.profiler import ProfileData

    directory = workdir / profiling.DIRECTORY
    traces = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    if not traces or not (directory / profiling.SUMMARY).is_file():
        raise UserError(f"{directory} holds no trace; train with --config.profile.steps=START:STOP")
    cost = records.read_json(directory / profiling.SUMMARY)
    num_steps = cost["steps"][1] - cost["steps"][0]
    markers, operations = _read_events(ProfileData.from_file(str(traces[-1])), cost["scopes"])

    seconds, counts = collections.Counter(), collections.Counter()
    scopes = dict.fromkeys((*profiling.SCOPES, "other"), 0.0)
    inside = []
    for start, stop, name, scope in operations:
        if any(begin <= start < end for begin, end in markers):
            inside.append((start, stop))
            seconds[name, scope] += (stop - start) / 1e9
            counts[name, scope] += 1
            scopes[scope] += (stop - start) / 1e9
    wall = sum(end - begin for begin, end in markers) / 1e9
    floor = num_steps * cost["flops"] / cost["flops_per_second"]
    return {
        "num_steps": num_steps,
        "wall": wall,
        "idle": wall - _union(inside) / 1e9,
        "floor": floor,
        "floor_share": floor / wall,
        "flops_per_step": cost["flops"],
        "bytes_per_step": cost["bytes"],
        "scopes": scopes,
        "operations": [
            {"name": name, "scope": scope, "seconds": total, "count": counts[name, scope]}
            for (name, scope), total in seconds.most_common(NUM_OPERATIONS)
        ],
    }


def _read_events(trace, scopes):
    """Returns the intervals of the step markers, and (start, stop, name, scope) of operations."""
    markers, operations = [], []
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                interval = event.start_ns, event.start_ns + event.duration_ns
                if event.name == profiling.MARKER:
                    markers.append(interval)
                    continue
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                scope = scopes.get(stats.get("hlo_module"), {}).get(name)
                if scope and event.duration_ns:
                    operations.append((*interval, name, scope))
    return markers, operations


def _union(intervals):
    """The length of the union of intervals."""
    total, reached = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _main(arguments):
    figures = summarize(arguments.workdir)
    num_steps, wall = figures["num_steps"], figures["wall"]
    busy = sum(figures["scopes"].values())
    console = Console(highlight=False)
    console.print(
        f"{num_steps} steps, {1000 * wall / num_steps:.3f} ms a step; floor "
        f"{1000 * figures['floor'] / num_steps:.3f} ms, {figures['floor_share']:.0%} of it "
        f"reached; idle {figures['idle'] / wall:.0%}"
    )
    scopes = Table("scope", "ms a step", "share of busy time", box=box.SIMPLE_HEAD)
    for scope, seconds in figures["scopes"].items():
        scopes.add_row(scope, f"{1000 * seconds / num_steps:.3f}", f"{seconds / busy:.0%}")
    operations = Table("operation", "scope", "ms a step", "times a step", box=box.SIMPLE_HEAD)
    for operation in figures["operations"]:
        operations.add_row(
            operation["name"],
            operation["scope"],
            f"{1000 * operation['seconds'] / num_steps:.3f}",
            f"{operation['count'] / num_steps:g}",
        )
    console.print(scopes, operations)
    return figures


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("workdir", type=pathlib.Path, metavar="DIR", help="a profiled workdir")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
