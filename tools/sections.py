"""The sections of a run's report: what a network learned and how it reads, in text and figures.

Shapes: N test examples, T time steps, C classes, U outputs of the top layer, D directions.
"""

import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from seqmnist import config as config_lib
from seqmnist.networks import views
from seqmnist.study import card, insight, trained
from seqmnist.training import members
from seqmnist.workdir import Workdir
from tools import figures

DPI = 150
_NUM_MISTAKES = 15
_NUM_EXAMPLES = 3  # of correct predictions, and as many of wrong ones
_NUM_GRADIENTS = 200
# Accuracy by time step reads at most so many time steps, all examples together.
_MAX_STEPS, _MAX_EXAMPLES, _MIN_EXAMPLES = 1 << 21, 2000, 50


class Section(NamedTuple):
    """A part of the page."""

    title: str
    text: str  # paragraphs, one per line
    pictures: dict[str, tuple[bytes, str]]  # file name -> PNG or SVG, and alternative text
    # Rows of cells. The first row holds the headings; if it is empty, the first column does.
    table: Sequence[Sequence[Any]] = ()


class Found:
    """What a trained network does on its test set; `n` examples stand for some of the N."""

    def __init__(self, network: trained.Trained, metrics: list[dict[str, Any]]):
        """Reads the test set; `metrics` are the lines of `metrics.jsonl`."""
        self.network, self.metrics = network, metrics
        self.names = network.spec.class_names
        self.drawn_names = figures.drawable(self.names)  # in figures
        self.images, self.labels = images, labels = network.test_set()
        self.probabilities = network.probabilities(images)  # [N, C]
        self.predictions = self.probabilities.argmax(-1)
        is_correct = self.predictions == labels
        self.accuracy = float(is_correct.mean())
        self.confusion = insight.confusion_matrix(labels, self.predictions, len(self.names))
        self.scores = insight.class_scores(self.confusion)
        wrong, right = np.flatnonzero(~is_correct), np.flatnonzero(is_correct)
        confidence = self.probabilities[wrong].max(-1)
        self.mistakes = wrong[np.argsort(-confidence, kind="stable")]
        _, first = np.unique(labels[right], return_index=True)  # of each class
        self.correct = self._examples(right[np.sort(first)][:_NUM_EXAMPLES])
        self.wrong = self._examples(self.mistakes[:_NUM_EXAMPLES])
        self.examples = [*self.correct, *self.wrong]  # at least one
        self.x = np.asarray(views.sequence(network.config.model, self.examples[0].image[None]))[0]
        some = slice(_NUM_GRADIENTS)
        self.gradient_norms = network.gradient_norms(images[some], labels[some])  # [D, T, n]
        self.accuracy_by_step = self.confidence_by_step = None  # [T] unless it takes too long
        num_steps, _ = network.sequence_shape
        cost = num_steps**2 if network.config.model.bidirectional else num_steps
        self.num_by_step = num = min(_MAX_EXAMPLES, len(images), _MAX_STEPS // cost)
        if num >= min(_MIN_EXAMPLES, len(images)):
            beliefs = network.beliefs(images[:num])  # [T, n, C]
            self.accuracy_by_step = (beliefs.argmax(-1) == labels[:num]).mean(1)
            self.confidence_by_step = beliefs[:, np.arange(num), labels[:num]].mean(1)

    def _examples(self, numbers):
        if not len(numbers):
            return []
        images, labels = self.images[numbers], self.labels[numbers].tolist()
        beliefs, states = self.network.beliefs(images), self.network.hidden_states(images)
        parts = (images, labels, beliefs.swapaxes(0, 1), states.swapaxes(0, 1))
        return [figures.Example(*each, self.drawn_names) for each in zip(*parts, strict=True)]


def examine(
    workdir: str | os.PathLike, member: int | None, checkpoint: str = "newest"
) -> tuple[list[Section], dict[str, Any]]:
    """Returns the sections of a page on a trained network, and the numbers in them.

    Raises UserError if the workdir holds no usable run, or its data is not available.
    """
    metrics = Workdir(workdir).read_metrics()
    found = Found(trained.load(workdir, member, checkpoint=checkpoint), metrics)
    sections = [section for make in _SECTIONS if (section := make(found))]
    by_step, num_mistakes = found.accuracy_by_step, len(found.mistakes)
    test = {"accuracy": found.accuracy, "examples": len(found.labels), "mistakes": num_mistakes}
    numbers = {
        "test": test,
        "member": found.network.member,
        "checkpoint": found.network.step,
        "class_names": list(found.names),
        "confusion": found.confusion.tolist(),
        "classes": {name: score.tolist() for name, score in found.scores._asdict().items()},
        "accuracy_by_step": None if by_step is None else by_step.tolist(),
        "gradient_norms": np.median(found.gradient_norms, axis=2).tolist(),
    }
    return sections, numbers


def compare(paths: Sequence[str | os.PathLike]) -> Section:
    """Compares runs in one table and one set of axes; raises UserError if one holds no run."""
    workdirs = [Workdir(path) for path in paths]
    names = [workdir.path.name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir.path) for workdir in workdirs]
    rows = [["run", "network", "parameters", "epochs", "seconds", *card.scores({})]]
    metrics = {}
    for workdir, name in zip(workdirs, names, strict=True):
        config, results = workdir.read_config(), workdir.read_results()
        lines = workdir.read_metrics()
        metrics[name], own = lines, _by_setting(config, lines, name)
        if len(own) > 1 and results.get("best") is not None:  # of a sweep, its chosen setting
            metrics[name] = own[_label(config, results["best"])]
        seconds = (results.get("seconds") or {}).get("train", "–")
        row = [name, card.describe(config.model), results.get("parameters", "–")]
        rows.append([*row, len(metrics[name]), seconds, *card.scores(results).values()])
    alt = "Curves of loss and accuracy by epoch of " + ", ".join(metrics)
    text = "Mean and standard deviation for runs with several members; of a sweep, the curves of "
    text += "the setting that validation chose."
    pictures = picture("compare", figures.learning_curves(metrics), alt, is_drawn=True)
    return Section("Runs side by side", text, pictures, rows)


