"""Profiles: a trace of some steps of a run, and what a step costs by XLA's own account.

A profiled run has in its workdir, under `profile/`, what `jax.profiler` writes, and
`step.json`: the steps, the cost of one, the device's rates, and the scope of every operation.
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist import records
from seqmnist.config import Config
from seqmnist.errors import UserError
from seqmnist.networks.views import sequence_shape
from seqmnist.training import batches
from seqmnist.training.steps import init_state, make_system, train_step

DIRECTORY, SUMMARY = "profile", "step.json"
MARKER = "train"
SCOPES = ("project", "recurrence", "readout", "loss", "optimizer")


class Profile:
    """Traces the steps that `ProfileConfig.steps` names, and no others.

    Evaluations that lie between those steps are in the trace, outside of its step markers.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, num_steps: int):
        """Takes the length of the run, in steps.

        Raises:
          UserError: the run has no such steps.
        """
        self._config, self._directory = config, workdir / DIRECTORY
        self._start, self._stop = -1, -1
        self._is_traced = False  # a run resumed between the two does not trace
        if config.profile.steps is not None:
            self._start, self._stop = map(int, config.profile.steps.split(":"))
            if not self._start < self._stop <= num_steps:
                raise UserError(
                    f"config.profile.steps={config.profile.steps} must be START:STOP with START < "
                    f"STOP <= {num_steps}, the steps of this run"
                )

    def breaks(self, first: int) -> tuple[int, int]:
        """Returns where the epoch that begins with step `first` must pause for this profile."""
        return self._start - first, self._stop - first

    def follow(
        self, progresses: Iterator[Any], first: int, num_steps: int, done: int = 0
    ) -> Iterator[Any]:
        """Passes on an epoch's progress, and starts and stops the trace on the way.

        Args:
          progresses: what a `loop.Loop` reports, with these `breaks`.
          first: the epoch's first step.
          num_steps: the epoch's steps.
          done: how many of them are done already.
        """
        step = first + done
        while step < first + num_steps:
            if step == self._start:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # it would slow down what it watches
                jax.profiler.start_trace(self._directory, profiler_options=options)
                self._is_traced = True
            with jax.profiler.StepTraceAnnotation(MARKER, step_num=step):
                progress = next(progresses)
            step = first + progress.step
            if step == self._stop and self._is_traced:
                jax.profiler.stop_trace()
                self._write_summary()
            yield progress

    def _write_summary(self):
        modules = [
            module.to_string()
            for executable in jax.devices()[0].client.live_executables()
            for module in executable.hlo_modules()
        ]
        summary = {
            "steps": [self._start, self._stop],
            **step_cost(self._config),
            **rates(),
            "scopes": scopes(modules),
        }
        records.write_json(self._directory / SUMMARY, summary)


def scopes(modules: list[str]) -> dict[str, dict[str, str]]:
    """Finds the scope of every operation of compiled modules.

    Args:
      modules: the texts of optimized HLO modules.

    Returns:
      {module: {operation: one of `SCOPES`, or "other"}}, without loops and calls, which only
      contain others.
    """
    result = {}
    for text in modules:
        name = re.match(r"HloModule ([^,\s]+)", text)[1]
        result.setdefault(name, {})
        for operation, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.M):
            if not re.search(r"[\])}] (while|call|conditional)\(", rest):
                path = re.search(r'op_name="([^"]*)"', rest)
                found = re.findall(rf"\b({'|'.join(SCOPES)})\b", path[1]) if path else []
                result[name][operation] = found[-1] if found else "other"
    return result


def compile_step(config: Config) -> jax.stages.Compiled:
    """Compiles one training step of one batch, from shapes alone."""
    system = make_system(config, num_steps=1)
    state = jax.eval_shape(lambda: init_state(config, system, config.seed))
    size = config.train.batch_size
    batch = batches.Batch(
        jax.ShapeDtypeStruct((size, 28, 28), np.uint8),
        jax.ShapeDtypeStruct((size,), np.int32),
        jax.ShapeDtypeStruct((size,), np.bool_),
    )
    return jax.jit(functools.partial(train_step, system)).lower(state, batch).compile()


def step_cost(config: Config) -> dict[str, float]:
    """Counts what one training step does, by XLA's own account.

    XLA counts the body of a loop once, whatever its length. So a step is compiled twice, with
    one and with two time steps a loop iteration, and the difference stands for all others. The
    bytes that XLA counts cannot be had so (it takes an update of a slice for one of the whole
    array, here and there); its plan of memory stands in for them.

    Returns:
      flops; bytes, if arguments are read once, results written once, and temporaries both;
      temporary_bytes, the largest sum of what is kept between operations.
    """

    def unrolled(unroll):
        scan = dataclasses.replace(config.scan, unroll=unroll)
        return compile_step(dataclasses.replace(config, scan=scan))

    once, twice = unrolled("1"), unrolled("2")
    one, two = (compiled.cost_analysis()["flops"] for compiled in (once, twice))
    memory = once.memory_analysis()
    temporary = memory.temp_size_in_bytes
    return {
        "flops": one + (sequence_shape(config.model)[0] - 1) * (two - one),
        "bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * temporary,
        "temporary_bytes": temporary,
    }


def program_cost(program: jax.stages.Lowered) -> dict[str, float]:
    """Compiles a program, and tells what that took and what XLA says of it.

    Returns:
      compile_seconds, little where the program lay in the compilation cache; hlo_flops, in which
      XLA counts the body of a loop once; argument_bytes, output_bytes and temporary_bytes. What
      a device does not tell is left out.
    """
    began = time.perf_counter()
    compiled = program.compile()
    cost = {"compile_seconds": round(time.perf_counter() - began, 3)}
    if analysis := compiled.cost_analysis():
        cost["hlo_flops"] = analysis["flops"]
    if memory := compiled.memory_analysis():
        cost["argument_bytes"] = memory.argument_size_in_bytes
        cost["output_bytes"] = memory.output_size_in_bytes
        cost["temporary_bytes"] = memory.temp_size_in_bytes
    return cost


def rates() -> dict[str, float]:
    """Measures the device: float32 FLOP/s of a large matrix product, bytes/s of a large copy."""
    size = 2048
    a = jnp.ones((size, size))
    large = jnp.ones(2**26)
    product = best_seconds(jax.jit(jnp.matmul), a, a)
    copy = best_seconds(jax.jit(lambda x: x + 1), large)
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 8 * large.size / copy}


def best_seconds(function: Callable, *arguments: Any) -> float:
    """Returns the least time of ten calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)
