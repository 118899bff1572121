"""Compiles a configuration's programs for devices that need not be there, and counts what they do.

Example:
  python -m tools.compile_for --topology=v5e:16x16 --config=experiments/seeds_notebook.py

TPUs need the extra tpu, GPUs `pip install 'jax[cuda13]'`, 3 GB; none needs a driver. Training and
evaluation are compiled for the mesh that a run there would choose, the exported classifier for one
device and 128 images. Per device and step, it prints

  FLOPs        of the matrix products, counted before compilation
  cycles       XLA's estimates, summed over operations; none for collectives
               and for GPUs
  all-reduce…  how many collectives there are, and the bytes of their results
  bytes        what XLA plans in main memory, without what stays on the chip

and warns of a program that does not fit. Nothing runs, so there are no measured times.
"""

import collections
import importlib.util
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple

from seqmnist.errors import UserError, one_line
from tools import cli

# GiB that XLA may use of each device's memory: of TPUs, what libtpu says when it refuses a larger
# program; of GPUs, the three quarters that JAX allocates. A TPU7x chip is two devices. Cycles per
# second follow from the published peak rates and matrix units: v5e 197 TFLOP/s = 4 × 128² × 2 ×
# 1.5 GHz, v5p 459 = 8 × 128² × 2 × 1.75 GHz.
_DEVICES = {
    "TPU v5 lite": (15.75, 1.5e9),
    "TPU v5": (95.74, 1.75e9),
    "TPU v6 lite": (31.25, None),
    "TPU7x": (94.75, None),
    "NVIDIA H100 80GB HBM3": (59.36, None),
}
_FORMS = (
    "v5e:2x2 to v5e:16x16, v6e:2x2 to v6e:16x16, v5p:2x2x1 or tpu7x:2x2x1 and larger, or h100:1x8 "
    "and others, HOSTSxGPUS"
)
_PATTERN = r"v[56]e:\d+x\d+|(v5p|tpu7x):\d+x\d+x\d+|h100:[1-9]\d*x[1-9]\d*"
_ENVIRONMENT = {  # else libtpu looks for a TPU's host, and writes logs to /tmp and standard error
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so processes may share it
}
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800 device_memory_size: 84978434048 memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_EXPORT_BATCH = 128
_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_CALLEES = re.compile(r"(?: call\(.*to_apply|calls|_computations?)=(%[^\s,]+|\{[^}]*\})")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(?:-done)?\(")


def describe(topology: str) -> list[Any]:
    """Returns the devices of a topology, which are only described.

    Raises UserError if it is unknown, or if what compiles for it is not installed.
    """
    if not re.fullmatch(_PATTERN, topology):
        raise UserError(f"--topology={topology} does not exist; choose one of {_FORMS}")
    gpus = re.fullmatch(r"h100:(\d+)x(\d+)", topology)
    module, remedy = ("jax_cuda13_plugin", "'jax[cuda13]'") if gpus else ("libtpu", "-e '.[tpu]'")
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--topology={topology} needs {module}; pip install {remedy}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    try:
        if gpus:
            shape = f"1 x {gpus[1]} x {gpus[2]}"
            options = {"topology": shape, "target_config": _H100}
            return topologies.get_topology_desc(topology, "cuda", **options).devices
        found = topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(
            f"--topology={topology} does not exist ({one_line(error)}); choose one of {_FORMS}"
        ) from None
    if found[0].device_kind not in _DEVICES:
        raise UserError(f"--topology={topology} is not supported; choose one of {_FORMS}")
    return found


class Step(NamedTuple):
    """What one step of a compiled program does on one device."""

    collectives: dict[str, dict[str, float]]  # by kind: {"number", "bytes"}
    cycles: float | None  # XLA's estimates, without collectives; None if there are none


def read_step(hlo: str, num_steps: int = 1) -> Step:
    """Counts what a step does, from the text of a compiled module that takes `num_steps`.

    A loop counts as often as the constant in its condition says; one without a constant, as the
    loop over training steps, counts once. All branches of a conditional count.
    """
    computations = {
        name: body.splitlines()
        for name, body in re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S)
    }
    collectives = collections.defaultdict(collections.Counter)
    cycles = 0.0

    def visit(name, times, is_fused=False):
        nonlocal cycles
        for line in computations[name]:
            # An operation that begins and ends apart counts where it ends, with its result.
            if found := _COLLECTIVE.search(line):
                collectives[found[2]]["number"] += times
                collectives[found[2]]["bytes"] += times * num_bytes(found[1])
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            if estimate and not is_fused:  # that of a fusion is of all of it
                cycles += times * int(estimate[1])
            if loop := re.search(r" while\(.*condition=%([^,\s]+), body=%([^,\s]+)", line):
                condition = "\n".join(computations[loop[1]])
                bounds = re.findall(r" = s32\[\]\S* constant\((\d+)\)", condition)
                visit(loop[2], times * (int(bounds[0]) if len(bounds) == 1 else 1))
            for callees in _CALLEES.findall(line):
                for callee in re.findall(r"%([^\s,}]+)", callees):
                    visit(callee, times, is_fused or " fusion(" in line)

    visit(re.search(r"^ENTRY %(\S+)", hlo, re.M)[1], 1 / num_steps)
    return Step({kind: dict(counts) for kind, counts in collectives.items()}, cycles or None)


