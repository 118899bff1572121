"""Paths that a user writes: expanded, absolute and checked, or refused in one line."""

import contextlib
import os
import pathlib
import re

from seqmnist.errors import UserError

# Orbax, TensorStore and ArrayRecord take these as patterns, separators or cloud addresses.
_NOT_STORABLE = re.compile(r"[\[\]*?\\]|gs:|s3:")


def resolve(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns the absolute path that a user means; creates nothing and keeps symbolic links.

    Args:
      path: what the user wrote; `~` and `~user` are home folders.
      name: the flag or field, for the message, e.g. "--workdir".

    Raises:
      UserError: no file can have this path.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise UserError(f"{name}={path!r} is no path; choose another path")
    text = os.fspath(path)

    def refuse(reason):
        shown = ascii(text)[1:-1]
        shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
        raise UserError(f"{name}={shown} {reason}; choose another path")

    if not isinstance(text, str) or not text.isprintable():  # surrogates are not printable
        refuse("is not printable text")
    if not text.strip():
        refuse("is empty")
    if re.match(r"\w[\w+.-]+:/", text):
        refuse("is an address; only folders and files of this machine's disks are supported")
    try:
        absolute = pathlib.Path(text).expanduser().absolute()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            absolute.stat()
    except RuntimeError as error:
        refuse(f"has no home folder ({error})")
    except OSError as error:  # also of a relative path, if the current folder has been removed
        refuse(f"cannot be used ({error.strerror})")
    return absolute


def natural_order(path: str | os.PathLike) -> tuple[list[str | int], str]:
    """Returns a key that sorts 2 before 10."""
    text = os.fspath(path)
    parts = re.split(r"(\d+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def resolve_storage(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Returns what `resolve` does, for a folder in which storage libraries write.

    Raises:
      UserError: no file can have this path, or storage libraries would take it for another.
    """
    absolute = resolve(path, name)
    if found := _NOT_STORABLE.search(str(absolute)):
        raise UserError(
            f"{name}={absolute} contains {found[0]!r}, which storage libraries do not take as part "
            "of a name; choose another path"
        )
    return absolute