def _what_was_run(found):
    network, results = found.network, found.network.results
    text = f"The accuracy on the test set, measured for this page, is {found.accuracy:.4f}."
    if network.member is not None:
        text += f" All pictures except the learning curves show member {network.member} only; "
        text += "without --member, that is the best by validation loss."
    if not results:
        text += "\nNOTICE: the run has not ended; this is its latest checkpoint."
    if notice := results.get("dataset", {}).get("notice"):
        text += f"\nNOTICE: {notice}"
    facts = card.facts(network.config, results, network.member, network.step)
    return Section("What was run", text, {}, [[], *facts.items()])


def _members(found):
    """A table of the settings of a sweep, or of the members as one."""
    results = found.network.results
    if not results.get("settings"):
        return None
    chosen, stops = results["best"], results.get("early_stopping", {}).get("stopped")
    count = found.network.config.members.num
    heads = ["setting", "seeds", "validation loss", "validation accuracy", "test accuracy"]
    heads += ["diverged", *(["stopped early"] if stops else [])]
    rows = []
    for i, setting in enumerate(results["settings"]):
        held_out, test = setting["validation"] or {}, setting["test"]
        scores = [held_out.get("loss"), held_out.get("accuracy"), test["accuracy"]]
        row = [_label(found.network.config, i) + (" (best)" if i == chosen else ""), count]
        row += [*map(card.format_spread, scores), setting["diverged"]]
        rows.append(row + ([sum(stops[i * count : (i + 1) * count])] if stops else []))
    together = results["ensemble"]["test"]["accuracy"]
    text = "Mean ± standard deviation over seeds, without those that diverged. The best setting "
    text += "has the lowest validation loss; of several settings, only that is scored on the test "
    text += (
        f"set. The mean prediction of its networks has the accuracy {card.format_score(together)}."
    )
    return Section("Settings" if len(rows) > 1 else "Members", text, {}, [heads, *rows])


