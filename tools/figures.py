"""Figures of what a network learned and how it reads, drawn from arrays.

Figures are at most six inches wide, readable on a phone.
Shapes: H, W height and width of an image, T time steps, F features per step, C classes, U outputs
of the top layer. Images are gray, uint8 [H, W], or colored, uint8 [H, W, 3]; `names` are those of
the C classes.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager, patches, rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

WIDTH = 6.0
# The palette of M. Okabe and K. Ito, distinguishable with any kind of color vision; darker colors
# in place of three of which a thin line is hard to see on white.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK, BROWN, VIOLET, GOLD, GREY = "#000000", "#8C510A", "#5E3C99", "#B8860B", "#666666"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, BLACK, GOLD, VIOLET, BROWN)
_MARKERS = "osv^"  # where there are more runs than colors
_GRAY_BYTES = {"cmap": "gray", "vmin": 0, "vmax": 255}
_GRAY = {"cmap": "gray", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
_BAR_BELOW = {"location": "bottom", "shrink": 0.5, "aspect": 40}
_MAX_WRITTEN = 15  # classes whose numbers are written into a confusion matrix
_UNUSED = "#e8e8e8"  # cells of a heat map without a value


class Example(NamedTuple):
    """An image and what the network made of it."""

    image: np.ndarray  # uint8 [H, W] or [H, W, 3]
    label: int  # its class
    beliefs: np.ndarray  # class probabilities after each time step, [T, C]
    states: np.ndarray  # outputs of the top layer, [T, U]
    names: Sequence[str]

    @property
    def title(self) -> str:
        """The predicted class with its probability, and whether it is correct."""
        predicted = int(self.beliefs[-1].argmax())
        share = f"{self.beliefs[-1, predicted]:.0%}"
        if predicted == self.label:
            return f"{self.names[predicted]}, correct ({share})"
        return f"{self.names[predicted]} ({share}), but it is {self.names[self.label]}"


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws loss and accuracy by epoch; with several members, their mean and standard deviation.

    `runs` maps names of runs or settings to the lines of their `metrics.jsonl`, whose scores may be
    null.
    """
    figure, axes = subplots(5.6, 2, sharex=True)
    for axis, score in zip(axes, ("loss", "accuracy"), strict=True):
        for i, lines in enumerate(runs.values()):
            epochs, (color, marker) = [line["epoch"] for line in lines], look(i)
            for split, style in (("train", "--"), ("validation", "-")):
                # [epochs, S]; null is NaN, and a run with one member has one number per epoch.
                scores = [np.atleast_1d(line.get(f"{split}/{score}")) for line in lines]
                values = np.ma.masked_invalid(np.array(scores, float))
                if values.mask.all():
                    continue
                mean, sd = (x.filled(np.nan) for x in (values.mean(1), values.std(1, ddof=1)))
                label = split if len(runs) == 1 else None
                is_long = len(lines) * len(runs) > 20 and len(lines) > 1
                marked = {"marker": marker, "ms": 4, "markevery": max(1, len(lines) // 6)}
                marked = {} if is_long and len(runs) <= len(COLORS) else marked
                axis.plot(epochs, mean, style, color=color, label=label, **marked)
                if values.shape[1] > 1:
                    axis.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
        axis.set_ylabel(f"{score}, nats" if score == "loss" else score)
        tidy(axis)
    axes[1].set_xlabel("epoch" if len(runs) == 1 else "epoch (solid: validation, dashed: train)")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1:
        name_runs(figure, runs)
        drawn = np.concatenate([line.get_ydata() for line in axes[0].lines] or [[]])
        if np.nanmax(drawn, initial=0) > 10 * np.nanmin(drawn, initial=np.inf):
            axes[0].set_yscale("log", subs=[])  # some settings of a sweep fail
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes[0].yaxis.set_major_formatter("{x:g}")
    elif axes[1].lines:
        axes[1].legend(frameon=False)
    return figure


def look(i: int) -> tuple[str, str]:
    """Returns the color and the marker of the i-th of several runs, from 0."""
    again, color = divmod(i, len(COLORS))
    return COLORS[color], _MARKERS[again % len(_MARKERS)]


def name_runs(figure: Figure, names: Sequence[str]) -> None:
    """Adds a legend below the axes, and makes the figure taller by its height."""
    # The space is for names that begin with "_", which matplotlib 3.9 leaves out.
    labels = [" " * name.startswith("_") + _plain(textwrap.fill(name, 64)) for name in names]
    are_marked = len(labels) > len(COLORS)
    looks = map(look, range(len(labels)))
    handles = [Line2D([], [], color=c, marker=m if are_marked else None) for c, m in looks]
    num_columns = max(1, min(3, 66 // (max(map(len, names)) + 8)))  # of letters across the figure
    figure.legend(handles, labels, frameon=False, loc="outside lower left", ncols=num_columns)
    num_lines = math.ceil(len(labels) / num_columns) + sum(x.count("\n") for x in labels)
    figure.set_figheight(figure.get_figheight() + 0.21 * num_lines)


def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws a confusion matrix, int [C, C]; color is the share of a row, for mistakes only.

    The numbers themselves are written if there is room for them.
    """
    num = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[np.eye(num, dtype=bool)] = np.nan
    largest = np.nanmax(shares)
    figure, axis = subplots(5.4)
    axis.set_facecolor(_UNUSED)
    heat = axis.imshow(shares, cmap="viridis", vmin=0, vmax=max(largest, 1e-3))
    for i, j in zip(*np.nonzero(counts), strict=True) if num <= _MAX_WRITTEN else ():
        color = "black" if i == j or shares[i, j] > largest / 2 else "white"
        weight = "bold" if i == j else "normal"
        _write(axis, j, i, counts[i, j], color=color, size=min(9, 100 / num), weight=weight)
    axis.set(xlabel="predicted class", ylabel="class")
    for side in (axis.xaxis, axis.yaxis):
        _name_ticks(side, names, 280)
    style = {"format": PercentFormatter(1, decimals=0), "ticks": MaxNLocator(5), "shrink": 0.8}
    figure.colorbar(heat, ax=axis, label="share of the class", **style)
    return figure


def class_bars(
    precision: np.ndarray, recall: np.ndarray, f1: np.ndarray, names: Sequence[str]
) -> Figure:
    """Draws three scores per class, [C] each."""
    figure, axis = subplots(2.8)
    axis.plot(precision, "v", color=BLUE, label="precision", ms=8)
    axis.plot(recall, "^", color=VERMILION, label="recall", ms=8)
    axis.plot(f1, "o", color=BLACK, label="F1", ms=8)
    axis.set(xlabel="class", ylabel="score")
    if (most := _name_ticks(axis.xaxis, names, 370)) > 20:
        figure.set_figheight(2.8 + most / 72)  # names stand upright
    tidy(axis)
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def calibration(confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray) -> Figure:
    """Draws the accuracy by confidence, [bins] each; NaN without examples. Dot areas are shares."""
    figure, axis = subplots(3.4)
    axis.plot([0, 1], [0, 1], ":", color=GREY, label="accuracy = confidence")
    areas = 20 + 500 * counts / counts.sum()
    axis.scatter(confidence, accuracy, areas, BLUE, zorder=3, clip_on=False, label="the network")
    for style in (axis.xaxis, axis.yaxis):
        style.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set(xlabel="probability of the predicted class", ylabel="accuracy")
    axis.set(xlim=(0, 1.03), ylim=(0, 1.05))
    axis.legend(frameon=False, loc="upper left", markerscale=0.5)
    tidy(axis)
    return figure


def throughput(epochs: np.ndarray, rate: np.ndarray) -> Figure:
    """Draws training examples per second by epoch, [E] each."""
    figure, axis = subplots(2.2)
    axis.plot(epochs, rate, color=BLUE, marker="o" if len(epochs) <= 20 else None, ms=4)
    axis.set(xlabel="epoch", ylabel="examples per second", ylim=(0, 1.1 * rate.max()))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    tidy(axis)
    return figure


def mistakes(
    images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> Figure:
    """Draws N images with their labels [N] and class probabilities [N, C]."""
    rows, is_brief = -(-len(images) // 5), _are_brief(names)
    figure = Figure(figsize=(WIDTH, (1.5 if is_brief else 1.7) * rows), layout="constrained")
    for i, (image, label, row) in enumerate(zip(images, labels, probabilities, strict=True)):
        axis = _show_image(figure.add_subplot(rows, 5, i + 1), image)
        predicted, share = _short(names[row.argmax()], 11), f"{row.max():.0%}"
        is_, size = ("is", 9) if is_brief else ("\nis", 8)
        axis.set_title(f"{predicted} ({share}), {is_} {_short(names[label], 15)}", size=size)
    return figure


def sequence(image: np.ndarray, x: np.ndarray, read_at: np.ndarray, title: str) -> Figure:
    """Draws an image, when its pixels are read, and the sequence `x` [T, F] under a title.

    `read_at` holds time steps, float [H, W], NaN if never read.
    """
    num_steps, size = x.shape
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    _show_image(figure.add_subplot(grid[0, 0]), image).set_title("the image")
    order = figure.add_subplot(grid[0, 1])
    order.set_facecolor(_UNUSED)
    heat = order.imshow(read_at + 1, cmap="viridis", vmin=1, vmax=num_steps)
    order.set(xticks=[], yticks=[], title="when each pixel is read")
    figure.colorbar(heat, ax=order, shrink=0.85, label="time step")
    axis = figure.add_subplot(grid[1, :])
    if size == 1:
        axis.fill_between(np.arange(1, num_steps + 1), x[:, 0], step="mid", color=BLUE, lw=0)
        axis.set(xlim=(0.5, num_steps + 0.5), ylabel="value")
        tidy(axis)
    else:
        axis.imshow(x.T, extent=(0.5, num_steps + 0.5, size + 0.5, 0.5), **_GRAY)
        if num_steps <= 60:  # gaps between time steps
            axis.vlines(np.arange(num_steps + 1) + 0.5, 0.5, size + 0.5, "white", lw=2)
            axis.spines[:].set_visible(False)
        axis.set_ylabel("feature")
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set(xlabel="time step", title=title)
    return figure


def unrolled(x: np.ndarray, probabilities: np.ndarray, model: Any, names: Sequence[str]) -> Figure:
    """Draws the network of a `ModelConfig` unrolled over a sequence, [T, F], and its prediction.

    `probabilities` are those of the classes, [C].
    """
    num_steps, middle = len(x), len(x) // 2
    steps = list(range(num_steps))
    if num_steps > 7:
        steps = [0, 1, None, middle - 1, middle, None, num_steps - 1]
    layers = list(range(model.num_layers))
    if len(layers) > 3:
        layers = [0, None, len(layers) - 1]
    height = 1.25 * (len(layers) - 1)
    figure, axis = subplots(4.0 + 0.62 * height)
    _draw_inputs(axis, x, steps)
    _draw_states(axis, steps, layers, model.bidirectional)
    last, peak = len(steps) - 1, height + 1.75
    sources = [i for i, t in enumerate(steps) if t is not None]
    if model.readout == "last":
        sources = [0, last] if model.bidirectional else [last]
    _draw_readout(axis, sources, height + 0.42, peak, model.readout)
    left = min(0.1, last - 2.7)  # beyond the first of few steps
    _draw_prediction(axis, probabilities, names, left, last - 1.2, peak - 0.42)
    axis.set(xlim=(left - 0.6, last + 0.8), ylim=(-2.75, peak + 0.85))
    axis.axis("off")
    return figure


def _draw_inputs(axis, x, steps):
    for i, t in enumerate(steps):
        if t is None:
            _write(axis, i, -1.45, "…", size=16)
            continue
        strip = np.flip(x[t][:, None], 0)  # the first feature at the top
        axis.imshow(strip, extent=(i - 0.13, i + 0.13, -2.1, -0.85), origin="lower", **_GRAY)
        axis.add_patch(patches.Rectangle((i - 0.13, -2.1), 0.26, 1.25, fill=False, lw=0.8))
        axis.text(i, -2.3, f"$x_{{{t + 1}}}$", ha="center", va="top", size=12)
        _arrow(axis, (i, -0.85), (i, -0.42))


def _draw_states(axis, steps, layers, is_bidirectional):
    shift = 0.12 if is_bidirectional else 0.0
    for k, layer in enumerate(layers):
        y = 1.25 * k
        for i, t in enumerate(steps):
            if t is None or layer is None:
                _write(axis, i, y, "…", size=16)
            else:
                number = f"^{{({layer + 1})}}" if len(layers) > 1 else ""
                _box(axis, (i - 0.3, y - 0.34), (0.6, 0.68), "#d6e9f5", BLUE)
                _write(axis, i, y, f"$h_{{{t + 1}}}{number}$", size=12)
            if i + 1 < len(steps):
                _arrow(axis, (i + 0.3, y + shift), (i + 0.7, y + shift))
                if is_bidirectional:
                    _arrow(axis, (i + 0.7, y - shift), (i + 0.3, y - shift), VERMILION)
            if k and t is not None:
                _arrow(axis, (i, y - 0.91), (i, y - 0.34))


def _draw_readout(axis, sources, top, peak, readout):
    last, bus = sources[-1], top + 0.25
    axis.vlines(sources[:-1], top - 0.08, bus, GREEN, lw=1.2)
    axis.hlines(bus, sources[0], last, GREEN, lw=1.2)
    _arrow(axis, (last, top - 0.08), (last, peak - 0.3), GREEN)
    _box(axis, (last - 0.66, peak - 0.3), (1.32, 0.5), "#d5efe7", GREEN)
    text = "readout" if readout == "last" else f"{readout} → readout"
    _write(axis, last, peak - 0.05, text, size=9)
    _arrow(axis, (last - 0.66, peak - 0.05), (last - 1.0, peak - 0.05), GREEN)


def _draw_prediction(axis, probabilities, names, left, right, base):
    num, predicted = len(probabilities), probabilities.argmax()
    if num <= 9:  # bars as narrow as those of ten classes
        left = right - (right - left) * (num - 1) / 9
    places = np.linspace(left, right, num)
    colors = [GREEN if c == predicted else "#9fb8b0" for c in range(num)]
    heights = np.maximum(probabilities, 0.01) * 0.95
    axis.bar(places, heights, 0.75 * (places[1] - places[0]), base, color=colors)
    for c, place in enumerate(places):
        if c == predicted or _are_brief(names):
            axis.text(place, base - 0.06, _short(names[c], 30), ha="center", va="top", size=9)
    share = probabilities[predicted]
    axis.text(
        places[predicted], base + 0.95 * share + 0.05, f"{share:.0%}", ha="center", size="medium"
    )


def beliefs(correct: Sequence[Example], wrong: Sequence[Example]) -> Figure:
    """Draws class probabilities after each time step beside the images, in a column per group.

    One of the groups may be empty.
    """
    columns = [column for column in (correct, wrong) if len(column)]
    rows = max(map(len, columns))
    figure = Figure(figsize=(WIDTH * len(columns) / 2, 1.95 * rows + 0.8), layout="constrained")
    grid = figure.add_gridspec(rows, 2 * len(columns), width_ratios=[1.3, 1] * len(columns))
    axes = []
    for j, column in enumerate(columns):
        for i, example in enumerate(column):
            # As tall as the heat map: in the view `rows`, each row is beside its time step.
            shown = _show_image(figure.add_subplot(grid[i, 2 * j]), example.image, aspect="auto")
            shown.set_title(_plain(textwrap.fill(example.title, 36)), size=9, loc="left")
            axis = figure.add_subplot(grid[i, 2 * j + 1])
            heat = _heat_map(axis, example.beliefs, "viridis", 0, 1, first_column=0)
            axis.tick_params(labelsize=7)
            _belief_ticks(axis, example)
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_ylabel("time step", size=8)
            if i == len(column) - 1:
                axis.set_xlabel("class", size=8)
            axes.append(axis)
    figure.colorbar(heat, ax=axes, label="probability", **_BAR_BELOW)
    return figure


def _belief_ticks(axis, example):
    """Names all classes, or if there is no room, the predicted and the true one."""
    names = example.names
    if _are_brief(names):
        axis.set_xticks(range(len(names)), names)
        return
    shown = sorted({int(example.beliefs[-1].argmax()), example.label})
    ticks = axis.set_xticks(shown, [f" {_short(names[c], 14)} " for c in shown])
    sides = ("right", "left") if len(shown) == 2 else ("center",)
    for tick, side in zip(ticks, sides, strict=True):
        tick.label1.set_ha(side)


def accuracy_by_step(accuracy: np.ndarray, confidence: np.ndarray, num_classes: int) -> Figure:
    """Draws the accuracy after each time step, [T], and the probability of the true class, [T].

    Guessing is right once in `num_classes`.
    """
    figure, axis = subplots(2.9)
    steps = np.arange(1, len(accuracy) + 1)
    axis.plot(steps, accuracy, color=BLUE, lw=2, label="accuracy")
    axis.plot(steps, confidence, "--", color=VERMILION, lw=2, label="probability of the true class")
    axis.axhline(1 / num_classes, color=GREY, lw=1, ls=":", label="guessing")
    axis.set(xlabel="time steps read", ylabel="mean", ylim=(0, 1.02), xlim=(1, len(accuracy)))
    axis.legend(frameon=False, loc="upper left")
    tidy(axis)
    return figure


def hidden_states(examples: Sequence[Example]) -> Figure:
    """Draws the outputs of the top layer over time: one heat map per example, one row per unit.

    Units are sorted by their last output for the first example.
    """
    num = len(examples)
    figure, axes = subplots(2.7 * num, num, sharex=True, squeeze=False)
    limit = max(np.abs(example.states).max() for example in examples)
    order = np.argsort(examples[0].states[-1])
    for axis, example in zip(axes[:, 0], examples, strict=True):
        heat = _heat_map(axis, example.states.T[order], "PuOr", -limit, limit)
        axis.set_title(f"Prediction: {_plain(example.title)}", size="medium", loc="left")
        axis.set_ylabel("unit")
        _show_image(axis.inset_axes((1.02, 0.3, 0.16, 0.4)), example.image)
    axes[-1, 0].set_xlabel("time step")
    figure.colorbar(heat, ax=axes, label="output of the top layer", **_BAR_BELOW)
    return figure


def gradient_norms(norms: np.ndarray) -> Figure:
    """Draws ‖∂loss/∂h_t‖, [D, T, N], by time step: the median and the middle half of examples."""
    figure, axis = subplots(3.0)
    steps = np.arange(1, norms.shape[1] + 1)
    names = ("reading forwards", "reading backwards") if len(norms) > 1 else (None,)
    largest = norms.max() if norms.max() > 0 else 1.0
    for norm, color, name in zip(norms, (BLUE, VERMILION), names, strict=False):
        with np.errstate(invalid="ignore"):  # between two infinite norms
            quartiles = np.percentile(norm, (25, 50, 75), axis=1)
        low, middle, high = np.maximum(quartiles, 1e-12 * largest)
        axis.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
        axis.plot(steps, middle, color=color, lw=2, label=name)
    axis.set(yscale="log", xlabel="time step t", ylabel="gradient norm", xlim=(1, steps[-1]))
    if len(norms) > 1:
        axis.legend(frameon=False)
    tidy(axis)
    return figure


def drawable(names: Sequence[str]) -> list[str]:
    """Returns names of classes, or the number of each class whose name the font cannot draw."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))

    def is_drawable(name):
        return all(font.get_char_index(ord(letter)) for letter in name)

    return [name if is_drawable(name) else str(c) for c, name in enumerate(names)]


def _plain(text):
    """Returns text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _short(name, length):
    return _plain(name if len(name) <= length else f"{name[: length - 1]}…")


def _are_brief(names):
    """Returns whether all classes can be named side by side on a small axis."""
    return max(map(len, names)) <= 2 and sum(map(len, names)) <= 12


def _name_ticks(side, names, length):
    """Names classes 0, 1, … on the x or y axis `side`, `length` points long.

    Names are small where many classes leave little room, and stand upright where they are longer
    than that. Returns the points that they take across the axis.
    """
    room = length / len(names)
    step = math.ceil(5 / room)  # every how many-th class is named
    size = min(rcParams["font.size"], step * room)
    shown = [_short(name, 18) for name in names[::step]]
    longest = 0.6 * size * max(map(len, shown))
    is_upright = side.axis_name == "x" and longest > step * room
    side.set_ticks(range(0, len(names), step), shown, size=size, rotation=90 * is_upright)
    return longest if is_upright else size


def subplots(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of this height, in inches, and its axes, one below the other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, **options)


def tidy(axis: Any) -> None:
    """Removes what an axis does not need."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)


def _show_image(axis, image, **options):
    axis.imshow(image, **_GRAY_BYTES, **options)
    axis.axis("off")
    return axis


def _heat_map(axis, values, cmap, low, high, first_column=1):
    """Draws values [rows, columns]; rows are numbered from 1, columns from `first_column`."""
    num_rows, num_columns = values.shape
    left = first_column - 0.5
    extent = (left, left + num_columns, num_rows + 0.5, 0.5)
    return axis.imshow(
        values, cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest", extent=extent
    )


def _write(axis, x, y, text, **options):
    axis.text(x, y, text, ha="center", va="center", **options)


def _arrow(axis, start, end, color="black"):
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)


def _box(axis, corner, size, face, edge):
    style = {"boxstyle": "round,pad=0,rounding_size=0.1", "lw": 1.5}
    axis.add_patch(patches.FancyBboxPatch(corner, *size, facecolor=face, edgecolor=edge, **style))
