"""Classifies images: files, folders, or patterns such as 'scans/*.png'.

Example:
  python -m tools.predict --workdir=runs/notebook digit.png scans/
  python -m tools.predict --artifact=runs/notebook/export/classifier.jax_export digit.png

Reads pictures of any format that Pillow decodes, NPY and IDX, of any size. For a network of MNIST's
digits, with light strokes on a dark ground or dark strokes on a light ground, they are prepared as
MNIST was; for any other network they are resized, and become gray or colored, as its images are.
Prints one line per image: the predicted class, probabilities, and the name of the image.
"""

import pathlib
from collections.abc import Iterable

import numpy as np

from seqmnist.errors import UserError
from seqmnist.spec import ImageSpec
from seqmnist.study import images
from tools import cli

_MAX_WIDTH = 100  # of a table of all probabilities; if it is wider, the highest three are printed


def gather(
    files: Iterable[pathlib.Path], spec: ImageSpec, prepared: bool
) -> tuple[list[str], np.ndarray]:
    """Reads files; raises UserError if one of them cannot be used.

    Returns titles, and images uint8 [N, *spec.shape], `prepared` for the network or not resized.
    """
    prepare = images.prepare if prepared else images.as_it_is
    titles, arrays = [], []
    for path in files:
        found = images.read(path)
        for i, image in enumerate(found):
            titles.append(str(path) if len(found) == 1 else f"{path}[{i}]")
            arrays.append(prepare(image, titles[-1], spec))
    return titles, np.stack(arrays)


def _main(arguments):
    if arguments.artifact and arguments.by_row:
        raise UserError("--by_row needs --workdir; an artifact classifies whole images only")
    files = images.find(arguments.images)
    if arguments.artifact:
        from seqmnist.study import export

        network = export.load(arguments.artifact)
    else:
        network = cli.load(arguments)
    names = network.spec.class_names
    titles, arrays = gather(files, network.spec, not arguments.no_prepare)
    probabilities = network.probabilities(arrays)
    beliefs = network.beliefs(arrays) if arguments.by_row else None

    head, to_line = _format(names)
    print(f"{head}  image")
    answers = []
    for i, (title, row) in enumerate(zip(titles, probabilities, strict=True)):
        print(f"{to_line(row)}  {title}")
        label = int(row.argmax())
        answers.append({"image": title, "class": label, "class_name": names[label]})
        answers[-1]["probabilities"] = row.tolist()
        if arguments.by_row:
            for t, belief in enumerate(beliefs[:, i], 1):
                print(f"{to_line(belief)}  after time step {t} of {len(beliefs)}")
            answers[-1]["by_row"] = beliefs[:, i].tolist()
    step = None if arguments.artifact else network.step
    return {"images": answers, "class_names": list(names), "checkpoint": step}


def _format(names):
    """Returns a head, and how probabilities become a line below it."""
    first = max(5, *map(len, names))
    widths = [max(5, len(name)) for name in names]
    if first + sum(widths) + len(names) > _MAX_WIDTH:
        num = min(len(names), 3)

        def to_line(row):
            best = np.argsort(-row, kind="stable")[:num]
            return "  ".join(f"{names[c]:>{first}} {row[c]:.3f}" for c in best)

        return "  ".join(
            f"{head:>{first}} {'p':>5}" for head in ("class", "or", "or")[:num]
        ), to_line

    def to_line(row):
        cells = [f"{p:>{width}.3f}" for p, width in zip(row, widths, strict=True)]
        return " ".join([f"{names[row.argmax()]:>{first}}", *cells])

    cells = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
    return " ".join([f"{'class':>{first}}", *cells]), to_line


def _make_parser():
    parser = cli.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    cli.add_workdir_argument(parser, source)
    source.add_argument("--artifact", metavar="FILE", help="an exported classifier")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, folder or pattern")
    parser.add_argument(
        "--by_row", action="store_true", help="also print the prediction after each time step"
    )
    parser.add_argument(
        "--no_prepare", action="store_true", help="use images of the network's size, not resized"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
