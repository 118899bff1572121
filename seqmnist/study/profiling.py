"""Profiles: a trace of some steps of a run, and what a step costs.

The profile folder holds what `jax.profiler` writes, and `step.json`: the traced steps, the cost of
one, the device's rates, and the scope of every operation.
"""

import contextlib
import functools
import math
import pathlib
import re
import timeit
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend import core

from seqmnist.config import Config
from seqmnist.errors import UserError, explain_storage
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.training import batches, devices, members
from seqmnist.training.loop import Progress
from seqmnist.training.steps import init_state, make_system, train_step
from seqmnist.workdir import write_json

SUMMARY = "step.json"
MARKER = "train"
SCOPES = (
    "view", "norm", "project", "recurrence", "emit", "gate", "dropout", "readout", "loss",
    "optimizer",
)  # fmt: skip


class Profile(contextlib.AbstractContextManager):
    """Traces exactly the steps in `ProfileConfig.steps`, on process 0 of a job.

    Evaluations between those steps are in the trace, outside of its step markers. As a context
    manager, it ends a trace that a stopped run leaves unfinished. The training loop must report
    progress at the steps `breaks` of the run.
    """

    def __init__(
        self,
        config: Config,
        directory: pathlib.Path,
        num_steps: int,
        modules: Callable[[], list[str]],
        spec: ImageSpec,
    ):
        """Traces a run of `num_steps` into a folder.

        `modules` returns the texts of the optimized HLO modules that the run executes. Raises
        UserError if the run has no such steps.
        """
        self._config, self._spec = config, spec
        self._directory, self._modules = directory, modules
        self._is_tracing = False
        self.breaks: tuple[int, ...] = ()
        if config.profile.steps is not None:
            start, stop = self.breaks = tuple(map(int, config.profile.steps.split(":")))
            if not start < stop <= num_steps:
                raise UserError(
                    f"config.profile.steps={config.profile.steps} must be START:STOP with START < "
                    f"STOP <= {num_steps}, the number of steps of this run"
                )

    def __exit__(self, *_):
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()

    def watch(
        self, progresses: Iterator[Progress], first: int, num_steps: int, done: int = 0
    ) -> Iterator[Progress]:
        """Passes on the progress of an epoch of `num_steps`; starts and stops the trace.

        `first` is the epoch's first step, counted from the start of the run; `done` of its steps
        are done already.
        """
        step = first + done
        while step < first + num_steps:
            if step in self.breaks[:1] and jax.process_index() == 0:
                self._start()
            with jax.profiler.StepTraceAnnotation(MARKER, step_num=step):
                progress = next(progresses)
            step = first + progress.step
            if step in self.breaks[1:] and self._is_tracing:
                self._stop()
            yield progress

    def _start(self):
        with self._explain():
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / SUMMARY).unlink(missing_ok=True)  # of another trace
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down what is traced
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._is_tracing = True

    def _stop(self):
        with self._explain():
            self.__exit__()
            summary = {"steps": list(self.breaks), **step_cost(self._config, self._spec)}
            num_devices = _num_devices(self._config)
            speed = rates(self._config.model.dtype).items()
            summary |= {name: num_devices * rate for name, rate in speed}
            summary["scopes"] = scopes(self._modules())
            write_json(self._directory / SUMMARY, summary)

    def _explain(self):
        remedy = "correct that and run the same command again: it resumes from the last checkpoint"
        return explain_storage(f"the profile in {self._directory}", remedy)


def _num_devices(config):
    """Returns how many devices work at once; on CPUs 1, as a large product uses all cores."""
    if jax.default_backend() == "cpu":
        return 1
    num_members = len(members.list_members(config))
    return math.prod(
        devices.mesh_shape(config.mesh, num_members, config.train.batch_size, jax.devices())
    )


