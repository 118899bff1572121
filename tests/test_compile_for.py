"""Programs for TPUs that are not here: what a step exchanges, and what a chip holds."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.errors import UserError
from seqmnist.networks.views import sequence_shape
from seqmnist.study import profiling
from seqmnist.training import devices, task
from tools import compile_for

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the extra tpu is not installed", allow_module_level=True)

SLOW = pytest.mark.slow
GRU = {"model.cell": "gru", "model.bidirectional": True}
RESIDUAL = {
    "model.cell": "min_gru",
    "model.block": "residual",
    "model.dropout": 0.1,
    "optimizer.clip_norm": 1.0,
    "train.batch_size": 512,
}
PERMUTED = {
    "model.view": "permuted_pixels",
    "train.augment": "affine",
    "train.batch_size": 256,
}


def both(num):
    """Members × data; a chip's load is the same on all topologies, and exceeds on-chip memory."""
    values = {"model.view": "pixels", "train.batch_size": 256 * num}
    return values | {"members.num": 2 * num, "mesh.data": num}


CASES = [
    # topology, configuration, [member, data] of the mesh
    ("v5e:2x2", {"train.batch_size": 512}, [1, 4]),
    pytest.param("v5e:4x4", GRU, [1, 16], marks=SLOW),
    pytest.param("v5e:2x2", RESIDUAL, [1, 4], marks=SLOW),
    pytest.param("v5e:16x16", PERMUTED, [1, 256], marks=SLOW),
    pytest.param("v5e:4x4", {"members.num": 32}, [16, 1], marks=SLOW),
    pytest.param("v5e:2x2", both(2), [2, 2], marks=SLOW),
    pytest.param("v5e:4x4", both(4), [4, 4], marks=SLOW),
    pytest.param("v5e:16x16", both(16), [16, 16], marks=SLOW),
]


def make_task(topology, values, data_dir):
    values = {"data.name": "mnist_5k", "data.data_dir": str(data_dir), **values}
    config = config_lib.validated(config_lib.override(Config(), values))
    return task.compose(config, print, compile_for.describe(topology))


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("topology", "values", "shape"), CASES)
def test_a_step_exchanges_its_gradient_once_and_nothing_else(topology, values, shape, data_dir):
    one = make_task(topology, values, data_dir)
    assert list(one.mesh.devices.shape) == shape
    state, sums = one.template()
    compiled = one.programs(state, sums)["train"].lower().compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    num_here, num_parts = len(one.members) // shape[0], shape[1]

    num_floats = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // len(one.members)
    once = {"number": 1, "bytes": 4 * num_here * (num_floats + 3)}  # the gradient and three sums
    assert compile_for.read_step(hlo).collectives == ({"all-reduce": once} if num_parts > 1 else {})
    assert not re.search(r"infeed|outfeed|is_host_transfer=true|callback", hlo)

    # Examples and parameters are arguments; of constants, the largest is a view's order.
    arrays = [one.dataset.arrays(split) for split in ("train", "test")]
    assert memory.argument_size_in_bytes >= num_bytes(arrays) + num_bytes(state) // shape[0]
    constants = re.findall(r" = (\S+) constant\(", hlo)
    assert sum(map(compile_for.num_bytes, constants)) < 2**15

    # Whatever the number of chips: two arrays [T, B, W] of its own part in each layer, and 4 MiB.
    model, spec = one.config.model, one.dataset.spec
    batch_size = num_here * one.config.train.batch_size // num_parts
    width = model.num_layers * max(128, model.hidden_size)  # a TPU pads to 128
    size = sequence_shape(model, spec)[0] * batch_size * width
    assert memory.temp_size_in_bytes < 2 * 4 * size + 2**22


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_have_the_factors_of_the_configuration(dtype, data_dir):
    values = {"model.cell": "gru", "model.hidden_size": 128, "model.dtype": dtype}
    one = make_task("v5e:2x2", values, data_dir)
    hlo = one.programs(*one.template())["train"].lower().compile().as_text()
    types = dict(re.findall(r"%(\S+?)(?: =|:) ([a-z]+\d+)\[", hlo))
    products = re.findall(r" (?:convolution|dot)\(%([^,\s]+), %([^,\s)]+)\)", hlo)
    assert len(products) == 8  # of the inputs, the states and the readout, and their gradients
    exact = [pair for pair in products if "f32" in {types[name] for name in pair}]
    assert (len(exact) <= 3) == (dtype == "bfloat16")  # the readout's


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_lowering_places_nothing(mode, data_dir, monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("placed"))
    one = make_task("v5e:2x2", {"data.input_mode": mode, "model.hidden_size": 8}, data_dir)
    for traced in one.programs(*one.template()).values():
        assert "stablehlo" in traced.lower().as_text()


def test_the_only_member_of_a_chip_has_no_axis_of_members(data_dir):
    one = make_task("v5e:2x2", {"members.num": 4, "model.hidden_size": 8}, data_dir)
    text = one.programs(*one.template())["train"].lower().as_text()
    assert re.search(r"dot_general.*tensor<128x8xf32>", text)
    assert not re.search(r"dot_general.*tensor<1x128x8xf32>", text)


