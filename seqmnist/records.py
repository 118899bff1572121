"""Records: config.json, metrics.jsonl and results.json in a workdir."""

import importlib.metadata
import json
import os
import pathlib
from typing import Any

from seqmnist import config as config_lib
from seqmnist.errors import UserError

CONFIG, METRICS, RESULTS = "config.json", "metrics.jsonl", "results.json"

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "tensorflow-datasets", "grain",
    "numpy",
)  # fmt: skip


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value whole or not at all: aside first, then renamed."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def append_line(path: pathlib.Path, value: Any) -> None:
    """Adds one line of JSON to a file of such lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads what `write_json` wrote.

    Raises:
      UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train with this --workdir first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore or delete it") from None


def read_config(workdir: pathlib.Path) -> config_lib.Config:
    """Returns the configuration that a workdir was trained with.

    Raises:
      UserError: there is none, or it is not valid.
    """
    return config_lib.from_dict(read_json(workdir / CONFIG))


def versions() -> dict[str, str]:
    """Returns the exact version of every package that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
