"""Beliefs, states and gradients against truncated sequences and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_params
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from seqmnist.config import Config, ModelConfig
from seqmnist.networks.cells import CELLS
from seqmnist.study import insight
from seqmnist.training.steps import init_state, make_system

MODELS = [
    ModelConfig(),
    ModelConfig(view="patches_14", cell="lru", block="residual", readout="mean"),
    ModelConfig(view="patches_14", cell="gru", num_layers=2, readout="max"),
    ModelConfig(view="patches_14", cell="lstm", num_layers=2, bidirectional=True),
    ModelConfig(
        view="patches_14", cell="min_gru", bidirectional=True, block="residual", num_layers=2
    ),
    ModelConfig(view="patches_14", cell="irnn", bidirectional=True, readout="max", reverse=True),
]


def name_of(model):
    direction = "both_" if model.bidirectional else ""
    return f"{direction}{model.cell}_{model.block}_{model.readout}_{model.num_layers}"


def make(model, hidden_size=5, dtype=np.float32):
    config = Config(model=dataclasses.replace(model, hidden_size=hidden_size))
    system = make_system(config)
    shapes = jax.eval_shape(lambda: init_state(config, system, 0)).params
    return system, random_params(shapes, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_beliefs_are_the_predictions_for_shorter_sequences(model, digits):
    system, params = make(model)
    images = jnp.array(digits[0][:3])
    network = nnx.merge(system.graphdef, params)
    x = network.sequence(images)
    beliefs = jax.jit(lambda: insight.beliefs(system, params, images))()
    assert beliefs.shape == (len(x), 3, 10)
    for t in sorted({1, len(x) - 1}):
        expected = jax.jit(lambda x: jax.nn.softmax(network.classify(x)))(x[:t])
        assert_close(beliefs[t - 1], expected)
    assert_close(beliefs[-1], jax.nn.softmax(system.apply(params, images)))


@pytest.mark.parametrize("model", [MODELS[0], MODELS[2], MODELS[3]], ids=name_of)
def test_the_readout_reads_the_hidden_states(model, digits):
    system, params = make(model)
    images = jnp.array(digits[0][:3])
    network = nnx.merge(system.graphdef, params)
    h = jax.jit(lambda: insight.hidden_states(system, params, images))()
    read = {"last": h[-1], "max": h.max(0)}[model.readout]
    if model.bidirectional:
        read = jnp.concatenate([h[-1, :, :5], h[0, :, 5:]], axis=-1)
    assert_close(network.readout(read), system.apply(params, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bidirectional"), [*((name, False) for name in CELLS), ("lstm", True), ("lru", True)]
)
def test_gradient_norms_are_finite_differences(name, bidirectional, digits):
    """Reads step by step, moves one number of one state by a little, and looks at the loss."""
    with jax.enable_x64(True):
        model = ModelConfig(
            view="patches_14", cell=name, bidirectional=bidirectional, readout="mean"
        )
        system, params = make(model, hidden_size=3, dtype=np.float64)
        images, labels = jnp.array(digits[0][:2]), jnp.array(digits[1][:2])
        network = nnx.merge(system.graphdef, params)
        x = network.sequence(images)
        (layer,) = network.layers
        cells = [(layer.forward, 1), (layer.backward, -1)] if bidirectional else [(layer, 1)]
        first = cells[0][0].initial_state(2)

        @jax.jit
        def losses(moves):
            outputs = []
            for (cell, sign), move in zip(cells, moves, strict=True):
                z, carry, states = cell.project(x[::sign]), first, []
                for t in range(len(x)):
                    carry = cell.step(carry, z[t])
                    carry = jax.tree.map(lambda leaf, by, t=t: leaf + by[t], carry, move)
                    states.append(jax.tree.leaves(carry)[0])
                outputs.append(cell.emit(jnp.stack(states), x[::sign])[::sign])
            logits = network.readout(jnp.concatenate(outputs, axis=-1).mean(0))
            return -jax.nn.log_softmax(logits)[jnp.arange(2), labels]

        still = [jax.tree.map(lambda leaf: np.zeros((len(x), *leaf.shape), leaf.dtype), first)]
        still *= len(cells)
        leaves, structure = jax.tree.flatten(still)
        squares = np.zeros((len(cells), len(x), 2))
        for i, leaf in enumerate(leaves):
            direction = i * len(cells) // len(leaves)
            for t in range(len(x)):
                for unit in np.ndindex(leaf.shape[2:]):
                    changed = []
                    for sign in (1, -1):
                        moved = leaf.copy()
                        moved[t, :, *unit] = sign * 1e-4
                        parts = [*leaves[:i], moved, *leaves[i + 1 :]]
                        changed.append(losses(jax.tree.unflatten(structure, parts)))
                    squares[direction, t] += ((changed[0] - changed[1]) / 2e-4) ** 2
        squares[1:] = squares[1:, ::-1]
        norms = jax.jit(lambda: insight.gradient_norms(system, params, images, labels))()
        np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5, atol=1e-8 * norms.max())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_scores_are_their_definitions(pairs):
    labels, predictions = np.array(pairs).T
    confusion = insight.confusion_matrix(labels, predictions, 4)
    scores = insight.class_scores(confusion)
    for c in range(4):
        for d in range(4):
            assert confusion[c, d] == sum(pair == (c, d) for pair in pairs)
        true = sum(pair == (c, c) for pair in pairs)
        false = sum(prediction == c != label for label, prediction in pairs)
        missed = sum(label == c != prediction for label, prediction in pairs)
        precision = true / (true + false) if true + false else 0
        recall = true / (true + missed) if true + missed else 0
        f1 = 2 * precision * recall / (precision + recall) if true else 0
        assert scores.precision[c] == pytest.approx(precision)
        assert scores.recall[c] == pytest.approx(recall)
        assert scores.f1[c] == pytest.approx(f1)
        assert scores.support[c] == true + missed


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.booleans())
def test_calibration_is_its_definition(seed, num, between_bins):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.ones(3), num), rng.integers(0, 3, num)
    if between_bins:
        probabilities = rng.multinomial(4, np.ones(3) / 3, num) / 4
    found = insight.calibration(labels, probabilities, num_bins=4)
    error = 0.0
    for k in range(4):
        own = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if k / 4 < row.max() <= (k + 1) / 4
        ]
        assert found.counts[k] == len(own)
        if own:
            confidence, accuracy = np.mean(own, 0)
            assert found.confidence[k] == pytest.approx(confidence)
            assert found.accuracy[k] == pytest.approx(accuracy)
            error += len(own) / num * abs(confidence - accuracy)
    assert found.error == pytest.approx(error)
