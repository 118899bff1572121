"""A trained network as files that need no code of this package.

`write` makes DIR/export: the classifier as StableHLO, its parameters as safetensors, and a model
card. Nothing here knows a model: reading back what was written must not depend on one.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from seqmnist.errors import UserError
from seqmnist.training import batches, metrics

DIRECTORY, ARTIFACT, PARAMETERS, CARD = (
    "export", "classifier.jax_export", "parameters.safetensors", "README.md"
)  # fmt: skip
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH_SIZES = (1, 7, 128)  # with which the artifact is compared with the network itself
TOLERANCE = 1e-6  # of logits, relative to the largest where that is above 1


class Artifact:
    """A classifier that was read back: it needs JAX, and nothing else."""

    def __init__(self, exported: jax_export.Exported):
        """Takes what `jax.export.deserialize` returns."""
        self._call = jax.jit(exported.call)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, 28, 28]: logits [N, C]."""
        return batches.in_chunks(self._call, images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, 28, 28]: probabilities [N, C]."""
        return metrics.softmax(self.logits(images))


def load(path: pathlib.Path) -> Artifact:
    """Reads an artifact that `write` wrote.

    Raises:
      UserError: there is none, or it is something else, or damaged.
    """
    try:
        return Artifact(jax_export.deserialize(bytearray(path.read_bytes())))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); export it first") from None
    except Exception as error:  # whatever the layers below make of other bytes
        raise UserError(f"{path} is not an exported classifier; export it again") from error


def write(
    workdir: pathlib.Path,
    classify: Callable[[jax.Array], jax.Array],
    params: Any,
    card: str,
) -> dict[str, Any]:
    """Writes DIR/export, once a process that knows no model has given the same answers from it.

    Args:
      workdir: where it is written, in place of an earlier one.
      classify: images uint8 [B, 28, 28] -> logits [B, C], for any B.
      params: its parameters, for those who want them by name.
      card: the model card, Markdown.

    Returns:
      {"files": {name: bytes}, "largest_difference": {batch size: of logits}, "logits_scale": …}.

    Raises:
      RuntimeError: the answers differ, which is a mistake of this program.
      UserError: the workdir cannot be written.
    """
    from safetensors.numpy import save_file

    jitted = jax.jit(classify)
    exported = _export(jitted)
    try:
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f"{DIRECTORY}.partial", dir=workdir))
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror}); mend that") from None
    try:
        aside.chmod(0o755)
        (aside / ARTIFACT).write_bytes(exported.serialize())
        save_file(by_name(params), aside / PARAMETERS, metadata={"format": "np"})
        (aside / CARD).write_text(card, encoding="utf-8")
        figures = _check(aside / ARTIFACT, jitted)
        final = workdir / DIRECTORY
        if final.exists():
            final.rename(aside / "earlier")
        aside.rename(final)
        shutil.rmtree(final / "earlier", ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = {path.name: path.stat().st_size for path in sorted(final.iterdir())}
    return {"files": files, **figures}


def by_name(params: Any) -> dict[str, np.ndarray]:
    """Returns parameters as a flat dict, e.g. "layers.0.kernel": float32 [F, H]."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(
            leaf
        )
        for path, leaf in leaves
    }


