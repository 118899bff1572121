"""Exports a trained network: StableHLO, safetensors and a model card, in DIR/export.

Example:
  python -m tools.export --workdir=runs/notebook
  python -m tools.predict --artifact=runs/notebook/export/classifier.jax_export digit.png

The exported classifier takes images uint8 [B, 28, 28], of any B, and gives logits [B, 10], on
CPU, GPU and TPU, without this package. It is declared good once another process, which does not
know the model, has given the same answers from it.
"""

from tools import cli


def _main(arguments):
    from seqmnist import config as config_lib
    from seqmnist.study import export, trained

    network = trained.load(arguments.workdir, arguments.member)
    card = export.model_card(
        network.workdir.resolve().name,
        config_lib.to_dict(network.config),
        network.results,
        network.member,
    )

    def classify(images):
        return network.system.apply(network.params, images)

    figures = export.write(network.workdir, classify, network.params, card)
    for name, size in figures["files"].items():
        print(f"{network.workdir / export.DIRECTORY / name}: {size:,} bytes")
    for size, difference in figures["largest_difference"].items():
        print(f"Checked in a process without the model, batch of {size}: {difference:.1e}")
    return figures


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
