"""Trains the notebook's network in Keras and here, from the same weights, on the same batches.

Example:
  python -m tools.keras_parity --float64 --manual_dir=DIR

Prints the largest difference in initial logits, in the gradients of the first step, in the
loss of each step, in the parameters at the end, and in the score on the test set; then puts
parameters trained here into a Keras model and scores them there. DIR holds the four archives
of MNIST; without it the dataset is found as `python -m seqmnist.main` finds it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist.config import Config
from seqmnist.datasets.sources import Prepared
from seqmnist.study import interop
from seqmnist.training import batches
from seqmnist.training.loop import Resident
from seqmnist.training.steps import init_state, make_system, train_step
from tools import cli


def compare(
    dataset: Prepared,
    num_steps: int | None = None,
    seed: int = 0,
    softmax: bool = False,
    save: str | None = None,
) -> dict:
    """Compares one epoch in Keras with one here.

    Args:
      dataset: the images.
      num_steps: how many steps of the epoch; None is all.
      seed: of Keras's initial weights and of the epoch order.
      softmax: let Keras's model give probabilities, which its loss clips, as the notebook
        writes it, instead of logits.
      save: a file for the trained Keras model, or None.

    Returns:
      The figures.
    """
    import keras

    config = Config(seed=seed)
    dtype = jnp.dtype(keras.config.floatx())
    images, labels = (
        np.concatenate(pair) for pair in zip(*map(dataset.arrays, ("train", "test")), strict=True)
    )
    sizes = [dataset.num_examples(split) for split in ("train", "test")]
    splits = batches.make_splits(*sizes, config.data.validation_fraction)
    order = batches.epoch_order(seed, 0, len(splits["train"]))
    rows = batches.batch_rows(order, config.train.batch_size)[:num_steps]

    keras.utils.set_random_seed(seed)
    theirs = interop.build_keras(config.model)
    if softmax:
        theirs.add(keras.layers.Softmax())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax)
    theirs.compile(keras.optimizers.RMSprop(), loss, metrics=["accuracy"])

    system = make_system(config)
    state = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        init_state(config, system, seed),
    )
    interop.from_keras(config.model, state.params, theirs.get_weights())

    pairs = [
        (images[row] / np.asarray(255, dtype), labels[row])
        for row in (np.asarray(row[row != batches.PADDING]) for row in rows)
    ]
    logits = system.apply(state.params, jnp.asarray(images[np.asarray(rows[0])]))
    their_logits = np.asarray(theirs(pairs[0][0]))
    figures = {
        "dataset": dataset.name,
        "dtype": dtype.name,
        "steps": len(rows),
        "initial_logits": _difference(jax.nn.softmax(logits) if softmax else logits, their_logits),
        "first_gradients": _difference(
            interop.to_keras(config.model, _our_gradients(system, state, images, labels, rows[0])),
            _their_gradients(theirs, loss, *pairs[0]),
        ),
    }

    arrays = jax.device_put((images, labels))
    step = jax.jit(lambda state, row: train_step(system, state, batches.take(*arrays, row)))
    losses = []
    for row in rows:
        state, sums = step(state, row)
        losses.append(sums.means()["loss"])
    # Reset after each batch, so that Keras reports the batch and not a running mean.
    their_losses = []
    for batch in pairs:
        theirs.reset_metrics()
        their_losses.append(float(theirs.train_on_batch(*batch)[0]))
    gaps = np.abs(np.array(losses) - their_losses)
    weights, their_weights = interop.to_keras(config.model, state.params), theirs.get_weights()
    figures |= {
        "loss_first_100_steps": float(gaps[:100].max()),
        "loss_all_steps": float(gaps.max()),
        "parameters": _difference(weights, their_weights),
        "parameters_relative": max(
            float(np.linalg.norm(ours - other) / np.linalg.norm(other))
            for ours, other in zip(weights, their_weights, strict=True)
        ),
        "ours": _score_here(config, system, state.params, images, labels, splits["test"]),
        "keras": _score_there(theirs, images, labels, splits["test"]),
    }
    theirs.set_weights(weights)
    figures["ours_in_keras"] = _score_there(theirs, images, labels, splits["test"])
    if save:
        theirs.save(save)
    return figures


def enable_float64() -> None:
    """Lets JAX and Keras compute in double precision.

    On JAX, Keras narrows the results of tanh, mean and others to float32, by a table of its
    own that has to be amended.
    """
    from keras import config
    from keras.src.backend.common import dtypes

    jax.config.update("jax_enable_x64", True)
    config.set_floatx("float64")
    config.set_dtype_policy("float64")
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"


def _difference(ours, theirs) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def _our_gradients(system, state, images, labels, row):
    def mean_loss(params):
        logits = system.apply(params, jnp.asarray(images[np.asarray(row)]))
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.mean(log_probabilities[jnp.arange(len(row)), jnp.asarray(labels)[row]])

    return jax.grad(mean_loss)(state.params)


def _their_gradients(model, loss, x, y):
    fixed = [variable.value for variable in model.non_trainable_variables]

    def mean_loss(weights):
        return loss(y, model.stateless_call(weights, fixed, x)[0])

    return jax.grad(mean_loss)([variable.value for variable in model.trainable_variables])


def _score_here(config, system, params, images, labels, split):
    rows = batches.batch_rows(np.array(split), config.train.batch_size)
    return Resident(system, images, labels).evaluate(params, rows).means()


def _score_there(model, images, labels, split):
    x = images[split.start : split.stop] / np.asarray(255, model.weights[0].dtype)
    loss, accuracy = model.evaluate(x, labels[split.start : split.stop], 128, verbose=0)
    return {"loss": float(loss), "accuracy": float(accuracy)}


def _main(arguments):
    if arguments.float64:
        enable_float64()
    figures = compare(
        cli.prepare_data(arguments),
        arguments.steps,
        arguments.seed,
        arguments.softmax,
        arguments.save,
    )
    for name, value in figures.items():
        print(f"{name:24}{value}")
    return figures


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument("--float64", action="store_true", help="compute in double precision")
    parser.add_argument("--steps", type=cli.positive, help="steps of the epoch (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--softmax", action="store_true", help="probabilities, not logits, in Keras"
    )
    parser.add_argument("--save", metavar="FILE.keras", help="save the trained network for Keras")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
