"""Members and meshes: many runs in one program give what each gives alone."""

import functools
import re
import types

import jax
import numpy as np
import pytest
from close import assert_close

from seqmnist.config import Config, MeshConfig, ModelConfig, TrainConfig
from seqmnist.errors import UserError
from seqmnist.training import batches, devices, task
from seqmnist.training.loop import Loop, Resident, Streamed
from seqmnist.training.steps import init_state, make_system

CONFIG = Config(model=ModelConfig(hidden_size=8))
SEEDS = np.arange(8, dtype=np.uint32)
# RMSprop divides by the size of a gradient, and so magnifies how the sums of small ones round.
TOLERANCE = 1e-4
SLOW = pytest.mark.slow
ALL = batches.batch_rows(np.arange(130), 32)


@pytest.fixture(scope="module")
def system():
    return make_system(CONFIG)


@pytest.fixture(scope="module")
def states(system):
    """The states of all seeds before the first step, each initialized alone, in NumPy."""
    init = jax.jit(functools.partial(init_state, CONFIG, system))
    each = [jax.tree.map(np.asarray, init(seed)) for seed in SEEDS]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def member(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def make_resident(digits):
    return Resident(*digits)


def make_streamed(digits):
    images, labels = digits
    return Streamed(batches.Records((images[:100], labels[:100]), (images[100:], labels[100:])))


def rows_of(seed):
    return batches.batch_rows(batches.epoch_order(seed, 0, 100), 32)


def rows_of_all():
    return np.stack([rows_of(seed) for seed in SEEDS])


def train(loop, state, rows):
    """Returns what an epoch makes of a state: parameters, the epoch's sums, and scores."""
    *_, last = loop.train(loop.start(state), rows)
    return last.state.params, last.sums, loop.evaluate(last.state.params, ALL)


@pytest.fixture(scope="module")
def alone(system, states, digits):
    """What members 0 and 7 give as separate runs."""
    loop = Loop(system, make_resident(digits))
    return {i: train(loop, member(states, i), rows_of(SEEDS[i])) for i in (0, 7)}


def assert_equal_separate_runs(loop, states, alone):
    together = train(loop, states, rows_of_all())
    for i, expected in alone.items():
        assert_close(member(together, i), expected, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_devices", [pytest.param(1, marks=SLOW), 4, pytest.param(8, marks=SLOW)]
)
def test_members_equal_separate_runs(num_devices, system, states, alone, digits):
    mesh = devices.make_mesh(num_devices, 1)
    loop = Loop(system, make_resident(digits), mesh, has_members=True)
    assert_equal_separate_runs(loop, states, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), pytest.param((2, 2), marks=SLOW)])
def test_members_of_an_accelerator_equal_separate_runs(
    shape, system, states, alone, digits, monkeypatch
):
    """There, all members of a device train at once, in products of one more axis."""
    monkeypatch.setattr(devices, "_ONE_BY_ONE", ())
    loop = Loop(system, make_resident(digits), devices.make_mesh(*shape), has_members=True)
    num_here = len(SEEDS) // shape[0]
    start = loop.start(states)
    traced = loop.programs(start.state, start.sums, rows_of_all().shape, ALL.shape)["train"]
    assert f"tensor<{num_here}x{32 // shape[1]}x8xf32>" in traced.lower().as_text()  # [S, B, H]
    assert_equal_separate_runs(loop, states, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4), pytest.param((1, 8), marks=SLOW)])
def test_split_batches_of_members_equal_separate_runs(shape, system, states, alone, digits):
    mesh = devices.make_mesh(*shape)
    loop = Loop(system, make_resident(digits), mesh, has_members=True)
    assert_equal_separate_runs(loop, states, alone)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_resident, make_streamed])
def test_a_split_batch_draws_the_same_random_numbers(make, digits):
    config = Config(
        model=ModelConfig(hidden_size=8, dropout=0.3, readout="mean"),
        train=TrainConfig(augment="affine"),
    )
    system = make_system(config)
    state = jax.tree.map(np.asarray, jax.jit(lambda: init_state(config, system, 0))())
    whole, split = (
        train(Loop(system, make(digits), devices.make_mesh(1, num)), state, rows_of(0))
        for num in (1, 8)
    )
    assert_close(split, whole, TOLERANCE)


