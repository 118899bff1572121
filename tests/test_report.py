"""The page against its run: its numbers, its pictures, and that it needs nothing else."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from test_export import run_on_a_full_disk
from test_predict import tool

from seqmnist import config as config_lib
from seqmnist import workdir as workdir_lib
from seqmnist.config import Config, MembersConfig, ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks import views
from seqmnist.spec import ImageSpec
from seqmnist.study import trained
from seqmnist.training.steps import init_state, make_system
from tools import figures, leaderboard, report, sections


class Page(html.parser.HTMLParser):
    """Collects what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.titles, self.metas, self.ids = [], [], [], [], []
        self.tables, self._in = [], None  # rows of cells
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._in = tag if tag != "wbr" else self._in
        if tag == "img":
            self.images.append(attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "meta":
            self.metas.append(attrs)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs and tag != "img"]

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in in ("h1", "h2") and data.strip():
            self.titles.append(data)
        if self._in in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.mark.slow
def test_the_tool_writes_a_page_that_needs_nothing_else(finished_run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second <b>"
    for workdir in (first, second):
        shutil.copytree(finished_run, workdir)
    paths = ("--workdir=first", "--compare=second <b>", "--json=figures.json")
    result = tool("report", *paths, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    results = json.loads((first / "results.json").read_text())
    assert found["test"]["accuracy"] == results["test"]["accuracy"]
    assert np.sum(found["confusion"]) == 1000
    assert np.trace(found["confusion"]) == 1000 - found["test"]["mistakes"]
    assert found["accuracy_by_step"][-1] == pytest.approx(results["test"]["accuracy"])
    assert np.shape(found["gradient_norms"]) == (1, 28)

    text = (first / "report.html").read_text()
    page = Page(text)
    assert page.titles[0] == 'Run "first": what it learned'
    for title in ("Learning curves", "Runs side by side", "Belief by time step", "Hidden states"):
        assert title in page.titles
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.metas
    assert page.links == [f"#{anchor}" for anchor in page.ids]
    assert len(set(page.ids)) == len(page.ids) == len(page.titles) - 1
    assert "python -m tools.report --workdir=first &#x27;--compare=second &lt;b&gt;&#x27;" in text
    config = json.loads((first / "config.json").read_text())
    assert html.escape(json.dumps(config, indent=2)) in text
    assert "://" not in text
    assert "second &lt;b&gt;" in text
    assert f"{results['test']['accuracy']:.4f}" in text
    names = {path.name for path in (first / "report").iterdir()}
    lines = {"classes.svg", "compare.svg", "curves.svg", "by_step.svg", "gradients.svg"}
    lines |= {"calibration.svg", "throughput.svg"}
    assert {name for name in names if name.endswith(".svg")} == lines
    assert "beliefs.png" in names  # by which a workdir knows the folder as its own
    assert len(page.images) == len(names) == 13
    contents = {(first / "report" / name).read_bytes() for name in names}
    for image in page.images:
        assert len(image["alt"]) > 20
        kind, _, data = image["src"].partition(";base64,")
        assert base64.b64decode(data) in contents
        if kind == "data:image/svg+xml":
            assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
        else:
            Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert not list(first.glob("*.partial"))


MODELS = [
    ModelConfig(view="permuted_pixels", cell="lru", hidden_size=4, readout="mean"),
    ModelConfig(view="patches_7", hidden_size=4, bidirectional=True, num_layers=4),
]


@pytest.fixture
def untrained(monkeypatch, digits, tmp_path):
    """Makes `trained.load` return a network with random parameters, tested on toy digits."""

    def prepare(model, results, member=None, **members):
        config = Config(model=model, members=MembersConfig(**members))
        system = make_system(config)
        shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: rng.normal(-0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes
        )
        workdir = workdir_lib.Workdir(tmp_path)
        network = trained.Trained(workdir, config, system, params, results, 0, "", member)
        monkeypatch.setattr(trained, "load", lambda *_, **__: network)
        monkeypatch.setattr(trained.Trained, "test_set", lambda self: [a[:60] for a in digits])
        monkeypatch.setattr(sections, "DPI", 50)  # faster
        if members:  # of which the other sections show nothing
            monkeypatch.setattr(sections, "_SECTIONS", sections._SECTIONS[:4])

    return prepare


def line(epoch, train, validation):
    """A line of metrics.jsonl; scores are pairs of loss and accuracy."""
    names = [
        f"{split}/{score}" for split in ("train", "validation") for score in ("loss", "accuracy")
    ]
    scores = dict(zip(names, (*train, *validation), strict=True))
    return {"epoch": epoch, "step": epoch, **scores, "seconds": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.view}_{model.cell}")
def test_every_kind_of_network_is_drawn(model, untrained, tmp_path):
    untrained(model, {})
    workdir_lib.append_line(tmp_path / "metrics.jsonl", line(1, (1.0, 0.5), (None, None)))
    shown, found = sections.examine(tmp_path, None)
    page = report.render("title", shown)
    assert "the run has not finished" in page
    assert np.sum(found["confusion"]) == 60
    for section in shown:
        for name, (content, _, look) in section.pictures.items():
            assert look.endswith(".")
            if name.endswith(".png"):
                assert Image.open(io.BytesIO(content)).width == 300
            else:
                assert ElementTree.fromstring(content).get("width") == "432pt"


SPECS = [
    ImageSpec(32, 24, 3, ("cat", "dog", "a fish in $ or $")),
    ImageSpec(28, 28, 1, tuple(f"kind {i}" for i in range(47))),
    ImageSpec(16, 16, 1, ("on", "おん")),
]


class Pretended:
    """What `sections` asks of a network that reads rows, for images of any kind: random numbers."""

    step = 0

    def __init__(self, spec, workdir):
        self.spec, self.workdir, self.results, self.member = spec, workdir, {}, None
        self.config = Config(model=ModelConfig(hidden_size=5))
        self.sequence_shape = (spec.height, spec.width * spec.channels)
        self.rng = np.random.default_rng(0)

    def test_set(self):
        shape, num_classes = self.spec.shape, self.spec.num_classes
        self.labels = self.rng.integers(0, num_classes, 400, dtype=np.int32)
        images = self.rng.integers(0, 256, (400, *shape), np.uint8)
        # A bar that begins at a place of its class.
        images[np.arange(400), self.labels * (shape[0] - 1) // num_classes] = 255
        return images, self.labels

    def beliefs(self, images):
        size = (self.spec.height, len(images), self.spec.num_classes)
        time = np.linspace(0, 5, size[0]).reshape(-1, 1, 1)
        logits = time * self.rng.normal(size=size[1:])
        if len(images) == len(self.labels):
            logits += time * np.eye(size[2])[self.labels]
        e = np.exp(logits)
        return e / e.sum(-1, keepdims=True)

    def probabilities(self, images):
        return self.beliefs(images)[-1]

    def hidden_states(self, images):
        return self.rng.normal(size=(self.spec.height, len(images), 5))

    def gradient_norms(self, images, labels):
        return np.exp(self.rng.normal(size=(1, self.spec.height, len(images))))


def rows_of(model, images):
    return images.reshape(*images.shape[:2], -1) / np.float32(255)


def rows_read_at(model, spec):
    return np.repeat(np.arange(spec.height, dtype=float)[:, None], spec.width, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.shape} {spec.num_classes}")
def test_images_and_classes_of_any_kind_are_drawn(spec, monkeypatch, tmp_path):
    network = Pretended(spec, workdir_lib.Workdir(tmp_path))
    monkeypatch.setattr(trained, "load", lambda *_, **__: network)
    monkeypatch.setattr(views, "sequence", rows_of)
    monkeypatch.setattr(views, "read_at", rows_read_at)
    monkeypatch.setattr(sections, "DPI", 50)  # faster
    workdir_lib.append_line(tmp_path / "metrics.jsonl", line(1, (1.0, 0.5), (1.0, 0.5)))
    shown, found = sections.examine(tmp_path, None)
    assert found["class_names"] == list(spec.class_names)
    assert np.shape(found["confusion"]) == (spec.num_classes,) * 2
    page = Page(report.render("title", shown))
    assert len(page.images) == 12
    table = next(section.table for section in shown if "confused" in section.title)
    names = [name.replace("おん", "1: おん") for name in spec.class_names]
    assert [str(row[0]) for row in table[1:]] == names
    wrong = np.flatnonzero(np.array(found["confusion"]) * (1 - np.eye(spec.num_classes)))
    assert len(wrong)
    for section in shown[3:]:
        for _, alt, _ in section.pictures.values():
            if "rediction" in alt or "class " in alt or " for " in alt:
                assert any(name in alt for name in ("1", *spec.class_names)), alt


@pytest.mark.parametrize("num", [2, 10, 47, 120])
def test_names_of_classes_do_not_overlap(num):
    names = [f"a long name {i}" for i in range(num)]
    counts = np.random.default_rng(0).integers(0, 9, (num, num))
    figure = figures.confusion(counts, names)
    figure.canvas.draw()
    axis = figure.axes[0]
    assert axis.get_xticklabels()[0].get_rotation() == (0 if num == 2 else 90)
    assert axis.get_xticklabels()[1].get_text() in names
    for labels, side in ((axis.get_xticklabels(), 0), (axis.get_yticklabels(), 1)):
        boxes = np.array([label.get_window_extent().get_points()[:, side] for label in labels])
        boxes = boxes[np.argsort(boxes[:, 0])]
        assert (boxes[1:, 0] - boxes[:-1, 1] > -1.5).all()  # of 100 pixels per inch
    assert len(axis.texts) == (np.count_nonzero(counts) if num <= 10 else 0)


@pytest.mark.parametrize("color", [*figures.COLORS, figures.GREY])
def test_lines_can_be_seen_on_white(color):
    # WCAG 2.2, success criterion 1.4.11.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) >= 3


def test_guessing_is_right_once_in_the_number_of_classes():
    figure = figures.accuracy_by_step(np.ones(4), np.ones(4), 47)
    assert figure.axes[0].lines[-1].get_ydata()[0] == 1 / 47


RESULTS = {
    "dataset": {"name": "a", "fingerprint": "b", "train": 1, "validation": 1, "test": 1},
    "epochs": 2,
    "steps": 2,
    "parameters": 7,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_scores_of_diverged_members_are_left_out(untrained, tmp_path):
    scores = {"loss": [None, 1.0, 2.0], "accuracy": [None, 0.5, 0.25]}
    nothing = {"loss": [None] * 3, "accuracy": [None] * 3}
    untrained(
        ModelConfig(hidden_size=4), {**RESULTS, "validation": scores, "test": nothing}, 1, num=3
    )
    for values in (scores, nothing):
        pair = (values["loss"], values["accuracy"])
        workdir_lib.append_line(tmp_path / "metrics.jsonl", line(1, pair, pair))
    shown, found = sections.examine(tmp_path, 1)
    facts = dict(shown[0].table[1:])
    assert facts["validation accuracy"] == "0.5000 (all seeds: 0.3750 ± 0.1768 (2 of 3 seeds))"
    assert facts["test accuracy"] == "– (all seeds: – (0 of 3 seeds))"
    assert found["member"] == 1


def test_an_epoch_without_a_score_is_a_gap():
    lines = [line(i + 1, (x, x), (None, None)) for i, x in enumerate((2.0, None, 1.0))]
    figure = figures.learning_curves({"run": lines})
    (drawn,) = figure.axes[0].lines
    np.testing.assert_array_equal(drawn.get_ydata(), [2.0, np.nan, 1.0])
    figures.learning_curves({"run": [line(1, (None, None), (None, None))]})


def test_runs_of_several_members_are_drawn_with_their_spread(tmp_path):
    losses = [[2.0, 1.0], [1.0, 0.2]]
    lines = [line(i + 1, (x, [0.5, 0.7]), (x, [0.25, 0.75])) for i, x in enumerate(losses)]
    figure = figures.learning_curves({"run": lines})
    for drawn in figure.axes[0].lines:
        np.testing.assert_allclose(drawn.get_ydata(), [1.5, 0.6])
    (band, _) = (collection.get_paths()[0] for collection in figure.axes[0].collections)
    expected = [1.5 - 0.5**0.5, 1.5 + 0.5**0.5, 0.6 - 0.32**0.5, 0.6 + 0.32**0.5]
    assert {round(y, 6) for y in band.vertices[:, 1]} == {round(y, 6) for y in expected}

    workdir_lib.write_json(tmp_path / "config.json", config_lib.to_dict(Config()))
    for each in lines:
        workdir_lib.append_line(tmp_path / "metrics.jsonl", each)
    scores = {"loss": [0.5, 0.7], "accuracy": [0.9, 0.8]}
    results = {**RESULTS, "validation": scores, "test": scores}
    workdir_lib.write_json(tmp_path / "results.json", results)
    table = sections.compare([tmp_path, tmp_path]).table
    assert table[1][-2:] == ["0.8500 ± 0.0707", "0.6000 ± 0.1414"]


def spread(mean, sd):
    return {"mean": mean, "sd": sd, "interval": None}


# Two settings of two seeds; the best member is of the first, the best mean is that of the second.
SWEEP = {"num": 2, "sweep": '{"optimizer.learning_rate": [0.1, 0.01]}'}
SWEPT = {
    **RESULTS,
    "validation": {"loss": [0.1, 1.9, 0.5, 0.7], "accuracy": [0.9, 0.5, 0.8, 0.6]},
    "test": {"loss": [None, None, 0.25, 0.75], "accuracy": [None, None, 0.75, 0.5]},
    "members": [
        {"seed": seed, "optimizer.learning_rate": rate} for rate in (0.1, 0.01) for seed in (0, 1)
    ],
    "settings": [
        {
            "optimizer.learning_rate": 0.1,
            "diverged": 0,
            "validation": {"loss": spread(1.0, 1.2728), "accuracy": spread(0.7, 0.2828)},
            "test": {"loss": spread(None, None), "accuracy": spread(None, None)},
        },
        {
            "optimizer.learning_rate": 0.01,
            "diverged": 0,
            "validation": {"loss": spread(0.6, 0.1414), "accuracy": spread(0.7, 0.1414)},
            "test": {"loss": spread(0.5, 0.3536), "accuracy": spread(0.625, 0.1768)},
        },
    ],
    "best": 1,
    "ensemble": {"members": [2, 3], "test": {"loss": 0.375, "accuracy": 0.875}},
    "early_stopping": {"best_epochs": [2, 1, 2, 1], "stopped": [False, True, False, True]},
}


def write_sweep(folder):
    """Writes config, metrics and results of SWEPT."""
    config = config_lib.to_dict(Config(members=MembersConfig(**SWEEP)))
    workdir_lib.write_json(folder / "config.json", config)
    workdir_lib.write_json(folder / "results.json", SWEPT)
    # What has stopped early has no training loss.
    first, last, train = [4.0, 2.0, 1.0, 3.0], SWEPT["validation"]["loss"], [0.1, None, 0.5, None]
    for epoch, pair in enumerate(((first, first), (train, last)), start=1):
        losses = ((each, [0.5] * 4) for each in pair)
        workdir_lib.append_line(folder / "metrics.jsonl", line(epoch, *losses))


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures of learning curves."""
    result, draw = [], figures.learning_curves
    monkeypatch.setattr(
        figures, "learning_curves", lambda runs: result.append(draw(runs)) or result[-1]
    )
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_settings_of_a_sweep_are_told_apart(untrained, drawn, tmp_path):
    untrained(ModelConfig(hidden_size=4), SWEPT, 0, **SWEEP)
    write_sweep(tmp_path)
    shown, _ = sections.examine(tmp_path, None)
    by_title = {section.title: section for section in shown}
    page = Page(report.render("title", shown))
    assert page.tables[1] == [
        ["setting", "optimizer.learning_rate", "seeds", "validation loss", "validation accuracy",
         "test accuracy", "diverged", "stopped early"],
        ["1", "0.1", "0–1", "1.0000 ± 1.2728", "0.7000 ± 0.2828", "–", "0", "1"],
        ["★ 2, best", "0.01", "0–1", "0.6000 ± 0.1414", "0.7000 ± 0.1414", "0.6250 ± 0.1768", "0",
         "1"],
    ]  # fmt: skip
    assert page.tables[2][1:] == [
        ["2", "0", "0.5000", "0.8000", "0.2500", "0.7500", "–"],
        ["3", "1", "0.7000", "0.6000", "0.7500", "0.5000", "stopped early, best epoch 1"],
    ]
    text = by_title["Members"].text
    assert "2 members has a test accuracy of 0.8750 and a loss of 0.3750" in text
    text = by_title["What was run"].text
    assert "member 0 (seed = 0, learning_rate = 0.1), which has the lowest valid" in text
    assert "NOTICE: this member is not of setting 2, which validation chose" in text
    facts = dict(by_title["What was run"].table[1:])
    assert facts["validation accuracy"] == "0.9000 (all seeds: 0.7000 ± 0.2828)"
    assert facts["test accuracy"].startswith("– (all seeds: –")

    # Train and validation of the chosen setting, then of the other.
    curves = [drawn[0].axes[0].lines[i].get_ydata() for i in range(4)]
    np.testing.assert_allclose(curves, [[2.0, 0.5], [2.0, 0.6], [3.0, 0.1], [3.0, 1.0]])
    names = [text.get_text().strip() for text in drawn[0].legends[0].get_texts()]
    assert [name.partition(":")[0] for name in names] == ["setting 2", "setting 1"]

    again, _ = sections.examine(tmp_path, None)
    pages = [report.render("title", each).splitlines() for each in (shown, again)]
    dated = [i for i, text in enumerate(pages[0]) if "UTC by" in text]
    assert len(dated) == 1
    for page in pages:
        assert re.fullmatch(
            r"<p>Page made on \d{4}-\d\d-\d\d at \d\d:\d\d UTC by</p>", page.pop(*dated)
        )
    assert pages[0] == pages[1]
    asked, _ = sections.examine(tmp_path, 0)
    assert "as --member asks" in asked[0].text


def test_a_sweep_is_compared_by_the_setting_that_validation_chose(drawn, tmp_path):
    write_sweep(tmp_path)
    (row,) = sections.compare([tmp_path]).table[1:]
    assert "setting 2: learning_rate = 0.01" in row[0]
    assert row[-3:] == ["0.7000 ± 0.1414", "0.6250 ± 0.1768", "0.5000 ± 0.3536"]
    np.testing.assert_allclose(drawn[0].axes[0].lines[1].get_ydata(), [2.0, 0.6])
    # As if a member of setting 2 had diverged: a higher mean loss is chosen.
    workdir_lib.write_json(tmp_path / "results.json", SWEPT | {"best": 0})
    (row,) = sections.compare([tmp_path]).table[1:]
    assert "setting 1: learning_rate = 0.1" in row[0]
    np.testing.assert_allclose(drawn[1].axes[0].lines[1].get_ydata(), [3.0, 1.0])


@pytest.mark.slow
def test_of_many_settings_the_best_are_drawn(untrained, drawn, tmp_path):
    rates = json.dumps({"optimizer.learning_rate": [i / 16 for i in range(1, 11)]})
    untrained(ModelConfig(hidden_size=4), {}, 0, sweep=rates)
    losses = [5.0, 4.0, None, 2.0, 1.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    pair = (losses, losses)
    workdir_lib.append_line(tmp_path / "metrics.jsonl", line(1, pair, pair))
    shown, _ = sections.examine(tmp_path, None)
    (curves,) = (section for section in shown if section.title == "Learning curves")
    assert "Shown are the best 8 of 10 settings" in curves.text
    lines = drawn[0].axes[0].lines[::2]  # one split
    assert [curve.get_ydata()[0] for curve in lines] == [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(("num", "name"), [(10, "a.svg"), (1000, "a.png")])
def test_lines_are_svg_unless_that_is_large(num, name):
    names = list(map(str, range(num)))
    ((file, (content, alt, _)),) = sections.picture(
        "a", figures.class_bars(*np.ones((3, num)), names), "alt", "Look."
    ).items()
    assert (file, alt) == (name, "alt")
    assert content.startswith(b"<?xml" if name == "a.svg" else b"\x89PNG")
    assert len(content) < 250_000


def test_runs_of_different_data_are_told_apart(finished_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    text = (other / "results.json").read_text()
    assert "NOTICE" not in sections.compare([finished_run, other]).text
    fingerprint = json.loads(text)["dataset"]["fingerprint"]
    (other / "results.json").write_text(text.replace(fingerprint, "0" * 64))
    section = sections.compare([finished_run, other])
    assert "NOTICE: the runs are of different data" in section.text
    assert [row[1] for row in section.table] == ["data", "mnist_5k", "mnist_5k"]


def test_names_of_runs_are_below_the_curves():
    names = ["_hidden", "x" * 150, "$a$", *"bcde"]
    figure = figures.learning_curves({name: [line(1, (2, 0.5), (2, 0.5))] for name in names})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names)
    box, size = legend.get_window_extent(), figure.bbox
    assert 0 <= box.x0 < box.x1 <= size.x1
    assert 0 <= box.y0 < box.y1 < figure.axes[1].get_tightbbox().y0 + 1
    assert figure.axes[1].get_window_extent().height > 150  # of 100 pixels per inch


def entries_of(names):
    score = {"mean": 0.9, "sd": 0.1, "interval": [0.8, 0.95]}
    tried = [
        {"rate": rate, "diverged": 0, "validation": {"loss": {"mean": rate}}} for rate in (0.1, 0.2)
    ]
    diverged = {"diverged": 1, "validation": {"loss": {"mean": None}}}  # a run as a whole
    entry = {"tried": [*tried, diverged], "setting": {"rate": 0.1}, "test/accuracy": score}
    return dict.fromkeys(names, entry)


ODD = ["cost $_$", "_gru", "x" * 150, *map("{} layers, bidirectional".format, range(9))]


@pytest.mark.parametrize("draw", ["scores", "sensitivity", "curves"])
@pytest.mark.parametrize("names", [ODD, ODD[:2] + ODD[3:], [f"W{'W' * 13}{i}" for i in range(9)]])
def test_networks_of_a_study_are_told_apart(names, draw):
    entries = entries_of(names)
    if draw == "scores":
        scores = {name: entry["test/accuracy"] for name, entry in entries.items()}
        figure = leaderboard.scores_against("cost", dict.fromkeys(names, 3), scores)
    elif draw == "sensitivity":
        figure = leaderboard.sensitivity("rate", entries)
    else:
        figure = figures.learning_curves(
            {name: 30 * [line(1, (0.5, 0.5), (0.5, 0.5))] for name in names}
        )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    looks = {(handle.get_color(), handle.get_marker()) for handle in legend.get_lines()}
    assert len(looks) == len(names)


def test_names_of_networks_break_no_table():
    rows = [["network"], ["x^2|a~b_c & 5 %"]]
    assert leaderboard._markdown(rows).splitlines()[-1] == r"| x^2\|a~b_c & 5 % |"
    latex = r"x\textasciicircum{}2|a\textasciitilde{}b\_c \& 5 \% \\"
    assert latex in leaderboard._latex(rows).splitlines()


STUB = """
from tools import sections
picture = sections.Picture(bytes(9000), "alt", "Look here.")
found = [sections.Section("title", "text", {"curves.svg": picture})]
sections.examine = lambda *_, **__: (found, {})
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_earlier_report(tmp_path):
    workdir = tmp_path / "run"
    (workdir / "report").mkdir(parents=True)
    earlier = (workdir / "report.html", workdir / "report" / "curves.svg")
    for path in earlier:
        path.write_text("earlier")
    result = run_on_a_full_disk("report", f"--workdir={workdir}", before=STUB)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "report.html cannot be written (File too large)" in result.stderr.splitlines()[-1]
    assert [path.read_text() for path in earlier] == ["earlier"] * 2
    assert list((workdir / "report").iterdir()) == [earlier[1]]
    assert not list(workdir.glob("*.partial"))


def test_files_of_the_user_are_kept_and_old_pictures_are_not(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    for name in ("compare.svg", "compare.png", "curves.png", "other.png"):
        (tmp_path / "report" / name).write_bytes(b"of an earlier page")
    new = sections.Picture(b"new", "curves", "Look here.")
    pictures = {"curves.svg": new, "other.svg": new}  # the latter as in the page of a study
    page = report.write(tmp_path, "title", [sections.Section("a", "b", pictures)])
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "report" / "curves.svg").read_bytes() == b"new"
    assert len(list((tmp_path / "report").iterdir())) == 3


@pytest.mark.parametrize("num_steps", [2, 3, 4, 28])
def test_classes_are_in_order_above_any_number_of_steps(num_steps):
    names = list("0123456789")
    figure = figures.unrolled(np.zeros((num_steps, 4)), np.full(10, 0.1), ModelConfig(), names)
    places = [bar.get_x() for bar in figure.axes[0].containers[0]]
    assert places == sorted(places)
    assert figure.axes[0].get_xlim()[0] < places[0]


def test_a_mistake_is_named(tmp_path, finished_run):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; train"):
        sections.examine(tmp_path, None)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no epoch"):
        sections.examine(tmp_path, None)
    with pytest.raises(UserError, match=r"nothing.config\.json"):
        sections.compare([finished_run, tmp_path / "nothing"])
