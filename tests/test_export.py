"""An exported classifier against the network it was made from."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.numpy import load_file

from seqmnist.config import Config, ModelConfig, to_dict
from seqmnist.errors import UserError
from seqmnist.study import export, trained
from seqmnist.training.steps import init_state, make_system


def export_run(workdir):
    network = trained.load(workdir)
    return network, export.write(
        workdir, lambda images: network.system.apply(network.params, images), network.params, "card"
    )


def test_it_answers_as_the_network_does(finished_run, digits):
    network, figures = export_run(finished_run)
    assert figures["files"].keys() == {export.ARTIFACT, export.PARAMETERS, export.CARD}
    assert figures["largest_difference"].keys() == {"1", "7", "128"}
    assert max(figures["largest_difference"].values()) <= 1e-6 * figures["logits_scale"]
    artifact = export.load(finished_run / "export" / export.ARTIFACT)
    np.testing.assert_allclose(
        artifact.probabilities(digits[0]), network.probabilities(digits[0]), atol=1e-6
    )
    content = (finished_run / "export" / export.ARTIFACT).read_bytes()
    assert str(REPOSITORY).encode() not in content  # nor any other path of this machine
    assert not list(finished_run.glob("*.partial*"))
    parameters = load_file(finished_run / "export" / export.PARAMETERS)
    assert parameters.keys() == {
        "layers.0.bias", "layers.0.kernel", "layers.0.recurrent_kernel", "readout.bias",
        "readout.kernel",
    }  # fmt: skip
    kernel = network.params["layers"][0]["kernel"][...]
    np.testing.assert_array_equal(parameters["layers.0.kernel"], kernel)


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(view="permuted_pixels", cell="lru", block="residual", readout="mean"),
        ModelConfig(view="patches", cell="lstm", bidirectional=True, num_layers=2, readout="max"),
        ModelConfig(view="columns", cell="min_gru", subsample=2, reverse=True),
    ],
    ids=lambda model: model.cell,
)
def test_every_view_and_cell_is_exported_for_any_batch(model, digits):
    config = Config(model=model)
    system = make_system(config)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(-0.1, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    classify = jax.jit(lambda images: system.apply(params, images))
    exported = jax.export.export(classify, platforms=export.PLATFORMS)(
        jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 28, 28"), np.uint8)
    )
    logits = export.Artifact(exported).logits(digits[0][:3])
    np.testing.assert_allclose(logits, classify(digits[0][:3]), atol=1e-5)


def test_an_artifact_that_answers_otherwise_is_never_taken(finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # nothing agrees this well
    with pytest.raises(RuntimeError, match="differs"):
        export_run(tmp_path)
    assert not list(tmp_path.glob("export*"))


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(UserError, match="export it first"):
        export.load(tmp_path / "none")
    for content in (b"", b"something else", bytes(1000)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match="not an exported classifier"):
            export.load(tmp_path / "file")


def test_the_card_says_what_was_measured_and_keeps_paths_to_itself():
    config = to_dict(Config())
    config["data"]["data_dir"] = "somewhere private"
    card = export.model_card("name", config, {}, None)
    assert "not measured" in card
    assert "private" not in card
    results = {
        "parameters": 6602,
        "dataset": {"name": "mnist", "train": 48000, "validation": 12000, "test": 10000},
        "validation": {"loss": [0.5, 0.25], "accuracy": [0.9, 0.95]},
        "test": {"loss": [0.5, 0.125], "accuracy": [0.9, 0.9375]},
        "versions": {"jax": "1.2.3"},
        "members": [{"seed": 6}, {"seed": 7}],
    }
    card = export.model_card("name", config, results, 1)
    for word in ("48,000 train", "| test | 0.1250 | 0.9375 |", "| jax | 1.2.3 |", "| seed | 7 |"):
        assert word in card
    assert card.startswith("# name\n")


def test_the_tool_writes_an_artifact_that_predicts_without_the_model(finished_run, tmp_path):
    def run(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    out = run("-m", "tools.export", f"--workdir={finished_run}", f"--json={tmp_path / 'figures'}")
    assert "batch of 128" in out
    assert json.loads((tmp_path / "figures").read_text())["logits_scale"] >= 1
    images, _ = trained.load(finished_run).test_set()
    np.save(tmp_path / "digits.npy", images[:9])
    arguments = [f"--artifact={finished_run / 'export' / export.ARTIFACT}", "--no_prepare"]
    arguments += [f"--json={tmp_path / 'answers'}", str(tmp_path / "digits.npy")]
    run(
        "-c",
        "import runpy, sys\n"
        "runpy.run_module('tools.predict', run_name='__main__')\n"
        "loaded = {'seqmnist.networks', 'flax'} & set(sys.modules)\n"
        "assert not loaded, loaded",
        *arguments,
    )
    answers = json.loads((tmp_path / "answers").read_text())["images"]
    found = [answer["probabilities"] for answer in answers]
    np.testing.assert_allclose(
        found, trained.load(finished_run).probabilities(images[:9]), atol=1e-6
    )