def _label(config, i):
    """Names a setting of a sweep by its values."""
    values = members.settings(config)[i].items()
    return ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in values) or "all"


def _by_setting(config, lines, name):
    """Splits the lines of `metrics.jsonl` by setting; of more than can be told apart, the best."""
    count, num = config.members.num, len(members.settings(config))

    def part(line, i):
        own = slice(i * count, (i + 1) * count)
        return {key: x[own] if isinstance(x, list) else x for key, x in line.items()}

    def loss(i):
        losses = [x for x in part(lines[-1], i).get("validation/loss") or [] if x is not None]
        return np.mean(losses) if losses else np.inf

    if num == 1:
        return {name: lines}
    best = sorted(sorted(range(num), key=loss)[: len(figures.COLORS)])
    return {_label(config, i): [part(line, i) for line in lines] for i in best}


def _configuration(found):
    config = found.network.config
    values = ((name, config_lib.get(config, name)) for name in config_lib.fields())
    rows = [[name, "none" if value is None else str(value)] for name, value in values]
    return Section("Configuration", "", {}, [[], *rows])


def _learning_curves(found):
    metrics, config = found.metrics, found.network.config
    curves = _by_setting(config, metrics, found.network.workdir.path.name)
    figure = figures.learning_curves(curves)
    final = "; ".join(
        f"{name}: {card.format_score(lines[-1].get('validation/accuracy'))}"
        for name, lines in curves.items()
    )
    alt = f"Loss and accuracy over {len(metrics)} epochs; final validation accuracy of {final}"
    text = "Training scores are means over an epoch in which the parameters change; validation "
    text += "scores are measured at its end."
    if isinstance(metrics[-1].get("train/loss"), list):
        text += " Bands are one standard deviation over members."
    if (num := len(members.settings(config))) > len(curves):
        text += f" Of {num} settings, the {len(curves)} with the lowest validation loss are shown."
    return Section("Learning curves", text, picture("curves", figure, alt, is_drawn=True))


def _classes(found):
    counts, (precision, recall, f1, support) = found.confusion, found.scores
    names = found.names
    mistakes = counts * (1 - np.eye(len(counts), dtype=int))
    most = np.argsort(-mistakes, axis=None, kind="stable")[:3]
    pairs = zip(*np.unravel_index(most, counts.shape), strict=True)
    worst = ", ".join(
        f"{names[i]} as {names[j]} ({counts[i, j]} times)" for i, j in pairs if mistakes[i, j]
    )
    alt = f"Confusion matrix; most frequent mistakes: {worst or 'none'}"
    pictures = picture("confusion", figures.confusion(counts, found.drawn_names), alt)
    alt = f"Precision, recall and F1 by class; lowest F1: class {names[f1.argmin()]}, "
    alt += f"{f1.min():.3f}"
    bars = figures.class_bars(precision, recall, f1, found.drawn_names)
    pictures |= picture("classes", bars, alt, is_drawn=True)
    table = [["class", "precision", "recall", "F1", "examples"]]
    for c, scores in enumerate(zip(precision, recall, f1, strict=True)):
        drawn = found.drawn_names[c]
        name = names[c] if drawn == names[c] else f"{drawn}: {names[c]}"
        name = c if name == str(c) else name  # numbers are aligned as such
        table.append([name, *(f"{score:.4f}" for score in scores), int(support[c])])
    text = f"{len(found.mistakes):,} of {len(found.labels):,} test examples are classified wrongly."
    text += " Rows are classes, columns predictions."
    return Section("Which classes are confused", text, pictures, table)


def _mistakes(found):
    if not len(found.mistakes):
        return None
    most = found.mistakes[:_NUM_MISTAKES]
    names = found.names
    shown = ", ".join(
        f"{names[found.predictions[n]]} for {names[found.labels[n]]}" for n in most[:5]
    )
    figure = figures.mistakes(
        found.images[most], found.labels[most], found.probabilities[most], found.drawn_names
    )
    pictures = picture("mistakes", figure, f"Images classified wrongly: {shown}, …")
    text = "The predicted class, its probability, and the image's label."
    return Section("The most confident mistakes", text, pictures)


