"""Trains the notebook's network from many seeds, here and in Keras, and compares the scores.

Example:
  python -m tools.seed_distribution --seeds=32 --keras_seeds=8 --figure=seeds.png

Prints mean, standard deviation and range of test accuracy and test loss, the p-value of a
Mann-Whitney test that both come from one distribution (ranks: the constant learning rate
leaves a heavy tail), and the percentile at which the notebook's own score falls.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from seqmnist.config import Config
from seqmnist.study import interop
from seqmnist.training import batches, devices
from seqmnist.training.loop import Resident
from seqmnist.training.steps import init_state, make_system
from tools import cli

# What the notebook prints at its end.
NOTEBOOK = {"accuracy": 0.9307, "loss": 0.2422}


def train_here(config: Config, seeds: np.ndarray, images, labels, splits) -> dict[str, list]:
    """Trains a member for each seed, all in one program, spread over the devices.

    Args:
      config: the configuration of every member, but for its seed.
      seeds: uint32 [S].
      images: uint8 [N, 28, 28].
      labels: int32 [N].
      splits: as `batches.make_splits` returns them.

    Returns:
      {"loss", "accuracy"} on the test set, a list of S each.
    """
    num_devices = max(n for n in range(1, len(jax.devices()) + 1) if len(seeds) % n == 0)
    mesh = devices.make_mesh(num_devices, 1)
    batch_size, train = config.train.batch_size, splits["train"]
    num_steps = config.train.num_epochs * batches.num_batches(len(train), batch_size)
    system = make_system(config, num_steps)
    loop = Resident(system, images, labels, mesh, True)
    each = devices.over_mesh(
        lambda seed: init_state(config, system, seed), mesh, [P()], [], P(), has_members=True
    )
    state = jax.jit(each)(devices.spread(mesh, np.asarray(seeds, np.uint32), "member"))
    for epoch in range(config.train.num_epochs):
        orders = [batches.epoch_order(seed, epoch, len(train)) for seed in seeds]
        rows = np.stack([batches.batch_rows(order, batch_size) for order in orders])
        for progress in loop.train(loop.start(state), rows):
            state = progress.state
    test = batches.batch_rows(np.array(splits["test"]), batch_size)
    return loop.evaluate(state.params, test).means()


def train_in_keras(config: Config, seed: int, images, labels, splits) -> dict[str, float]:
    """Trains one network in Keras as the notebook does; arguments as of `train_here`."""
    import keras

    keras.utils.set_random_seed(seed)
    model = interop.build_keras(config.model)
    model.add(keras.layers.Softmax())
    model.compile(
        keras.optimizers.RMSprop(), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    images = images.astype(np.float32) / 255
    size, batch_size = splits["test"].start, config.train.batch_size
    model.fit(
        images[:size],
        labels[:size],
        batch_size=batch_size,
        epochs=config.train.num_epochs,
        validation_split=config.data.validation_fraction,
        verbose=0,
    )
    loss, accuracy = model.evaluate(images[size:], labels[size:], batch_size, verbose=0)
    return {"loss": float(loss), "accuracy": float(accuracy)}


def summarize(ours: list[float], theirs: list[float], notebook: float) -> dict:
    """Compares two samples of one score.

    Returns:
      Mean, standard deviation, least and largest of each, the two-sided p-value of the
      Mann-Whitney test, and the notebook's percentile in each.
    """
    from scipy import stats

    figures = {
        name: {
            "count": len(sample),
            "mean": float(np.mean(sample)),
            "sd": float(np.std(sample, ddof=1)),
            "min": min(sample),
            "median": float(np.median(sample)),
            "max": max(sample),
            "notebook_percentile": float(stats.percentileofscore(sample, notebook, kind="mean")),
        }
        for name, sample in (("ours", ours), ("keras", theirs))
    }
    return {**figures, "p_value": float(stats.mannwhitneyu(ours, theirs).pvalue)}


def draw(scores: dict[str, dict[str, list[float]]], path: str) -> None:
    """Draws the distribution functions of both samples, and where the notebook falls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        for who, color in (("ours", "#0072B2"), ("keras", "#D55E00")):
            sample = scores[who][name]
            label = f"{'seqmnist' if who == 'ours' else 'Keras'}, {len(sample)} seeds"
            axis.ecdf(sample, color=color, label=label, linewidth=2)
        value = NOTEBOOK[name]
        axis.axvline(value, color="black", linestyle="--", label=f"notebook, {value}")
        axis.set_xlabel(f"test {name}")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of seeds at most there")
    figure.savefig(path, dpi=150)


def _main(arguments):
    # Two cores train two members at once faster than one member after the other.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    dataset = cli.prepare_data(arguments)
    config = Config()
    images, labels = (
        np.concatenate(pair) for pair in zip(*map(dataset.arrays, ("train", "test")), strict=True)
    )
    sizes = [dataset.num_examples(split) for split in ("train", "test")]
    splits = batches.make_splits(*sizes, config.data.validation_fraction)

    began = time.monotonic()
    ours = train_here(config, np.arange(arguments.seeds), images, labels, splits)
    seconds = {"ours": time.monotonic() - began}
    began = time.monotonic()
    runs = [
        train_in_keras(config, seed, images, labels, splits)
        for seed in range(arguments.keras_seeds)
    ]
    seconds["keras"] = time.monotonic() - began
    scores = {"ours": ours, "keras": {name: [run[name] for run in runs] for name in NOTEBOOK}}
    summary = {
        name: summarize(scores["ours"][name], scores["keras"][name], NOTEBOOK[name])
        for name in NOTEBOOK
    }
    for name, figures in summary.items():
        for who in ("ours", "keras"):
            print(
                "test {} {:5} {count:3d} seeds: {mean:.4f} ± {sd:.4f}, median {median:.4f}, "
                "{min:.4f} to {max:.4f}; the notebook's {} is at percentile "
                "{notebook_percentile:.0f}".format(name, who, NOTEBOOK[name], **figures[who])
            )
        print(f"test {name} one distribution? p = {figures['p_value']:.3f}")
    if arguments.figure:
        draw(scores, arguments.figure)
    return {"dataset": dataset.name, "scores": scores, "summary": summary, "seconds": seconds}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument("--seeds", type=cli.positive, default=32, help="(default: 32)")
    parser.add_argument("--keras_seeds", type=cli.positive, default=8, help="(default: 8)")
    parser.add_argument("--figure", metavar="FILE.png", help="draw both distributions")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
