"""Trains the notebook's network from many seeds, here and in Keras, and compares the scores.

Example:
  python -m tools.seed_distribution --seeds=32 --keras_seeds=8 --figure=seeds.png

Prints the distribution of test accuracy and test loss, the percentile of the notebook's own
score in it, and the p-value of a Mann-Whitney test that both samples have one distribution
(ranks, because the constant learning rate gives the scores a heavy tail).
"""

import pathlib
import tempfile
import time

import numpy as np

from seqmnist import config as config_lib
from seqmnist import process, run
from seqmnist.config import Config, DataConfig
from seqmnist.datasets.sources import Prepared
from seqmnist.errors import explain_storage
from tools import cli
from tools.keras_parity import make_keras, require_keras

# The scores that the notebook prints.
NOTEBOOK = {"accuracy": 0.9307, "loss": 0.2422}
_LINE = (
    "test {} {:5} {count:3d} seeds: {mean:.4f} ± {sd:.4f}, median {median:.4f}, {min:.4f} to "
    "{max:.4f}; the notebook's {} is at percentile {notebook_percentile:.0f}"
)
_LABELS = {"ours": ("seqmnist", "#0072B2"), "keras": ("Keras", "#D55E00")}


def train_here(config: Config) -> dict[str, list[float]]:
    """Trains the members of a configuration; returns {"loss", "accuracy"} on the test set."""
    with tempfile.TemporaryDirectory() as folder:
        test = run.train(config, folder)["test"]
    return {name: np.atleast_1d(test[name]).tolist() for name in NOTEBOOK}


def train_in_keras(config: Config, dataset: Prepared, seeds: range) -> dict[str, list[float]]:
    """Does what `train_here` does in Keras, as the notebook does, one seed after the other."""
    arrays = map(dataset.arrays, ("train", "test"))
    train, test = ((images / np.float32(255), labels) for images, labels in arrays)
    batch_size, num_epochs = config.train.batch_size, config.train.num_epochs
    held_out = config.data.validation_fraction
    found = []
    for seed in seeds:
        model = make_keras(config.model, seed, softmax=True)
        model.fit(*train, batch_size, num_epochs, validation_split=held_out, verbose=0)
        found.append(model.evaluate(*test, batch_size, verbose=0, return_dict=True))
    return {name: [float(scores[name]) for scores in found] for name in NOTEBOOK}


def summarize(samples: dict[str, list[float]], notebook: float) -> dict:
    """Returns the statistics of samples of one score, and the two-sided p-value of a pair."""
    from scipy import stats

    summary = {
        name: {
            "count": len(sample),
            "mean": float(np.mean(sample)),
            "sd": float(np.std(sample, ddof=1)) if len(sample) > 1 else float("nan"),
            "min": min(sample),
            "median": float(np.median(sample)),
            "max": max(sample),
            "notebook_percentile": float(stats.percentileofscore(sample, notebook, kind="mean")),
        }
        for name, sample in samples.items()
    }
    if len(samples) == 2:
        summary["p_value"] = float(stats.mannwhitneyu(*samples.values()).pvalue)
    return summary


def draw(scores: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """Draws the distribution functions of samples and the notebook's score as a PNG image."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, value) in zip(axes, NOTEBOOK.items(), strict=True):
        for who, samples in scores.items():
            label, color = _LABELS[who]
            label = f"{label}, {len(samples[name])} seeds"
            axis.ecdf(samples[name], color=color, label=label, linewidth=2)
        axis.axvline(value, color="black", linestyle="--", label=f"notebook, {value}")
        axis.set_xlabel(f"test {name}")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("fraction of seeds up to this value")
    with explain_storage(f"--figure={path}", "choose another path"):
        figure.savefig(path, dpi=150, format="png")


def _main(arguments):
    if arguments.keras_seeds:
        require_keras()
    dataset = cli.prepare_digits(arguments)
    config = Config(data=DataConfig(dataset.requested, **cli.places(arguments)))
    config.members.num = arguments.seeds
    config = config_lib.validated(config)
    process.set_up_jax(config)
    began = time.monotonic()
    scores = {"ours": train_here(config)}
    seconds = {"ours": time.monotonic() - began}
    if arguments.keras_seeds:
        began = time.monotonic()
        scores["keras"] = train_in_keras(config, dataset, range(arguments.keras_seeds))
        seconds["keras"] = time.monotonic() - began
    summary = {}
    for name, value in NOTEBOOK.items():
        samples = {who: scores[who][name] for who in scores}
        summary[name] = summarize(samples, value)
        for who in scores:
            print(_LINE.format(name, who, value, **summary[name][who]))
        if "p_value" in summary[name]:
            print(f"test {name}, same distribution: p = {summary[name]['p_value']:.3f}")
    if dataset.name != "mnist":
        print(f"NOTICE: these are scores on {dataset.name}, the notebook's are on all of MNIST")
    if arguments.figure:
        draw(scores, arguments.figure)
    return {"dataset": dataset.name, "scores": scores, "summary": summary, "seconds": seconds}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_data_arguments(parser)
    parser.add_argument(
        "--seeds", type=cli.positive, default=32, help="seeds here (default: %(default)s)"
    )
    parser.add_argument(
        "--keras_seeds",
        type=lambda text: 0 if text == "0" else cli.positive(text),
        default=8,
        help="seeds in Keras; 0 leaves Keras out (default: %(default)s)",
    )
    cli.add_output_argument(parser, "--figure", "draw the distributions as a PNG image")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
