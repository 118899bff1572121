"""The results of a study: tables for people and papers, pictures, and one page."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from seqmnist.display import format_interval, format_spread
from seqmnist.workdir import Workdir, write_aside
from tools import cli, figures, report
from tools.sections import Section, picture

_COLUMNS = {
    "network": "",
    "parameters": "",
    "FLOPs per image": "of the matrix products that classify one image",
    "seconds per epoch": "of one network, when all seeds are trained in one program",
    "memory": "MiB of the program that trains all seeds, by XLA",
    "validation": "accuracy, mean ± standard deviation over seeds",
    "test": "accuracy, mean ± standard deviation over seeds",
    "95 % interval": "of the mean test accuracy, Student's t",
    "diverged": "number of seeds, which are left out of all other columns",
}


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> tuple[pathlib.Path, list[list[Any]]]:
    """Writes study.csv, .md, .tex and .html, and pictures/.

    Returns the path of the page, and the rows of `table`.
    """
    measured = {name: _measured(workdir / "final" / name, found) for name in found["entries"]}
    rows = table(found, measured)
    pairs = differences_table(found)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    contents = {
        "study.csv": text.getvalue(),
        "study.md": _markdown(rows) + "\n" + _markdown(pairs),
        "study.tex": _latex(rows) + "\n" + _latex(pairs),
    }
    for name, content in contents.items():
        write_aside(workdir / name, content.encode())
    sections = _sections(workdir, found, measured, rows, pairs)
    page = report.write(workdir, f'Study "{workdir.name}"', sections, "study.html", "pictures")
    return page, rows


def show(found: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
    """Prints those columns of the rows of `table` that fit on 80 characters, and remarks on it."""
    names = ("network", "parameters", "validation", "test", "95 % interval")
    heads, *rows = rows
    chosen = [heads.index(name) for name in names]
    cli.print_table(names, [[str(row[i]) for i in chosen] for row in rows])
    for line in _remarks(found):
        print(line)


def table(found: Mapping[str, Any], measured: Mapping[str, Any]) -> list[list[Any]]:
    """Returns the rows of the leaderboard, the best by mean test accuracy first, below headings."""
    rows = []
    for name, entry in _ranked(found):
        test, own = entry["test/accuracy"], measured[name]
        rows.append([
            name, entry["parameters"], entry["flops_per_image"], f"{own['seconds']:.2f}",
            f"{own['bytes'] / 2**20:,.0f}",
            format_spread(entry["validation/accuracy"]), format_spread(test),
            format_interval(test["interval"]), entry["diverged"],
        ])  # fmt: skip
    return [list(_COLUMNS), *rows]


def differences_table(found: Mapping[str, Any]) -> list[list[Any]]:
    """Returns the rows of all pairs of entries below headings."""
    heads = ["pair", "difference", "95 % interval", "p", "p (Holm)", "significant"]
    rows = []
    for each in found["differences"]:
        p, corrected = each["p"], each["p_holm"]
        rows.append([
            " - ".join(each["entries"]),
            "–" if each["mean"] is None else f"{each['mean']:+.4f}",
            format_interval(each["interval"], "+"),
            "–" if p is None else f"{p:.2g}",
            "–" if corrected is None else f"{corrected:.2g}",
            "yes" if each["is_significant"] else "no",
        ])  # fmt: skip
    return [heads, *rows]


def _ranked(found):
    def key(pair):
        mean = pair[1]["test/accuracy"]["mean"]
        return -np.inf if mean is None else mean

    return sorted(found["entries"].items(), key=key, reverse=True)


def _measured(folder, found):
    """Returns what depends on the machine, from the workdir of an entry's final run."""
    workdir = Workdir(folder)
    metrics, results = workdir.read_metrics(), workdir.read_results()
    seeds = found["study"]["seeds"]
    cost = results["programs"]["train"]
    return {
        "metrics": metrics,
        "seconds": float(np.median([line["seconds"] for line in metrics])) / (seeds[1] - seeds[0]),
        "bytes": cost.get("argument_bytes", 0) + cost.get("temporary_bytes", 0),
    }


def _remarks(found):
    """Yields what a reader must know about the choice of settings, in lines."""
    entries = found["entries"]
    if names := {each["dataset"] for each in entries.values() if "dataset" in each}:
        yield f"Data: {', '.join(sorted(names))}"

    def told(name, fields):
        return f"{name}: " + ", ".join(f"{f} = {entries[name]['setting'][f]}" for f in fields)

    if chosen := [told(name, each["setting"]) for name, each in entries.items() if each["setting"]]:
        yield f"Chosen by validation: {'; '.join(chosen)}"
    if edges := [told(name, each["at_edge"]) for name, each in entries.items() if each["at_edge"]]:
        yield f"NOTICE: at the edge of the grid; values beyond may be better: {'; '.join(edges)}"
    for name, entry in entries.items():
        if entry["diverged"]:
            yield f"NOTICE: {name}: {entry['diverged']} of {len(entry['seeds'])} seeds diverged"


