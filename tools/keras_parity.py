"""Trains the notebook's network in Keras and here, from the same weights, on the same batches.

Example:
  python -m tools.keras_parity --float64 --manual_dir=DIR

Prints the largest difference in initial logits, in the gradients of the first step, in the loss
of each step and in the parameters at the end, and the scores on the test set; `ours_in_keras` is
the score of the parameters trained here in a Keras model. DIR holds the four archives of MNIST;
without it the dataset is chosen as by `python -m seqmnist.main`.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmnist import config as config_lib
from seqmnist import process
from seqmnist.config import Config, ModelConfig
from seqmnist.datasets.sources import Prepared
from seqmnist.errors import UserError, explain_storage
from seqmnist.spec import MNIST
from seqmnist.study import interop
from seqmnist.training import batches
from seqmnist.training.loop import Loop, Resident
from seqmnist.training.steps import init_state, make_system, train_step
from tools import cli


def require_keras() -> None:
    """Selects JAX as Keras's backend; raises UserError if Keras is not installed."""
    os.environ["KERAS_BACKEND"] = "jax"
    if not importlib.util.find_spec("keras"):
        raise UserError("Keras is not installed; pip install 'keras>=3.9'")


def make_keras(model: ModelConfig, seed: int, softmax: bool):
    """Returns a compiled Keras model of logits, or with `softmax` of probabilities.

    Its loss clips probabilities, as the notebook's does.
    """
    import keras

    keras.utils.set_random_seed(seed)
    network = interop.build_keras(model, MNIST)
    if softmax:
        network.add(keras.layers.Softmax())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax)
    network.compile(keras.optimizers.RMSprop(), loss, metrics=["accuracy"])
    return network


def compare(
    dataset: Prepared,
    config: Config,
    num_steps: int | None = None,
    softmax: bool = False,
    save: str | os.PathLike | None = None,
) -> dict:
    """Compares an epoch, or its first steps, in Keras with one here.

    `config.seed` is also that of Keras's initial weights, `softmax` is as in `make_keras`, and
    `save` is a file for the trained Keras model.
    """
    parts = [dataset.arrays(split) for split in ("train", "test")]
    arrays = tuple(map(np.concatenate, zip(*parts, strict=True)))
    sizes = (len(labels) for _, labels in parts)
    splits = batches.make_splits(*sizes, config.data.validation_fraction)
    order = batches.epoch_order(config.seed, 0, len(splits["train"]))
    rows = batches.batch_rows(order, config.train.batch_size)[:num_steps]
    theirs = _Keras(config, arrays, softmax)
    ours = _Ours(config, arrays, softmax, theirs.weights())
    first = _unpadded(rows[0])
    figures = {
        "dataset": dataset.name,
        "dtype": theirs.dtype.name,
        "steps": len(rows),
        "initial_logits": _difference([ours.outputs(first)], [theirs.outputs(first)]),
        "first_gradients": _difference(ours.gradients(first), theirs.gradients(first)),
    }
    gaps = np.array([abs(ours.train(row) - theirs.train(row)) for row in rows])
    pairs = list(zip(ours.weights(), theirs.weights(), strict=True))
    figures |= {
        "loss_first_100_steps": gaps[:100].max().item(),
        "loss_all_steps": gaps.max().item(),
        "parameters": _difference(*zip(*pairs, strict=True)),
        "parameters_relative": max(
            (np.linalg.norm(a - b) / np.linalg.norm(b)).item() for a, b in pairs
        ),
        "ours": ours.score(splits["test"]),
        "keras": theirs.score(splits["test"]),
    }
    theirs.model.set_weights(ours.weights())
    figures["ours_in_keras"] = theirs.score(splits["test"])
    if save:
        with explain_storage(f"--save={save}", "choose another path"):
            theirs.save(save)
    return figures


class _Ours:
    def __init__(self, config, arrays, softmax, weights):
        self._config, self._softmax = config, softmax
        self._arrays = jax.device_put(arrays)
        self._system = make_system(config)
        state = init_state(config, self._system, config.seed)
        self._state = jax.tree.map(
            lambda x: x.astype(weights[0].dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )
        interop.from_keras(config.model, self._state.params, weights)
        self._step = jax.jit(
            lambda arrays, state, row: train_step(self._system, state, batches.take(*arrays, row))
        )

    def outputs(self, row):
        logits = self._system.apply(self._state.params, self._arrays[0][row])
        return jax.nn.softmax(logits) if self._softmax else logits

    def gradients(self, row):
        images, labels = (array[row] for array in self._arrays)

        def mean_loss(params):
            logits = self._system.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return interop.to_keras(self._config.model, jax.grad(mean_loss)(self._state.params))

    def train(self, row):
        self._state, sums = self._step(self._arrays, self._state, row)
        return sums.means()["loss"]

    def weights(self):
        return interop.to_keras(self._config.model, self._state.params)

    def score(self, split):
        rows = batches.batch_rows(np.array(split), self._config.train.batch_size)
        loop = Loop(self._system, Resident(*map(np.asarray, self._arrays)))
        return loop.evaluate(self._state.params, rows).means()


class _Keras:
    def __init__(self, config, arrays, softmax):
        import keras

        self._arrays, self.dtype = arrays, np.dtype(keras.config.floatx())
        self.model = make_keras(config.model, config.seed, softmax)
        if self.dtype == np.float64:  # Keras's own tanh casts to float32
            self.model.layers[0].cell.activation = jnp.tanh

    def _examples(self, row):
        images, labels = self._arrays
        return images[row] / self.dtype.type(255), labels[row]

    def outputs(self, row):
        return self.model(self._examples(row)[0])

    def gradients(self, row):
        fixed = [variable.value for variable in self.model.non_trainable_variables]
        images, labels = self._examples(row)

        def mean_loss(weights):
            return self.model.loss(labels, self.model.stateless_call(weights, fixed, images)[0])

        return jax.grad(mean_loss)([variable.value for variable in self.model.trainable_variables])

    def train(self, row):
        self.model.reset_metrics()  # or Keras would report a running mean
        return float(self.model.train_on_batch(*self._examples(_unpadded(row)))[0])

    def weights(self):
        return self.model.get_weights()

    def score(self, split):
        examples = self._examples(slice(split.start, split.stop))
        loss, accuracy = self.model.evaluate(*examples, 128, verbose=0)
        return {"loss": float(loss), "accuracy": float(accuracy)}

    def save(self, path):
        import keras

        self.model.layers[0].cell.activation = keras.activations.tanh  # saved by its name
        self.model.save(path)


def _unpadded(row):
    return row[row != batches.PADDING]


def _difference(ours, theirs) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max().item() for a, b in pairs)


def _main(arguments):
    require_keras()
    config = config_lib.validated(Config(seed=arguments.seed))
    if arguments.save and arguments.save.suffix != ".keras":
        raise UserError(f"--save={arguments.save} must end in .keras")
    process.set_up_jax(config)
    if arguments.float64:
        import keras

        jax.config.update("jax_enable_x64", True)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
    dataset = cli.prepare_digits(arguments)
    figures = compare(dataset, config, arguments.steps, arguments.softmax, arguments.save)
    for name, value in figures.items():
        print(f"{name:24}{value}")
    return figures


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument("--float64", action="store_true", help="compute in double precision")
    parser.add_argument("--steps", type=cli.positive, help="steps of the epoch (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--softmax",
        action="store_true",
        help="let Keras compute probabilities, as the notebook does",
    )
    cli.add_output_argument(parser, "--save", "save the trained network for Keras, as FILE.keras")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
