import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from seqmnist import config as config_lib
from seqmnist import workdir as workdir_lib
from seqmnist.checkpoints import Checkpoints, Saved
from seqmnist.config import Config, MembersConfig, ModelConfig
from seqmnist.errors import UserError
from seqmnist.spec import MNIST
from seqmnist.study import trained
from seqmnist.training.metrics import Sums
from seqmnist.training.steps import init_state, make_system
from tools import cli, redraw, report


@pytest.fixture(scope="module")
def network(finished_run):
    return trained.load(finished_run)


@pytest.fixture(scope="module")
def test_set(network):
    return network.test_set()


def test_it_scores_as_the_run_did(network, test_set):
    images, labels = test_set
    assert images.shape == (1000, 28, 28)
    answers = network.probabilities(images).argmax(-1)
    assert (answers == labels).mean() == network.results["test"]["accuracy"]
    one_by_one = np.concatenate([network.logits(images[i : i + 1]) for i in range(3)])
    assert_close(one_by_one, network.logits(images)[:3])


def test_a_relative_workdir_is_found_from_its_parent(finished_run, network, test_set, monkeypatch):
    monkeypatch.chdir(finished_run.parent)
    again = trained.load(finished_run.name)
    assert again.workdir.path == finished_run
    np.testing.assert_array_equal(again.logits(test_set[0][:8]), network.logits(test_set[0][:8]))


def test_any_number_of_images_can_be_read_step_by_step(network, test_set):
    images, labels = (array[:5] for array in test_set)
    beliefs = network.beliefs(images)
    assert beliefs.shape == (28, 5, 10)
    assert_close(beliefs[-1], network.probabilities(images))
    assert network.hidden_states(images).shape == (28, 5, 8)
    assert network.gradient_norms(images, labels).shape == (1, 28, 5)


@pytest.mark.parametrize("label", [10, -1, 0.5])
def test_a_label_that_is_not_a_class_is_refused(three_members, label):
    network = trained.load(three_members[0])
    with pytest.raises(UserError, match="whole numbers from 0 to 9"):
        network.gradient_norms(np.zeros((2, 28, 28), np.uint8), np.array([0, label]))
    with pytest.raises(UserError, match="not a class for each image"):
        network.gradient_norms(np.zeros((2, 28, 28), np.uint8), np.array([1]))


@pytest.fixture
def three_members(tmp_path, finished_run):
    """A workdir with a checkpoint of three random members, and their parameters."""
    config = Config(model=ModelConfig(hidden_size=3), members=MembersConfig(num=3))
    system, rng = make_system(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0))
    state = jax.tree.map(lambda leaf: rng.normal(size=(3, *leaf.shape)).astype(leaf.dtype), shapes)
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(
        Saved(state, Sums.zeros(shape=(3,)), 5, [], "of no data", 1.0, MNIST.to_dict(), {})
    )
    checkpoints.close()
    workdir_lib.write_json(tmp_path / "config.json", config_lib.to_dict(config))
    results = workdir_lib.Workdir(finished_run).read_results()
    results |= {"steps": 5, "validation": {"loss": [None, 0.1, 0.2], "accuracy": [0.9, 0.8, 0.7]}}
    workdir_lib.write_json(tmp_path / "results.json", results)
    return tmp_path, system, state.params


def test_a_member_is_taken_out_of_many(three_members):
    workdir, system, params = three_members
    images = np.full((2, 28, 28), 9, np.uint8)
    for member in range(3):
        alone = jax.tree.map(lambda leaf, i=member: leaf[i], params)
        expected = jax.jit(system.apply)(alone, jnp.array(images))
        assert_close(trained.load(workdir, member).logits(images), np.asarray(expected))
    with pytest.raises(UserError, match="members 0 to 2, not 3"):
        trained.load(workdir, 3)


def test_the_best_member_is_that_of_validation_and_has_not_diverged(three_members):
    workdir, _, _ = three_members
    said = []
    assert trained.load(workdir, say=said.append).member == 1
    (workdir / "results.json").unlink()  # the run has not finished
    assert trained.load(workdir, say=said.append).member == 0
    assert said == [
        "Member 1 of members 0 to 2, the one with the lowest validation loss",
        "Member 0 of members 0 to 2, the first",
    ]


def test_the_best_member_of_a_sweep_is_one_of_the_chosen_setting(three_members):
    workdir, _, _ = three_members
    config, results = (
        json.loads((workdir / f"{x}.json").read_text()) for x in ("config", "results")
    )
    sweep = json.dumps({"optimizer.learning_rate": [0.1, 0.2, 0.3]})
    config["members"] |= {"num": 1, "sweep": sweep}
    results["validation"]["loss"], results["best"] = [0.1, 0.3, 0.2], 2
    workdir_lib.write_json(workdir / "config.json", config)
    workdir_lib.write_json(workdir / "results.json", results)
    assert trained.load(workdir).member == 2


def test_an_older_checkpoint_is_announced(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    results = workdir_lib.Workdir(tmp_path / "run").read_results()
    workdir_lib.write_json(tmp_path / "run" / "results.json", {**results, "steps": 999})
    said = []
    trained.load(tmp_path / "run", say=said.append)
    assert len(said) == 1
    assert "step 25 of 999" in said[0]


def test_what_is_missing_is_named(tmp_path, finished_run):
    with pytest.raises(UserError, match=r"config.json does not exist; train"):
        trained.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="one network"):
        trained.load(finished_run, 1)
    shutil.copy(finished_run / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"checkpoints holds no usable checkpoint; train"):
        trained.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_other_images_than_those_of_the_run_are_refused(three_members, data_dir):
    workdir, _, _ = three_members
    config = config_lib.override(
        workdir_lib.Workdir(workdir).read_config(),
        {"data.name": "mnist_5k", "data.data_dir": str(data_dir)},
    )
    workdir_lib.write_json(workdir / "config.json", config_lib.to_dict(config))
    with pytest.raises(UserError, match="other images than those"):
        trained.load(workdir).test_set()


def test_data_that_were_moved_are_found_where_one_says(finished_run, data_dir, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    gone = {"data.data_dir": str(tmp_path / "a"), "data.manual_dir": str(tmp_path / "b")}
    config = config_lib.override(workdir_lib.Workdir(finished_run).read_config(), gone)
    workdir_lib.write_json(tmp_path / "run" / "config.json", config_lib.to_dict(config))

    with pytest.raises(
        UserError, match=r"manual_dir=.* machine, or none, with --data_dir and --manual_dir"
    ):
        trained.load(tmp_path / "run").test_set()
    places = {"data_dir": str(data_dir), "manual_dir": None}
    found = trained.load(tmp_path / "run", places=places).test_set()
    chex.assert_trees_all_equal(found, trained.load(finished_run).test_set())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("tool", [redraw, report])
def test_a_tool_passes_on_where_the_data_are(tool):
    def chosen(*flags):
        return cli.chosen(tool._make_parser().parse_args(["--workdir=a", *flags]))["places"]

    assert chosen() == {}
    assert chosen("--manual_dir=none", "--data_dir=b") == {"manual_dir": None, "data_dir": "b"}
