"""Exports a trained network to files that need no code of this package.

`write` makes DIR/export: the classifier as StableHLO, also step by step, its parameters as
safetensors, what its images are, and a model card. Nothing here depends on the model, so that
reading an artifact does not either.
"""

import contextlib
import functools
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export as jax_export

from seqmnist import paths
from seqmnist.errors import UserError, explain_storage, one_line
from seqmnist.spec import ImageSpec
from seqmnist.training import batches, metrics

DIRECTORY, ARTIFACT, PARAMETERS, CARD = (
    "export", "classifier.jax_export", "parameters.safetensors", "README.md"
)  # fmt: skip
STEP, INITIAL_STATE, IMAGES = "step.jax_export", "initial_state.npz", "images.json"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH_SIZES = (1, 7, 128)  # for which the artifact is compared with the network
NUM_STEPS = 8  # after which the state is compared
TOLERANCE = 1e-6  # of logits, relative to the largest logit if that exceeds 1
_USAGE = f"""\
## Use

`{ARTIFACT}` is StableHLO for {", ".join(PLATFORMS)} and for any batch size; it includes
normalization. It needs the packages jax and flatbuffers.

```python
import jax.export, numpy as np

classify = jax.export.deserialize(open("{ARTIFACT}", "rb").read()).call
logits = classify(np.zeros((1, {{shape}}), np.uint8))  # [1, {{num_classes}}]
```

`{PARAMETERS}` holds the parameters by name, `{IMAGES}` the size of images and the names of the
classes, by label."""
_STEP_USAGE = f"""

`{STEP}` reads one time step of B sequences, float32 [B, {{size}}], pixels / 255, and gives the
logits of what has been read so far. `{INITIAL_STATE}` holds the state of one sequence before the
first step, a list of arrays.

```python
step = jax.export.deserialize(open("{STEP}", "rb").read()).call
state = list(np.load("{INITIAL_STATE}").values())  # of B sequences: np.repeat(each, B, axis=0)
state, logits = step(state, np.zeros((1, {{size}}), np.float32))  # [1, {{num_classes}}]
```"""
_SEAL = b"seqmnist sha256:"  # and 32 bytes, after the artifact; jax.export ignores both
_SEAL_SIZE = len(_SEAL) + 32


class Artifact:
    """An exported classifier, of images as its `spec` says; it needs only JAX."""

    def __init__(self, exported: jax_export.Exported, spec: ImageSpec | None = None):
        """Takes what `jax.export.deserialize` returns; without a spec, classes are numbered.

        Raises ValueError if the spec is that of another network.
        """
        (images,), (logits,) = exported.in_avals, exported.out_avals
        height, width, *channels = images.shape[1:]
        names = tuple(map(str, range(logits.shape[1])))
        self.spec = spec or ImageSpec(height, width, *(channels or (1,)), names)
        if (self.spec.shape, self.spec.num_classes) != (images.shape[1:], len(names)):
            raise ValueError("the images or classes are those of another network")
        self._call = jax.jit(exported.call)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: logits [N, C]."""
        return batches.in_chunks(self._call, images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: probabilities [N, C]."""
        return metrics.softmax(self.logits(images))


def load(path: str | pathlib.Path) -> Artifact:
    """Reads an artifact that `write` wrote, and what its images are, from the file beside it.

    Earlier versions wrote none; classes are then numbered. Raises UserError if there is no
    artifact, it is another file, or one of them is damaged.
    """
    path = paths.resolve(path, "--artifact")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a file that tools.export wrote"
        ) from None
    program, seal = content[:-_SEAL_SIZE], content[-_SEAL_SIZE:]
    if seal != _seal(program):
        raise UserError(
            f"{path} is damaged or not a file that tools.export wrote; export the run again"
        )
    exported, beside = jax_export.deserialize(bytearray(program)), path.with_name(IMAGES)
    if not beside.exists():
        return Artifact(exported)
    try:
        spec = ImageSpec.from_dict(json.loads(beside.read_text(encoding="utf-8")))
        return Artifact(exported, spec)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{beside} is damaged or does not belong to {path.name} ({one_line(error)}); export "
            "the run again"
        ) from None


class Streaming(NamedTuple):
    """A network that reads step by step; a state is a list of arrays [B, …]."""

    initial_state: list[np.ndarray]  # of one sequence
    step: Callable[[list[jax.Array], jax.Array], tuple[list[jax.Array], jax.Array]]
    size: int  # F: (state, x [B, F]) -> (state, logits [B, C])


def usage(spec: ImageSpec, streaming: Streaming | None = None) -> str:
    """Returns how to use the files, Markdown, for a model card."""
    shape, text = ", ".join(map(str, spec.shape)), _USAGE
    values = {"shape": shape, "num_classes": spec.num_classes}
    if streaming:
        text, values["size"] = text + _STEP_USAGE, streaming.size
    return text.format(**values)


