"""Members and meshes: many runs in one program are the runs alone."""

import re

import chex
import jax
import numpy as np
import pytest

from seqmnist.config import Config, MeshConfig, ModelConfig, TrainConfig
from seqmnist.errors import UserError
from seqmnist.training import batches, devices
from seqmnist.training.loop import Resident, Streamed
from seqmnist.training.steps import init_state, make_system

CONFIG = Config(model=ModelConfig(hidden_size=8))
SEEDS = np.arange(8, dtype=np.uint32)


def make_resident(system, digits, mesh):
    return Resident(system, *digits, mesh)


def make_streamed(system, digits, mesh):
    images, labels = digits
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    return Streamed(system, records, mesh)


def in_float64(tree):
    is_real = lambda x: np.issubdtype(x.dtype, np.floating)  # noqa: E731
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if is_real(x) else x.dtype), tree)


def rows_of(seed):
    return batches.batch_rows(batches.epoch_order(seed, 0, 100), 32)


def train(loop, state, rows):
    *_, last = loop.train(loop.start(state), rows)
    evaluation = loop.evaluate(last.state.params, batches.batch_rows(np.arange(130), 32))
    return last.state.params, last.sums.means(), evaluation.means()


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_members_equal_lone_runs(num_devices, digits):
    system = make_system(CONFIG)
    mesh = devices.make_mesh(num_devices, 1)
    states = jax.vmap(lambda seed: init_state(CONFIG, system, seed))(SEEDS)
    rows = np.stack([rows_of(seed) for seed in SEEDS])
    loop = Resident(system, *digits, mesh, True)
    params, *together = train(loop, devices.spread(mesh, states, "member"), rows)
    for member in (0, 7):
        lone = Resident(system, *digits)
        state = init_state(CONFIG, system, SEEDS[member])
        lone_params, *alone = train(lone, state, rows_of(SEEDS[member]))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=member: leaf[i], params), lone_params, atol=1e-5
        )
        for means, of_all in zip(alone, together, strict=True):
            for name, value in means.items():
                assert value == pytest.approx(of_all[name][member], abs=1e-5)


@pytest.mark.parametrize(("num_members", "num_data"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_mesh_agrees_with_one_device(num_members, num_data, digits):
    system = make_system(CONFIG)
    rows = np.stack([rows_of(seed) for seed in SEEDS])
    results = []
    for mesh in (devices.make_mesh(1, 1), devices.make_mesh(num_members, num_data)):
        states = jax.vmap(lambda seed: init_state(CONFIG, system, seed))(SEEDS)
        loop = Resident(system, *digits, mesh, True)
        results.append(train(loop, devices.spread(mesh, states, "member"), rows))
    chex.assert_trees_all_close(*jax.tree.map(np.asarray, results), atol=1e-5)


@pytest.mark.parametrize("make", [make_resident, make_streamed])
def test_a_split_batch_is_the_batch_whatever_is_drawn(make, digits):
    config = Config(
        model=ModelConfig(cell="gru", hidden_size=8, dropout=0.3, readout="mean"),
        train=TrainConfig(augment="affine"),
    )
    system, results = make_system(config), []
    for mesh in (devices.make_mesh(1, 1), devices.make_mesh(1, 8)):
        state = devices.spread(mesh, init_state(config, system, 0))
        results.append(train(make(system, digits, mesh), state, rows_of(0)))
    chex.assert_trees_all_close(*jax.tree.map(np.asarray, results), atol=1e-5)


def test_a_split_batch_is_reduced_once_a_step(digits):
    system = make_system(CONFIG)
    mesh = devices.make_mesh(1, 8)
    loop = make_resident(system, digits, mesh)
    state = devices.spread(mesh, init_state(CONFIG, system, 0))
    start = loop.start(state)
    rows = devices.spread(mesh, np.asarray(rows_of(0)), None, "data")
    lowered = loop._train.lower(state, start.sums, rows, loop._arrays, 0, 4)
    found = re.findall(r"= (.*?) (all-\w+|reduce-scatter)\(", lowered.compile().as_text())
    ((what, how),) = found  # none for a single parameter, sum or time step
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert how == "all-reduce"
    assert what.startswith(f"f32[{num_parameters + 3}]")  # and the three sums


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


@pytest.mark.parametrize(("members", "batch", "devices", "asked", "expected"), PLANS)
def test_devices_are_shared_out(members, batch, devices, asked, expected):
    assert devices.plan(MeshConfig(**asked), members, batch, devices) == expected


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
        devices.plan(MeshConfig(**asked), 4, 128, 8)


def test_members_equal_lone_runs_in_float64(digits):
    with jax.enable_x64(True):
        system = make_system(CONFIG)
        states = [in_float64(init_state(CONFIG, system, seed)) for seed in SEEDS[:2]]
        lone_state = states[1]
        states = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
        mesh = devices.make_mesh(2, 1)
        loop = Resident(system, *digits, mesh, True)
        rows = np.stack([rows_of(seed) for seed in SEEDS[:2]])
        params, *together = train(loop, devices.spread(mesh, states, "member"), rows)
        lone, *alone = train(Resident(system, *digits), lone_state, rows_of(1))
    assert jax.tree.leaves(lone)[0].dtype == np.float64
    one = jax.tree.map(lambda leaf: leaf[1], jax.tree.map(np.asarray, params))
    chex.assert_trees_all_close(one, jax.tree.map(np.asarray, lone), atol=1e-10)
    assert together[0]["loss"][1] == pytest.approx(alone[0]["loss"], abs=1e-10)
