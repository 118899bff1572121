"""An exported classifier against the network it was made from."""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from close import assert_close
from conftest import REPOSITORY
from PIL import Image

import seqmnist
from seqmnist.config import (
    Config,
    DataConfig,
    MembersConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import card, export, trained
from seqmnist.training.steps import init_state, make_system
from seqmnist.workdir import Workdir


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
    """A copy of the finished run with an export: its network, and what `write` returned.

    Before it, `export` was a link to a folder with a file of the user and an earlier card.
    """
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(finished_run, folder / "run", ignore=shutil.ignore_patterns("export"))
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "notes.txt").write_text("mine")
    (folder / "elsewhere" / export.CARD).write_text("an earlier card")
    (folder / "run" / "export").symlink_to(folder / "elsewhere")
    before = jax.config.values.copy()
    network, figures = export_run(folder / "run")
    assert jax.config.values == before
    return network, figures


@pytest.mark.slow
def test_an_artifact_gives_the_logits_of_the_network(exported, digits):
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
    parameters = safetensors.numpy.load_file(workdir / "export" / export.PARAMETERS)
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
def test_a_network_with_a_long_memory_can_be_exported(tmp_path):
    options = {"r_min": 0.999, "r_max": 0.9999}
    model = ModelConfig(view="pixels", cell="lru", cell_options=options, hidden_size=32)
    system = make_system(Config(model=model))
    params = init_state(Config(model=model), system, 0).params
    export.write(tmp_path, lambda x: system.apply(params, x), params, "card", MNIST)
    artifact = export.load(tmp_path / "export" / export.ARTIFACT)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    assert_close(artifact.logits(images), system.apply(params, images), 1e-4)


@pytest.mark.slow
def test_an_artifact_that_answers_otherwise_is_never_written(finished_run, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # nothing agrees this well
    with pytest.raises(RuntimeError, match="differs"):
        export_run(workdir)
    assert not list(workdir.glob("export*"))


@pytest.mark.slow
def test_exporting_changes_no_file_of_the_user(exported):
    folder = exported[0].workdir.path / "export"
    assert folder.is_symlink()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / export.CARD).read_text() == "card"


