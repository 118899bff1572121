"""Pictures of what a network learned and does, drawn from arrays.

Each function returns a matplotlib figure of six inches' width, so that it can be read on a phone.
Shapes: T time steps, F features a step, C classes, W outputs of the top layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import patches
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 6.0
# M. Okabe and K. Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, GREY = "#E69F00", "#56B4E9", "#F0E442", "#666666"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#000000", YELLOW)


class Example(NamedTuple):
    """An image, and what the network made of it.

    Attributes:
      image: uint8 [28, 28].
      label: its class.
      beliefs: after each time step, [T, C].
      states: outputs of the top layer, [T, W].
    """

    image: np.ndarray
    label: int
    beliefs: np.ndarray
    states: np.ndarray

    @property
    def title(self) -> str:
        """What was answered, and how surely."""
        answer = int(self.beliefs[-1].argmax())
        share = f"{self.beliefs[-1, answer]:.0%}"
        if answer == self.label:
            return f"{answer}, rightly ({share})"
        return f"{answer} ({share}), but it is {self.label}"


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws loss and accuracy by epoch; of several members, their mean and standard deviation.

    Args:
      runs: the lines of `metrics.jsonl` by the name of the run.
    """
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 5.6), sharex=True, layout="constrained")
    for (name, lines), color in zip(runs.items(), _cycle(len(runs)), strict=True):
        epochs = [line["epoch"] for line in lines]
        for axis, score in zip(axes, ("loss", "accuracy"), strict=True):
            for split, style in (("train", "--"), ("validation", "-")):
                values = [line.get(f"{split}/{score}") for line in lines]
                if any(value is None for value in values):
                    continue
                values = np.array(values, float).reshape(len(lines), -1)
                mean, sd = np.nanmean(values, 1), np.nanstd(values, 1)
                label = split if len(runs) == 1 else (name if split == "validation" else None)
                marker = "o" if len(lines) <= 20 else None
                axis.plot(epochs, mean, style, color=color, label=label, marker=marker, ms=4)
                if values.shape[1] > 1:
                    axis.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
            axis.set_ylabel(score if score == "accuracy" else "loss, nats")
            _tidy(axis)
    axes[1].set_xlabel("epoch" if len(runs) == 1 else "epoch (solid: validation, dashed: train)")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend(frameon=False)
    return figure


