"""What a person sees: on a terminal with a bar and colour, elsewhere as plain lines."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seqmnist.config import Config
from seqmnist.datasets.sources import Prepared
from seqmnist.training import members


class Display:
    """Tells the story of a run on standard output; of several processes, the first one does."""

    def __init__(self):
        is_quiet = jax.process_index() != 0
        self._console = Console(highlight=False, soft_wrap=True, quiet=is_quiet)
        if not self._console.is_terminal:
            self._console.width = 120

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line."""
        self._console.print(escape(text), style=style)

    def notice(self, text: str) -> None:
        """Prints a line that must not be overlooked."""
        self.say(f"NOTICE: {text}", style="bold black on yellow")

    def setup(
        self,
        config: Config,
        dataset: Prepared,
        splits: Mapping[str, range],
        params: Any,
        mesh: jax.sharding.Mesh,
    ) -> None:
        """Prints what runs, on which data and devices, and the table of parameters.

        Args:
          config: the configuration.
          dataset: where the data is.
          splits: ranges of example numbers.
          params: arrays or their shapes; of members, with a leading axis S.
          mesh: where it runs.
        """
        if dataset.notice:
            self.notice(dataset.notice)
        counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
        devices = ", ".join(f"{device} ({device.device_kind})" for device in mesh.devices.flat)
        num_members, num_data = mesh.devices.shape
        if mesh.devices.size > 1:
            devices += f"; {num_members} for members × {num_data} for each batch"
        model = config.model
        self.say(f"Data: {dataset.name}: {counts} examples, from {dataset.directory}")
        self.say(f"Device: {devices}")
        both_ways = "bidirectional " if model.bidirectional else ""
        cells = f"{model.num_layers} × {both_ways}{model.cell}({model.hidden_size})"
        self.say(f"Model: {model.view} → {cells} → {model.readout} → logits")
        num_members = len(members.plan(config))
        if num_members > 1:
            swept = ", ".join(members.swept_fields(config)) or "seed"
            self.say(f"Members: {num_members}, which differ in {swept}")
            params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
        self._parameter_table(params)

    def _parameter_table(self, params):
        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        total = sum(math.prod(leaf.shape) for _, leaf in leaves)
        table.add_column("parameter", footer="total")
        table.add_column("shape")
        table.add_column("count", justify="right", footer=f"{total:,}")
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            shape = " × ".join(map(str, leaf.shape))
            table.add_row(name, shape, f"{math.prod(leaf.shape):,}")
        self._console.print(table)

    @contextlib.contextmanager
    def epoch(self, title: str, num_steps: int) -> Iterator[Any]:
        """Shows an epoch's progress; yields update(step, {"loss", "accuracy"})."""
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
        )
        bar = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(title, total=num_steps, metrics="")

            def update(step: int, means: Mapping[str, float]) -> None:
                metrics = " ".join(f"{name}: {_text(value)}" for name, value in means.items())
                bar.update(task, completed=step, metrics=metrics)

            yield update

    def epoch_line(self, title: str, num_steps: int, record: Mapping[str, Any]) -> None:
        """Prints an epoch's line as Keras does."""
        seconds = record["seconds"]
        parts = [title, f"{num_steps}/{num_steps}"]
        parts += [f"{seconds:.1f}s {1000 * seconds / num_steps:.1f}ms/step"]
        names = {"train/loss": "loss", "train/accuracy": "accuracy"}
        names |= {"validation/loss": "val_loss", "validation/accuracy": "val_accuracy"}
        parts += [
            f"{short}: {_text(record[name])}"
            for name, short in names.items()
            if record[name] is not None
        ]
        self.say(" - ".join(parts))

    def test_line(self, dataset: Mapping[str, Any], test: Mapping[str, float]) -> None:
        """Prints the last line: the score on the test set, and of which dataset it is."""
        if dataset["notice"]:
            self.notice(dataset["notice"])
        self.say(
            f"Test on {dataset['name']} ({dataset['test']:,} examples) - "
            f"test_loss: {_text(test['loss'])} - test_accuracy: {_text(test['accuracy'])}",
            style="bold",
        )

    def members_table(self, results: Mapping[str, Any]) -> None:
        """Prints what came out of each setting, the best by validation, and the ensemble."""
        dataset = results["dataset"]
        if dataset["notice"]:
            self.notice(dataset["notice"])
        swept = [name for name in results["members"][0] if name != "seed"]
        table = Table(box=box.SIMPLE_HEAD)
        short = [name.rpartition(".")[2] for name in swept]
        for name in (*short, "val_accuracy", "test_loss", "test_accuracy", "95 % interval"):
            table.add_column(name, justify="right", no_wrap=True)
        for i, setting in enumerate(results["settings"]):
            validation, test = setting["validation"], setting["test"]
            interval = test["accuracy"]["interval"]
            table.add_row(
                *(f"{setting[name]:g}" for name in swept),
                _summary(validation["accuracy"]) if validation else "",
                _summary(test["loss"]),
                _summary(test["accuracy"]),
                f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                style="bold" if i == results["best"] else None,
            )
        self._console.print(table)
        best = results["best"]
        if swept and best is not None:
            chosen = results["settings"][best]
            values = ", ".join(f"{name} = {chosen[name]:g}" for name in swept)
            self.say(f"Best by validation: {values}")
        ensemble = results["ensemble"]
        self.say(
            f"Test on {dataset['name']} ({dataset['test']:,} examples) of the mean prediction of "
            f"{len(ensemble['members'])} members - test_loss: {ensemble['test']['loss']:.4f} - "
            f"test_accuracy: {ensemble['test']['accuracy']:.4f}",
            style="bold",
        )


def _text(value):
    """One run's value, or the mean ± sd of members'."""
    if not isinstance(value, list):
        return f"{value:.4f}"
    sd = np.std(value, ddof=1)
    return f"{np.mean(value):.4f} ± {sd:.4f}"


def _summary(spread):
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.4f}"
    return f"{spread['mean']:.4f}{sd}"