@pytest.mark.parametrize(
    ("topology", "shape"), [("v5e:2x2", (3, 1)), ("v6e:16x16", (64, 4)), ("v5p:2x2x1", (1, 2))]
)
def test_a_mesh_of_any_shape_is_made_of_chips(topology, shape):
    found = devices.make_mesh(*shape, compile_for.describe(topology)).devices
    assert found.shape == shape
    assert len({device.id for device in found.flat}) == found.size


def test_a_process_reads_the_examples_of_its_own_chips():
    """They are not neighbours along the batch."""
    mesh = devices.make_mesh(1, 16, compile_for.describe("v5e:4x4"))
    owners = np.repeat([chip.process_index for chip in mesh.devices.flat], 2)
    assert list(devices.local_columns(mesh, 32)) == list(np.flatnonzero(owners == 0))


HLO = """\
HloModule jit_train

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%called (x: f32[100]) -> f32[100] {
  ROOT %exp = f32[100]{0} exponential(%x), backend_config={"estimated_cycles":"7"}
}

%fused (p: f32[4]) -> f32[8] {
  ROOT %gather = f32[8]{0} all-gather(%p), dimensions={0}, "estimated_cycles":"1000"
}

%inner_condition (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28), metadata={}
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%inner_body (p: (s32[])) -> (s32[]) {
  %dot = f32[8]{0} fusion(%x), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"5"}
}

%outer_condition (p: (s32[])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %stop), direction=LT
}

%outer_body (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[]{:T(128)}) while(%t), condition=%inner_condition, body=%inner_body
  %start = f32[100]{0} all-reduce-start(%x), to_apply=%sum
  %done = (f32[100]{0}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce-done(%start)
  %call = f32[100]{0} call(%x), to_apply=%called, backend_config={}
  %if = f32[100]{0} conditional(%i, %x, %x), branch_computations={%called, %called}
}

ENTRY %main (p: s32[]) -> s32[] {
  ROOT %while.2 = (s32[]) while(%t), condition=%outer_condition, body=%outer_body
}
"""


def test_a_step_is_read_with_its_loops():
    collectives, cycles = compile_for.read_step(HLO)
    assert collectives == {
        "all-gather": {"number": 28, "bytes": 28 * 32},
        "all-reduce": {"number": 1, "bytes": 400 + 12},
    }
    assert cycles == 28 * 5 + 3 * 7
    assert compile_for.read_step(HLO, num_steps=7).collectives["all-gather"]["number"] == 4


def test_products_are_counted_of_the_platform():
    def twice(x):
        return x @ x @ x

    def function(x):
        return jax.lax.platform_dependent(x, cpu=twice, default=lambda x: x @ x)

    jaxpr = jax.jit(function).trace(jnp.ones((4, 4))).jaxpr.jaxpr
    flops = [profiling.product_flops(jaxpr, each) for each in (None, "cpu", "tpu")]
    assert flops == [256, 256, 128]


def test_what_does_not_fit_is_told():
    (chip, *_) = compile_for.describe("v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(chip)
    large = jax.ShapeDtypeStruct((2**30, 8), np.float32, sharding=place)
    counts = compile_for.count(compile_for.Program(jax.jit(jnp.sort).trace(large), 1, 0, 1, 1))
    assert "15.75G" in counts["refused"]


@pytest.mark.parametrize("topology", ["v5e", "v5e:3x3", "v9:2x2", "v4:2x2x1", "h100:8"])
def test_unknown_topologies_are_refused(topology):
    with pytest.raises(UserError, match=f"--topology={topology} .*; choose one of v5e:2x2 "):
        compile_for.describe(topology)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu; pip install -e"):
        compile_for.describe("v5e:2x2")
    with pytest.raises(UserError, match=r"needs jax_cuda13_plugin; pip install 'jax\[cuda13\]'"):
        compile_for.describe("h100:1x8")


@pytest.mark.slow
def test_the_tool_prints_a_table_and_writes_it(data_dir, tmp_path):
    command = [sys.executable, "-m", "tools.compile_for", "--topology=v5e:2x2"]
    values = {"data.name": "mnist_5k", "data.data_dir": data_dir, "train.batch_size": 512}
    command += [f"--config.{name}={value}" for name, value in values.items()]
    command += ["--config.model.hidden_size=8", f"--json={tmp_path / 'counts.json'}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["mesh"] == {"member": 1, "data": 4}
    programs = counts["programs"]
    num_floats = 8 * (28 + 8 + 1) + 10 * (8 + 1)
    once = {"number": 1, "bytes": 4 * (num_floats + 3)}
    assert programs["train"]["collectives"] == {"all-reduce": once}
    assert programs["evaluate"]["collectives"] == programs["export"]["collectives"] == {}
    # z for all steps, then r; of training, also their derivatives but that of the images.
    forward = 2 * 128 * (28 * 8 * (28 + 8) + 8 * 10)
    assert programs["evaluate"]["flops"] == programs["export"]["flops"] == forward
    assert programs["train"]["flops"] == 3 * forward - 2 * 128 * 28 * 28 * 8
    for program in programs.values():
        assert program["cycles"] > 0
        assert 0 < program["memory_bytes"] < 2**24
