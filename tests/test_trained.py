import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist import checkpoint, records, run, trained
from seqmnist import config as config_lib
from seqmnist.config import Config, DataConfig, ModelConfig, TrainConfig
from seqmnist.errors import UserError
from seqmnist.steps import TrainState, init_state, make_system


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of one epoch over the 5,000 digits."""
    home = tmp_path_factory.mktemp("trained")
    config = Config(
        data=DataConfig(name="mnist_5k", data_dir=str(home / "data")),
        model=ModelConfig(hidden_size=8),
        train=TrainConfig(num_epochs=1),
    )
    run.train(config, home / "run")
    return home / "run"


def test_it_scores_as_the_run_did(workdir):
    network = trained.load(workdir)
    images, labels = network.test_set()
    assert images.shape == (1000, 28, 28)
    answers = network.probabilities(images).argmax(-1)
    assert (answers == labels).mean() == network.results["test"]["accuracy"]
    one_by_one = np.concatenate([network.logits(images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(one_by_one, network.logits(images)[:3], atol=1e-5)


def test_what_it_does_by_time_step_comes_in_any_number(workdir):
    network = trained.load(workdir)
    images, labels = (array[:5] for array in network.test_set())
    beliefs = network.beliefs(images)
    assert beliefs.shape == (28, 5, 10)
    np.testing.assert_allclose(beliefs[-1], network.probabilities(images), atol=1e-5)
    assert network.hidden_states(images).shape == (28, 5, 8)
    assert network.gradient_norms(images, labels).shape == (1, 28, 5)


@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_change_nothing(axis):
    images, sizes = np.arange(11), []

    def double(x):
        sizes.append(len(x))
        return np.stack([x, 2 * x], 1 - axis)

    both = trained._in_chunks(double, images, most=4, axis=axis)
    assert sizes == [4, 4, 4]
    np.testing.assert_array_equal(both, double(images))


def test_a_member_is_taken_out_of_many(tmp_path, monkeypatch):
    config = Config(model=ModelConfig(hidden_size=3))
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

    monkeypatch.setattr(checkpoint, "restore", restore)
    records.write_json(tmp_path / records.CONFIG, config_lib.to_dict(config))
    records.write_json(tmp_path / records.RESULTS, {"validation": {"loss": [0.3, 0.1, 0.2]}})
    best = trained.load(tmp_path)
    assert best.member == 1
    images = np.full((2, 28, 28), 9, np.uint8)
    for member in range(3):
        alone = system.apply(states[member].params, jnp.array(images))
        np.testing.assert_allclose(trained.load(tmp_path, member).logits(images), alone, atol=1e-6)
    with pytest.raises(UserError, match="members 0 to 2, not 3"):
        trained.load(tmp_path, 3)


def test_what_is_not_there_is_named(tmp_path, workdir):
    with pytest.raises(UserError, match=r"config.json does not exist; train"):
        trained.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="one network"):
        trained.load(workdir, 1)
    (tmp_path / records.CONFIG).write_bytes((workdir / records.CONFIG).read_bytes())
    with pytest.raises(UserError, match=r"checkpoints does not exist; train"):
        trained.load(tmp_path)