def confusion(counts: np.ndarray) -> Figure:
    """Draws a confusion matrix, int [C, C]; colours are shares of a row, of the mistakes only."""
    num = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    off = np.where(np.eye(num, dtype=bool), np.nan, shares)
    figure, axis = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    axis.set_facecolor("#e8e8e8")
    drawn = axis.imshow(off, cmap="viridis", vmin=0, vmax=max(np.nanmax(off), 1e-3))
    dark = np.nanmax(off) / 2
    for i in range(num):
        for j in range(num):
            if counts[i, j]:
                color = "black" if i == j or off[i, j] > dark else "white"
                weight = "bold" if i == j else "normal"
                axis.text(
                    j, i, counts[i, j], ha="center", va="center", color=color, size=9,
                    weight=weight,
                )  # fmt: skip
    axis.set(xticks=range(num), yticks=range(num), xlabel="answer", ylabel="class")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.set_label("share of the class answered wrongly so")
    bar.ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def class_bars(precision: np.ndarray, recall: np.ndarray, f1: np.ndarray) -> Figure:
    """Draws the three scores of each class, [C] each, from the lowest that is worth showing."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    places = np.arange(len(f1))
    scores = {"precision": precision, "recall": recall, "F1": f1}
    for (name, values), color, marker in zip(
        scores.items(), (SKY, ORANGE, "black"), "v^o", strict=True
    ):
        axis.plot(places, values, marker, color=color, label=name, ms=8)
    axis.set(xticks=places, xlabel="class", ylabel="score")
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    _tidy(axis)
    return figure


def mistakes(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Draws images uint8 [N, 28, 28] with their classes [N] and what was answered, [N, C]."""
    columns = 5
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 1.5 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, row in zip(axes.flat, images, labels, probabilities, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        answer = row.argmax()
        axis.set_title(f"{answer} ({row[answer]:.0%}), is {label}", size=9)
    return figure


def sequence(image: np.ndarray, x: np.ndarray, read_at: np.ndarray, title: str) -> Figure:
    """Draws an image, when each of its pixels is read, and what the network reads.

    Args:
      image: uint8 [28, 28].
      x: the sequence, [T, F].
      read_at: the time step of each pixel, float [28, 28]; NaN where it is never read.
      title: what the sequence is called.
    """
    num_steps, size = x.shape
    figure = plt.figure(figsize=(WIDTH, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    shown = figure.add_subplot(grid[0, 0])
    shown.imshow(image, cmap="gray", vmin=0, vmax=255)
    shown.set_title("the image")
    shown.axis("off")
    order = figure.add_subplot(grid[0, 1])
    order.set_facecolor("#e8e8e8")
    drawn = order.imshow(read_at + 1, cmap="viridis", vmin=1, vmax=num_steps)
    order.set(xticks=[], yticks=[], title="when each pixel is read")
    bar = figure.colorbar(drawn, ax=order, shrink=0.85)
    bar.set_label("time step")
    read = figure.add_subplot(grid[1, :])
    if size == 1:
        read.fill_between(np.arange(1, num_steps + 1), x[:, 0], step="mid", color=BLUE, lw=0)
        read.set(xlim=(0.5, num_steps + 0.5), ylabel="value")
        _tidy(read)
    elif num_steps <= 60:  # time steps as separate strips
        gap = np.full((size, num_steps, 1), np.nan)
        strips = np.concatenate([np.repeat(x.T[..., None], 5, 2), gap], 2).reshape(size, -1)
        extent = (0.5 + 1 / 12, num_steps + 0.5 + 1 / 12, size + 0.5, 0.5)
        read.imshow(
            strips, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            extent=extent,
        )  # fmt: skip
        read.set_ylabel("feature")
        read.spines[:].set_visible(False)
        read.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        extent = (0.5, num_steps + 0.5, size + 0.5, 0.5)
        read.imshow(x.T, cmap="gray", vmin=0, vmax=1, aspect="auto", extent=extent)
        read.set_ylabel("feature")
    read.set(xlabel="time step", title=title)
    return figure


def unrolled(x: np.ndarray, probabilities: np.ndarray, model: Any) -> Figure:
    """Draws the network over the time steps of a sequence, and its answer.

    Args:
      x: the sequence, [T, F].
      probabilities: of its classes, [C].
      model: its `ModelConfig`.
    """
    num_steps = len(x)
    steps, middle = list(range(num_steps)), num_steps // 2
    if num_steps > 7:
        steps = [0, 1, None, middle - 1, middle, None, num_steps - 1]
    layers = list(range(model.num_layers))
    if len(layers) > 3:
        layers = [0, None, len(layers) - 1]
    height = 1.25 * (len(layers) - 1)
    figure, axis = plt.subplots(figsize=(WIDTH, 4.0 + 0.62 * height), layout="constrained")
    top, peak = height + 0.42, height + 1.75
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}

    def connect(start, end, **changes):
        axis.annotate("", end, start, arrowprops={**arrow, **changes})

    for i, t in enumerate(steps):
        if t is None:
            axis.text(i, -1.45, "…", ha="center", va="center", size=16)
        else:
            strip = np.flip(x[t][:, None], 0)  # the first feature at the top
            axis.imshow(
                strip, extent=(i - 0.13, i + 0.13, -2.1, -0.85), cmap="gray", vmin=0, vmax=1,
                aspect="auto", origin="lower", interpolation="nearest", zorder=2,
            )  # fmt: skip
            axis.add_patch(patches.Rectangle((i - 0.13, -2.1), 0.26, 1.25, fill=False, lw=0.8))
            axis.text(i, -2.3, f"$x_{{{t + 1}}}$", ha="center", va="top", size=12)
            connect((i, -0.85), (i, -0.42))
        for k, layer in enumerate(layers):
            y = 1.25 * k
            if t is None or layer is None:
                axis.text(i, y, "…", ha="center", va="center", size=16)
            else:
                box = patches.FancyBboxPatch(
                    (i - 0.3, y - 0.34), 0.6, 0.68, boxstyle="round,pad=0,rounding_size=0.1",
                    facecolor="#d6e9f5", edgecolor=BLUE, lw=1.5,
                )  # fmt: skip
                axis.add_patch(box)
                number = f"^{{({layer + 1})}}" if len(layers) > 1 else ""
                axis.text(i, y, f"$h_{{{t + 1}}}{number}$", ha="center", va="center", size=12)
            if i + 1 < len(steps):
                offset = 0.12 if model.bidirectional else 0.0
                connect((i + 0.3, y + offset), (i + 0.7, y + offset))
                if model.bidirectional:
                    connect((i + 0.7, y - offset), (i + 0.3, y - offset), color=VERMILION)
            if k and t is not None:
                connect((i, y - 0.91), (i, y - 0.34))
    last, is_all = len(steps) - 1, model.readout != "last"
    sources = [i for i, t in enumerate(steps) if t is not None] if is_all else [last]
    if model.bidirectional and not is_all:
        sources = [0, last]
    bus = top + 0.25
    for i in sources[:-1]:
        axis.plot((i, i), (top - 0.08, bus), color=GREEN, lw=1.2)
    if len(sources) > 1:
        axis.plot((sources[0], last), (bus, bus), color=GREEN, lw=1.2)
    connect((last, top - 0.08), (last, peak - 0.3), color=GREEN)
    box = patches.FancyBboxPatch(
        (last - 0.66, peak - 0.3), 1.32, 0.5, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor="#d5efe7", edgecolor=GREEN, lw=1.5,
    )  # fmt: skip
    axis.add_patch(box)
    text = "readout" if not is_all else f"{model.readout} → readout"
    axis.text(last, peak - 0.05, text, ha="center", va="center", size=9)
    connect((last - 0.66, peak - 0.05), (last - 1.0, peak - 0.05), color=GREEN)
    left, right = 0.1, last - 1.2
    places = np.linspace(left, right, len(probabilities))
    base, answer = peak - 0.42, probabilities.argmax()
    colors = [GREEN if c == answer else "#9fb8b0" for c in range(len(probabilities))]
    axis.bar(
        places, np.maximum(probabilities, 0.01) * 0.95, 0.75 * (places[1] - places[0]), base,
        color=colors,
    )  # fmt: skip
    for c, place in enumerate(places):
        axis.text(place, base - 0.06, c, ha="center", va="top", size=9)
    axis.text(
        places[answer], base + 0.95 * probabilities[answer] + 0.05,
        f"{probabilities[answer]:.0%}", ha="center", size=10,
    )  # fmt: skip
    axis.set(xlim=(-0.5, last + 0.8), ylim=(-2.75, peak + 0.85))
    axis.axis("off")
    return figure


def beliefs(right: Sequence[Example], wrong: Sequence[Example]) -> Figure:
    """Draws what is believed after each time step, beside the image.

    Args:
      right: examples answered rightly, the left column.
      wrong: the others; not both may be empty.
    """
    columns = [column for column in (right, wrong) if len(column)]
    rows = max(map(len, columns))
    figure = plt.figure(figsize=(WIDTH * len(columns) / 2, 1.95 * rows + 0.8), layout="constrained")
    grid = figure.add_gridspec(rows, 2 * len(columns), width_ratios=[1.3, 1] * len(columns))
    drawn = None
    heats = []
    places = [(i, j) for j, column in enumerate(columns) for i in range(len(column))]
    for row, column in places:
        example = columns[column][row]
        num_steps, num_classes = example.beliefs.shape
        shown = figure.add_subplot(grid[row, 2 * column])
        # As tall as the heat map: in the view `rows`, row and time step stand side by side.
        shown.imshow(example.image, cmap="gray", vmin=0, vmax=255, aspect="auto")
        shown.axis("off")
        shown.set_title(example.title, size=9, loc="left")
        heat = figure.add_subplot(grid[row, 2 * column + 1])
        heats.append(heat)
        drawn = heat.imshow(
            example.beliefs, cmap="viridis", vmin=0, vmax=1, aspect="auto",
            interpolation="nearest", extent=(-0.5, num_classes - 0.5, num_steps + 0.5, 0.5),
        )  # fmt: skip
        heat.set_xticks(range(num_classes))
        heat.tick_params(labelsize=7)
        heat.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        heat.set_ylabel("time step", size=8)
        if row == len(columns[column]) - 1:
            heat.set_xlabel("class", size=8)
    bar = figure.colorbar(drawn, ax=heats, location="bottom", shrink=0.5, aspect=40)
    bar.set_label("probability", size=8)
    return figure


def accuracy_by_step(right: np.ndarray, trust: np.ndarray) -> Figure:
    """Draws how good the answer would be after each time step.

    Args:
      right: accuracy, [T].
      trust: the mean probability of the right class, [T].
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    steps = np.arange(1, len(right) + 1)
    axis.plot(steps, right, color=BLUE, lw=2, label="accuracy")
    axis.plot(steps, trust, "--", color=VERMILION, lw=2, label="probability of the right class")
    axis.axhline(1 / 10, color=GREY, lw=1, ls=":", label="guessing")
    axis.set(xlabel="time steps read", ylabel="mean", ylim=(0, 1.02), xlim=(1, len(right)))
    axis.legend(frameon=False, loc="upper left")
    _tidy(axis)
    return figure


def hidden_states(examples: Sequence[Example]) -> Figure:
    """Draws the outputs of the top layer over time: a heat map an example, a line a unit.

    Units are in the order of their last output for the first example.
    """
    figure, axes = plt.subplots(
        len(examples), 1, figsize=(WIDTH, 2.7 * len(examples)), layout="constrained",
        sharex=True, squeeze=False,
    )  # fmt: skip
    limit = max(np.abs(example.states).max() for example in examples)
    order = np.argsort(examples[0].states[-1])  # as they come, neighbours have nothing in common
    drawn = None
    for axis, example in zip(axes[:, 0], examples, strict=True):
        num_steps, width = example.states.shape
        drawn = axis.imshow(
            example.states.T[order], cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto",
            interpolation="nearest", extent=(0.5, num_steps + 0.5, width + 0.5, 0.5),
        )  # fmt: skip
        axis.set_title(f"Answer: {example.title}", size=10, loc="left")
        axis.set_ylabel("unit")
        inset = axis.inset_axes((1.02, 0.3, 0.16, 0.4))
        inset.imshow(example.image, cmap="gray", vmin=0, vmax=255)
        inset.axis("off")
    axes[-1, 0].set_xlabel("time step")
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.5, aspect=40)
    bar.set_label("output of the top layer")
    return figure


def gradient_norms(norms: np.ndarray) -> Figure:
    """Draws ‖∂loss/∂h_t‖, [D, T, N], by time step: the median and the middle half of examples."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    steps = np.arange(1, norms.shape[1] + 1)
    names = ("reading forwards", "reading backwards") if len(norms) > 1 else (None,)
    largest = norms.max() if norms.max() > 0 else 1.0
    for norm, color, name in zip(norms, (BLUE, VERMILION), names, strict=False):
        low, middle, high = np.maximum(np.percentile(norm, (25, 50, 75), axis=1), 1e-12 * largest)
        axis.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
        axis.plot(steps, middle, color=color, lw=2, label=name)
    axis.set(yscale="log", xlabel="time step t", ylabel="gradient norm", xlim=(1, steps[-1]))
    if len(norms) > 1:
        axis.legend(frameon=False)
    _tidy(axis)
    return figure


def _cycle(count):
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _tidy(axis):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
