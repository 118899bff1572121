"""The one exception that means: the user can mend this."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """What a user got wrong, in one line that names the thing and the remedy.

    `main` prints the message on standard error and exits with code 2. Everything else
    that goes wrong keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the three names closest to `name`, as text for a message."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0))


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Looks `name` up in a table of choices.

    Args:
      table: the choices.
      name: the one asked for.
      what: what is chosen, as a user would name it, e.g. "model.cell".

    Raises:
      UserError: `name` is not in the table; the message lists the choices.
    """
    try:
        return table[name]
    except KeyError:
        raise UserError(
            f"config.{what}={name!r} does not exist; choose one of: {', '.join(table)}"
        ) from None
