"""The sections of a run's report: what a network learned and how it reads, in text and figures.

Shapes: N test examples, T time steps, C classes, U outputs of the top layer, D directions.
"""

import datetime
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context

from seqmnist import config as config_lib
from seqmnist.display import describe, format_spread
from seqmnist.networks import views
from seqmnist.study import card, insight, trained
from seqmnist.training import members
from seqmnist.workdir import RESULTS, Workdir
from tools import figures

DPI = 150
_NUM_MISTAKES = 15
_NUM_EXAMPLES = 3  # of correct predictions, and as many of wrong ones
_NUM_GRADIENTS = 200
# Accuracy by time step reads at most this many time steps, over all examples.
_MAX_STEPS, _MAX_EXAMPLES, _MIN_EXAMPLES = 1 << 21, 2000, 50
_NUM_CURVES = 8  # of settings, in one figure
_LARGEST_SVG = 250_000  # bytes


class Picture(NamedTuple):
    """A picture of the page."""

    content: bytes  # SVG or PNG
    alt: str
    look: str  # a sentence under it: what to look for


class Section(NamedTuple):
    """A part of the page."""

    title: str
    text: str  # paragraphs, one per line
    pictures: dict[str, Picture]  # by file name
    # Rows of cells. The first row holds the headings; if it is empty, the first column does.
    table: Sequence[Sequence[Any]] = ()
    code: str = ""  # folded on a screen, shown on paper


class Found:
    """What a trained network does on its test set; shapes with n are of some of the N examples."""

    def __init__(self, network: trained.Trained, metrics: list[dict[str, Any]], is_asked: bool):
        """Reads the test set; `metrics` are the lines of `metrics.jsonl`.

        `is_asked` tells whether the user chose the member.
        """
        self.network, self.metrics, self.is_asked = network, metrics, is_asked
        self.settings = _by_setting(network.config, network.results, metrics)
        self.names = network.spec.class_names
        self.drawn_names = figures.drawable(self.names)  # in figures
        self.images, self.labels = images, labels = network.test_set()
        self.probabilities = network.probabilities(images)  # [N, C]
        self.predictions = self.probabilities.argmax(-1)
        is_correct = self.predictions == labels
        self.accuracy = float(is_correct.mean())
        self.confusion = insight.confusion_matrix(labels, self.predictions, len(self.names))
        self.scores = insight.class_scores(self.confusion)
        self.calibration = insight.calibration(labels, self.probabilities)
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
    workdir: str | os.PathLike, member: int | None, **chosen: Any
) -> tuple[list[Section], dict[str, Any]]:
    """Returns the sections of a page on a trained network, and the numbers in them.

    `chosen` are further arguments of `trained.load`. Raises UserError if the workdir holds no
    usable run, or its data is not available.
    """
    metrics = Workdir(workdir).read_metrics()
    network = trained.load(workdir, member, **chosen)
    found = Found(network, metrics, member is not None)
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
        "calibration_error": found.calibration.error,
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
    rows = [["run", "data", "network", "parameters", "epochs", "seconds", *card.scores({})]]
    fingerprints = set()
    metrics = {}
    for workdir, name in zip(workdirs, names, strict=True):
        config, results = workdir.read_config(), workdir.read_results()
        lines = workdir.read_metrics()
        _, setting, own = _by_setting(config, results, lines)[0]
        if setting:
            name = f"{name} ({setting})"
        metrics[name] = own
        seconds = (results.get("seconds") or {}).get("train", "–")
        data = results.get("dataset", {})
        fingerprints.add(data.get("fingerprint"))
        row = [name, data.get("name", config.data.name), describe(config.model)]
        row.append(results.get("parameters", "–"))
        rows.append([*row, len(lines), seconds, *card.scores(results).values()])
    alt = "Curves of loss and accuracy by epoch of " + ", ".join(metrics)
    text = "Mean and standard deviation for runs with several members; for a sweep, those of the "
    text += "setting that validation ranks first."
    if len(fingerprints - {None}) > 1:
        text += "\nNOTICE: the runs are of different data, so that their scores cannot be compared."
    look = "Compare the solid lines; a run whose dashed line is far better has memorized its "
    look += "training examples."
    pictures = picture("compare", figures.learning_curves(metrics), alt, look)
    return Section("Runs side by side", text, pictures, rows)


