"""Exports a trained network to files that need no code of this package.

`write` makes DIR/export: the classifier as StableHLO, its parameters as safetensors, and a model
card. Nothing here depends on the model, so that reading an artifact does not either.
"""

import contextlib
import functools
import hashlib
import io
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from seqmnist import paths
from seqmnist.errors import UserError, explain_storage
from seqmnist.training import batches, metrics

DIRECTORY, ARTIFACT, PARAMETERS, CARD = (
    "export", "classifier.jax_export", "parameters.safetensors", "README.md"
)  # fmt: skip
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH_SIZES = (1, 7, 128)  # for which the artifact is compared with the network
TOLERANCE = 1e-6  # of logits, relative to the largest logit if that exceeds 1
USAGE = f"""\
## Use

`{ARTIFACT}` is StableHLO for {", ".join(PLATFORMS)} and for any batch size; it includes
normalization. It needs the packages jax and flatbuffers.

```python
import jax.export, numpy as np

classify = jax.export.deserialize(open("{ARTIFACT}", "rb").read()).call
logits = classify(np.zeros((1, 28, 28), np.uint8))  # [1, 10]
```

`{PARAMETERS}` holds the parameters by name."""
_SEAL = b"seqmnist sha256:"  # and 32 bytes, after the artifact; jax.export ignores both
_SEAL_SIZE = len(_SEAL) + 32


class Artifact:
    """An exported classifier; it needs only JAX."""

    def __init__(self, exported: jax_export.Exported):
        """Takes what `jax.export.deserialize` returns."""
        self._call = jax.jit(exported.call)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, 28, 28]: logits [N, C]."""
        return batches.in_chunks(self._call, images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, 28, 28]: probabilities [N, C]."""
        return metrics.softmax(self.logits(images))


def load(path: str | pathlib.Path) -> Artifact:
    """Reads an artifact that `write` wrote.

    Raises UserError if there is none, it is another file, or it is damaged.
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
    return Artifact(jax_export.deserialize(bytearray(program)))


def write(
    workdir: pathlib.Path, classify: Callable[[jax.Array], jax.Array], params: Any, card: str
) -> dict[str, Any]:
    """Writes DIR/export, after a process without the model got the same logits from it.

    Args:
      workdir: the folder DIR; an earlier export there is replaced.
      classify: images uint8 [B, 28, 28] -> logits [B, C], for any B.
      params: the parameters of `classify`, to be written by name.
      card: the model card, Markdown.

    Returns:
      {"files": {name: bytes}, "largest_difference": {batch size: of logits}, "logits_scale": …}.

    Raises UserError if the workdir cannot be written, and RuntimeError if the logits differ, which
    is a fault of this program.
    """
    from safetensors.numpy import save

    jitted = jax.jit(classify)
    content = bytes(_export(jitted).serialize())
    final = workdir / DIRECTORY
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(final), remedy), replacing(final) as folder:
        (folder / ARTIFACT).write_bytes(content + _seal(content))
        (folder / PARAMETERS).write_bytes(save(_by_name(params), metadata={"format": "np"}))
        (folder / CARD).write_text(card, encoding="utf-8")
        comparison = _check(folder / ARTIFACT, jitted)
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


def _export(jitted):
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, 28, 28"), np.uint8)
    # Paths of this machine are private. JAX has no public context manager for this option, and
    # it changes nothing but the names of source files in what is traced meanwhile.
    before = jax.config.jax_hlo_source_file_canonicalization_regex
    try:
        jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*")
        return jax_export.export(jitted, platforms=PLATFORMS)(images)
    finally:
        jax.config.update("jax_hlo_source_file_canonicalization_regex", before)


_READ_BACK = """
import io, sys, numpy as np, jax.export
classify = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
images = np.load(io.BytesIO(sys.stdin.buffer.read()))
np.savez(answers := io.BytesIO(), **{name: classify(images[name]) for name in images})
sys.stdout.buffer.write(answers.getvalue())
"""


def _check(artifact, classify):
    """Compares an artifact, in a process without this package, with the network it came from."""
    rng = np.random.default_rng(0)
    images = {str(size): rng.integers(0, 256, (size, 28, 28), np.uint8) for size in BATCH_SIZES}
    np.savez(sent := io.BytesIO(), **images)
    command = [sys.executable, "-c", _READ_BACK, str(artifact)]
    result = subprocess.run(command, input=sent.getvalue(), capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the artifact cannot be used:\n{result.stderr.decode()}")
    answers = np.load(io.BytesIO(result.stdout))
    logits = {name: np.asarray(classify(array)) for name, array in images.items()}
    scale = max(1.0, *(float(np.abs(array).max()) for array in logits.values()))
    differences = {name: float(np.abs(answers[name] - logits[name]).max()) for name in logits}
    if not max(differences.values()) <= TOLERANCE * scale:
        raise RuntimeError(f"the artifact differs from the network: {differences}")
    return {"largest_difference": differences, "logits_scale": scale}
