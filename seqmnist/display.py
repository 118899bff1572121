"""What a person sees: a bar and color on a terminal or in a notebook, elsewhere plain lines."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seqmnist.config import ModelConfig
from seqmnist.training import members


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continues without output; Rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Cell:
    """The output of a notebook's cell, as a text file: one output per run, with a bar at its end.

    Rich would add an output for each line; its bar needs widgets, which a saved notebook loses.
    """

    def __init__(self):
        self._text, self._display = "", None

    def write(self, text: str) -> None:
        """Adds text, in place of the bar."""
        self._text += text
        self._show(self._text)

    def flush(self) -> None:
        """Does nothing: `write` has shown everything."""

    def show_bar(self, title: str, step: int, num_steps: int, metrics: str) -> None:
        """Shows how far an epoch is, below the text."""
        done = 30 * step // num_steps
        bar = "━" * done + "╌" * (30 - done)
        self._show(f"{self._text}{title} {step}/{num_steps} {bar} {metrics}")

    def _show(self, text):
        from IPython.display import display

        bundle = {"text/plain": text.rstrip()}
        if self._display is None:
            self._display = display(bundle, raw=True, display_id=True)
        else:
            self._display.update(bundle, raw=True)


class Display:
    """Prints the progress of a run on standard output; of several processes, only the first."""

    def __init__(self):
        settings = {"highlight": False, "quiet": jax.process_index() != 0}
        self._console, self._cell = _Console(**settings, soft_wrap=True), None
        if self._console.is_jupyter:
            self._cell = _Cell()
            self._console = _Console(
                **settings, file=self._cell, width=100, force_jupyter=False, force_terminal=False
            )
        self._is_live = self._console.is_terminal
        if not (self._is_live or self._cell):
            self._console.width = 120
        self._failure: OSError | None = None

    def say(self, text: str, style: str | None = None) -> None:
        """Prints one line."""
        self._print(escape(text), style=style)

    def notice(self, text: str) -> None:
        """Prints one line that must not be overlooked."""
        self.say(f"NOTICE: {text}", style="bold black on yellow")

    def setup(self, task: Any, params: Any) -> None:
        """Prints the data, the devices, the network and its table of parameters.

        Args:
          task: a `training.task.Task`.
          params: arrays or their shapes; with members, they have a leading axis S.
        """
        if task.dataset.notice:
            self.notice(task.dataset.notice)
        counts = ", ".join(f"{len(split):,} {name}" for name, split in task.splits.items())
        spec = task.dataset.spec
        folder, home = str(task.dataset.directory), os.path.expanduser("~") + os.sep
        folder = f"~/{folder.removeprefix(home)}" if folder.startswith(home) else folder
        self.say(f"Data: {task.dataset.name}: {counts} examples, from {folder}")
        shape = " × ".join(map(str, spec.shape))
        self.say(f"Images: {shape}, in {spec.num_classes} classes")
        devices = ", ".join(f"{each} ({each.device_kind})" for each in task.mesh.devices.flat)
        if task.mesh.devices.size > 1:
            devices += "; {} for members × {} for each batch".format(*task.mesh.devices.shape)
        self.say(f"Device: {devices}")
        self.say(f"Model: {describe(task.config.model)}")
        if len(task.members) > 1:
            swept = [name for name in task.members[0] if name != "seed"]
            differ = ", ".join(swept) or "seed"
            self.say(f"Members: {len(task.members)}, which differ in {differ}")
            params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        total = sum(leaf.size for _, leaf in leaves)
        table.add_column("parameter", footer="total")
        table.add_column("shape")
        table.add_column("count", justify="right", footer=f"{total:,}")
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            shape = " × ".join(map(str, leaf.shape))
            table.add_row(name, shape, f"{leaf.size:,}")
        self._print(table)

    @contextlib.contextmanager
    def epoch(self, epoch: int, num_epochs: int, num_steps: int) -> Iterator[Any]:
        """Shows the progress of an epoch, from 1 on; yields update(step, {"loss", "accuracy"})."""
        title = _title(epoch, num_epochs)
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
        )
        is_hidden = not self._is_live or self._console.quiet
        bar = Progress(*columns, console=self._console, transient=True, disable=is_hidden)
        task = bar.add_task(title, total=num_steps, metrics="")

        def update(step: int, means: Mapping[str, Any]) -> None:
            texts = {name: _text(value).partition(" ±")[0] for name, value in means.items()}
            metrics = " ".join(f"{name}: {text}" for name, text in texts.items())
            if self._cell:
                self._cell.show_bar(title, step, num_steps, metrics)
            bar.update(task, completed=step, metrics=metrics)

        bar.start()
        try:
            yield update
        finally:
            with contextlib.suppress(OSError):  # the terminal is closed
                bar.stop()

    def epoch_line(
        self,
        num_epochs: int,
        num_steps: int,
        record: Mapping[str, Any],
        taken: int,
        seconds: float,
    ) -> None:
        """Prints the line of an epoch as Keras does.

        `record` is a line of `metrics.jsonl`. `taken` is the number of its steps that this process
        has taken, fewer than all if the run was resumed within the epoch, and `seconds` is how long
        those took.
        """
        title = _title(record["epoch"], num_epochs)
        parts = [title, f"{num_steps}/{num_steps}"]
        parts += [f"{seconds:.1f}s {1000 * seconds / taken:.1f}ms/step"]
        if self._cell:  # whose width is not known, and many are narrow
            parts = [title, f"{seconds:.1f}s"]
        names = {"train/loss": "loss", "train/accuracy": "accuracy"}
        names |= {"validation/loss": "val_loss", "validation/accuracy": "val_accuracy"}
        scores = [f"{short}: {_text(record[name])}" for name, short in names.items()]
        self._say_parts(parts + scores[: 2 if record["validation/loss"] is None else 4])

    def results(self, results: Mapping[str, Any]) -> None:
        """Prints the scores on the test set; raises OSError if the disk has no room for output."""
        dataset = results["dataset"]
        if dataset.get("notice"):
            self.notice(dataset["notice"])
        what, test = f"Test on {dataset['name']} ({dataset['test']:,} examples)", results["test"]
        if "members" in results:
            self._settings_table(results)
            ensemble = results["ensemble"]
            count = len(ensemble["members"])
            what += f", mean prediction of {count} members" if count > 1 else ""
            test = ensemble["test"]
        scores = [f"test_{name}: {_text(test[name])}" for name in ("loss", "accuracy")]
        if "epochs" in results and _text(test["accuracy"]) == "nan":  # not of an evaluation
            is_open = len(results.get("settings", [])) > 1 and results["best"] is None
            why = "validation has not chosen a setting" if is_open else "the test set was withheld"
            scores = [f"not scored: {why}"]
        self._say_parts([what, *scores], style="bold")
        if self._failure:
            raise self._failure

    def _settings_table(self, results):
        swept = [name for name in results["members"][0] if name != "seed"]
        count = len(results["members"]) // len(results["settings"])
        rows = [self._settings_row(setting, swept, count) for setting in results["settings"]]

        def table(names):
            table = Table(box=box.SIMPLE_HEAD)
            for name in names:
                table.add_column(name, justify="right")
            for i, row in enumerate(rows):
                style = "bold" if i == results["best"] else None
                table.add_row(*(row[name] for name in names), style=style)
            return table

        names, unlimited = list(rows[0]), self._console.options.update(max_width=1000)
        for name in ("test_loss", "95 % interval"):  # results.json holds these, too
            needed = self._console.measure(table(names), options=unlimited).maximum
            if needed > self._console.width:
                names.remove(name)
        self._print(table(names))
        if diverged := sum(setting.get("diverged", 0) for setting in results["settings"]):
            self.say(f"{diverged} of {len(results['members'])} members diverged and are left out")
        if swept and results["best"] is not None:
            chosen = results["settings"][results["best"]]
            values = ", ".join(f"{name} = {chosen[name]:g}" for name in swept)
            self.say(f"Best by validation: {values}")

    def _settings_row(self, setting, swept, count):
        validation, test = setting["validation"], setting["test"]
        is_scored = setting["diverged"] == count or test["loss"]["mean"] is not None
        return {
            **{name.rpartition(".")[2]: f"{setting[name]:g}" for name in swept},
            "val_accuracy": format_spread(validation["accuracy"], "nan") if validation else "",
            "test_loss": format_spread(test["loss"], "nan") if is_scored else "",
            "test_accuracy": format_spread(test["accuracy"], "nan") if is_scored else "",
            "95 % interval": format_interval(test["accuracy"]["interval"], missing=""),
        }

    def _say_parts(self, parts, style=None):
        """Prints parts on one line, or on as many as they need on a terminal or in a notebook."""
        lines = parts[:1]
        for part in parts[1:]:
            longer = f"{lines[-1]} - {part}"
            if (self._is_live or self._cell) and len(longer) > self._console.width:
                lines.append(f"  {part}")
            else:
                lines[-1] = longer
        self.say("\n".join(lines), style)

    def _print(self, what, style=None):
        try:
            self._console.print(what, style=style)
        except OSError as error:  # the terminal is closed or the disk full; the run continues
            self._console.on_broken_pipe()
            self._failure = error if error.errno == errno.ENOSPC else None


class Quiet(Display):
    """Shows only notices, and calls `advance` with the number of epochs done so far, a float."""

    def __init__(self, advance: Callable[[float], None]):
        super().__init__()
        self._advance, self.num_epochs = advance, 0  # of this process

    def say(self, text: str, style: str | None = None) -> None:
        if style:
            super().say(text, style)

    def setup(self, task: Any, params: Any) -> None:
        pass

    @contextlib.contextmanager
    def epoch(self, epoch: int, num_epochs: int, num_steps: int) -> Iterator[Any]:
        yield lambda step, means: self._advance(epoch - 1 + step / num_steps)

    def epoch_line(self, *_: Any) -> None:
        self.num_epochs += 1

    def results(self, results: Mapping[str, Any]) -> None:
        pass


def describe(model: ModelConfig) -> str:
    """Returns a network in one line, e.g. "rows → 1 × simple_rnn(64) → last → logits"."""
    parts = [model.view]
    parts += ["reversed"] if model.reverse else []
    parts += [f"1 of {model.subsample} time steps"] if model.subsample > 1 else []
    sides = "bidirectional " if model.bidirectional else ""
    block = f"{model.block} " if model.block != "plain" else ""
    options = "".join(f", {name}={value}" for name, value in model.cell_options.items())
    layers = f"{model.num_layers} × {sides}{block}{model.cell}({model.hidden_size}{options})"
    layers += f" in {model.dtype}" if model.dtype != "float32" else ""
    return f"{', '.join(parts)} → {layers} → {model.readout} → logits"


def _title(epoch, num_epochs):
    return f"Epoch {epoch}/{num_epochs}"


def _text(value):
    """Returns one score, or mean ± standard deviation over members that did not diverge."""
    return format_spread(members.statistics(np.ravel(value)), "nan")


def format_spread(spread: Mapping[str, Any] | None, missing: str = "–") -> str:
    """Formats what `members.statistics` returns as mean ± sd."""
    if not spread or spread["mean"] is None:
        return missing
    numbers = [spread["mean"]] if spread["sd"] is None else [spread["mean"], spread["sd"]]
    return " ± ".join(f"{x:.4f}" if abs(x) < 1e5 else f"{x:.4g}" for x in numbers)


def format_interval(interval: Sequence[float] | None, sign: str = "", missing: str = "–") -> str:
    """Formats both ends of an interval, with a plus if `sign` is "+"."""
    return " to ".join(f"{x:{sign}.4f}" for x in interval) if interval else missing
