"""An exported classifier against the network it was made from."""

import json
import math
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.numpy import load_file

from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import card, export, trained
from seqmnist.training.steps import init_state, make_system


def export_run(workdir):
    network = trained.load(workdir)
    path, params = network.workdir.path, network.params
    return network, export.write(
        path,
        lambda x: network.system.apply(params, x),
        params,
        "card",
        network.spec,
        network.streaming(),
    )


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """A copy of the finished run with an export: its network, and what `write` returned."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    return export_run(workdir)


@pytest.mark.slow
def test_it_answers_as_the_network_does(exported, digits):
    network, figures = exported
    workdir = network.workdir.path
    assert figures["files"].keys() == {
        export.ARTIFACT, export.STEP, export.INITIAL_STATE, export.PARAMETERS, export.CARD,
        export.IMAGES,
    }  # fmt: skip
    assert figures["largest_difference"].keys() == {"1", "7", "128", "step"}
    assert max(figures["largest_difference"].values()) <= 1e-6 * figures["logits_scale"]
    artifact = export.load(workdir / "export" / export.ARTIFACT)
    np.testing.assert_allclose(
        artifact.probabilities(digits[0]), network.probabilities(digits[0]), atol=1e-6
    )
    content = (workdir / "export" / export.ARTIFACT).read_bytes()
    assert str(REPOSITORY).encode() not in content  # nor any other path of this machine
    assert not list(workdir.glob("*.partial*"))
    modes = {path.stat().st_mode & 0o777 for path in (workdir / "export").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
    parameters = load_file(workdir / "export" / export.PARAMETERS)
    assert parameters.keys() == {
        "layers.0.bias", "layers.0.kernel", "layers.0.recurrent_kernel", "readout.bias",
        "readout.kernel",
    }  # fmt: skip
    kernel = network.params["layers"][0]["kernel"][...]
    np.testing.assert_array_equal(parameters["layers.0.kernel"], kernel)


@pytest.mark.slow
def test_it_reads_step_by_step(exported, digits):
    network, _ = exported
    folder = network.workdir.path / "export"
    step = jax.export.deserialize(bytearray((folder / export.STEP).read_bytes())).call
    images = digits[0][:3]
    state = [np.repeat(a, 3, axis=0) for a in np.load(folder / export.INITIAL_STATE).values()]
    for t in range(28):
        state, logits = step(state, images[:, t].astype(np.float32) / 255)
    np.testing.assert_allclose(logits, network.logits(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_artifact_that_answers_otherwise_is_never_written(finished_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # nothing agrees this well
    with pytest.raises(RuntimeError, match="differs"):
        export_run(workdir)
    assert not list(workdir.glob("export*"))


@pytest.mark.slow
def test_exporting_changes_no_setting_and_no_file_of_the_user(finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    (workdir / "export").mkdir()
    (workdir / "export" / "notes.txt").write_text("mine")
    (workdir / "export" / export.CARD).write_text("an earlier card")
    before = jax.config.values.copy()
    export_run(workdir)
    assert jax.config.values == before
    assert (workdir / "export" / "notes.txt").read_text() == "mine"
    assert (workdir / "export" / export.CARD).read_text() == "card"


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_on_a_full_disk(name, *arguments):
    """Runs a tool whose files cannot exceed 4096 bytes; -B spares the cached bytecode."""
    return subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, f"tools.{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_earlier_export(finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    (workdir / "export").mkdir()
    (workdir / "export" / export.ARTIFACT).write_text("earlier")
    result = run_on_a_full_disk("export", f"--workdir={workdir}")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert "export cannot be written (File too large)" in line
    assert [path.read_text() for path in (workdir / "export").iterdir()] == ["earlier"]
    assert not list(workdir.glob("export.*"))


@pytest.mark.slow
def test_what_is_no_artifact_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        export.load(tmp_path / "none")
    artifact = (exported[0].workdir.path / "export" / export.ARTIFACT).read_bytes()
    flipped = [bytearray(artifact) for _ in range(20)]
    for i, content in enumerate(flipped):
        content[i * (len(artifact) - 1) // 19] ^= 16
    for content in (b"", b"something else", bytes(1000), artifact[:-1], *flipped):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=r"damaged or not a file that tools\.export wrote"):
            export.load(tmp_path / "file")


def test_the_card_says_what_was_measured_and_keeps_paths_to_itself():
    config = Config()
    config.data.data_dir = "somewhere private"
    config.plugins = "/private/mine.py"
    text = card.model_card("name", config, {}, None, MNIST, export.usage(MNIST))
    assert "| test accuracy | – |" in text
    assert "private" not in text
    assert '"plugins": "mine.py"' in text
    results = {
        "parameters": 6602,
        "dataset": {"name": "mnist", "train": 48000, "validation": 12000, "test": 10000},
        "validation": {"loss": [0.5, 0.25], "accuracy": [0.9, 0.95]},
        "test": {"loss": [0.5, 0.125], "accuracy": [0.9, 0.9375]},
        "versions": {"jax": "1.2.3"},
        "members": [
            {"seed": 6, "optimizer.learning_rate": 0.01},
            {"seed": 7, "optimizer.learning_rate": 0.02},
        ],
    }
    text = card.model_card("name", config, results, 1, MNIST, export.usage(MNIST))
    for word in (
        "mnist, 48,000 train, 12,000 validation",
        "| test loss | 0.1250 (all seeds: 0.3125 ± 0.2652) |",
        "| versions | jax 1.2.3 |",
        "| seed | 7 |",
        "rmsprop, learning rate 0.02 |",
        "6,602",
        "gray images of 28 × 28 pixels",
        "10 classes",
        "| classes | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "np.zeros((1, 28, 28), np.uint8))  # [1, 10]",
    ):
        assert word in text
    assert text.startswith("# name\n")


SPECS = [
    ImageSpec(8, 8, 1, tuple("0123456789")),
    ImageSpec(32, 24, 3, ("cat", "dog", "fish")),
    ImageSpec(28, 28, 1, tuple(f"kind {i}" for i in range(47))),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.shape}")
def test_the_card_names_images_and_classes(spec):
    streaming = export.Streaming([], None, spec.width * spec.channels)
    text = card.model_card("name", Config(), {}, None, spec, export.usage(spec, streaming))
    shape = ", ".join(map(str, spec.shape))
    for word in (
        f"{'color' if spec.channels == 3 else 'gray'} images of {spec.width} × {spec.height}",
        f"{spec.num_classes} classes",
        f"np.zeros((1, {shape}), np.uint8))  # [1, {spec.num_classes}]",
        f"np.zeros((1, {streaming.size}), np.float32))  # [1, {spec.num_classes}]",
        "kind 19, and 27 more" if spec.num_classes == 47 else ", ".join(spec.class_names),
    ):
        assert word in text


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: f"{spec.shape}")
def linear(request, tmp_path_factory):
    """A linear classifier of images, exported: the folder, the classifier and its spec."""
    spec, folder = request.param, tmp_path_factory.mktemp("linear")
    size = math.prod(spec.shape)
    kernel = np.random.default_rng(0).normal(0, 1e-3, (size, spec.num_classes)).astype(np.float32)

    def classify(images):
        return images.reshape(-1, size).astype(np.float32) @ kernel

    figures = export.write(folder, classify, {"kernel": kernel}, "card", spec)
    assert figures["largest_difference"].keys() == {"1", "7", "128"}
    return folder / "export", classify, spec


@pytest.mark.slow
def test_an_artifact_knows_its_images_and_classes(linear):
    folder, classify, spec = linear
    artifact = export.load(folder / export.ARTIFACT)
    assert artifact.spec == spec
    images = np.random.default_rng(0).integers(0, 256, (3, *spec.shape), np.uint8)
    np.testing.assert_allclose(artifact.logits(images), classify(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_artifact_without_names_has_numbered_classes(linear, tmp_path):
    folder, _, spec = linear
    shutil.copy(folder / export.ARTIFACT, tmp_path)
    numbers = tuple(map(str, range(spec.num_classes)))
    expected = ImageSpec(spec.height, spec.width, spec.channels, numbers)
    assert export.load(tmp_path / export.ARTIFACT).spec == expected
    other = ImageSpec(spec.height, spec.width, spec.channels, (*numbers, "one more")).to_dict()
    for text in ("", "[]", "{}", "null", '{"height": 3}', json.dumps(other)):
        (tmp_path / export.IMAGES).write_text(text)
        with pytest.raises(UserError, match=r"images\.json is damaged or does not belong"):
            export.load(tmp_path / export.ARTIFACT)


@pytest.mark.slow
def test_the_tool_writes_an_artifact_that_predicts_without_the_model(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))

    def run(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    out = run("-m", "tools.export", "--workdir=run", "--json=figures.json")
    assert "batch of 128" in out
    assert json.loads((tmp_path / "figures.json").read_text())["logits_scale"] >= 1
    images, _ = trained.load(finished_run).test_set()
    np.save(tmp_path / "digits.npy", images[:9])
    code = (
        "import runpy, sys\n"
        "from seqmnist import process\n"
        "process.leave = sys.exit\n"
        "try: runpy.run_module('tools.predict', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {'seqmnist.networks', 'flax'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    arguments = [f"--artifact=run/export/{export.ARTIFACT}", "--no_prepare", "--json=answers.json"]
    run("-c", code, *arguments, "digits.npy")
    answers = json.loads((tmp_path / "answers.json").read_text())["images"]
    found = [answer["probabilities"] for answer in answers]
    np.testing.assert_allclose(
        found, trained.load(finished_run).probabilities(images[:9]), atol=1e-6
    )
