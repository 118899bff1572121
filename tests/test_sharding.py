"""Members and meshes: many runs in one program are the runs alone."""

import chex
import jax
import numpy as np
import pytest

from seqmnist import data, sharding
from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.loop import Resident
from seqmnist.steps import init_state, make_system

CONFIG = Config(model=ModelConfig(hidden_size=8))
SEEDS = np.arange(8, dtype=np.uint32)


def rows_of(seed):
    return data.batch_rows(data.epoch_order(seed, 0, 100), 32)


def train(loop, state, rows):
    *_, last = loop.train(loop.start(state), rows)
    evaluation = loop.evaluate(last.state.params, data.batch_rows(np.arange(130), 32))
    return last.state.params, last.sums.means(), evaluation.means()


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_members_equal_lone_runs(num_devices, digits):
    system = make_system(CONFIG)
    mesh = sharding.make_mesh(num_devices, 1)
    states = jax.vmap(lambda seed: init_state(CONFIG, system, seed))(SEEDS)
    rows = np.stack([rows_of(seed) for seed in SEEDS])
    loop = Resident(system, *digits, mesh, True)
    params, *together = train(
        loop, *(sharding.spread(mesh, tree, "member") for tree in (states, rows))
    )
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


def test_too_few_devices_are_named():
    with pytest.raises(UserError, match="needs 16 devices; there are 8"):
        sharding.make_mesh(8, 2)