def num_bytes(shapes: str) -> int:
    """Adds up the bytes of all arrays in the text of a shape, e.g. "f32[8,128]{1,0:T(8,128)}"."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * max(1, int(bits or 8) // 8)
        for bits, sizes in re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]", shapes)
    )


class Program(NamedTuple):
    """A program to compile, and what it does on each device."""

    traced: Any  # jax.stages.Traced
    num_steps: int
    flops: float  # of a step
    num_members: int
    batch_size: int  # of a step, for each member


def make_programs(task: Any, device: Any) -> dict[str, Program]:
    """Returns training and evaluation of a task, and its network exported, on one device."""
    import jax
    import numpy as np

    from seqmnist.study import export, profiling
    from seqmnist.training import batches

    is_streamed = task.config.data.input_mode == "stream"
    num_steps = {"train": 1, "evaluate": batches.WINDOW if is_streamed else len(task.rows["test"])}
    num_members = len(task.members) // task.mesh.shape["member"]
    batch_size = task.config.train.batch_size // task.mesh.shape["data"]
    state, sums = task.template()
    programs = {}
    for name, traced in task.programs(state, sums).items():
        flops = profiling.product_flops(traced.jaxpr.jaxpr, device.platform) / num_steps[name]
        programs[name] = Program(traced, num_steps[name], flops, num_members, batch_size)

    rng, first = np.random.default_rng(0), 1 if len(task.members) > 1 else 0
    params = jax.tree.map(lambda x: rng.random(x.shape[first:]).astype(x.dtype), state.params)
    jitted, arguments = export.make_programs(
        lambda images: task.system.apply(params, images), task.system.spec
    )[export.ARTIFACT]
    call = jax.jit(export.export(jitted, arguments).call)
    place = jax.sharding.SingleDeviceSharding(device)
    shape = (_EXPORT_BATCH, *task.system.spec.shape)
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=place)
    flops = profiling.product_flops(jitted.trace(images).jaxpr.jaxpr, device.platform)
    programs["export"] = Program(call.trace(images), 1, flops, 1, _EXPORT_BATCH)
    return programs


def count(program: Program) -> dict[str, Any]:
    """Compiles a program and counts what it does on one device.

    Returns {"members", "batch_size", "flops", "compile_seconds", "collectives", "cycles",
    "argument_bytes", "temporary_bytes", "output_bytes", "code_bytes", "memory_bytes"}; memory is
    the sum, and outputs that reuse arguments are not in it. If XLA refuses the program for lack of
    memory, {"members", "batch_size", "flops", "refused": why}.
    """
    import jax

    began = time.monotonic()
    counts = {"members": program.num_members, "batch_size": program.batch_size}
    counts["flops"] = program.flops
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return counts | {"refused": str(error).partition("\n")[0]}
    step, memory = read_step(compiled.as_text(), program.num_steps), compiled.memory_analysis()
    parts = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    seconds = {"compile_seconds": round(time.monotonic() - began, 1)}
    return counts | seconds | step._asdict() | parts | {"memory_bytes": sum(parts.values())}


def _main(arguments):
    from seqmnist import config as config_lib
    from seqmnist import main

    config = config_lib.validated(main.new_config(arguments))
    import jax

    from seqmnist.training.task import compose

    jax.config.update("jax_platforms", "cpu")  # what this machine has is of no interest
    devices = describe(arguments.topology)
    task = compose(config, print, devices)
    mesh, kind = dict(task.mesh.shape), devices[0].device_kind
    print(
        f"{arguments.topology}: {len(devices)} × {kind}; {mesh['member']} for members × "
        f"{mesh['data']} for each batch"
    )
    counts = {}
    for name, program in make_programs(task, devices[0]).items():
        counts[name] = count(program)
        if "compile_seconds" in counts[name]:
            print(f"Compiled {name} in {counts[name]['compile_seconds']} s", flush=True)
    _show(counts, kind)
    return {
        "topology": arguments.topology,
        "devices": {"kind": kind, "number": len(devices), "memory_gib": _DEVICES[kind][0]},
        "mesh": mesh,
        "programs": counts,
    }


def _show(counts, kind):
    available, clock = _DEVICES[kind]
    rows = {
        "members × examples": lambda c: f"{c['members']:,} × {c['batch_size']:,}",
        "FLOPs per step": lambda c: f"{c['flops']:.3g}",
        "XLA's cycles per step": lambda c: c["cycles"] and f"{c['cycles']:,.0f}",
    }
    if clock:
        rows[f"  at {clock / 1e9:g} GHz"] = lambda c: (
            c["cycles"] and f"{1e6 * c['cycles'] / clock:,.1f} µs"
        )
    for each in sorted({kind for c in counts.values() for kind in c.get("collectives", ())}):
        rows[f"{each} per step"] = lambda c, each=each: _exchange(c["collectives"].get(each))
    for name in ("argument", "temporary", "output", "code", "memory"):
        rows[f"{name} bytes"] = lambda c, name=name: _size(c[f"{name}_bytes"])
    rows[f"  of {available} GiB"] = lambda c: f"{c['memory_bytes'] / available / 2**30:.2%}"

    def cell(show, one):
        try:
            return show(one) or "-"
        except KeyError:  # was refused
            return "-"

    table = [(title, *(cell(show, one) for one in counts.values())) for title, show in rows.items()]
    cli.print_table(("per device", *counts), table)
    if not any(c.get("collectives", True) for c in counts.values()):
        print("No collectives: the devices exchange nothing.")
    if not any(c.get("cycles") for c in counts.values()):
        print("XLA gives no estimate of cycles for these devices.")
    for name, one in counts.items():
        reason = one.get("refused")
        if not reason and one["memory_bytes"] > available * 2**30:
            reason = f"it needs {_size(one['memory_bytes'])}"
        if reason:
            print(f"WARNING: {name} does not fit into {available} GiB of a {kind}: {reason}")


def _exchange(counts):
    return f"{counts['number']:g} of {_size(counts['bytes'])}" if counts else "none"


def _size(num):
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num >= size:
            return f"{num / size:,.2f} {unit}"
    return f"{num:,.0f} B"


def _make_parser():
    from seqmnist import main

    parser = cli.make_parser(__doc__)
    parser.add_argument("--topology", required=True, help=f"kind and shape: {_FORMS}")
    main.add_config_arguments(parser, sys.argv[1:])
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
