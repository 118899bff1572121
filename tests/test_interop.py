"""Against Keras and PyTorch themselves: values and gradients from copied weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module, random_params
from flax import nnx

from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks.cells import CELLS
from seqmnist.networks.views import sequence
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import interop
from seqmnist.training.steps import init_state, make_system

ARCHITECTURES = [
    ModelConfig(hidden_size=9),
    ModelConfig(cell="irnn", hidden_size=9, view="columns"),
    ModelConfig(cell="gru", hidden_size=9, num_layers=2, view="patches_7"),
    ModelConfig(cell="lstm", hidden_size=9, bidirectional=True, num_layers=2, reverse=True),
]


@pytest.fixture(autouse=True)
def relaxed():
    """Keras does not compute under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def make_params(config, seed):
    shapes = jax.eval_shape(lambda: init_state(config, make_system(config), seed)).params
    return random_params(shapes, seed)


@pytest.mark.slow
@pytest.mark.parametrize("model", ARCHITECTURES, ids=lambda model: model.cell)
def test_keras_gives_the_same_logits_and_gradients(model, digits):
    config = Config(model=model)
    system, params = make_system(config), make_params(config, 0)
    images = jnp.array(digits[0][:16])
    labels = jnp.array(digits[1][:16])
    their_model = interop.build_keras(model, MNIST)
    their_model.set_weights(interop.to_keras(model, params))
    x = sequence(model, images)

    def mean_loss(logits):
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels])

    def our_loss(params):
        logits = system.apply(params, images)
        return mean_loss(logits), logits

    def their_loss(weights):
        logits, _ = their_model.stateless_call(weights, other, x)
        return mean_loss(logits), logits

    other = [variable.value for variable in their_model.non_trainable_variables]
    weights = [variable.value for variable in their_model.trainable_variables]
    theirs, their_logits = jax.jit(jax.grad(their_loss, has_aux=True))(weights)
    ours, logits = jax.jit(jax.grad(our_loss, has_aux=True))(params)
    assert_close(logits, their_logits)
    assert_close(interop.to_keras(model, ours), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("model", ARCHITECTURES, ids=lambda model: model.cell)
def test_weights_survive_a_round_trip(model):
    config = Config(model=model)
    params, other = make_params(config, 0), make_params(config, 1)
    their_model = interop.build_keras(model, MNIST)
    their_model.set_weights(interop.to_keras(model, params))
    interop.from_keras(model, other, their_model.get_weights())
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)
    assert their_model.count_params() == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_keras_has_the_networks_sizes(monkeypatch):
    spec = ImageSpec(32, 24, 3, ("cat", "dog", "fish"))
    monkeypatch.setattr(interop, "sequence_shape", lambda config, spec: (32, 24 * spec.channels))
    network = interop.build_keras(ModelConfig(), spec)
    assert (network.input_shape, network.output_shape) == ((None, 32, 72), (None, 3))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"cell": "lru"}, "cell=lru"),
        ({"cell": "min_gru"}, "cell=min_gru"),
        ({"readout": "mean"}, "readout=mean"),
        ({"block": "residual"}, "block=residual"),
        ({"dropout": 0.1}, "dropout=0.1"),
    ],
)
def test_what_keras_does_not_have_is_refused(fields, word):
    with pytest.raises(UserError, match=word):
        interop.build_keras(ModelConfig(**fields), MNIST)
    with pytest.raises(UserError, match=word):
        interop.to_keras(ModelConfig(**fields), None)


def test_weights_of_another_architecture_are_refused_and_change_nothing():
    params = make_params(Config(), 0)
    before = interop.to_keras(ModelConfig(), params)
    for weights in (before[:-1], [*before, before[0]], [before[0].T, *before[1:]]):
        with pytest.raises(UserError, match="Keras has"):
            interop.from_keras(ModelConfig(), params, weights)
    for one, two in zip(before, interop.to_keras(ModelConfig(), params), strict=True):
        np.testing.assert_array_equal(one, two)


TORCH_ORDER = {"simple_rnn": [0], "gru": [1, 0, 2], "lstm": [0, 1, 2, 3]}
TORCH_LAYERS = {"simple_rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


@pytest.mark.parametrize("name", TORCH_ORDER)
def test_pytorch_gives_the_same_states_and_gradients(name):
    torch = pytest.importorskip("torch")
    hidden, order = 7, TORCH_ORDER[name]
    cell = random_module(lambda rngs: CELLS[name](5, hidden, rngs=rngs))
    graphdef, params = nnx.split(cell)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(11, 3, 5)).astype(np.float32)
    cotangent = rng.normal(size=(11, 3, hidden)).astype(np.float32)

    def reorder(array):  # gates side by side, ours -> PyTorch's; kernels transposed
        gates = np.split(np.asarray(array), len(order), axis=-1)
        return np.concatenate([gates[i] for i in order], axis=-1).T

    layer = getattr(torch.nn, TORCH_LAYERS[name])(5, hidden)
    names = {"weight_ih_l0": "kernel", "weight_hh_l0": "recurrent_kernel", "bias_ih_l0": "bias"}
    if name == "gru":
        names["bias_hh_l0"] = "recurrent_bias"
    with torch.no_grad():
        layer.bias_hh_l0.zero_()
        for theirs, ours in names.items():
            getattr(layer, theirs).copy_(torch.tensor(reorder(params[ours][...])))
    their_h, _ = layer(torch.tensor(x))
    (their_h * torch.tensor(cotangent)).sum().backward()

    def inner(params):
        h = nnx.merge(graphdef, params)(jnp.array(x))
        return jnp.sum(h * cotangent), h

    grads, our_h = jax.grad(inner, has_aux=True)(params)
    assert_close(our_h, their_h.detach().numpy())
    for theirs, ours in names.items():
        gradient = getattr(layer, theirs).grad.numpy()
        assert_close(reorder(grads[ours][...]), gradient)
