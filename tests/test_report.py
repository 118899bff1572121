"""The page against its run: its numbers, its pictures, and that it needs nothing else."""

import html.parser
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from seqmnist import config as config_lib
from seqmnist import records
from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.study import trained
from seqmnist.training.steps import init_state, make_system
from tools import figures, report


class Page(html.parser.HTMLParser):
    """Collects what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.titles, self.metas, self._in = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._in = tag
        if tag == "img":
            self.images.append(attrs)
        if tag == "meta":
            self.metas.append(attrs)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs and tag != "img"]

    def handle_data(self, data):
        if self._in in ("h1", "h2") and data.strip():
            self.titles.append(data)


def test_the_tool_writes_a_page_that_needs_nothing_else(finished_run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second <b>"
    for workdir in (first, second):
        shutil.copytree(finished_run, workdir)
    command = [sys.executable, "-m", "tools.report", f"--workdir={first}"]
    command += [f"--compare={second}", f"--json={tmp_path / 'figures.json'}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
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
    assert page.titles[0] == "What first learned"
    for title in ("Learning curves", "Runs side by side", "Belief by time step", "Hidden states"):
        assert title in page.titles
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.metas
    assert not page.links
    assert "://" not in text
    assert "second &lt;b&gt;" in text
    assert f"{results['test']['accuracy']:.4f}" in text
    names = {path.name for path in (first / "report").iterdir()}
    assert len(page.images) == len(names) == 11
    for image in page.images:
        assert len(image["alt"]) > 20
        assert image["src"].startswith("data:image/png;base64,")
    for name in names:
        with Image.open(first / "report" / name) as picture:
            picture.verify()
    assert not list(first.glob("*.partial"))


MODELS = [
    ModelConfig(view="permuted_pixels", cell="lru", hidden_size=4, readout="mean"),
    ModelConfig(view="patches_7", cell="gru", hidden_size=4, bidirectional=True, num_layers=4),
]


@pytest.fixture
def untrained(monkeypatch, digits):
    """Makes `trained.load` give a network of random parameters, tested on toy digits."""

    def prepare(model, workdir, results):
        config = Config(model=model)
        system = make_system(config)
        shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: rng.normal(-0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes
        )
        network = trained.Trained(workdir, config, system, params, results)
        monkeypatch.setattr(trained, "load", lambda workdir, member: network)
        monkeypatch.setattr(trained.Trained, "test_set", lambda self: [a[:60] for a in digits])
        return network

    return prepare


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.view}_{model.cell}")
def test_every_kind_of_network_is_drawn(model, untrained, tmp_path, monkeypatch):
    untrained(model, tmp_path, {})
    monkeypatch.setattr(report, "_DPI", 50)  # faster
    line = {"epoch": 1, "train/loss": 1.0, "train/accuracy": 0.5}
    line |= {"validation/loss": None, "validation/accuracy": None}
    records.append_line(tmp_path / records.METRICS, line)
    sections, found = report.examine(tmp_path, None)
    page = report.render("title", sections)
    assert "the run has not ended" in page
    assert np.sum(found["confusion"]) == 60
    for section in sections:
        for content, _ in section.pictures.values():
            assert Image.open(io.BytesIO(content)).width == 300


def test_runs_of_several_members_are_drawn_with_their_spread(tmp_path):
    losses = [[2.0, 1.0], [1.0, 0.2]]
    lines = [
        {"epoch": i + 1, "train/loss": loss, "train/accuracy": [0.5, 0.7],
         "validation/loss": loss, "validation/accuracy": [0.25, 0.75]}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    figure = figures.learning_curves({"run": lines})
    for drawn in figure.axes[0].lines:
        np.testing.assert_allclose(drawn.get_ydata(), [1.5, 0.6])
    (band, _) = (collection.get_paths()[0] for collection in figure.axes[0].collections)
    assert {round(y, 6) for y in band.vertices[:, 1]} == {1.0, 2.0, 0.2}

    records.write_json(tmp_path / records.CONFIG, config_lib.to_dict(Config()))
    for line in lines:
        records.append_line(tmp_path / records.METRICS, line)
    results = {"test": {"loss": [0.5, 0.7], "accuracy": [0.9, 0.8]}}
    records.write_json(tmp_path / records.RESULTS, results)
    table = report.compare([tmp_path, tmp_path]).table
    assert table[1][-2:] == ["0.8500 ± 0.0707", "0.6000 ± 0.1414"]


def test_a_mistake_is_named(tmp_path, finished_run):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; train"):
        report.examine(tmp_path, None)
    (tmp_path / records.METRICS).write_text("")
    with pytest.raises(UserError, match="no epoch"):
        report.examine(tmp_path, None)
    with pytest.raises(UserError, match=r"nothing.config\.json"):
        report.compare([finished_run, tmp_path / "nothing"])