def test_a_split_batch_is_reduced_once_per_step(system, states, digits):
    loop = Loop(system, make_resident(digits), devices.make_mesh(1, 8))
    start = loop.start(member(states, 0))
    traced = loop.programs(start.state, start.sums, rows_of(0).shape, ALL.shape)["train"]
    found = re.findall(r"= (.*?) (all-\w+|reduce-scatter)\(", traced.lower().compile().as_text())
    ((what, how),) = found  # none for a single parameter, sum or time step
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(start.state.params))
    assert how == "all-reduce"
    assert what.startswith(f"f32[{num_parameters + 3}]")  # and the three sums


@pytest.mark.slow
def test_members_equal_separate_runs_in_float64(states, digits):
    def in_float64(x):
        return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x

    with jax.enable_x64(True):
        system = make_system(CONFIG)
        states = jax.tree.map(lambda x: in_float64(x[:2]), states)
        loop = Loop(system, make_resident(digits), devices.make_mesh(2, 1), has_members=True)
        together = train(loop, states, rows_of_all()[:2])
        alone = train(Loop(system, make_resident(digits)), member(states, 1), rows_of(1))
        assert jax.tree.leaves(alone[0])[0].dtype == np.float64
        assert_close(member(together, 1), alone, 1e-12)


PLANS = [
    # members, batch, devices, asked for, (member, data) on CPUs
    (1, 128, 8, {}, [1, 2]),
    (8, 128, 8, {}, [8, 1]),
    (6, 128, 8, {}, [6, 1]),
    (5, 128, 2, {}, [1, 2]),
    (8, 128, 8, {"data": 4}, [2, 4]),
    (1, 96, 8, {"data": 8}, [1, 8]),
    (4, 128, 8, {"member": 2, "data": 4}, [2, 4]),
]


@pytest.mark.parametrize(("num_members", "batch_size", "num_devices", "asked", "expected"), PLANS)
def test_devices_are_assigned_to_members_and_batches(
    num_members, batch_size, num_devices, asked, expected
):
    some = jax.devices()[:num_devices]
    assert devices.mesh_shape(MeshConfig(**asked), num_members, batch_size, some) == expected


def test_a_batch_is_split_as_its_devices_need():
    """With simulated devices, whatever this machine has."""
    gpus = [types.SimpleNamespace(platform="gpu", process_index=0)] * 8
    assert devices.mesh_shape(MeshConfig(), 1, 128, gpus) == [1, 1]
    assert devices.mesh_shape(MeshConfig(), 1, 512, gpus) == [1, 4]
    hosts = [types.SimpleNamespace(platform="gpu", process_index=i) for i in range(2)]
    assert devices.mesh_shape(MeshConfig(), 1, 128, hosts) == [1, 2]
    with pytest.raises(UserError, match="of 2 processes idle"):
        devices.mesh_shape(MeshConfig(data=1), 1, 128, hosts)


def test_processes_of_different_size_are_refused(monkeypatch):
    uneven = [types.SimpleNamespace(process_index=i) for i in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: uneven)
    with pytest.raises(UserError, match=r"have \[1, 2\] devices"):
        devices.agree(0)


def test_what_is_refused_elsewhere_is_not_composed(monkeypatch):
    """As process 0 of a job that is refused: those that went on would be ended by its end."""
    monkeypatch.setattr(task.sources, "prepare", lambda *_, **__: pytest.fail("went on"))
    monkeypatch.setattr(devices, "agree", lambda number: 1)
    with pytest.raises(UserError, match="another process of this job"):
        task.compose(CONFIG, print)


def test_memory_of_the_machine_limits_only_its_own_processors():
    def mesh(platform):
        return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))

    task.check_memory(mesh("gpu"), 1e18)
    with pytest.raises(UserError, match="GiB of memory"):
        task.check_memory(mesh("cpu"), 1e18)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"member": 3}, "does not divide the 4 members; choose one of 1, 2, 4"),
        ({"data": 3}, "does not divide the 128 examples of a batch"),
        ({"data": 16}, "needs 16 devices, and there are 8"),
    ],
)
def test_impossible_meshes_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        devices.mesh_shape(MeshConfig(**asked), 4, 128, jax.devices())
