"""Errors that a user can fix, and the one way to report them."""

import collections
import contextlib
import contextvars
import difflib
import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

_STORAGE_ERRORS = (
    "ENOSPC", "EDQUOT", "EEXIST", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "EMFILE", "ENFILE",
    "ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "ESTALE", "ENOLCK", "ENXIO", "ENODEV",
)  # fmt: skip
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_ERRNOS = {getattr(errno, name) for name in _STORAGE_ERRORS if hasattr(errno, name)}


class UserError(Exception):
    """An error that a user can fix: one line that names the thing and the remedy.

    Command lines print the message on standard error and exit with code 2, and notebooks show it
    alone. Every other error keeps its traceback.
    """

    def _render_traceback_(self):  # for IPython
        return [f"error: {self}"]


class InUseError(UserError):
    """Another process holds a workdir."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the three names closest to `name`, as text for a message."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0))


# The plugin that is being run, and, by table and name, which of those run with it added a choice.
_ADDING: contextvars.ContextVar = contextvars.ContextVar("adding", default=None)


@contextlib.contextmanager
def adding(file: str, owners: dict[tuple[int, str], str]) -> Iterator[None]:
    """Refuses to let a file replace choices that another one with the same `owners` has added."""
    token = _ADDING.set((file, owners))
    try:
        yield
    finally:
        _ADDING.reset(token)


class Table(collections.UserDict[str, T]):
    """What a configuration can name: choices of the library, to which plugins add others."""

    def __init__(self, choices: Mapping[str, T], reserved: Iterable[str] = ()):
        self._library = {**dict.fromkeys(reserved), **choices}
        super().__init__(choices)

    def __setitem__(self, name: str, choice: T) -> None:
        """Adds or replaces a choice; raises UserError if its name is taken, see `adding`."""
        if name in self._library and choice is not self._library[name]:
            raise UserError(f"{name!r} is a name of the library; choose another")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{name!r} cannot be a name; use letters, digits, '_', '-' and '.'")
        file, owners = _ADDING.get() or (None, {})
        if (owner := owners.setdefault((id(self), name), file)) != file:
            raise UserError(f"{name!r} is also a name of {owner}; choose another in one of them")
        super().__setitem__(name, choice)

    def __ior__(self, choices):
        self.update(choices)  # through `__setitem__`
        return self

    def is_own(self, name: str) -> bool:
        """Returns whether a plugin added this choice."""
        return name in self and name not in self._library


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


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or the error's type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def storage_reason(error: BaseException | None) -> str | None:
    """Returns why the disk refused, e.g. "No space left on device"; None for any other error.

    Storage libraries report what the operating system said as text in errors of their own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return error.strerror
        for number in _ERRNOS:
            if os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__
    return None


@contextlib.contextmanager
def explain_storage(what: str, remedy: str) -> Iterator[None]:
    """Turns an error of the disk into one line; every other error passes.

    Args:
      what: what is written, e.g. "--workdir=runs/a".
      remedy: what the user can do.

    Raises:
      UserError: in place of an error that `storage_reason` recognizes.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, UserError) else storage_reason(error)
        if reason is None:
            raise
        raise UserError(f"{what} cannot be written ({reason}); {remedy}") from error


@contextlib.contextmanager
def explain_any(what: str, remedy: str) -> Iterator[None]:
    """Turns any error within a block into one line: readers of files raise a dozen types.

    Args:
      what: what failed, e.g. "a.png cannot be read".
      remedy: what the user can do.

    Raises:
      UserError: in place of any `Exception` but one of memory.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{what} ({reason}); {remedy}") from error


@contextlib.contextmanager
def no_warnings_of(name: str) -> Iterator[None]:
    """Keeps warnings out of the log `name` within a block; errors pass."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)