def write(
    workdir: pathlib.Path,
    classify: Callable[[jax.Array], jax.Array],
    params: Any,
    card: str,
    spec: ImageSpec,
    streaming: Streaming | None = None,
) -> dict[str, Any]:
    """Writes DIR/export, after a process without the model got the same logits from it.

    Args:
      workdir: the folder DIR; an earlier export there is replaced.
      classify: images uint8 [B, *spec.shape] -> logits [B, C], for any B.
      params: the parameters of `classify`, to be written by name.
      card: the model card, Markdown.
      spec: the size of images, and the names of the classes.
      streaming: the same network step by step, if it can read so.

    Returns:
      {"files": {name: bytes}, "largest_difference": {batch size or "step": of logits},
      "logits_scale": …}.

    Raises UserError if the workdir cannot be written, and RuntimeError if the logits differ, which
    is a fault of this program.
    """
    from safetensors.numpy import save

    sizes = jax_export.symbolic_shape(", ".join(["b", *map(str, spec.shape)]))
    programs = {ARTIFACT: (jax.jit(classify), (jax.ShapeDtypeStruct(sizes, np.uint8),))}
    if streaming:
        before = [
            jax.ShapeDtypeStruct(sizes[:1] + each.shape[1:], each.dtype)
            for each in streaming.initial_state
        ]
        x = jax.ShapeDtypeStruct((sizes[0], streaming.size), np.float32)
        programs[STEP] = (jax.jit(streaming.step), (before, x))
    contents = {name: bytes(_export(*program).serialize()) for name, program in programs.items()}
    final = workdir / DIRECTORY
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(final), remedy), replacing(final) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content + _seal(content))
        if streaming:
            np.savez(folder / INITIAL_STATE, *streaming.initial_state)
        (folder / PARAMETERS).write_bytes(save(_by_name(params), metadata={"format": "np"}))
        images = json.dumps(spec.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (folder / IMAGES).write_text(images, encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        comparison = _check(folder, programs, spec, streaming)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"files": files, **comparison}


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder that replaces `folder` if the block succeeds, and is removed otherwise.

    Files of `folder` that have no namesake in the new one are kept.
    """
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent, ignore_cleanup_errors=True
    ) as aside:
        new, earlier = pathlib.Path(aside, "new"), pathlib.Path(aside, "earlier")
        new.mkdir()
        yield new
        if folder.is_dir():
            folder.rename(earlier)
        new.rename(folder)
        if earlier.is_dir() and not earlier.is_symlink():
            for path in earlier.iterdir():
                if not (folder / path.name).exists():
                    path.rename(folder / path.name)


def _by_name(params):
    """Returns parameters as a flat dict, e.g. "layers.0.kernel": float32 [F, H]."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {
        keystr(path).removesuffix(".value"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _seal(content):
    return _SEAL + hashlib.sha256(content).digest()


def _export(jitted, arguments):
    # Paths of this machine are private. JAX has no public context manager for this option, and
    # it changes nothing but the names of source files in what is traced meanwhile.
    before = jax.config.jax_hlo_source_file_canonicalization_regex
    try:
        jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*")
        return jax_export.export(jitted, platforms=PLATFORMS)(*arguments)
    finally:
        jax.config.update("jax_hlo_source_file_canonicalization_regex", before)


_READ_BACK = f"""
import io, pathlib, sys, numpy as np, jax.export
folder, sent = pathlib.Path(sys.argv[1]), np.load(io.BytesIO(sys.stdin.buffer.read()))
load = lambda name: jax.export.deserialize(bytearray((folder / name).read_bytes())).call
classify = load("{ARTIFACT}")
answers = {{name: classify(sent[name]) for name in sent if name != "step"}}
if "step" in sent:
    step, x = load("{STEP}"), sent["step"]
    initial = np.load(folder / "{INITIAL_STATE}").values()
    state = [np.repeat(each, x.shape[1], axis=0) for each in initial]
    for x_t in x:
        state, answers["step"] = step(state, x_t)
np.savez(answer := io.BytesIO(), **answers)
sys.stdout.buffer.write(answer.getvalue())
"""


def _check(folder, programs, spec, streaming):
    """Compares what was written, in a process without this package, with the network."""
    rng, (classify, _) = np.random.default_rng(0), programs[ARTIFACT]
    shapes = {str(size): (size, *spec.shape) for size in BATCH_SIZES}
    sent = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in shapes.items()}
    logits = {name: np.asarray(classify(images)) for name, images in sent.items()}
    if streaming:
        step, _ = programs[STEP]
        sent["step"] = rng.random((NUM_STEPS, 7, streaming.size), np.float32)
        state = [np.repeat(each, 7, axis=0) for each in streaming.initial_state]
        for x in sent["step"]:
            state, logits["step"] = step(state, x)
    np.savez(content := io.BytesIO(), **sent)
    command = [sys.executable, "-c", _READ_BACK, str(folder)]
    result = subprocess.run(command, input=content.getvalue(), capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the artifact cannot be used:\n{result.stderr.decode()}")
    answers = np.load(io.BytesIO(result.stdout))
    scale = max(1.0, *(float(np.abs(array).max()) for array in logits.values()))
    differences = {name: float(np.abs(answers[name] - logits[name]).max()) for name in logits}
    if not max(differences.values()) <= TOLERANCE * scale:
        raise RuntimeError(f"the artifact differs from the network: {differences}")
    return {"largest_difference": differences, "logits_scale": scale}
