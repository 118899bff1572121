"""Parameters to Keras and back, for the architectures that both can hold."""

import os
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks.model import NUM_CLASSES
from seqmnist.networks.views import sequence_shape

if TYPE_CHECKING:
    import keras

# Of each cell: its layer in Keras, the layer's options, and our names in Keras's order; a tuple
# of names stands for one weight of Keras's that stacks several of ours.
_CELLS = {
    "simple_rnn": ("SimpleRNN", {}, ("kernel", "recurrent_kernel", "bias")),
    "irnn": ("SimpleRNN", {"activation": "relu"}, ("kernel", "recurrent_kernel", "bias")),
    "gru": ("GRU", {}, ("kernel", "recurrent_kernel", ("bias", "recurrent_bias"))),
    "lstm": ("LSTM", {}, ("kernel", "recurrent_kernel", "bias")),
}


def build_keras(config: ModelConfig) -> "keras.Sequential":
    """Builds a model of the same architecture in Keras: sequences [B, T, F] -> logits [B, C].

    Keras computes on JAX, unless it is imported already or KERAS_BACKEND says otherwise.

    Raises:
      UserError: Keras cannot hold the architecture, or is not installed.
    """
    layer_name, options, _ = _check(config)
    keras = _import_keras()
    layers = [keras.Input(sequence_shape(config))]
    for i in range(config.num_layers):
        is_last = i == config.num_layers - 1
        layer = getattr(keras.layers, layer_name)(
            config.hidden_size, return_sequences=not is_last, **options
        )
        layers.append(keras.layers.Bidirectional(layer) if config.bidirectional else layer)
    return keras.Sequential([*layers, keras.layers.Dense(NUM_CLASSES)])


def to_keras(config: ModelConfig, params: Any) -> list[np.ndarray]:
    """Returns parameters as `keras.Model.set_weights` takes them.

    Args:
      config: the architecture.
      params: an `nnx.State` of a `SequenceClassifier` of that architecture.

    Raises:
      UserError: Keras cannot hold the architecture.
    """
    weights = []
    for module, names in _modules(config, params):
        for name in names:
            if isinstance(name, tuple):
                weights.append(np.stack([np.asarray(module[part][...]) for part in name]))
            else:
                weights.append(np.asarray(module[name][...]))
    return weights


def from_keras(config: ModelConfig, params: Any, weights: list[np.ndarray]) -> None:
    """Replaces parameters by what `keras.Model.get_weights` returns.

    Args:
      config: the architecture.
      params: an `nnx.State` of a `SequenceClassifier` of that architecture; changed in place.
      weights: the weights.

    Raises:
      UserError: Keras cannot hold the architecture, or the weights are of another one.
    """
    remaining = list(weights)
    slots = []
    for module, names in _modules(config, params):
        for name in names:
            parts = name if isinstance(name, tuple) else (name,)
            if not remaining:
                raise UserError(f"Keras's {len(weights)} weights are too few for {config}")
            weight = remaining.pop(0)
            values = weight if isinstance(name, tuple) else [weight]
            if [value.shape for value in values] != [module[part].shape for part in parts]:
                raise UserError(
                    f"Keras's weight of shape {weight.shape} does not fit {'/'.join(parts)} of "
                    f"{config}"
                )
            slots += zip([module[part] for part in parts], values, strict=True)
    if remaining:
        raise UserError(f"Keras's {len(weights)} weights are too many for {config}")
    for variable, value in slots:
        variable[...] = jnp.asarray(value, variable.dtype)


def _check(config):
    refused = {
        f"cell={config.cell}": config.cell not in _CELLS,
        f"readout={config.readout}": config.readout != "last",
        f"block={config.block}": config.block != "plain",
        f"dropout={config.dropout}": config.dropout != 0,
    }
    for setting, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"Keras has no layers for config.model.{setting}; it holds plain stacks of "
                f"{', '.join(_CELLS)} with the readout last and no dropout"
            )
    return _CELLS[config.cell]


def _modules(config, params):
    """The modules that hold parameters, in Keras's order, each with its parameters' names."""
    *_, names = _check(config)
    for i in range(config.num_layers):
        layer = params["layers"][i]
        if config.bidirectional:
            yield layer["forward"], names
            yield layer["backward"], names
        else:
            yield layer, names
    yield params["readout"], ("kernel", "bias")


def _import_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras
    except ImportError:
        raise UserError("Keras is not installed; pip install 'seqmnist[peers]'") from None
    return keras
