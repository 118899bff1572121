"""What a person sees: on a terminal with a bar and colour, elsewhere as plain lines."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seqmnist.config import Config
from seqmnist.datasets.sources import Prepared


class Display:
    """Tells the story of a run on standard output."""

    def __init__(self):
        self._console = Console(highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line."""
        self._console.print(escape(text), style=style)

    def notice(self, text: str) -> None:
        """Prints a line that must not be overlooked."""
        self.say(f"NOTICE: {text}", style="bold black on yellow")

    def setup(
        self, config: Config, dataset: Prepared, splits: Mapping[str, range], params: Any
    ) -> None:
        """Prints what runs, on which data and device, and the table of parameters."""
        if dataset.notice:
            self.notice(dataset.notice)
        counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
        devices = ", ".join(f"{device} ({device.device_kind})" for device in jax.devices())
        model = config.model
        self.say(f"Data: {dataset.name}: {counts} examples, from {dataset.directory}")
        self.say(f"Device: {devices}")
        both_ways = "bidirectional " if model.bidirectional else ""
        cells = f"{model.num_layers} × {both_ways}{model.cell}({model.hidden_size})"
        self.say(f"Model: {model.view} → {cells} → {model.readout} → logits")
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
                metrics = f"loss: {means['loss']:.4f} accuracy: {means['accuracy']:.4f}"
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
            f"{short}: {record[name]:.4f}"
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
            f"test_loss: {test['loss']:.4f} - test_accuracy: {test['accuracy']:.4f}",
            style="bold",
        )
