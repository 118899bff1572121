"""What every tool shares: its arguments, its one-line errors, its figures as JSON."""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import logging

from seqmnist import records
from seqmnist.datasets import sources
from seqmnist.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring, with its example, and takes --json."""
    parser = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=pathlib.Path, help="write every figure to this file")
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `prepare_data` reads."""
    parser.add_argument("--data_name", default="auto", help="as --config.data.name (%(default)s)")
    parser.add_argument("--data_dir", help="as --config.data.data_dir")
    parser.add_argument("--manual_dir", help="as --config.data.manual_dir")


def add_workdir_argument(group, parser: argparse.ArgumentParser | None = None) -> None:
    """Adds --workdir, required unless the group of choices it joins is, and --member."""
    help_ = "what a run has written"
    required = {} if parser else {"required": True}
    group.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help=help_, **required)
    (parser or group).add_argument(
        "--member", type=int, help="of a run of several (the best by validation loss)"
    )


def prepare_data(arguments: argparse.Namespace) -> sources.Prepared:
    """Prepares the dataset that the arguments name, and says which it is."""
    prepared = sources.prepare(
        arguments.data_name,
        data_dir=arguments.data_dir,
        manual_dir=arguments.manual_dir,
        verify_checksums=True,
        say=print,
    )
    if prepared.notice:
        print(f"NOTICE: {prepared.notice}")
    return prepared


def positive(text: str) -> int:
    """Parses a whole number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> None:
    """Parses the command line, runs a tool, and writes the figures that it returns.

    A user's mistake ends with one line and exit code 2.
    """
    logging.set_verbosity(logging.FATAL)  # keep the libraries' diaries off the screen
    try:
        arguments = parser.parse_args()
        figures = main(arguments)
        if arguments.json:
            try:
                records.write_json(arguments.json, figures)
            except OSError as error:
                raise UserError(f"--json={arguments.json}: {error.strerror}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
