"""Classifies images: files, folders, or patterns such as 'scans/*.png'.

Example:
  python -m tools.predict --workdir=runs/notebook digit.png scans/
  python -m tools.predict --artifact=runs/notebook/export/classifier.jax_export digit.png

Reads pictures of any format that Pillow decodes, NPY, NPZ and IDX, of any size; folders with their
sub-folders. For a network of MNIST's digits, the digit is found, dark on light paper or light on a
dark background, and prepared as MNIST was; for any other network, images are resized, and made gray
or colored like those that it was trained on. Prints one line per image: the predicted class, the
probabilities, and the name of the image.

For an image that cannot be used, one line is printed on standard error. The exit code is 1 if some
images cannot be used, and 2 if none can.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from seqmnist import paths
from seqmnist.errors import UserError, explain_storage
from seqmnist.spec import ImageSpec
from seqmnist.study import images
from tools import cli

_MAX_WIDTH = 100  # of a table of all probabilities; if it is wider, the highest three are printed


def gather(
    files: Iterable[pathlib.Path], spec: ImageSpec, prepared: bool = True, several: bool = False
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Reads the images of files, and prepares them for the network if `prepared`.

    Returns an entry for each, as in --json, {"image": its title, …}, and for each entry without an
    "error" an array uint8 [*spec.shape]. If an image shows several digits, there is an entry for
    each with `several`, else one for the largest, with a "warning".
    """
    entries, arrays = [], []
    finds_digits, is_resized = images.is_of_digits(spec), False
    for path in files:
        with _noting_errors(entries, str(path)):
            found = images.read(path, any_range=prepared and finds_digits, spec=spec)
            for i, image in enumerate(found):
                title = str(path) if len(found) == 1 else f"{path}[{i}]"
                with _noting_errors(entries, title):
                    if prepared:
                        is_resized |= not finds_digits and image.shape[:2] != spec.shape[:2]
                        digits, largest = images.prepare_all(image, title, spec)
                    else:
                        digits, largest = [images.as_it_is(image, title, spec)], 0
                    for k in range(len(digits)) if several else [largest]:
                        entry = {"image": title}
                        if several and len(digits) > 1:
                            entry["digit"] = k + 1
                        elif len(digits) > 1:
                            entry["warning"] = f"{title} shows {len(digits)} digits; the answer is "
                            entry["warning"] += "for the largest; --several answers all"
                            _say(f"warning: {entry['warning']}")
                        entries.append(entry)
                        arrays.append(digits[k])
    if is_resized:
        _say("NOTICE: images are only resized; light and dark must be as in the training set")
    return entries, arrays


@contextlib.contextmanager
def _noting_errors(entries: list, title: str) -> Iterator[None]:
    """Prints a UserError and adds an entry for it, so that the other images are still read."""
    try:
        yield
    except UserError as error:
        _say(f"error: {error}")
        entries.append({"image": title, "error": str(error)})


def _say(line):
    print(_printable(line), file=sys.stderr)


def _printable(line):
    """The name of a file may hold any character, also a new line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _main(arguments):
    if arguments.artifact is not None:
        if arguments.by_row:
            raise UserError("--by_row needs --workdir; an artifact classifies whole images only")
        if arguments.member is not None or arguments.checkpoint != "newest":
            raise UserError("--member and --checkpoint need --workdir; an artifact is one network")
    entries, files = [], []
    for name in arguments.images:
        with _noting_errors(entries, name):
            files += images.find(name, _say)
    if not files:
        return {"images": entries}, 2
    if arguments.artifact is not None:
        from seqmnist.study import export

        network = export.load(arguments.artifact)
    else:
        network = cli.load(arguments)
    names = network.spec.class_names
    found, arrays = gather(files, network.spec, not arguments.no_prepare, arguments.several)
    entries += found
    answers = [entry for entry in entries if "error" not in entry]
    if answers:
        if arguments.save_prepared:
            _save(arguments.save_prepared, answers, arrays)
        _answer(network, answers, np.stack(arrays), arguments.by_row)
    step = None if arguments.artifact is not None else network.step
    numbers = {"images": entries, "class_names": list(names), "checkpoint": step}
    return numbers, 0 if len(answers) == len(entries) else 1 if answers else 2


def _answer(network, entries, arrays, by_row):
    """Classifies images, completes their entries and prints them."""
    names = network.spec.class_names
    probabilities = network.probabilities(arrays)
    beliefs = network.beliefs(arrays) if by_row else None
    head, to_line = _format(names)
    print(f"{head}  image")
    for i, (entry, row) in enumerate(zip(entries, probabilities, strict=True)):
        digit = f", digit {entry['digit']}" if "digit" in entry else ""
        print(_printable(f"{to_line(row)}  {entry['image']}{digit}"))
        label = int(row.argmax())
        entry |= {"class": label, "class_name": names[label], "probabilities": row.tolist()}
        if by_row:
            for t, belief in enumerate(beliefs[:, i], 1):
                print(f"{to_line(belief)}  after time step {t} of {len(beliefs)}")
            entry["by_row"] = beliefs[:, i].tolist()


def _save(folder, entries, arrays):
    """Writes the images that the network sees, and adds their paths to the entries."""
    from PIL import Image

    with explain_storage(f"--save_prepared={folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for i, (entry, array) in enumerate(zip(entries, arrays, strict=True)):
            # The name may already be as long as the disk allows.
            path = folder / f"{i:05}-{pathlib.Path(entry['image']).name[:40]}.png"
            Image.fromarray(array).save(path)
            entry["prepared"] = str(path)


def _format(names):
    """Returns a heading, and a function that turns probabilities [C] into a line below it."""
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
    source.add_argument("--artifact", metavar="FILE", help="exported classifier, instead of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, folder or pattern")
    parser.add_argument(
        "--by_row", action="store_true", help="also print the prediction after each time step"
    )
    parser.add_argument(
        "--no_prepare",
        action="store_true",
        help="use images as they are, all of the network's size",
    )
    parser.add_argument(
        "--several", action="store_true", help="classify each digit of an image, from left to right"
    )
    parser.add_argument(
        "--save_prepared",
        type=lambda text: paths.resolve(text, "--save_prepared"),
        metavar="DIR",
        help="write the images that the network saw to this folder",
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
