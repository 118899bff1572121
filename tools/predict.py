"""Classifies images: files, folders, or patterns such as 'scans/*.png'.

Example:
  python -m tools.predict --workdir=runs/notebook digit.png scans/
  python -m tools.predict --artifact=runs/notebook/export/classifier.jax_export digit.png

Reads PNG, JPEG, NPY and IDX images of any size, with light strokes on a dark ground or dark strokes
on a light ground, and prepares them as MNIST was prepared. Prints one line per image: the predicted
class, the probabilities of all classes, and the name of the image.
"""

import numpy as np

from seqmnist.errors import UserError
from seqmnist.study import images
from tools import cli


def gather(names: list[str], prepared: bool) -> tuple[list[str], np.ndarray]:
    """Reads files, folders or patterns; raises UserError if one of them cannot be used.

    Returns titles, and images uint8 [N, 28, 28], `prepared` as MNIST was or unchanged.
    """
    prepare = images.prepare if prepared else images.as_it_is
    titles, arrays = [], []
    for path in images.find(names):
        found = images.read(path)
        for i, image in enumerate(found):
            titles.append(str(path) if len(found) == 1 else f"{path}[{i}]")
            arrays.append(prepare(image, titles[-1]))
    return titles, np.stack(arrays)


def _main(arguments):
    if arguments.artifact and arguments.by_row:
        raise UserError("--by_row needs --workdir; an artifact classifies whole images only")
    titles, arrays = gather(arguments.images, not arguments.no_prepare)
    if arguments.artifact:
        from seqmnist.study import export

        network = export.load(arguments.artifact)
    else:
        from seqmnist.study import trained

        network = trained.load(arguments.workdir, arguments.member)
    probabilities = network.probabilities(arrays)
    beliefs = network.beliefs(arrays) if arguments.by_row else None

    print("class " + " ".join(f"{c:>5}" for c in range(probabilities.shape[1])) + "  image")
    answers = []
    for i, (title, row) in enumerate(zip(titles, probabilities, strict=True)):
        print(f"{_line(row)}  {title}")
        answers.append({"image": title, "class": int(row.argmax()), "probabilities": row.tolist()})
        if arguments.by_row:
            for t, belief in enumerate(beliefs[:, i], 1):
                print(f"{_line(belief)}  after time step {t} of {len(beliefs)}")
            answers[-1]["by_row"] = beliefs[:, i].tolist()
    return {"images": answers}


def _line(probabilities):
    return f"{probabilities.argmax():>5} " + " ".join(f"{p:.3f}" for p in probabilities)


def _make_parser():
    parser = cli.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    cli.add_workdir_argument(parser, source)
    source.add_argument("--artifact", metavar="FILE", help="an exported classifier")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, folder or pattern")
    parser.add_argument(
        "--by_row", action="store_true", help="also print the prediction after each time step"
    )
    parser.add_argument("--no_prepare", action="store_true", help="use 28 × 28 pixels unchanged")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