def _sections(workdir, found, measured, rows, pairs):
    study = found["study"]
    seeds, select = study["seeds"], study["select"]
    text = [f"Each network was trained from {seeds[1] - seeds[0]} seeds, beginning at {seeds[0]}."]
    if study["budget"]:
        text.append("Hidden sizes are the largest within the budget of parameters.")
    if select:
        first, last = study["selection_seeds"]
        text.append(
            f"Settings were chosen for each by the lowest mean validation loss over {last - first} "
            f"other seeds, among "
            + "; ".join(f"{field}: {values}" for field, values in select.items())
            + ". The test set was scored once, after the choice."
        )
    columns = [f"{name}: {meaning}" for name, meaning in _COLUMNS.items() if meaning]
    sections = [
        Section("Leaderboard", "\n".join([" ".join(text), *_remarks(found)]), {}, rows),
        Section("What the columns mean", "\n".join(columns), {}),
        Section(
            "Differences",
            "Difference of the test accuracies of two networks from the same seeds; Student's "
            "t-test of paired samples, corrected for the number of pairs by Holm's method.",
            {},
            pairs,
        ),
    ]
    entries = found["entries"]
    for title, name, label, values in (
        ("Accuracy against parameters", "parameters", "parameters",
         {key: entry["parameters"] for key, entry in entries.items()}),
        ("Accuracy against training time", "time", "seconds per epoch",
         {key: own["seconds"] for key, own in measured.items()}),
    ):  # fmt: skip
        spreads = {key: entries[key]["test/accuracy"] for key in values}
        alt = "; ".join(
            f"{key}: {values[key]:,.4g}, {format_spread(spreads[key])}" for key in values
        )
        figure = scores_against(label, values, spreads)
        look = (
            "Look at the upper left: much accuracy for little cost. Where bars overlap, see the "
            "differences above."
        )
        pictures = picture(name, figure, f"{title}: {alt}", look)
        sections.append(Section(title, "", pictures))
    metrics = {name: own["metrics"] for name, own in measured.items()}
    alt = "Validation accuracy by epoch, mean and standard deviation over seeds"
    look = "A line that still rises at the end would gain from more epochs."
    curves = picture("curves", figures.learning_curves(metrics), alt, look)
    sections.append(Section("Learning curves", "Bands are one standard deviation.", curves))
    for field, tried in select.items():
        if len(tried) > 1 and all(type(value) in (int, float) for value in tried):
            alt = f"Lowest mean validation loss by {field}, a line for each network"
            text = f"Mean validation loss by {field}; for each value, the best of the other fields."
            look = (
                "A wide valley is a network that is easy to tune; one whose lowest point is at an "
                "end needs a wider grid."
            )
            pictures = picture(field, sensitivity(field, entries), alt, look)
            sections.append(Section(f"Sensitivity to {field}", text, pictures))
    return sections


def scores_against(
    label: str, values: Mapping[str, float], scores: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Draws test accuracy with its 95 % interval against a cost, a point for each entry."""
    figure, axis = figures.subplots(3.6)
    for i, (name, value) in enumerate(values.items()):
        mean, interval = scores[name]["mean"], scores[name]["interval"]
        if mean is None:
            continue
        low, high = interval or (mean, mean)
        errors, (color, marker) = [[mean - low], [high - mean]], figures.look(i)
        axis.errorbar([value], [mean], yerr=errors, fmt=marker, color=color, capsize=4)
    axis.set(xlabel=label, ylabel="test accuracy")
    axis.margins(0.15)
    if min(values.values()) > 0 and max(values.values()) > 20 * min(values.values()):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    figures.name_runs(figure, list(values))
    figures.tidy(axis)
    return figure


def sensitivity(field: str, entries: Mapping[str, Any]) -> Any:
    """Draws the mean validation loss of each entry against a field that was selected."""
    figure, axis = figures.subplots(3.4)
    for i, entry in enumerate(entries.values()):
        best: dict[float, float] = {}
        for each in entry["tried"]:
            loss = each["validation"]["loss"]["mean"]  # None of a run that diverged as a whole
            if loss is not None and not each["diverged"]:
                best[each[field]] = min(loss, best.get(each[field], np.inf))
        values = sorted(best)
        color, marker = figures.look(i)
        axis.plot(values, [best[value] for value in values], f"{marker}-", color=color)
        if entry["setting"].get(field) in best:
            chosen = entry["setting"][field]
            axis.plot([chosen], [best[chosen]], marker, ms=11, mfc="none", color=color)
    tried = [each for entry in entries.values() for each in entry["tried"]]
    numbers = [each[field] for each in tried if field in each]
    if min(numbers) > 0 and max(numbers) > 10 * min(numbers):
        axis.set_xscale("log")
    axis.set(xlabel=field, ylabel="validation loss", yscale="log")
    figures.name_runs(figure, list(entries))
    figures.tidy(axis)
    return figure


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    heads, *rows = rows
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[_text(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _latex(rows: Sequence[Sequence[Any]]) -> str:
    heads, *rows = rows

    def line(cells):
        return " & ".join(_escaped(_text(cell)) for cell in cells) + r" \\"

    inner = [line(heads), r"\midrule", *map(line, rows)]
    columns = "l" + "r" * (len(heads) - 1)
    return "\n".join([
        f"% needs the package booktabs\n\\begin{{tabular}}{{{columns}}}", r"\toprule", *inner,
        r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def _text(value):
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(text):
    for character in "\\&%$#_{}":
        text = text.replace(character, "\\" + character)
    text = text.replace("^", r"\textasciicircum{}").replace("~", r"\textasciitilde{}")
    return text.replace("±", r"$\pm$").replace("–", "--")
