"""A workdir: it belongs to one run, and to one process at a time."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from seqmnist.errors import UserError

# All that a run writes, and all that starting afresh removes.
CONTENT = ("config.json", "metrics.jsonl", "results.json", "checkpoints", "damaged", "profile")
CONTENT += ("events.out.tfevents.*", "*.partial")


def check(workdir: pathlib.Path) -> None:
    """Refuses early, before anything is made or downloaded, what `make` would refuse.

    Raises:
      UserError: the folder cannot be made or written.
    """
    try:
        nearest = next(path for path in (workdir, *workdir.parents) if path.exists())
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.strerror}); choose another"
        ) from None
    if not nearest.is_dir():
        raise UserError(f"--workdir={workdir}: {nearest} is not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {nearest} is not writable; choose another")


def make(workdir: pathlib.Path) -> None:
    """Makes the folder, and those above it.

    Raises:
      UserError: it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made ({error.strerror}); choose another"
        ) from None


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out; a process that ends, however it ends, keeps out no one.

    Raises:
      UserError: another process holds it.
    """
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--workdir={workdir} is in use by another process; wait for it, or choose another"
            ) from None
        yield
    finally:
        os.close(descriptor)


def clear(workdir: pathlib.Path) -> None:
    """Removes what a run has written there, and nothing else."""
    for pattern in CONTENT:
        for path in workdir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def explain_failure(workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write, such as a full disk, into one line.

    Raises:
      UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror or error}); mend that and run "
            "the same command again: the run goes on from its last checkpoint"
        ) from error