LIMITED = """
import resource, runpy, signal, sys
{}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_on_a_full_disk(name, *arguments, before=""):
    """Runs a tool whose files cannot exceed 4096 bytes; -B writes no bytecode."""
    return subprocess.run(
        [sys.executable, "-B", "-c", LIMITED.format(before), f"tools.{name}", *map(str, arguments)],
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


def sealed(content):
    """Returns what a file that ends with its own digest looks like."""
    content = bytes(content) + b"seqmnist sha256:"
    return content + hashlib.sha256(content).hexdigest().encode()


@pytest.mark.slow
def test_a_file_that_is_not_an_artifact_is_refused(exported, tmp_path):
    folder = exported[0].workdir.path / "export"
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            export.load(path)
    os.mkfifo(tmp_path / "pipe")  # whose other end nobody opens
    with pytest.raises(UserError, match="not a regular file"):
        export.load(tmp_path / "pipe")
    for content in (b"", b"something else", bytes(1000), (folder / export.CARD).read_bytes()):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=r"damaged or not a file that tools\.export wrote"):
            export.load(tmp_path / "file")
    for name in (export.STEP, export.IMAGES, export.INITIAL_STATE, export.PARAMETERS):
        with pytest.raises(UserError, match=r"cannot be used .*name its classifier\.jax_export"):
            export.load(folder / name)


def damage(content, rng):
    """Returns `content` with flipped bits, or another length, or a part zeroed or moved."""
    damaged, size = bytearray(content), len(content)
    start, other = (int(i) for i in rng.integers(0, size - 1, 2))
    few = slice(start, start + int(rng.integers(1, 40)))
    match rng.integers(7):
        case 0:
            damaged[start] ^= 1 << rng.integers(8)
        case 1:
            for i in rng.integers(0, size, 9):
                damaged[i] ^= 1 << rng.integers(8)
        case 2:
            del damaged[start:]
        case 3:
            damaged += rng.bytes(9)
        case 4:
            del damaged[few]
        case 5:
            damaged[start:start] = rng.bytes(9)
        case 6:
            part = bytes(damaged[few])
            damaged[few] = bytes(len(part))
            damaged[other : other + len(part)] = part
    return bytes(damaged) if damaged != content else damage(content, rng)


@pytest.mark.slow
def test_no_damage_changes_an_answer(exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported[0].workdir.path / "export", folder)
    rng = np.random.default_rng(0)
    images, x = rng.integers(0, 256, (4, 28, 28), np.uint8), rng.random((4, 28), np.float32)

    def classify():
        artifact = export.load(folder / export.ARTIFACT)
        return artifact.spec, artifact.logits(images).tobytes()

    def step():
        initial, function, _ = export.load_step(folder / export.STEP)
        state, logits = function([np.repeat(each, 4, axis=0) for each in initial], x)
        return [np.asarray(each).tobytes() for each in (*state, logits)]

    def read_parameters():
        content = export.read(folder / export.PARAMETERS)
        return {k: v.tobytes() for k, v in safetensors.numpy.load(content).items()}

    readers = {
        export.ARTIFACT: classify,
        export.IMAGES: classify,
        export.STEP: step,
        export.INITIAL_STATE: step,
        export.PARAMETERS: read_parameters,
    }
    for name, read in readers.items():
        content, answer = (folder / name).read_bytes(), read()
        for _ in range(100):
            (folder / name).write_bytes(damage(content, rng))
            with pytest.raises(UserError, match=f"{name} is damaged"):
                read()
        (folder / name).write_bytes(content)
        assert read() == answer


def export_of(function, *arguments, **options):
    return jax.export.export(jax.jit(function), **options)(*arguments)


def export_flat(shape="b, 28, 28", dtype=np.uint8, **options):
    """Exports a function whose logits are the first ten pixels."""

    def flat(images):
        return images.reshape(images.shape[0], -1)[:, :10].astype(np.float32)

    return export_of(flat, jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), dtype), **options)


def export_by_a_newer_stablehlo():
    exported = export_flat()
    newer = re.sub(rb"(StableHLO_v)[0-9]", rb"\g<1>9", exported.mlir_module_serialized)
    return dataclasses.replace(exported, mlir_module_serialized=newer)


OTHERS = {
    "it maps float32[b,28,28] to float32[b,10], not images": lambda: export_flat(dtype=np.float32),
    "it maps to float32[], not images to logits": lambda: export_of(lambda: np.float32(1)),
    "expected (128, 28, 28)": lambda: export_flat("128, 28, 28"),
    "for platforms '('cuda',)' but": lambda: export_flat(platforms=["cuda"]),
    "its calling convention is 99; the newest": lambda: dataclasses.replace(
        export_flat(), calling_convention_version=99
    ),
    "its StableHLO is 9.": export_by_a_newer_stablehlo,
}


@pytest.mark.parametrize("reason", OTHERS)
def test_what_cannot_be_called_here_is_refused_when_loaded(reason, tmp_path):
    (tmp_path / "file").write_bytes(sealed(OTHERS[reason]().serialize()))
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        export.load(tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert f"file cannot be used by JAX {jax.__version__} here" in str(caught.value)


def test_what_can_be_called_here_is_loaded(tmp_path):
    (tmp_path / "file").write_bytes(sealed(export_flat().serialize()))
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    np.testing.assert_array_equal(export.load(tmp_path / "file").logits(images), images[:, 0, :10])


def test_a_step_that_cannot_be_called_is_refused_when_loaded(tmp_path):
    def step(state, x):
        return state, x

    (state,) = arrays = [np.zeros((1, 5), np.float32)]
    np.savez(file := io.BytesIO(), *arrays)
    (tmp_path / export.INITIAL_STATE).write_bytes(sealed(file.getvalue()))
    b = jax.export.symbolic_shape("b, 5, 28")

    def attempt(size=5, dtype=np.float32, **options):
        before = [jax.ShapeDtypeStruct((b[0], size), np.float32)]
        exported = export_of(step, before, jax.ShapeDtypeStruct((b[0], 28), dtype), **options)
        (tmp_path / export.STEP).write_bytes(sealed(exported.serialize()))
        return export.load_step(tmp_path / export.STEP)

    streaming = attempt()
    assert streaming.size == 28
    np.testing.assert_array_equal(streaming.initial_state[0], state)
    for options in ({"size": 6}, {"dtype": np.uint8}, {"platforms": ["tpu"]}):
        with pytest.raises(UserError, match=r"cannot be used .*name its step\.jax_export"):
            attempt(**options)
    (tmp_path / export.STEP).write_bytes(sealed(export_flat().serialize()))
    with pytest.raises(UserError, match=r"cannot be used .*name its step\.jax_export"):
        export.load_step(tmp_path / export.STEP)


def test_the_card_says_what_was_measured_and_keeps_paths_to_itself():
    config = Config()
    config.data.data_dir = "somewhere private"
    config.plugins = "/private/mine.py"
    text = card.model_card("name", config, {}, None, MNIST)
    assert "| test accuracy | – |" in text
    several = Config(seed=4, members=MembersConfig(num=3))
    assert card.facts(several, {}, 2)["seed"] == "6"
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
    text = card.model_card("name", config, results, 1, MNIST)
    for word in (
        "mnist, 48,000 train, 12,000 validation",
        "| test loss | 0.1250 (all seeds: 0.3125 ± 0.2652) |",
        "| versions | jax 1.2.3 |",
        "| seed | 7 |",
        "rmsprop, learning rate 0.02 |",
        "6,602",
        "gray images of 28 × 28 pixels",
        "10 classes",
        "| classes, by label | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "uint8 [B, 28, 28] -> float32 [B, 10]",
        'prepare("example.png")',
        f"by JAX {jax.__version__} with jaxlib",
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
    text = card.model_card("name", Config(), {}, None, spec, streaming=streaming)
    shape = ", ".join(map(str, spec.shape))
    for word in (
        f"{'color' if spec.channels == 3 else 'gray'} images of {spec.width} × {spec.height}",
        f"{spec.num_classes} classes",
        f"uint8 [B, {shape}] -> float32 [B, {spec.num_classes}]",
        f"np.zeros((1, {streaming.size}), np.float32)",
        f'.convert("{"RGB" if spec.channels == 3 else "L"}").resize(({spec.width}, {spec.height}))',
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
def test_the_example_on_the_card_of_other_images_runs(linear, tmp_path, monkeypatch, capsys):
    folder, classify, spec = linear
    text = card.model_card("name", Config(), {}, None, spec)
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    image = np.random.default_rng(1).integers(0, 256, spec.shape, np.uint8)
    Image.fromarray(image).save("picture.png")
    exec(example, {})
    expected = spec.class_names[classify(image[None])[0].argmax()]
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.slow
def test_an_artifact_alone_knows_its_images(linear, tmp_path):
    folder, _, spec = linear
    shutil.copy(folder / export.ARTIFACT, tmp_path)
    assert export.load(tmp_path / export.ARTIFACT).spec == spec
    whole = (folder / export.ARTIFACT).read_bytes()
    earlier = whole[: whole.index(export._MARK)] + export._BLANK_SEAL
    (tmp_path / "earlier").write_bytes(export._sealed(earlier))
    numbers = tuple(map(str, range(spec.num_classes)))
    expected = ImageSpec(spec.height, spec.width, spec.channels, numbers)
    assert export.load(tmp_path / "earlier").spec == expected
    (tmp_path / export.IMAGES).write_text("{}")
    with pytest.raises(UserError, match=r"images\.json is damaged"):
        export.load(tmp_path / export.ARTIFACT)
    other = ImageSpec(spec.height, spec.width, spec.channels, (*numbers, "one more")).to_dict()
    text = json.dumps(other | {"digest": "seqmnist sha256:"})
    digest = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / export.IMAGES).write_text(text.replace("sha256:", f"sha256:{digest}"))
    with pytest.raises(UserError, match=r"images\.json beside it belongs to another network"):
        export.load(tmp_path / export.ARTIFACT)


def run_python(*command, cwd):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def exported_by_tool(data_dir, tmp_path_factory):
    """The workdir of a network that reads most digits, with an export; do not change it."""
    workdir = tmp_path_factory.mktemp("exported_by_tool") / "run"
    config = Config(
        data=DataConfig(name="mnist_5k", data_dir=str(data_dir)),
        model=ModelConfig(cell="gru"),
        optimizer=OptimizerConfig(learning_rate=0.004),
        train=TrainConfig(num_epochs=6, batch_size=64),
        seed=1,
    )
    assert seqmnist.train(config, workdir)["test"]["accuracy"] > 0.8
    arguments = ("--workdir=run", "--json=figures.json")
    out = run_python("-m", "tools.export", *arguments, cwd=workdir.parent)
    assert "batch of 128" in out
    figures = json.loads((workdir.parent / "figures.json").read_text())
    assert figures["logits_scale"] >= 1
    assert export.EXAMPLE in figures["files"]
    return workdir


@pytest.mark.slow
def test_an_artifact_predicts_without_the_model(exported_by_tool, tmp_path):
    images, _ = trained.load(exported_by_tool).test_set()
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
    artifact = exported_by_tool / "export" / export.ARTIFACT
    arguments = [f"--artifact={artifact}", "--no_prepare", "--json=answers.json"]
    run_python("-c", code, *arguments, "digits.npy", cwd=tmp_path)
    answers = json.loads((tmp_path / "answers.json").read_text())["images"]
    found = [answer["probabilities"] for answer in answers]
    np.testing.assert_allclose(
        found, trained.load(exported_by_tool).probabilities(images[:9]), atol=1e-5
    )


# After what is on a card, in the same process: ten digits on paper, and what has been imported.
ALL_DIGITS = f"""
files = [f"{REPOSITORY}/tools/pictures/digits/{{c}}.png" for c in range(10)]
print(*classify(np.stack([prepare(file) for file in files])).argmax(1))
import sys
used = {{name.partition(".")[0] for name in sys.modules}}
assert not used & {{"seqmnist", "flax", "optax", "orbax"}}, used
"""


@pytest.mark.slow
def test_the_example_on_the_card_reads_a_digit(exported_by_tool, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported_by_tool / "export", folder)
    text = (folder / export.CARD).read_text(encoding="utf-8")
    example, by_step = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "JAX_"))}

    def run_as_a_stranger(code):
        command = [sys.executable, "-c", code]
        options = {"cwd": folder, "env": environment, "check": False, "capture_output": True}
        return subprocess.run(command, text=True, **options)

    result = run_as_a_stranger(example + by_step + ALL_DIGITS)
    assert result.returncode == 0, result.stderr
    answer, answers = result.stdout.splitlines()
    assert answer == "7"
    pictures = [f"{REPOSITORY}/tools/pictures/digits/{c}.png" for c in range(10)]
    run_python(
        "-m", "tools.predict", f"--workdir={exported_by_tool}", "--json=a", *pictures, cwd=folder
    )
    expected = [answer["class"] for answer in json.loads((folder / "a").read_text())["images"]]
    assert np.sum(np.array(answers.split(), int) == expected) >= 9  # it prepares more simply
    content = bytearray((folder / export.ARTIFACT).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / export.ARTIFACT).write_bytes(content)
    result = run_as_a_stranger(example)
    assert result.stderr.endswith("ValueError: classifier.jax_export is damaged\n")
    assert not result.stdout


def test_networks_of_64_bits_are_refused(tmp_path):
    with pytest.raises(UserError, match="without JAX_ENABLE_X64"):
        export.write(tmp_path, None, {"kernel": np.zeros(2)}, "", MNIST)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_overwritten_run_keeps_only_what_no_tool_wrote(exported_by_tool, tmp_path):
    shutil.copytree(exported_by_tool, tmp_path / "run")
    (tmp_path / "run" / "report").mkdir()
    names = re.findall(r'picture\("(\w+)"', (REPOSITORY / "tools" / "sections.py").read_text())
    theirs = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in ("export/notes.md", "report/photo.png", *(f"report/{name}" for name in theirs)):
        (tmp_path / "run" / name).write_text("x")
    workdir = Workdir(tmp_path / "run")
    workdir.replace(workdir.read_config())
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["notes.md"]
    assert [path.name for path in (tmp_path / "run" / "report").iterdir()] == ["photo.png"]


def test_no_folder_of_a_notice_is_on_the_card():
    notice = "the archives in /home/me/files are not the registered ones, because /home/me/x is not"
    dataset = {"name": "mnist", "notice": notice, "train": 8, "validation": 2, "test": 2}
    results = {"dataset": dataset, "parameters": 6602}
    text = card.model_card("name", Config(), results, None, MNIST)
    assert "| notice | the archives in … are not the registered ones |" in text
    assert "/home/me" not in text


@pytest.mark.parametrize(("score", "text"), [(0.5, "0.5000"), (6.5e21, "6.5e+21")])
def test_scores_are_short(score, text):
    assert card.format_score(score) == card.format_score([score]) == text
