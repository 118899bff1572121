"""Writes DIR/report.html: what a run learned, and how it reads, in pictures.

Example:
  python -m tools.report --workdir=runs/notebook
  python -m tools.report --workdir=runs/lstm --compare runs/notebook runs/gru

The page needs no network and no other file; its pictures are in DIR/report as well. The runs to
compare with share one table and one set of axes with DIR.
"""

import base64
import html
import io
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from seqmnist import records
from seqmnist.errors import UserError
from tools import cli

PAGE, FOLDER = "report.html", "report"
_DPI = 150
_NUM_MISTAKES = 15
_NUM_EXAMPLES = 3  # right ones, and as many wrong ones
_NUM_GRADIENTS = 200
# Time steps of all examples together that are read for the accuracy by time step.
_MOST_STEPS, _MOST_EXAMPLES, _LEAST_EXAMPLES = 1 << 21, 2000, 50

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 42rem; margin: 0 auto;
  padding: 1rem; }
p, h1 { overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid #ddd;
  vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.notice { border-left: 4px solid #E69F00; padding-left: .8rem; }
"""


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      title: its heading.
      text: a paragraph.
      pictures: file name → (PNG, what it shows for those who do not see it).
      table: rows of cells, the first of them headings; where it is empty, the first cell of
        each row is its name.
    """

    title: str
    text: str
    pictures: dict[str, tuple[bytes, str]] = {}  # noqa: RUF012
    table: list[list[Any]] = []  # noqa: RUF012


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`.

    Raises:
      UserError: there are none, or they are no lines of JSON.
    """
    path = workdir / records.METRICS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train with this --workdir first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); train again") from None
    if not lines:
        raise UserError(f"{path} holds no epoch; train with this --workdir first")
    return lines


def compare(workdirs: list[pathlib.Path]) -> Section:
    """Puts runs side by side: one table, one set of axes.

    Raises:
      UserError: one of them is no run.
    """
    from tools import figures

    heads = ["run", "network", "parameters", "epochs", "seconds"]
    heads += ["validation accuracy", "test accuracy", "test loss"]
    rows, metrics = [heads], {}
    for workdir, name in zip(workdirs, _names(workdirs), strict=True):
        config = records.read_config(workdir)
        results = _read_results(workdir)
        metrics[name] = read_metrics(workdir)
        rows.append(
            [
                name,
                describe(config.model),
                results.get("parameters", "–"),
                len(metrics[name]),
                results.get("seconds", {}).get("train", "–"),
                _score(results, "validation", "accuracy"),
                _score(results, "test", "accuracy"),
                _score(results, "test", "loss"),
            ]
        )
    drawing = _png(figures.learning_curves(metrics))
    alt = "Curves of loss and accuracy by epoch of " + ", ".join(metrics)
    text = "Mean and standard deviation where a run has several members."
    return Section("Runs side by side", text, {"compare.png": (drawing, alt)}, rows)


def describe(model: Any) -> str:
    """Says in a few words what a `ModelConfig` is."""
    parts = [model.view]
    parts += ["from the end"] if model.reverse else []
    parts += [f"every {model.subsample}th step"] if model.subsample > 1 else []
    sides = "bidirectional " if model.bidirectional else ""
    block = f"{model.block} " if model.block != "plain" else ""
    layers = f"{model.num_layers} × {sides}{block}{model.cell}({model.hidden_size})"
    return f"{', '.join(parts)} → {layers} → {model.readout} → logits"


def examine(workdir: pathlib.Path, member: int | None) -> tuple[list[Section], dict[str, Any]]:
    """Looks at a trained network on its test set.

    Returns:
      The sections of the page, and its figures.

    Raises:
      UserError: the workdir holds no usable run, or its data cannot be had.
    """
    from seqmnist.networks import views
    from seqmnist.study import insight, trained
    from tools import figures

    metrics = read_metrics(workdir)
    network = trained.load(workdir, member)
    images, labels = network.test_set()
    probabilities = network.probabilities(images)
    answers = probabilities.argmax(-1)
    counts = insight.confusion_matrix(labels, answers, probabilities.shape[1])
    scores = insight.class_scores(counts)
    accuracy = float((answers == labels).mean())
    wrong = np.flatnonzero(answers != labels)
    wrong = wrong[np.argsort(-probabilities[wrong].max(-1), kind="stable")]
    right = _first_of_each_class(labels, answers)

    chosen = np.concatenate([right[:_NUM_EXAMPLES], wrong[:_NUM_EXAMPLES]])
    beliefs, states = network.beliefs(images[chosen]), network.hidden_states(images[chosen])
    examples = [
        figures.Example(images[n], int(labels[n]), beliefs[:, i], states[:, i])
        for i, n in enumerate(chosen)
    ]
    num_right = min(_NUM_EXAMPLES, len(right))
    few = slice(0, _NUM_GRADIENTS)
    norms = network.gradient_norms(images[few], labels[few])
    model, (num_steps, size) = network.config.model, network.sequence_shape
    x, read_at = np.asarray(views.sequence(model, images[chosen[:1]]))[0], views.read_at(model)
    by_step = _accuracy_by_step(network, images, labels)

    sections = [
        Section("What was run", *_what(network, accuracy)),
        Section(
            "Learning curves",
            "Training scores are means over an epoch while the parameters change; validation "
            "scores are taken at its end."
            + (" Bands are one standard deviation over members." if _has_members(metrics) else ""),
            {
                "curves.png": (
                    _png(figures.learning_curves({workdir.name: metrics})),
                    f"Curves of loss and accuracy over {len(metrics)} epochs; final validation "
                    f"accuracy {_mean(metrics[-1].get('validation/accuracy'))}",
                )
            },
        ),
        Section(
            "Which classes are mixed up",
            f"{len(wrong):,} of {len(labels):,} test examples are answered wrongly. A row is a "
            "class, a column an answer.",
            {
                "confusion.png": (
                    _png(figures.confusion(counts)),
                    f"Confusion matrix; most often mixed up: {_worst(counts)}",
                ),
                "classes.png": (
                    _png(figures.class_bars(scores.precision, scores.recall, scores.f1)),
                    f"Precision, recall and F1 by class; lowest F1: class {scores.f1.argmin()}, "
                    f"{scores.f1.min():.3f}",
                ),
            },
            [
                ["class", "precision", "recall", "F1", "examples"],
                *(
                    [c, *(f"{score[c]:.4f}" for score in scores[:3]), int(scores.support[c])]
                    for c in range(len(counts))
                ),
            ],
        ),
    ]
    if len(wrong):
        most = wrong[:_NUM_MISTAKES]
        shown = ", ".join(f"{answers[n]} for {labels[n]}" for n in most[:5])
        drawing = figures.mistakes(images[most], labels[most], probabilities[most])
        sections.append(
            Section(
                "The most confident mistakes",
                "What it answered, how surely, and what the image's label is.",
                {"mistakes.png": (_png(drawing), f"Images answered wrongly: {shown}, …")},
            )
        )
    reading = f"{model.view}: {num_steps} time steps of {size}"
    gradient_text, gradient_alt = _gradient_words(norms)
    sections += [
        Section(
            "The image as a sequence",
            f"The network reads {num_steps} time steps of {size} "
            f"number{'s' if size > 1 else ''} each.",
            {
                "sequence.png": (
                    _png(figures.sequence(examples[0].image, x, read_at, reading)),
                    f"An image of class {examples[0].label}, the time step of each of its pixels, "
                    f"and its {num_steps} time steps",
                )
            },
        ),
        Section(
            "The network, unrolled over it",
            "Each state h is made of the one before it in time and of what lies below; the same "
            "weights act at every time step.",
            {
                "unrolled.png": (
                    _png(figures.unrolled(x, examples[0].beliefs[-1], model)),
                    f"{describe(model)}, drawn as a chain of states over time steps; it answers "
                    f"{examples[0].title}",
                )
            },
        ),
        Section(
            "Belief by time step",
            "What it would answer if the sequence ended there, for images answered rightly and "
            "for its most confident mistakes."
            + (" A backward reader then starts from there." if model.bidirectional else ""),
            {
                "beliefs.png": (
                    _png(figures.beliefs(examples[:num_right], examples[num_right:])),
                    "Heat maps of the probability of each class after each time step; answers: "
                    + "; ".join(example.title for example in examples),
                )
            },
        ),
    ]
    if by_step is not None:
        half = int(np.argmax(by_step["accuracy"] >= accuracy / 2)) + 1
        sections[-1].pictures["by_step.png"] = (
            _png(figures.accuracy_by_step(by_step["accuracy"], by_step["trust"])),
            f"Accuracy after each time step over {by_step['examples']:,} test examples; half of "
            f"the final accuracy is reached after time step {half}",
        )
    pair = [*examples[:num_right][:1], *examples[num_right:][:1]]
    sections += [
        Section(
            "Hidden states",
            "The outputs of the top layer while it reads."
            + (
                " Its second half reads backwards, from the last time step."
                if model.bidirectional
                else ""
            ),
            {
                "states.png": (
                    _png(figures.hidden_states(pair)),
                    f"Heat maps of {states.shape[-1]} outputs over {num_steps} time steps; "
                    "answers: " + "; ".join(example.title for example in pair),
                )
            },
        ),
        Section(
            "Gradient by time step",
            gradient_text,
            {"gradients.png": (_png(figures.gradient_norms(norms)), gradient_alt)},
        ),
    ]
    found = {
        "test": {"accuracy": accuracy, "examples": len(labels), "mistakes": len(wrong)},
        "member": network.member,
        "confusion": counts.tolist(),
        "classes": {name: score.tolist() for name, score in scores._asdict().items()},
        "accuracy_by_step": None if by_step is None else by_step["accuracy"].tolist(),
        "gradient_norms": np.median(norms, axis=2).tolist(),
    }
    return sections, found


def render(title: str, sections: list[Section]) -> str:
    """Returns the page: HTML with its pictures inside."""
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for line in filter(None, section.text.split("\n")):
            notice = ' class="notice"' if line.startswith("NOTICE") else ""
            parts.append(f"<p{notice}>{html.escape(line)}</p>")
        for content, alt in section.pictures.values():
            data = base64.b64encode(content).decode()
            parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
        if section.table:
            parts.append(f'<div class="wide"><table>{_rows(section.table)}</table></div>')
    return "\n".join([*parts, "</body></html>\n"])


def write(workdir: pathlib.Path, title: str, sections: list[Section]) -> pathlib.Path:
    """Writes the page and its pictures; returns where the page is.

    Raises:
      UserError: the workdir cannot be written.
    """
    page = workdir / PAGE
    try:
        (workdir / FOLDER).mkdir(exist_ok=True)
        for section in sections:
            for name, (content, _) in section.pictures.items():
                (workdir / FOLDER / name).write_bytes(content)
        aside = page.with_name(f"{page.name}.partial")
        aside.write_text(render(title, sections), encoding="utf-8")
        os.replace(aside, page)
    except OSError as error:
        raise UserError(f"{page} cannot be written ({error.strerror}); mend that") from None
    return page


def _what(network, accuracy):
    results, config = network.results, network.config
    dataset = results.get("dataset", {})
    counts = ", ".join(f"{dataset[s]:,} {s}" for s in ("train", "validation", "test") if dataset)
    seconds = results.get("seconds", {})
    rows = [
        ["network", describe(config.model)],
        ["parameters", f"{results['parameters']:,}" if results else "–"],
        ["data", f"{dataset.get('name', config.data.name)}: {counts or 'not recorded'}"],
        [
            "training",
            f"{config.train.num_epochs} epochs, batches of {config.train.batch_size}, "
            f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate}",
        ],
        ["seed", str(config.seed)],
        ["devices", ", ".join(results.get("devices", ["not recorded"]))],
        ["seconds", f"{seconds['train']} to train, {seconds['total']} in all" if seconds else "–"],
        ["validation accuracy", _score(results, "validation", "accuracy")],
        ["test accuracy", _score(results, "test", "accuracy")],
        ["test loss", _score(results, "test", "loss")],
        ["versions", ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items()) or "–"],
    ]
    text = f"Its accuracy on the test set, measured for this page: {accuracy:.4f}."
    if network.member is not None:
        text += f" All pictures but the curves are of member {network.member} alone."
    if not results:
        text += "\nNOTICE: the run has not ended; this is its latest checkpoint."
    if dataset.get("notice"):
        text += f"\nNOTICE: {dataset['notice']}"
    return text, {}, [[], *rows]


def _accuracy_by_step(network, images, labels):
    num_steps = network.sequence_shape[0]
    cost = num_steps**2 if network.config.model.bidirectional else num_steps
    count = min(_MOST_EXAMPLES, len(images), _MOST_STEPS // cost)
    if count < min(_LEAST_EXAMPLES, len(images)):
        return None
    beliefs = network.beliefs(images[:count])
    return {
        "examples": count,
        "accuracy": (beliefs.argmax(-1) == labels[:count]).mean(1),
        "trust": beliefs[:, np.arange(count), labels[:count]].mean(1),
    }


def _gradient_words(norms):
    middle = np.median(norms, axis=2)
    text = (
        "How strongly the loss depends on the top layer's state after each time step. Where this "
        "is small, training learns little from what was read before. Line: median; band: the "
        f"middle half of {norms.shape[2]} test examples."
    )
    alt = "Median gradient norm by time step: " + "; ".join(
        f"{line[0]:.1e} at the first, {line[-1]:.1e} at the last" for line in middle
    )
    return text, alt


def _first_of_each_class(labels, answers):
    """Examples answered rightly: the first of every class, in the order of the test set."""
    hits = np.flatnonzero(labels == answers)
    _, first = np.unique(labels[hits], return_index=True)
    return hits[np.sort(first)]


def _worst(counts):
    off = counts * (1 - np.eye(len(counts), dtype=int))
    pairs = np.argsort(-off, axis=None, kind="stable")[:3]
    cells = [np.unravel_index(pair, off.shape) for pair in pairs]
    return ", ".join(f"{i} answered as {j} ({off[i, j]} times)" for i, j in cells if off[i, j])


def _read_results(workdir):
    path = workdir / records.RESULTS
    return records.read_json(path) if path.exists() else {}


def _score(results, split, name):
    return _mean(results.get(split, {}).get(name))


def _mean(value):
    """A score as text: of several members, mean ± standard deviation."""
    if value is None:
        return "–"
    if isinstance(value, list):
        values = np.array(value, float)  # null, of a member that diverged, is NaN
        return f"{np.nanmean(values):.4f} ± {np.nanstd(values, ddof=1):.4f}"
    return f"{value:.4f}"


def _has_members(metrics):
    return isinstance(metrics[-1].get("train/loss"), list)


def _names(workdirs):
    """Short names, as long as they differ."""
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def _rows(table):
    heads, *rows = table
    parts = [f"<tr>{''.join(_cell(value, 'th') for value in heads)}</tr>"] if heads else []
    for row in rows:
        first, *others = row
        cells = [_cell(first, "td" if heads else "th"), *(_cell(value, "td") for value in others)]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(parts)


def _cell(value, tag):
    text = f"{value:,}" if isinstance(value, int) else str(value)
    kind = ' class="number"' if isinstance(value, int | float) else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _png(figure):
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    plt.close(figure)
    return file.getvalue()


def _main(arguments):
    sections, found = examine(arguments.workdir, arguments.member)
    if arguments.compare:
        sections.insert(1, compare([arguments.workdir, *arguments.compare]))
    name = arguments.workdir.resolve().name
    page = write(arguments.workdir, f"What {name} learned", sections)
    test = found["test"]
    print(f"Test accuracy: {test['accuracy']:.4f}, {test['mistakes']:,} mistakes")
    print(f"Report: {page} ({page.stat().st_size:,} bytes)")
    return found


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    parser.add_argument(
        "--compare", nargs="+", type=pathlib.Path, default=[], metavar="DIR", help="other runs"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
