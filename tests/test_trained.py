import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist import checkpoints as checkpoint_lib
from seqmnist import config as config_lib
from seqmnist import records
from seqmnist.config import Config, MembersConfig, ModelConfig
from seqmnist.errors import UserError
from seqmnist.study import trained
from seqmnist.training.steps import TrainState, init_state, make_system


def test_it_scores_as_the_run_did(finished_run):
    network = trained.load(finished_run)
    images, labels = network.test_set()
    assert images.shape == (1000, 28, 28)
    answers = network.probabilities(images).argmax(-1)
    assert (answers == labels).mean() == network.results["test"]["accuracy"]
    one_by_one = np.concatenate([network.logits(images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(one_by_one, network.logits(images)[:3], atol=1e-5)


def test_what_it_does_by_time_step_comes_in_any_number(finished_run):
    network = trained.load(finished_run)
    images, labels = (array[:5] for array in network.test_set())
    beliefs = network.beliefs(images)
    assert beliefs.shape == (28, 5, 10)
    np.testing.assert_allclose(beliefs[-1], network.probabilities(images), atol=1e-5)
    assert network.hidden_states(images).shape == (28, 5, 8)
    assert network.gradient_norms(images, labels).shape == (1, 28, 5)


def test_a_member_is_taken_out_of_many(tmp_path, monkeypatch):
    config = Config(model=ModelConfig(hidden_size=3), members=MembersConfig(num=3))
    system = make_system(config)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0))
    rng = np.random.default_rng(0)
    states = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
        for _ in range(3)
    ]
    state = jax.tree.map(lambda *leaves: np.stack(leaves), *states)

    def restore(workdir, like: TrainState):
        assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, state)
        return state

    monkeypatch.setattr(checkpoint_lib, "restore", restore)
    records.write_json(tmp_path / records.CONFIG, config_lib.to_dict(config))
    records.write_json(tmp_path / records.RESULTS, {"validation": {"loss": [None, 0.1, 0.2]}})
    best = trained.load(tmp_path)
    assert best.member == 1
    images = np.full((2, 28, 28), 9, np.uint8)
    for member in range(3):
        alone = system.apply(states[member].params, jnp.array(images))
        np.testing.assert_allclose(trained.load(tmp_path, member).logits(images), alone, atol=1e-6)
    (tmp_path / records.RESULTS).unlink()  # the run has not ended
    assert trained.load(tmp_path).member == 0
    with pytest.raises(UserError, match="members 0 to 2, not 3"):
        trained.load(tmp_path, 3)


def test_what_is_not_there_is_named(tmp_path, finished_run):
    with pytest.raises(UserError, match=r"config.json does not exist; train"):
        trained.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="one network"):
        trained.load(finished_run, 1)
    (tmp_path / records.CONFIG).write_bytes((finished_run / records.CONFIG).read_bytes())
    with pytest.raises(UserError, match=r"checkpoints does not exist; train"):
        trained.load(tmp_path)
