"""Settings of the whole process. Only command lines use them; library functions change none."""

import argparse
import codecs
import contextlib
import errno
import logging
import os
import pathlib
import shutil
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable

from seqmnist.config import Config
from seqmnist.errors import UserError, one_line, storage_reason
from seqmnist.stop import StopRequest

# The compilation cache holds programs of a few MB; the least recently used ones go first.
_CACHE_BYTES = 1 << 30
_ASCII = {"×": "x", "→": "->", "±": "+/-", "…": "...", "–": "-", "²": "2"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help raises OSError if the disk is full."""

    def __init__(self, description, **settings):
        """Takes the settings of `argparse.ArgumentParser`, and a description: a docstring."""
        width = max(11, shutil.get_terminal_size().columns - 2)  # as argparse's own
        blocks = (description or "").strip().split("\n\n")  # python -OO removes docstrings
        description = "\n\n".join(
            block if "\n  " in block else textwrap.fill(block, width) for block in blocks
        )
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, formatter_class=as_written, allow_abbrev=False, **settings
        )

    def error(self, message):
        """Raises UserError."""
        raise UserError(f"{textwrap.shorten(message, 300)}; see --help")

    def print_help(self, file=None):
        """Prints the help."""
        print(self.format_help(), end="", file=file)


def prepare_output() -> None:
    """Makes output work in any encoding, and silences the logs of libraries."""

    def replace(error):
        part = error.object[error.start : error.end]
        return "".join(_ASCII.get(character, "?") for character in part), error.end

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed in the shell, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    codecs.register_error("ascii_substitutes", replace)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="ascii_substitutes")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")

    def report(failure):
        """Hides storage errors: threads of libraries repeat what the main thread has reported."""
        if storage_reason(failure.exc_value) is None:
            threading.__excepthook__(failure)

    threading.excepthook = report
    previous = sys.unraisablehook

    def report_unraisable(failure):
        """Hides that TensorStore calls an event loop that Orbax closed after an error."""
        if str(failure.exc_value) != "Event loop is closed":
            previous(failure)

    sys.unraisablehook = report_unraisable


def listen(stop: StopRequest) -> None:
    """Passes SIGINT, SIGTERM and SIGHUP to `stop`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, stop.receive)


def set_up_jax(config: Config) -> None:
    """Chooses the number of CPU devices and where compiled programs are kept.

    CPU cores become devices as far as there are members, or parts of a batch, for them, or as
    `config.mesh` asks; not if XLA_FLAGS sets the number of devices, or if JAX already uses its
    devices. Raises UserError as `check_devices` does.
    """
    import jax  # imported here: command lines answer --help without it

    from seqmnist.training import devices, members

    num_members = len(members.list_members(config))
    num_devices = devices.num_useful_cores(num_members, config.train.batch_size)
    if not jax.distributed.is_initialized():  # a mesh then spans the devices of all processes
        num_devices = max(num_devices, max(1, config.mesh.member) * max(1, config.mesh.data))
    is_chosen = "xla_force_host_platform_device_count" in os.getenv("XLA_FLAGS", "")
    if num_devices > 1 and not is_chosen:
        with contextlib.suppress(RuntimeError):  # devices are in use
            jax.config.update("jax_num_cpu_devices", min(num_devices, num_cores()))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if jax.config.jax_compilation_cache_dir is None and os.path.isabs(home):  # there is a home
        # Not the folder of earlier versions: their entries lack the times that a limit needs.
        folder = pathlib.Path(home) / "seqmnist" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_threefry_partitionable", True)  # else other numbers are drawn
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    check_devices()


def check_devices() -> None:
    """Raises UserError if there is no device of JAX_PLATFORMS."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former says nothing
        if not (platforms := jax.config.jax_platforms):
            raise
        reason = f" ({one_line(error)})" if str(error) else ""
        raise UserError(
            f"JAX finds no device of JAX_PLATFORMS={platforms}{reason}; unset it, or choose cpu"
        ) from error


def num_cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command line and returns its exit code, after printing what ended it.

    The exit code is what `command` returns or exits with; 2 after the line of an error that a user
    can fix; 130 after Ctrl-C; 141 if the output is a closed pipe; 1 after any other error.
    """
    try:
        try:
            prepare_output()
            code = command() or 0
        except SystemExit as error:
            code = int(error.code or 0)
        if not code:
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            what = error.filename or "the output"  # `print` names no file
            print(f"error: {what} cannot be written ({error.strerror}); make room", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1


def leave(code: int) -> None:
    """Ends the process at once: threads of storage libraries could keep it alive forever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is closed
            stream.flush()
    os._exit(code)
