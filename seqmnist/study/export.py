"""Exports a trained network to files that need no code of this package.

`write` makes DIR/export: the classifier as StableHLO, also step by step, its parameters as
safetensors, a description of its images, and a model card. Nothing here depends on the model, so
that reading an artifact does not either. Each file, except the card and its example, contains the
SHA-256 of its other bytes, in a place that other readers ignore; so a file that is copied alone
can be checked too.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export as jax_export
from jax.extend.mlir.dialects import stablehlo
from scipy import special

from seqmnist import paths
from seqmnist.errors import UserError, explain_any, explain_storage
from seqmnist.spec import ImageSpec
from seqmnist.training import batches
from seqmnist.workdir import replacing

DIRECTORY, ARTIFACT, PARAMETERS, CARD = (
    "export", "classifier.jax_export", "parameters.safetensors", "README.md"
)  # fmt: skip
STEP, INITIAL_STATE, IMAGES = "step.jax_export", "initial_state.npz", "images.json"
EXAMPLE = "example.png"
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH_SIZES = (1, 7, 128)  # for which the artifact is compared with the network
NUM_STEPS = 8  # after which the state is compared
# Of logits, relative to the largest logit if that exceeds 1. A state that remembers 784 steps also
# sums their rounding, which depends on the program: 3e-6 with an LRU of moduli up to 0.9999.
TOLERANCE = 1e-4
_SEAL = b"seqmnist sha256:"  # and the digest, in hexadecimal digits
_DIGEST_SIZE = 64
_BLANK_SEAL = _SEAL + b"0" * _DIGEST_SIZE
_MARK = b"\nseqmnist images:"  # before the `ImageSpec`, JSON, which follows the classifier


class Artifact:
    """An exported classifier of the images that `spec` describes; it needs only JAX."""

    def __init__(self, exported: jax_export.Exported, spec: ImageSpec | None = None):
        """Takes what `jax.export.deserialize` returns; without a spec, classes are numbered.

        Raises ValueError if it is not a classifier of such images, or this JAX cannot call it.
        """
        avals = (*exported.in_avals, *exported.out_avals)
        signature = [(aval.dtype.name, aval.ndim) for aval in avals]
        if signature not in ([("uint8", n), ("float32", 2)] for n in (3, 4)):
            inputs, outputs = (
                ", ".join(aval.str_short() for aval in each)
                for each in (exported.in_avals, exported.out_avals)
            )
            raise ValueError(f"it maps {inputs} to {outputs}, not images to logits")
        images, logits = avals
        height, width, *channels = images.shape[1:]
        names = tuple(map(str, range(logits.shape[1])))
        self.spec = spec or ImageSpec(height, width, *(channels or (1,)), names)
        if (self.spec.shape, self.spec.num_classes) != (images.shape[1:], len(names)):
            raise ValueError(f"{IMAGES} beside it belongs to another network")
        self._call = _callable(exported, jax.ShapeDtypeStruct((3, *images.shape[1:]), np.uint8))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: logits [N, C]."""
        return batches.in_chunks(self._call, images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: probabilities [N, C]."""
        return special.softmax(self.logits(images), axis=-1)


class Streaming(NamedTuple):
    """A network that reads step by step; a state is a list of arrays [B, …]."""

    initial_state: list[np.ndarray]  # of one sequence
    # (state, x [B, F]) -> (state, logits [B, C])
    step: Callable[[list[jax.Array], jax.Array], tuple[list[jax.Array], jax.Array]]
    size: int  # F


def read(path: str | os.PathLike) -> bytes:
    """Returns the content of a file that `write` wrote, other than the card and its example.

    Any reader of its format takes it, e.g. `safetensors.numpy.load`. Raises UserError if the file
    cannot be read or its digest is not that of its content.
    """
    path = paths.resolve(path, "--artifact")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe may never end
            raise OSError(None, "not a regular file")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a file that tools.export wrote"
        ) from None
    if _sealed(content) != content:
        raise UserError(
            f"{path} is damaged or not a file that tools.export wrote (it does not contain its own "
            "SHA-256); export the run again"
        )
    return content


def load(path: str | os.PathLike) -> Artifact:
    """Loads the classifier that `write` wrote, and its `ImageSpec`.

    Classes are numbered if it is of an earlier version and was copied without the file beside it.
    Raises UserError if a file cannot be read, is damaged or of another kind, or this JAX cannot run
    it.
    """
    path, spec = paths.resolve(path, "--artifact"), None
    with _explain_use(path, ARTIFACT):
        content, beside = read(path), path.with_name(IMAGES)
        exported = jax_export.deserialize(bytearray(content))
        _, mark, images = content.rpartition(_SEAL)[0].rpartition(_MARK)
        if mark or beside.exists():
            values = json.loads(read(beside) if beside.exists() else images)
            values.pop("digest", None)
            spec = ImageSpec.from_dict(values)
        return Artifact(exported, spec)


def load_step(path: str | os.PathLike) -> Streaming:
    """Loads the network step by step that `write` wrote, with the initial state beside it.

    Raises UserError as `load` does.
    """
    path = paths.resolve(path, "--artifact")
    with _explain_use(path, STEP):
        exported = jax_export.deserialize(bytearray(read(path)))
        initial = np.load(io.BytesIO(read(path.with_name(INITIAL_STATE))))
        state, shape = list(initial.values()), exported.in_avals[-1].shape[1:]
        before = [jax.ShapeDtypeStruct((3, *each.shape[1:]), each.dtype) for each in state]
        step = _callable(exported, before, jax.ShapeDtypeStruct((3, *shape), np.float32))
        return Streaming(state, step, *shape)


def _callable(exported, *arguments):
    """Returns the compiled call; raises an error if JAX cannot call it with such arguments."""
    # JAX ignores the first version, and names the second on standard error only.
    header = re.search(rb"StableHLO_v([0-9.]+)", exported.mlir_module_serialized)
    newest = jax_export.maximum_supported_calling_convention_version
    for what, needed, supported in (
        ("calling convention", str(exported.calling_convention_version), str(newest)),
        ("StableHLO", header[1].decode() if header else "0", stablehlo.get_current_version()),
    ):
        own, highest = (tuple(map(int, text.split("."))) for text in (needed, supported))
        if own > highest:
            raise ValueError(f"its {what} is {needed}; the newest supported is {supported}")
    call = jax.jit(exported.call)
    call.lower(*arguments)  # only here are shapes, types and platforms compared
    return call


def _explain_use(path, name):
    # JAX rejects other formats by many errors; the file is undamaged.
    what = f"{path} cannot be used by JAX {jax.__version__} here"
    return explain_any(what, f"export the run again and name its {name}")


def make_programs(
    classify: Callable[[jax.Array], jax.Array], spec: ImageSpec, streaming: Streaming | None = None
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns what is exported, {file name: (jitted function, its arguments' shapes for any B)}."""
    sizes = jax_export.symbolic_shape(", ".join(["b", *map(str, spec.shape)]))
    programs = {ARTIFACT: (jax.jit(classify), (jax.ShapeDtypeStruct(sizes, np.uint8),))}
    if streaming:
        before = [
            jax.ShapeDtypeStruct(sizes[:1] + each.shape[1:], each.dtype)
            for each in streaming.initial_state
        ]
        x = jax.ShapeDtypeStruct((sizes[0], streaming.size), np.float32)
        programs[STEP] = (jax.jit(streaming.step), (before, x))
    return programs


def write(
    workdir: pathlib.Path,
    classify: Callable[[jax.Array], jax.Array],
    params: Any,
    card: str,
    spec: ImageSpec,
    streaming: Streaming | None = None,
    example: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Writes DIR/export, once a process without this package has got the same logits from it.

    Args:
      workdir: the folder DIR; an earlier export there is replaced.
      classify: images uint8 [B, *spec.shape] -> logits [B, C], for any B.
      params: the parameters of `classify`, to be written by name.
      card: the model card, Markdown.
      spec: the size of images, and the names of the classes.
      streaming: the same network step by step, if it can read that way.
      example: a picture that the card names, PNG.

    Returns:
      {"files": {name: size in bytes}, "largest_difference": {batch size or "step": difference of
      logits}, "logits_scale": the largest logit, at least 1}.

    Raises UserError if parameters are not float32 or the workdir cannot be written, and
    RuntimeError if the logits differ, which is a fault of this program.
    """
    from safetensors.numpy import save

    if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(params)):
        raise UserError("only networks of float32 are exported; train without JAX_ENABLE_X64")
    programs = make_programs(classify, spec, streaming)
    contents = {name: export(*each).serialize() for name, each in programs.items()}
    contents[ARTIFACT] += _MARK + json.dumps(spec.to_dict()).encode()
    contents = {name: content + _BLANK_SEAL for name, content in contents.items()}
    if streaming:
        contents[INITIAL_STATE] = _npz(streaming.initial_state)
    metadata = {"format": "np", "digest": _BLANK_SEAL.decode()}
    contents[PARAMETERS] = save(by_name(params), metadata)
    images = spec.to_dict() | {"digest": _BLANK_SEAL.decode()}
    contents[IMAGES] = (json.dumps(images, indent=2, ensure_ascii=False) + "\n").encode()
    final = workdir / DIRECTORY
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(final), remedy), replacing(final) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(_sealed(content))
        if example:
            (folder / EXAMPLE).write_bytes(example.read_bytes())
        (folder / CARD).write_text(card, encoding="utf-8")
        comparison = _check(folder, programs, spec, streaming)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"files": files, **comparison}


def by_name(params: Any) -> dict[str, np.ndarray]:
    """Returns parameters as a flat dict, e.g. "layers.0.kernel": float32 [F, H]."""
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {
        keystr(path).removesuffix(".value"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _npz(arrays):
    np.savez(file := io.BytesIO(), *arrays)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = _BLANK_SEAL
    return file.getvalue()


def _sealed(content):
    """Returns `content` with its own digest after its last seal, if there is one."""
    before, seal, after = bytes(content).rpartition(_SEAL)
    rest = after[_DIGEST_SIZE:]
    digest = hashlib.sha256(before + seal + rest).hexdigest().encode()
    return before + seal + digest + rest


def export(jitted: Any, arguments: tuple[Any, ...]) -> jax_export.Exported:
    """Exports a compiled function for all `PLATFORMS`; arguments are shapes and dtypes."""
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
