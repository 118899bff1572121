"""Records in a workdir: config.json, metrics.jsonl, results.json, TensorBoard events."""

import functools
import importlib.metadata
import json
import math
import os
import pathlib
import time
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
    aside.write_text(_dump(value, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def write_lines(path: pathlib.Path, values: list[Any]) -> None:
    """Writes a file of lines of JSON whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(_dump(value) + "\n" for value in values), encoding="utf-8")
    os.replace(aside, path)


def append_line(path: pathlib.Path, value: Any) -> None:
    """Adds one line of JSON to a file of such lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_dump(value) + "\n")


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
    values = read_json(workdir / CONFIG)
    try:
        return config_lib.from_dict(values)
    except UserError as error:
        raise UserError(f"{workdir / CONFIG}: {error}") from None


class Events:
    """TensorBoard's event file of a workdir: what `metrics.jsonl` holds, as curves."""

    def __init__(self, workdir: pathlib.Path, history: list[dict[str, Any]]):
        """Takes the epochs that are done, with which the file is started afresh."""
        self._workdir, self._history = workdir, list(history)

    @functools.cached_property
    def _writer(self):
        # Not before it is needed: it takes long to import.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for old in self._workdir.glob("events.out.tfevents.*"):
            old.unlink()
        writer = EventFileWriter(str(self._workdir))
        for record in self._history:
            _add_event(writer, record)
        return writer

    def add(self, record: dict[str, Any]) -> None:
        """Adds an epoch; of members, mean, least and greatest."""
        _add_event(self._writer, record)
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def versions() -> dict[str, str]:
    """Returns the exact version of every package that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _add_event(writer, record):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = {}
    for name, value in record.items():
        if isinstance(value, list):
            scalars |= {f"{name}/mean": sum(value) / len(value)}
            scalars |= {f"{name}/min": min(value), f"{name}/max": max(value)}
        elif isinstance(value, float):
            scalars[name] = value
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()])
    event = Event(wall_time=time.time(), step=record["step"], summary=summary)
    writer.add_event(event)


def _dump(value, indent=None):
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
