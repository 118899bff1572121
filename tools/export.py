"""Exports a trained network to DIR/export: StableHLO, safetensors, a model card, and a page.

Example:
  python -m tools.export --workdir=runs/notebook
  python -m tools.predict --artifact=runs/notebook/export/classifier.jax_export digit.png

The exported classifier maps images uint8 [B, H, W], or [B, H, W, 3] if it reads colors, for any B,
to logits [B, C], on CPU, GPU and TPU, without this package; so does step.jax_export, (state, time
step) -> (state, logits), unless the network reads in both directions. Another process, which has
only JAX, first checks that both compute the same logits as the network.

draw.html is a page to draw on: it runs the network in a browser, from its parameters, and shows how
the prediction changes by time step. It is one file that needs neither a server nor a network.
"""

import pathlib

from seqmnist.errors import UserError, explain_storage
from seqmnist.workdir import write_aside
from tools import cli

_EXAMPLE = pathlib.Path(__file__).parent / "pictures" / "digits" / "7.png"


def _main(arguments):
    from seqmnist.study import card, export, images  # here, not above: --help needs no JAX

    network = cli.load(arguments)
    workdir, facts = network.workdir.path, (network.config, network.results, network.member)
    streaming = None if network.config.model.bidirectional else network.streaming()
    spec = network.spec
    text = card.model_card(workdir.name, *facts, spec, network.step, streaming)
    example = _EXAMPLE if images.is_of_digits(spec) else None

    def classify(images):
        return network.system.apply(network.params, images)

    figures = export.write(workdir, classify, network.params, text, spec, streaming, example)
    figures["files"] |= _write_page(network)
    for name, size in figures["files"].items():
        print(f"{workdir / export.DIRECTORY / name}: {size:,} bytes")
    for name, difference in figures["largest_difference"].items():
        what = f"{export.NUM_STEPS} steps" if name == "step" else f"batch of {name}"
        print(f"Largest difference in another process, {what}: {difference:.1e}")
    return figures | {"checkpoint": network.step}


def _write_page(network):
    """Writes the page, if the network has JavaScript; returns its size by name."""
    from seqmnist.study import export, page

    path = network.workdir.path / export.DIRECTORY / page.PAGE
    remedy = "make room or move it away, then run the same command again"
    with explain_storage(str(path), remedy):
        try:
            text = page.make(network.config.model, network.spec, export.by_name(network.params))
        except UserError as error:
            print(f"NOTICE: {path} is not written: {error}")
            path.unlink(missing_ok=True)  # another network's
            return {}
        write_aside(path, text.encode())
    return {page.PAGE: path.stat().st_size}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
