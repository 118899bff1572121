"""A run's metrics for TensorBoard."""

import functools
import json
import math
import time
from typing import Any

from seqmnist import config as config_lib
from seqmnist.workdir import EVENTS, Workdir

# Charts of TensorBoard's tab Custom Scalars: titles, and regular expressions for their curves.
_CHARTS = {
    "loss": "(train|validation)/loss(/mean)?$",
    "accuracy": "(train|validation)/accuracy(/mean)?$",
    "norms of gradient and update": "train/(gradient|update)_norm(/mean)?$",
}


class Events:
    """TensorBoard's event file of a workdir: records as curves, charts, and hyper-parameters.

    Wall times count seconds of training only, as if the run had not been interrupted.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: config_lib.Config,
        history: list[dict[str, Any]],
        steps: list[dict[str, Any]],
        seconds: float,
    ):
        """Takes epochs, logged steps and seconds of training so far: the file is written anew."""
        self._directory, self._config = workdir.path, config
        self._began = time.time() - seconds
        self._pending, self._seconds = [*history, *steps], 0.0  # of the finished epochs

    def add(self, record: dict[str, Any]) -> None:
        """Adds an epoch or a logged step, which has `train_seconds`; of members, mean, min and max.

        An epoch is then on disk; a step is within about ten seconds.
        """
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self._pending.append(record)
        for each in self._pending:
            values, prefix = dict(each), "step/"
            seconds = values.pop("train_seconds", None)
            if seconds is None:
                self._seconds += each["seconds"]
                prefix, seconds = "", self._seconds
            for name, value in _scalars(values):
                summary = scalar_pb(prefix + name, value)
                self._writer.add_event(self._event(summary, each["step"], seconds))
        self._pending.clear()
        if not prefix:
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        if "_writer" in self.__dict__:
            self._writer.close()

    def _event(self, summary, step=0, seconds=0.0):
        from tensorboard.compat.proto.event_pb2 import Event

        return Event(wall_time=self._began + seconds, step=step, summary=summary)

    @functools.cached_property
    def _writer(self):
        # Here, not above: they take long to import. None of them needs TensorFlow.
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for old in self._directory.glob(EVENTS):
            old.unlink()
        writer = EventFileWriter(str(self._directory), flush_secs=10)
        settings = hparams_pb(_hyperparameters(self._config), start_time_secs=self._began)
        for summary in (_charts(), settings):
            writer.add_event(self._event(summary))
        return writer


def _hyperparameters(config):
    """Returns the fields that determine a run's results, as numbers, strings and booleans."""
    values = {"data.name": config.data.name, **config_lib.settings(config)}
    values["train.num_epochs"] = config.train.num_epochs
    values = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in values.items()}
    return {name: value for name, value in values.items() if value is not None}


def _charts():
    """Returns the layout of TensorBoard's custom scalars; its own function needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[curves]))
        for title, curves in _CHARTS.items()
    ]
    category = layout_pb2.Category(title="training and validation", chart=charts)
    layout = layout_pb2.Layout(category=[category]).SerializeToString()
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=metadata.create_summary_metadata(),
        tensor=make_tensor_proto(layout),
    )
    return Summary(value=[value])


def _scalars(record):
    """Yields a name and a value for each curve of a record; of members, of their finite values."""
    for name, value in record.items():
        if isinstance(value, list):
            values = [x for x in value if x is not None and math.isfinite(x)]
            if values:
                yield f"{name}/mean", sum(values) / len(values)
                yield f"{name}/min", min(values)
                yield f"{name}/max", max(values)
        elif isinstance(value, float):
            yield name, value
