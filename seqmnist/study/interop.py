"""Parameters to Keras and back, for architectures that exist in both."""

import os
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks.views import sequence_shape
from seqmnist.spec import ImageSpec

if TYPE_CHECKING:
    import keras

# For each cell: its layer in Keras, the layer's options, and our parameters in Keras's order; a
# tuple of names is one weight in Keras that stacks several of ours.
_CELLS = {
    "simple_rnn": ("SimpleRNN", {}, ("kernel", "recurrent_kernel", "bias")),
    "irnn": ("SimpleRNN", {"activation": "relu"}, ("kernel", "recurrent_kernel", "bias")),
    "gru": ("GRU", {}, ("kernel", "recurrent_kernel", ("bias", "recurrent_bias"))),
    "lstm": ("LSTM", {}, ("kernel", "recurrent_kernel", "bias")),
}


def build_keras(config: ModelConfig, spec: ImageSpec) -> "keras.Sequential":
    """Builds the same architecture in Keras: sequences [B, T, F] -> logits [B, C].

    `spec` describes the images from which the sequences are made.

    Keras uses the JAX backend unless it is already imported or KERAS_BACKEND is set. Raises
    UserError if Keras has no such layers, or is not installed.
    """
    layer_name, options, _ = _keras_cell(config)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras
    except ImportError:
        raise UserError("Keras is not installed; pip install 'keras>=3.9'") from None
    layers = [keras.Input(sequence_shape(config, spec))]
    for i in range(config.num_layers):
        is_last = i == config.num_layers - 1
        layer = getattr(keras.layers, layer_name)(
            config.hidden_size, return_sequences=not is_last, **options
        )
        layers.append(keras.layers.Bidirectional(layer) if config.bidirectional else layer)
    return keras.Sequential([*layers, keras.layers.Dense(spec.num_classes)])


def to_keras(config: ModelConfig, params: Any) -> list[np.ndarray]:
    """Converts parameters, an `nnx.State`, to the form of `keras.Model.set_weights`.

    Raises UserError if Keras has no such layers.
    """
    weights = []
    for names, variables in _slots(config, params):
        values = [np.asarray(variable[...]) for variable in variables]
        weights.append(np.stack(values) if isinstance(names, tuple) else values[0])
    return weights


def from_keras(config: ModelConfig, params: Any, weights: list[np.ndarray]) -> None:
    """Replaces parameters, an `nnx.State`, in place by what `keras.Model.get_weights` returns.

    Raises UserError, and changes nothing, if Keras has no such layers or the weights are of another
    architecture.
    """
    slots = list(_slots(config, params))
    if len(weights) != len(slots):
        raise UserError(f"Keras has {len(weights)} weights, not the {len(slots)} of {config}")
    pairs = []
    for (names, variables), weight in zip(slots, weights, strict=True):
        values = weight if isinstance(names, tuple) else [weight]
        if [value.shape for value in values] != [variable.shape for variable in variables]:
            raise UserError(f"Keras has a weight {weight.shape} for {names}, not that of {config}")
        pairs += zip(variables, values, strict=True)
    for variable, value in pairs:
        variable[...] = jnp.asarray(value, variable.dtype)


def _keras_cell(config):
    known = {"cell": _CELLS, "readout": ("last",), "block": ("plain",), "dropout": (0,)}
    for name, values in known.items():
        if (value := getattr(config, name)) not in values:
            raise UserError(
                f"config.model.{name}={value} has no equivalent in Keras; use plain stacks of "
                f"{', '.join(_CELLS)} with readout=last and dropout=0"
            )
    return _CELLS[config.cell]


def _slots(config, params):
    """Yields the names and variables of each of Keras's weights, in Keras's order."""
    *_, cell_names = _keras_cell(config)
    layers = [params["layers"][i] for i in range(config.num_layers)]
    if config.bidirectional:
        layers = [layer[name] for layer in layers for name in ("forward", "backward")]
    modules = [(layer, cell_names) for layer in layers]
    for module, all_names in [*modules, (params["readout"], ("kernel", "bias"))]:
        for names in all_names:
            parts = names if isinstance(names, tuple) else (names,)
            yield names, [module[name] for name in parts]