def _what_was_run(found):
    network, results = found.network, found.network.results
    text = f"The accuracy on the test set, measured for this page, is {found.accuracy:.4f}."
    if network.member is not None:
        text += _which_member(found)
    if not results:
        text += "\nNOTICE: the run has not finished; this is its latest checkpoint."
    if notice := results.get("dataset", {}).get("notice"):
        text += f"\nNOTICE: {notice}"
    facts = card.facts(network.config, results, network.member, network.step)
    if (file := network.workdir.path / RESULTS).exists():
        ended = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
        facts["ended"] = f"{ended:%Y-%m-%d at %H:%M} UTC, by the date of {RESULTS}"
    return Section("What was run", text, {}, [[], *facts.items()])


def _which_member(found):
    network, results = found.network, found.network.results
    member, losses = network.member, (results.get("validation") or {}).get("loss") or [None]
    each = members.list_members(network.config)[member]
    reason = "which has the lowest validation loss"
    reason += " in the chosen setting" if len(found.settings) > 1 else ""
    if found.is_asked:
        reason = "as --member asks"
    elif all(loss is None for loss in losses):
        reason = "the first, as there are no validation losses to choose by"
    text = " All pictures except the learning curves, and all scores of classes, are of member "
    text += f"{member} ({_named(each)}), {reason}."
    best = results.get("best")
    if len(found.settings) > 1 and best not in (None, member // network.config.members.num):
        text += (
            f"\nNOTICE: this member is not of setting {best + 1}, which validation chose by the "
        )
        text += "mean over seeds."
    return text


def _by_setting(config, results, metrics):
    """Returns [(number, name, its members' metrics)], the setting that validation chose first.

    The others follow by their mean validation loss. Without a sweep, it is one setting named "".
    """
    settings, num, best = members.settings(config), config.members.num, results.get("best")
    if len(settings) == 1:
        return [(0, "", metrics)]
    losses = results["validation"]["loss"] if results else metrics[-1]["validation/loss"]
    losses = np.broadcast_to(np.array(losses, float), len(settings) * num).reshape(-1, num)
    losses = np.ma.masked_invalid(losses).mean(1).filled(np.inf)
    found = []
    for i in sorted(range(len(settings)), key=lambda i: (i != best, losses[i])):
        name = f"setting {i + 1}: " + _named(settings[i])
        own = slice(i * num, (i + 1) * num)
        lines = [
            {key: value[own] if isinstance(value, list) else value for key, value in line.items()}
            for line in metrics
        ]
        found.append((i, name, lines))
    return found


def _named(setting):
    short = {name.rpartition(".")[2]: value for name, value in setting.items()}
    named = short if len(short) == len(setting) else setting
    return ", ".join(f"{name} = {value}" for name, value in named.items())


def _settings(found):
    config, results = found.network.config, found.network.results
    settings, best = members.settings(config), results.get("best")
    if len(settings) < 2 or "settings" not in results:
        return None
    first, num = config.seed, config.members.num
    stopped = (results.get("early_stopping") or {}).get("stopped")
    heads = ["setting", *settings[0], "seeds", "validation loss", "validation accuracy"]
    rows = [[*heads, "test accuracy", "diverged", *(["stopped early"] if stopped else [])]]
    for i, entry in enumerate(results["settings"]):
        own = slice(i * num, (i + 1) * num)
        validation, test = entry.get("validation") or {}, entry.get("test") or {}
        rows.append([
            f"★ {i + 1}, best" if i == best else str(i + 1), *map(str, settings[i].values()),
            f"{first}–{first + num - 1}" if num > 1 else str(first),
            *(format_spread(validation.get(score)) for score in ("loss", "accuracy")),
            format_spread(test.get("accuracy")), entry["diverged"],
            *([sum(stopped[own])] if stopped else []),
        ])  # fmt: skip
    text = "Mean ± standard deviation over the seeds of each setting. "
    if best is None:
        text += "Without validation data, no setting is chosen."
    else:
        text += f"Validation chose setting {best + 1} ({_named(settings[best])}): the lowest mean "
        text += "validation loss among those in which the fewest seeds diverged. Only this setting "
        text += "is scored on the test set."
    return Section("Settings", text, {}, rows)


def _members(found):
    network, results = found.network, found.network.results
    if "members" not in results:
        return None
    number, setting, _ = found.settings[0]
    num = network.config.members.num
    # Training losses of members that stopped early are null, too.
    losses = results["validation"]["loss"] or found.metrics[-1]["train/loss"]
    stopped = results.get("early_stopping")
    scores = [("validation", "loss"), ("validation", "accuracy"), ("test", "loss")]
    scores.append(("test", "accuracy"))
    rows = [["member", "seed", *map(" ".join, scores), "notes"]]
    for i in range(number * num, (number + 1) * num):
        notes = ["in the pictures"] if i == network.member else []
        notes += ["diverged"] if losses[i] is None else []
        if stopped and stopped["stopped"][i]:
            notes.append(f"stopped early, best epoch {stopped['best_epochs'][i]}")
        own = [card.format_score((results[split][name] or {i: None})[i]) for split, name in scores]
        rows.append([i, str(results["members"][i]["seed"]), *own, ", ".join(notes) or "–"])
    text = f"The members of {setting}." if setting else "Members differ by their seeds."
    ensemble = results.get("ensemble") or {}
    if (test := ensemble.get("test") or {}).get("accuracy") is not None:
        text += f"\nEnsemble: the mean of the probabilities of {len(ensemble['members'])} members "
        text += f"has a test accuracy of {test['accuracy']:.4f} and a loss of {test['loss']:.4f}."
    return Section("Members", text, {}, rows)


def _learning_curves(found):
    metrics, name = found.metrics, found.network.workdir.path.name
    shown = {setting or name: lines for _, setting, lines in found.settings[:_NUM_CURVES]}
    final = "; ".join(
        f"{key}: {card.format_score(lines[-1].get('validation/accuracy'))}"
        for key, lines in shown.items()
    )
    alt = f"Loss and accuracy over {len(metrics)} epochs; final validation accuracy of {final}"
    text = "Training scores are means over an epoch in which the parameters change; validation "
    text += "scores are measured at its end."
    if isinstance(metrics[-1].get("train/loss"), list):
        text += " Bands are one standard deviation over members."
    if len(shown) < len(found.settings):
        text += (
            f"\nShown are the best {len(shown)} of {len(found.settings)} settings by validation."
        )
    look = "Look for the epoch from which validation gets worse while training still improves: "
    look += "there the network begins to memorize its examples."
    pictures = picture("curves", figures.learning_curves(shown), alt, look)
    num = found.network.config.train.batch_size * len(members.list_members(found.network.config))
    steps = np.diff([line["step"] for line in metrics], prepend=0)
    rate = num * steps / np.maximum([line["seconds"] for line in metrics], 1e-3)  # rounded to it
    alt = f"Training examples per second by epoch; median {np.median(rate):,.0f}"
    look = "A dip is an epoch during which other programs used the machine."
    figure = figures.throughput([line["epoch"] for line in metrics], rate)
    return Section("Learning curves", text, pictures | picture("throughput", figure, alt, look))


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
    look = "Look for bright cells: pairs of classes that the network confuses, often in "
    look += "one direction only."
    pictures = picture("confusion", figures.confusion(counts, found.drawn_names), alt, look)
    alt = f"Precision, recall and F1 by class; lowest F1: class {names[f1.argmin()]}, "
    alt += f"{f1.min():.3f}"
    look = "A class with low precision is predicted too often, one with low recall too rarely."
    figure = figures.class_bars(precision, recall, f1, found.drawn_names)
    pictures |= picture("classes", figure, alt, look)
    table = [["class", "precision", "recall", "F1", "examples"]]
    for c, scores in enumerate(zip(precision, recall, f1, strict=True)):
        drawn = found.drawn_names[c]
        name = names[c] if drawn == names[c] else f"{drawn}: {names[c]}"
        name = c if name == str(c) else name  # numbers are aligned as such
        table.append([name, *(f"{score:.4f}" for score in scores), int(support[c])])
    text = f"{len(found.mistakes):,} of {len(found.labels):,} test examples are classified wrongly."
    text += " Rows are classes, columns predictions."
    return Section("Which classes are confused", text, pictures, table)


def _calibration(found):
    confidence, accuracy, counts, error = found.calibration
    alt = f"Accuracy by confidence; expected calibration error {error:.4f}"
    text = "Predictions in groups by the probability of the predicted class. The expected "
    text += f"calibration error, their mean distance from the dotted line, is {error:.4f}."
    look = (
        "Dots below the line: the network is more confident than accurate. Larger dots stand for "
        "more examples."
    )
    pictures = picture("calibration", figures.calibration(confidence, accuracy, counts), alt, look)
    return Section("Can its probabilities be trusted?", text, pictures)


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
    look = "Look for those that you can read at once: what they have in common, the network has "
    look += "not learned. Others may be labeled wrongly."
    pictures = picture("mistakes", figure, f"Images classified wrongly: {shown}, …", look)
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
    look = (
        "Neighbors of different colors are read at different times: to see a stroke, the network "
    )
    look += "has to remember one of them until it reads the other."
    return Section("The image as a sequence", text, picture("sequence", figure, alt, look))


def _unrolled(found):
    model, example = found.network.config.model, found.examples[0]
    figure = figures.unrolled(found.x, example.beliefs[-1], model, found.drawn_names)
    alt = f"{describe(model)}, drawn as a chain of states; prediction: {example.title}"
    text = "Each state h is computed from the state one time step earlier and from the layer below."
    text += " All time steps share the same weights."
    look = (
        "Follow the arrows from the first time step to the prediction: what was read there has to "
    )
    look += "pass through every state on the way."
    return Section(
        "The network, unrolled over the sequence", text, picture("unrolled", figure, alt, look)
    )


def _beliefs(found):
    figure = figures.beliefs(found.correct, found.wrong)
    alt = f"Heat maps of class probabilities by time step; predictions: {_titles(found.examples)}"
    look = "Look for the time step at which one class turns bright, and for the part of the image "
    look += "that had been read by then."
    pictures = picture("beliefs", figure, alt, look)
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
        look = "Where the line is steep, the network reads what tells classes apart."
        pictures |= picture("by_step", figure, alt, look)
    return Section("Belief by time step", text, pictures)


def _hidden_states(found):
    examples = [*found.correct[:1], *found.wrong[:1]]
    alt = f"Heat maps of the top layer's outputs; predictions: {_titles(examples)}"
    text = "The outputs of the top layer at each time step."
    if found.network.config.model.bidirectional:
        text += " The second half of the units reads backwards, from the last time step."
    look = "Units that keep their color remember; units that flicker follow the input."
    pictures = picture("states", figures.hidden_states(examples), alt, look)
    return Section("Hidden states", text, pictures)


def _gradients(found):
    norms = found.gradient_norms
    alt = "Median gradient norm by time step: " + "; ".join(
        f"{line[0]:.1e} at the first, {line[-1]:.1e} at the last" for line in np.median(norms, 2)
    )
    text = "How strongly the loss depends on the top layer's state after each time step. If this "
    text += "is small, training learns little from what was read before. Line: median; band: the "
    text += f"middle half of {norms.shape[2]} test examples."
    look = (
        "A line that falls by powers of ten towards the first time steps is a vanishing gradient; "
    )
    look += "one that rises there is an exploding one."
    pictures = picture("gradients", figures.gradient_norms(norms), alt, look)
    return Section("Gradient by time step", text, pictures)


def _configuration(found):
    code = json.dumps(config_lib.to_dict(found.network.config), indent=2)
    return Section("Configuration", "All fields of the run's configuration.", {}, code=code)


_SECTIONS = (
    _what_was_run, _settings, _members, _learning_curves, _classes, _calibration, _mistakes,
    _sequence, _unrolled, _beliefs, _hidden_states, _gradients, _configuration,
)  # fmt: skip


def _titles(examples):
    return "; ".join(example.title for example in examples)


def picture(name: str, figure: Any, alt: str, look: str) -> dict[str, Picture]:
    """Returns the pictures of a section that has one; `alt` and `look` as in `Picture`.

    It is SVG if it shows no image or heat map and is not too large, else PNG. Letters are paths:
    they look alike everywhere.
    """
    if not any(axis.images for axis in figure.axes):
        file = io.BytesIO()
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):  # reproducible names
            figure.savefig(file, format="svg", metadata={"Date": None})
        # A hundredth of a point is precise enough for a path.
        content = re.sub(
            rb'(?<= d=")[^"]*', lambda d: re.sub(rb"(\.\d\d)\d+", rb"\1", d[0]), file.getvalue()
        )
        if len(content) <= _LARGEST_SVG:
            return {f"{name}.svg": Picture(content, alt, look)}
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return {f"{name}.png": Picture(file.getvalue(), alt, look)}
