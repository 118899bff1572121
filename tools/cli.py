"""What the tools share: arguments, errors in one line, and results as JSON."""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from seqmnist import paths, process, workdir
from seqmnist.config import PLACES
from seqmnist.errors import UserError, explain_storage
from seqmnist.spec import MNIST

if TYPE_CHECKING:
    from seqmnist.datasets import sources
    from seqmnist.study import trained


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring and accepts --json."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    prog = f"python -m {module.name}" if module else None
    parser = process.Parser(prog=prog, description=doc)
    add_output_argument(parser, "--json", "write all numbers to this file")
    return parser


def add_output_argument(parser: argparse.ArgumentParser, flag: str, help_: str) -> None:
    """Adds a flag for a file to write; a path that cannot be written is refused before any work."""

    def output_file(text):
        path = paths.resolve(text, flag)
        if not path.parent.is_dir():
            raise UserError(f"{flag}={text}: there is no folder {path.parent}; create it first")
        if path.is_dir():
            raise UserError(f"{flag}={text} is a folder; name a file")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{flag}={text} is no regular file; choose another path")
        if flag == "--json" and path.exists():
            with explain_storage(f"--json={text}", "choose another path"), path.open("rb") as file:
                if file.read(1) not in (b"", b"{"):
                    raise UserError(f"--json={text} exists and is not JSON; choose another path")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UserError(f"{flag}={text}: {path.parent} is not writable; choose another folder")
        return path

    parser.add_argument(flag, type=output_file, metavar="FILE", help=help_)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `prepare_digits` reads."""
    parser.add_argument(
        "--data_name", default="auto", help="as --config.data.name (default: %(default)s)"
    )
    add_place_arguments(parser)


def add_workdir_argument(parser: argparse.ArgumentParser, choices=None) -> None:
    """Adds --member, --checkpoint and --workdir; the last is required, or one of `choices`."""
    (choices or parser).add_argument(
        "--workdir", metavar="DIR", required=not choices, help="folder of a trained run"
    )
    parser.add_argument(
        "--member",
        type=int,
        help="number of a member, from 0 (default: the one with the lowest validation loss)",
    )
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest, best by validation loss, or the number of a step (default: %(default)s)",
    )


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data_dir and --manual_dir."""
    for name in PLACES:
        parser.add_argument(
            f"--{name}",
            metavar="DIR",
            type=lambda text: None if text.lower() == "none" else text,
            default=argparse.SUPPRESS,
            help=f"in place of config.data.{name}; none is its default",
        )


def places(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Returns those of --data_dir and --manual_dir that were given."""
    return {name: folder for name, folder in vars(arguments).items() if name in PLACES}


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `trained.load` besides the workdir."""
    found = places(arguments)
    return {"member": arguments.member, "checkpoint": arguments.checkpoint, "places": found}


def load(arguments: argparse.Namespace) -> "trained.Trained":
    """Loads the network that the arguments name."""
    from seqmnist.study import trained  # imported here: --help needs no JAX

    process.check_devices()
    return trained.load(arguments.workdir, **chosen(arguments))


def prepare_digits(arguments: argparse.Namespace) -> "sources.Prepared":
    """Prepares the dataset that the arguments name, and prints its notice.

    Raises UserError unless it has the shape of MNIST.
    """
    from seqmnist import interface  # imported here: --help needs no JAX

    data = interface.load_data(arguments.data_name, **places(arguments))
    if (data.spec.shape, data.spec.num_classes) != (MNIST.shape, MNIST.num_classes):
        raise UserError(
            f"{data.name} does not have the size and the number of classes of MNIST, which the "
            "notebook's network reads; name another with --data_name"
        )
    return data


def positive(text: str) -> int:
    """Parses a whole number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def print_table(columns: Sequence[str], rows: Iterable[Iterable], title: str | None = None) -> None:
    """Prints a table, unless it has no rows; numbers are rounded to three digits."""
    from rich import box, console, table  # imported here: most tools print none

    grid = table.Table(*columns, title=title, box=box.SIMPLE_HEAD)
    for row in rows:
        grid.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row))
    if grid.row_count:
        width = shutil.get_terminal_size((100, 0)).columns
        console.Console(highlight=False, width=width).print(grid)


def call(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> int:
    """Runs a tool on the command line's arguments and writes the numbers it returns to --json.

    `main` returns numbers, or numbers and an exit code. Returns the tool's exit code, see
    `process.exit_code`.
    """

    def command():
        arguments = parser.parse_args()
        numbers = main(arguments)
        numbers, code = numbers if isinstance(numbers, tuple) else (numbers, 0)
        if arguments.json:
            with explain_storage(f"--json={arguments.json}", "choose another path"):
                workdir.write_json(arguments.json, numbers)
        return code

    return process.exit_code(command)


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> None:
    """Does what `call` does and ends the process with its exit code."""

    def notice(unraisable):
        if unraisable.exc_type is KeyboardInterrupt:  # in a callback, which ignores exceptions
            process.leave(130)
        if unraisable.exc_type is SystemExit:
            process.leave(unraisable.exc_value.code)
        sys.__unraisablehook__(unraisable)

    sys.unraisablehook = notice
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that unfinished files are removed
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process.leave(call(parser, main))