def model_card(
    name: str, config: dict[str, Any], results: dict[str, Any], member: int | None
) -> str:
    """Says what a network is, what it was trained on, how good it is, and how to use it.

    Args:
      name: of the run.
      config: its configuration, as plain dicts.
      results: what `results.json` holds; empty where the run has not ended.
      member: of which member the parameters are, or None.
    """
    model, train, dataset = config["model"], config["train"], results.get("dataset", {})
    # Where the data lay is nobody's business but the machine's.
    config = {**config, "data": {**config["data"], "data_dir": None, "manual_dir": None}}

    def score(split, key):
        value = results.get(split, {}).get(key)
        value = value[member] if isinstance(value, list) else value
        return "not measured" if value is None else f"{value:.4f}"

    facts = {
        "task": "naming the digit or class, 0 to 9, of an image of 28 × 28 pixels",
        "network": f"{model['view']} → {model['num_layers']} × {model['cell']}"
        f"({model['hidden_size']}) → {model['readout']} → logits",
        "parameters": f"{results['parameters']:,}" if results else "see config.json",
        "data": dataset.get("name", config["data"]["name"]),
        "examples": ", ".join(
            f"{dataset[split]:,} {split}" for split in ("train", "validation", "test")
        )
        if dataset
        else "not recorded",
        "fingerprint of the data": dataset.get("fingerprint", "not recorded"),
        "trained": f"{train['num_epochs']} epochs, batches of {train['batch_size']}, "
        f"{config['optimizer']['name']}, learning rate {config['optimizer']['learning_rate']}",
        "seed": config["seed"],
    }
    if member is not None:  # its seed and settings, in place of the run's
        facts |= {"member": member, **results.get("members", {member: {}})[member]}
    lines = [f"# {name}", "", "A recurrent network that reads an image as a sequence.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    if dataset.get("notice"):
        lines += ["", f"Note: {dataset['notice']}."]
    lines += ["", "## Scores", "", "| split | loss | accuracy |", "|---|---|---|"]
    for split in ("validation", "test"):
        lines.append(f"| {split} | {score(split, 'loss')} | {score(split, 'accuracy')} |")
    lines += [
        "",
        "The network knows only images like those that it was trained on, prepared alike. It "
        "answers whatever it is shown; no probability says whether an image shows one of the "
        "classes at all.",
        "",
        "## Use",
        "",
        f"`{ARTIFACT}` is StableHLO for {', '.join(PLATFORMS)}, of any batch size; "
        "normalization is inside. It needs the packages jax and flatbuffers.",
        "",
        "```python",
        "import jax.export, numpy as np",
        "",
        f'classify = jax.export.deserialize(open("{ARTIFACT}", "rb").read()).call',
        "logits = classify(np.zeros((1, 28, 28), np.uint8))  # [1, 10]",
        "```",
        "",
        f"`{PARAMETERS}` holds the parameters by name.",
        "",
        "## Versions",
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {package} | {version} |" for package, version in results.get("versions", {}).items()),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _export(jitted):
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, 28, 28"), np.uint8)
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    try:
        jax.config.update(option, ".*")  # where the source lay is nobody's business
        return jax_export.export(jitted, platforms=PLATFORMS)(images)
    finally:
        jax.config.update(option, before)


def answer(artifact: str, questions: str, answers: str) -> None:
    """Writes the logits of the arrays of images in one NPZ file to another; knows no model."""
    network = jax_export.deserialize(bytearray(pathlib.Path(artifact).read_bytes()))
    with np.load(questions, allow_pickle=False) as arrays:
        logits = {name: np.asarray(network.call(arrays[name])) for name in arrays.files}
    if "seqmnist.networks" in sys.modules:
        raise RuntimeError("what checks an artifact must not know the model")
    np.savez(answers, **logits)


def _check(artifact, classify):
    """Compares an artifact, in a process of its own, with the network that it was made from."""
    rng = np.random.default_rng(0)
    questions = {str(size): rng.integers(0, 256, (size, 28, 28), np.uint8) for size in BATCH_SIZES}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = f"{folder}/questions.npz", f"{folder}/answers.npz"
        np.savez(asked, **questions)
        code = "import sys; from seqmnist.study import export; export.answer(*sys.argv[1:])"
        result = subprocess.run(
            [sys.executable, "-c", code, str(artifact), asked, answered],
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"the artifact cannot be used:\n{result.stderr}")
        with np.load(answered, allow_pickle=False) as arrays:
            answers = {name: arrays[name] for name in arrays.files}
    differences, scale = {}, 1.0
    for name, images in questions.items():
        logits = np.asarray(classify(images))
        scale = max(scale, float(np.abs(logits).max()))
        differences[name] = float(np.abs(answers[name] - logits).max())
    if not max(differences.values()) <= TOLERANCE * scale:
        raise RuntimeError(f"the artifact differs from the network: {differences}")
    return {"largest_difference": differences, "logits_scale": scale}