def _sequence(found):
    model, (num_steps, size) = found.network.config.model, found.network.sequence_shape
    read_at = views.read_at(model, found.network.spec)
    example, title = found.examples[0], f"{model.view}: {num_steps} time steps of {size}"
    figure = figures.sequence(example.image, found.x, read_at, title)
    alt = f"An image of class {found.names[example.label]}, the time step of each pixel, and the "
    alt += "sequence"
    text = f"The network reads {num_steps} time steps of {size} number{'s' * (size > 1)} each."
    return Section("The image as a sequence", text, picture("sequence", figure, alt))


def _unrolled(found):
    model, example = found.network.config.model, found.examples[0]
    figure = figures.unrolled(found.x, example.beliefs[-1], model, found.drawn_names)
    alt = f"{card.describe(model)}, drawn as a chain of states; prediction: {example.title}"
    text = "Each state h is computed from the state one time step earlier and from the layer below."
    text += " All time steps share the same weights."
    return Section("The network, unrolled over it", text, picture("unrolled", figure, alt))


def _beliefs(found):
    figure = figures.beliefs(found.correct, found.wrong)
    alt = f"Heat maps of class probabilities by time step; predictions: {_titles(found.examples)}"
    pictures = picture("beliefs", figure, alt)
    text = "The prediction if the sequence ended at each time step, for correct predictions and "
    text += "for the most confident mistakes."
    if found.network.config.model.bidirectional:
        text += " A backward layer then starts from there."
    if found.accuracy_by_step is not None:
        half = int(np.argmax(found.accuracy_by_step >= found.accuracy / 2)) + 1
        figure = figures.accuracy_by_step(
            found.accuracy_by_step, found.confidence_by_step, len(found.names)
        )
        alt = f"Accuracy after each time step over {found.num_by_step:,} test examples; half of the"
        alt += f" final accuracy is reached after time step {half}"
        pictures |= picture("by_step", figure, alt, is_drawn=True)
    return Section("Belief by time step", text, pictures)


def _hidden_states(found):
    examples = [*found.correct[:1], *found.wrong[:1]]
    alt = f"Heat maps of the top layer's outputs; predictions: {_titles(examples)}"
    text = "The outputs of the top layer at each time step."
    if found.network.config.model.bidirectional:
        text += " The second half of the units reads backwards, from the last time step."
    pictures = picture("states", figures.hidden_states(examples), alt)
    return Section("Hidden states", text, pictures)


def _gradients(found):
    norms = found.gradient_norms
    alt = "Median gradient norm by time step: " + "; ".join(
        f"{line[0]:.1e} at the first, {line[-1]:.1e} at the last" for line in np.median(norms, 2)
    )
    text = "How strongly the loss depends on the top layer's state after each time step. If this "
    text += "is small, training learns little from what was read before. Line: median; band: the "
    text += f"middle half of {norms.shape[2]} test examples."
    pictures = picture("gradients", figures.gradient_norms(norms), alt, is_drawn=True)
    return Section("Gradient by time step", text, pictures)


_SECTIONS = (
    _what_was_run, _members, _learning_curves, _classes, _mistakes, _sequence, _unrolled, _beliefs,
    _hidden_states, _gradients, _configuration,
)  # fmt: skip


def _titles(examples):
    return "; ".join(example.title for example in examples)


def picture(
    name: str, figure: Any, alt: str, is_drawn: bool = False
) -> dict[str, tuple[bytes, str]]:
    """Returns the pictures of a section that has one: a figure with its alternative text.

    What `is_drawn` consists of lines and becomes SVG, the same for the same figure; the rest PNG.
    """
    file, kind = io.BytesIO(), "svg" if is_drawn else "png"
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format=kind, dpi=DPI, metadata={"Date": None} if is_drawn else None)
    return {f"{name}.{kind}": (file.getvalue(), alt)}