def scopes(modules: list[str]) -> dict[str, dict[str, str]]:
    """Finds the scope of every operation, from the texts of optimized HLO modules.

    Returns {module: {operation: one of `SCOPES`, or "other"}}, without loops and calls, which only
    contain other operations.
    """
    result = {}
    for text in modules:
        name = re.match(r"HloModule ([^,\s]+)", text)[1]
        result.setdefault(name, {})
        for operation, rest in re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.M):
            if not re.search(r"[\])}] (while|call|conditional)\(", rest):
                path = re.search(r'op_name="([^"]*)"', rest)
                names = re.findall(rf"\b({'|'.join(SCOPES)})\b", path[1]) if path else []
                result[name][operation] = names[-1] if names else "other"
    return result


def step_cost(config: Config, spec: ImageSpec = MNIST) -> dict[str, float]:
    """Counts what one training step of all members does, from shapes alone.

    XLA's own count of bytes mistakes some updates of slices for updates of whole arrays, so bytes
    are estimated from its memory plan.

    Returns flops of the matrix products; bytes, if arguments are read once, results written once,
    and temporaries written and read once; temporary_bytes, the size of the buffer for temporaries.
    """
    system = make_system(config, 1, spec)
    state = jax.eval_shape(lambda: init_state(config, system, config.seed))
    batch = batches.shapes((config.train.batch_size,), spec.shape)
    traced = jax.jit(functools.partial(train_step, system)).trace(state, batch)
    memory = program_cost(traced.lower().compile())
    temporary = memory["temporary_bytes"]
    cost = {
        "flops": product_flops(traced.jaxpr.jaxpr, jax.default_backend()),
        "bytes": memory["argument_bytes"] + memory["output_bytes"] + 2 * temporary,
        "temporary_bytes": temporary,
    }
    return {name: value * len(members.list_members(config)) for name, value in cost.items()}


def product_flops(jaxpr: core.Jaxpr, platform: str | None = None) -> int:
    """Counts the FLOPs of the matrix products of a jaxpr.

    Results that nothing reads cost nothing. The body of a `while` loop counts once; of the
    branches of a conditional, the most expensive counts, or that of the platform if it depends on
    one and `platform` is given.
    """
    total, live = 0, {x for x in jaxpr.outvars if isinstance(x, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if not live.intersection(eqn.outvars):
            continue
        live.update(x for x in eqn.invars if isinstance(x, core.Var))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        inner = list(core.jaxprs_in_params(eqn.params))
        if platform and (platforms := eqn.params.get("branches_platforms")):
            fits = [names is None or platform in names for names in platforms]
            inner = inner[fits.index(True) :][:1]
        flops = [product_flops(x, platform) for x in inner] or [0]
        total += eqn.params.get("length", 1) * (max if "branches" in eqn.params else sum)(flops)
    return total


def program_cost(program: jax.stages.Compiled) -> dict[str, float]:
    """Returns XLA's analysis of a program, as far as the device reports it.

    Its hlo_flops count the body of a loop once.
    """
    cost = {}
    if analysis := program.cost_analysis():
        cost["hlo_flops"] = analysis["flops"]
    if memory := program.memory_analysis():
        cost["argument_bytes"] = memory.argument_size_in_bytes
        cost["output_bytes"] = memory.output_size_in_bytes
        cost["temporary_bytes"] = memory.temp_size_in_bytes
    return cost


def rates(dtype: str) -> dict[str, float]:
    """Measures the device: FLOP/s of a large matrix product in `dtype`, bytes/s of a large copy."""
    size = 2048
    square, large = jnp.ones((size, size), dtype), jnp.ones(2**26)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)

    def seconds(run):  # the first one compiles
        return min(timeit.repeat(lambda: jax.block_until_ready(run()), number=1, repeat=11))

    return {
        "flops_per_second": 2 * size**3 / seconds(lambda: product(square, square)),
        "bytes_per_second": 2 * large.nbytes / seconds(lambda: copy(large)),
    }
