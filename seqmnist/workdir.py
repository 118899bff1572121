"""A workdir: all files of one run, written by one process at a time.

config.json     the whole configuration
metrics.jsonl   one line per epoch
steps.jsonl     one line per logged step, if asked for
results.json    the results; exists once the run has finished
events.out.tfevents.*   the metrics for TensorBoard, see `events`
checkpoints/, damaged/  see `checkpoints`
plugins/        copies of the files in `config.plugins`, to which the run keeps
profile/, export/, report.html, report/   what the profiler and the tools write
"""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from seqmnist import config as config_lib
from seqmnist import paths
from seqmnist.errors import InUseError, UserError, one_line

CONFIG, METRICS, STEPS = "config.json", "metrics.jsonl", "steps.jsonl"
RESULTS = "results.json"
PLAN = "plan.json"  # of a study, whose folder is none of a run
PROFILE, EXPORT, REPORT, PLUGINS = "profile", "export", "report", "plugins"
EVENTS = "events.out.tfevents.*"
_LOCK, _REPLACED = ".lock", ".replaced"

# What a run writes; for each folder, a file that only a run or a tool puts there.
_FILES = (CONFIG, METRICS, STEPS, RESULTS, EVENTS, f"{REPORT}.html", f"{CONFIG}.partial")
_FILES += (f"{METRICS}.partial", f"{STEPS}.partial", f"{RESULTS}.partial")
_FOLDERS = {
    "checkpoints": "[0-9]*",
    PROFILE: "plugins/profile",
    EXPORT: "classifier.jax_export",
    REPORT: "beliefs.png",
    PLUGINS: "0/*",
}
# What a run and tools write into these folders, which may also hold files of the user.
WRITTEN = {
    "checkpoints": ("[0-9]*",),
    PROFILE: ("plugins", "step.json"),
    PLUGINS: ("[0-9]*",),
    EXPORT: (
        "classifier.jax_export", "step.jax_export", "initial_state.npz", "images.json",
        "parameters.safetensors", "README.md", "example.png", "draw.html",
    ),
    REPORT: tuple(f"{name}.{kind}" for kind in ("png", "svg") for name in (
        "beliefs", "by_step", "calibration", "classes", "compare", "confusion", "curves",
        "gradients", "mistakes", "sequence", "states", "throughput", "unrolled",
    )),
}  # fmt: skip

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "tensorflow-datasets", "grain",
    "numpy",
)  # fmt: skip

# The errors of a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)

# The types of the values that other programs rely on, see `fits`; there may be more values.
NUMBER = (float, int, type(None))
SPREAD = {"mean": NUMBER, "sd": NUMBER, "interval": ([(float, int)], type(None))}
_SCORE = (*NUMBER, [NUMBER])
_RESULTS_KINDS = {
    "dataset": {"name": str, "fingerprint": str, "train": int, "validation": int, "test": int},
    "epochs": int,
    "steps": int,
    "parameters": int,
    "validation": {"loss": _SCORE, "accuracy": _SCORE},
    "test": {"loss": _SCORE, "accuracy": _SCORE},
}
_OPTIONAL_KINDS = {"seconds": dict, "versions": dict, "devices": list, "programs": dict}
_OPTIONAL_KINDS |= {"members": list, "settings": list, "ensemble": dict, "early_stopping": dict}
_SPREADS = {"loss": SPREAD, "accuracy": SPREAD}
_SETTING = {"diverged": int, "validation": (_SPREADS, type(None)), "test": _SPREADS}
_ENSEMBLE = {"members": ([int], []), "test": {"loss": NUMBER, "accuracy": NUMBER}}
_MEMBERS_KINDS = {"members": [{"seed": int}], "settings": [_SETTING], "best": (int, type(None))}
_MEMBERS_KINDS |= {"ensemble": _ENSEMBLE}
_METRICS_KINDS = {"epoch": int, "step": int, "train/loss": _SCORE, "train/accuracy": _SCORE}
_METRICS_KINDS |= {"validation/loss": _SCORE, "validation/accuracy": _SCORE}
_METRICS_KINDS |= {"seconds": (float, int)}
_STEPS_KINDS = {"step": int, "train_seconds": float}


class Workdir:
    """The one owner of a workdir's files, except checkpoints.

    Attributes:
      path: the absolute path of the folder.
    """

    def __init__(self, path: str | os.PathLike):
        """Raises UserError if no run can have this folder; creates nothing."""
        self.path = paths.resolve_storage(path, "--workdir")

    def __fspath__(self):
        return str(self.path)

    __str__ = __fspath__

    def check_usable(self) -> None:
        """Raises UserError if the folder cannot be created or written; creates nothing."""
        nearest = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"--workdir={self}: {nearest} is not a folder; choose another")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--workdir={self}: {nearest} is not writable; choose another")
        for name in (CONFIG, METRICS, STEPS, RESULTS):
            if (self.path / name).is_dir():
                raise UserError(
                    f"{self.path / name} is a folder; move it, or choose another --workdir"
                )
        if os.path.lexists(folder := self.path / "checkpoints") and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; move it, or choose another workdir")
        if (self.path / PLAN).is_file() and not self.has_config():
            raise UserError(f"--workdir={self} holds a study; choose another for the run")

    @contextlib.contextmanager
    def hold(self, notice: Callable[[str], None], wait: bool = False) -> Iterator[None]:
        """Creates and locks the folder; the lock of a killed process does not remain.

        `notice` is called with a line if the file system has no locks. Raises InUseError if another
        process holds the lock, unless it should `wait`; UserError if the folder cannot be created.
        """
        import filelock  # imported here: only a run that writes needs it

        lock = filelock.FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(action="ignore"):  # about a lock that is only a file
                lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise InUseError(
                f"--workdir={self} is in use by another process; wait for it, or choose another"
            ) from None
        except (OSError, NotImplementedError) as error:  # filelock raises both without locks
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise UserError(
                    f"--workdir={self} cannot be created or locked ({error.strerror}); choose "
                    "another"
                ) from error
            notice(f"the disk of {self} has no locks; let no other process train there")
        try:
            try:
                self._recover()
            except OSError as error:
                raise UserError(
                    f"{error.filename} cannot be moved or removed ({error.strerror}); make its "
                    "folder writable"
                ) from error
            yield
        finally:
            lock.release()

    def recover(self) -> None:
        """Completes or undoes a replacement that was interrupted, if no other process does."""
        if (self.path / _REPLACED).is_dir():
            with contextlib.suppress(InUseError), self.hold(lambda line: None):
                pass

    def has_config(self) -> bool:
        """Returns whether a run has begun here."""
        return (self.path / CONFIG).is_file()

    def read_config(self) -> config_lib.Config:
        """Returns the configuration of the run; its plugins are the workdir's copies.

        Raises UserError if it is missing or not valid.
        """
        if not self.has_config() and (self.path / _REPLACED).is_dir():
            raise UserError(
                f"--workdir={self} holds a run whose replacement was interrupted; train with this "
                "workdir again, which restores that run first"
            )
        values = read_json(self.path / CONFIG)
        try:
            config = config_lib.from_dict(values)
        except UserError as error:
            raise UserError(f"{self.path / CONFIG}: {error}") from None
        pairs = zip(self._plugin_copies(config), config_lib.plugin_names(config), strict=True)
        # Earlier versions kept none.
        config.plugins = ",".join(str(copy) if copy.exists() else name for copy, name in pairs)
        return config

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError if config.json has other `config.settings` than a checkpoint's."""
        now = config_lib.settings(self.read_config())
        changed = [
            f"config.{name}: {value!r} → {now[name]!r}"
            for name, value in settings.items()
            if name in now and now[name] != value
        ]
        if changed:
            raise UserError(
                f"{self.path / CONFIG} has been changed since the run began "
                f"({', '.join(changed)}); restore it"
            )

    def has_metrics(self) -> bool:
        """Returns whether an epoch has been recorded here."""
        path = self.path / METRICS
        return path.is_file() and path.stat().st_size > 0

    def check_plugins(self, config: config_lib.Config) -> None:
        """Raises UserError if the plugins of a configuration are not those of the run."""
        copies = [copy for copy in self._plugin_copies(self.read_config()) if copy.exists()]
        contents = config_lib.read_plugins(config)
        if [copy.read_bytes() for copy in copies] != contents[: len(copies)]:
            raise UserError(
                f"config.plugins={config.plugins} is not what {self} was trained with, of which "
                f"{self.path / PLUGINS} holds copies; leave it out to use these, or choose another "
                "--workdir"
            )

    def read_results(self) -> dict[str, Any]:
        """Returns what `results.json` holds; {} if the run has not finished.

        Raises UserError if it is not what a run writes.
        """
        path = self.path / RESULTS
        if not path.exists():
            return {}
        results = _checked(path, read_json(path), _RESULTS_KINDS)
        kinds = {name: kind for name, kind in _OPTIONAL_KINDS.items() if name in results}
        return _checked(path, results, kinds | (_MEMBERS_KINDS if "members" in results else {}))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`; raises UserError if a run has not written any."""
        path = self.path / METRICS
        lines = _read_lines(path, _METRICS_KINDS)
        if not lines:
            raise UserError(f"{path} holds no epoch; train with this workdir first")
        return lines

    def read_steps(self, step: int) -> list[dict[str, Any]]:
        """Returns the lines of `steps.jsonl` up to a step of the run; none if there is no file.

        Raises UserError if the file is not what a run writes.
        """
        path = self.path / STEPS
        lines = _read_lines(path, _STEPS_KINDS) if step and path.exists() else []
        return [line for line in lines if line["step"] <= step]

    def begin(
        self,
        config: config_lib.Config,
        history: list[dict[str, Any]],
        step: int = 0,
        plugins: list[bytes] | None = None,
    ) -> None:
        """Writes the configuration and the records of the first `step` steps; removes results.

        `plugins` are the contents of those that the configuration names, if they have been read.
        """
        plugins = config_lib.read_plugins(config) if plugins is None else plugins
        (self.path / RESULTS).unlink(missing_ok=True)
        for copy, content in zip(self._plugin_copies(config), plugins, strict=True):
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_aside(copy, content)
        _write_lines(self.path / METRICS, history)
        if (self.path / STEPS).exists():
            _write_lines(self.path / STEPS, self.read_steps(step))
        write_json(self.path / CONFIG, config_lib.to_dict(config))  # last: it makes it a run

    def replace(self, config: config_lib.Config) -> None:
        """Removes the run that is here and begins another; all or nothing, see `_recover`."""
        plugins = config_lib.read_plugins(config)  # they may lie in the run that is here
        aside = self.path / _REPLACED
        aside.mkdir()
        for path in self._written():
            path.rename(aside / path.name)
        try:
            self.begin(config, [], 0, plugins)
        except OSError:
            self._recover()
            raise
        self._discard(aside)

    def _plugin_copies(self, config):
        """Returns where the copy of each plugin is kept."""
        names = config_lib.plugin_names(config)
        if names and "," in str(self.path):
            raise UserError(
                f"--workdir={self} contains a comma, which separates config.plugins; choose or "
                "move it to another path"
            )
        folder = self.path / PLUGINS
        return [folder / str(i) / pathlib.Path(name).name for i, name in enumerate(names)]

    def _written(self):
        """Yields what a run or a tool has written: first config.json, which makes it a run."""
        for pattern in _FILES:
            yield from sorted(self.path.glob(pattern))
        for name, mark in _FOLDERS.items():
            folder = self.path / name
            if folder.is_dir() and any(folder.glob(mark)):
                yield folder

    def _recover(self):
        """Completes an interrupted replacement if the new run has begun; else undoes it."""
        aside = self.path / _REPLACED
        if not aside.is_dir():
            return
        if not self.has_config():
            # Last config.json: if this is interrupted, it is completed the next time.
            for path in sorted(aside.iterdir(), key=lambda path: path.name == CONFIG):
                shutil.rmtree(self.path / path.name, ignore_errors=True)  # of the new run
                path.rename(self.path / path.name)
        self._discard(aside)

    def _discard(self, aside):
        """Removes what a run and tools wrote, and returns the user's own files to their place."""
        for name, patterns in WRITTEN.items():
            folder = aside / name
            for path in [] if folder.is_symlink() else folder.glob("*"):
                target = self.path / name / path.name
                if not any(map(path.match, patterns)) and not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    path.rename(target)
        shutil.rmtree(aside)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON completely or not at all, by renaming a finished file; NaN becomes null."""
    write_aside(path, (_dump(value, indent=2) + "\n").encode())


def append_line(path: pathlib.Path, value: Any) -> None:
    """Adds one line of JSON to a file of such lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_dump(value) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Reads what `write_json` wrote; raises UserError if it cannot be read or is not JSON."""
    return _parse(path, _read_text(path))


def versions() -> dict[str, str]:
    """Returns the version of every package that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def write_aside(path: pathlib.Path, content: bytes) -> None:
    """Writes a file completely or not at all, by renaming a finished one."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder, whose files are moved to `folder` if the block succeeds.

    Each replaces its namesake; other files of `folder` are never touched.
    """
    folder = folder.resolve()  # it may be a link to another disk
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; move it to another place")
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent, ignore_cleanup_errors=True
    ) as aside:
        new = pathlib.Path(aside)
        yield new
        folder.mkdir(exist_ok=True)
        for path in new.iterdir():
            path.replace(folder / path.name)


def _write_lines(path, records):
    write_aside(path, "".join(_dump(record) + "\n" for record in records).encode())


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        # The folder of a study, or one of several runs, has runs below it.
        below = [*path.parent.glob(f"*/{METRICS}"), *path.parent.glob(f"*/*/{METRICS}")]
        remedy = "train with this workdir first"
        if below:
            remedy = f"name a run, e.g. {min(below).parent}"
        raise UserError(f"{path} does not exist; {remedy}") from None
    except NotADirectoryError:
        raise UserError(f"{path.parent} is not a folder; name the folder of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be read ({reason}); restore it from a copy") from None


def _read_lines(path, kinds):
    """Reads lines of JSON, without the incomplete last one of a process that was killed."""
    lines = _read_text(path).split("\n")[:-1]
    return [_checked(path, _parse(path, line), kinds) for line in lines]


def _parse(path, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({one_line(error)}); restore it from a copy, or move it away"
        ) from None


def _checked(path, value, kinds: Mapping[str, Any], where=""):
    """Returns `value`; raises UserError unless it is a dict with values of these types."""
    if not isinstance(value, dict):
        raise UserError(f"{path} {where}is not what a run writes; restore it, or move it away")
    for name, kind in kinds.items():
        if isinstance(kind, Mapping):
            _checked(path, value.get(name), kind, where=f"({name}) ")
        elif name not in value or not fits(value[name], kind):
            raise UserError(
                f"{path} {where}has no valid {name!r}, which a run writes; restore it, or move it "
                "away"
            )
    return value


def fits(value: Any, kind: Any) -> bool:
    """Returns whether a value of JSON is of a kind.

    That is a type, a tuple of kinds to choose from, a dict with the kinds of some values, [kind],
    a list of at least one value of that kind, or [], the empty list.
    """
    if isinstance(kind, tuple):
        return any(fits(value, each) for each in kind)
    if isinstance(kind, Mapping):
        are_there = isinstance(value, dict) and value.keys() >= kind.keys()
        return are_there and all(fits(value[name], each) for name, each in kind.items())
    if isinstance(kind, list):
        is_list = isinstance(value, list) and bool(value) == bool(kind)
        return is_list and all(fits(each, *kind) for each in value)
    return isinstance(value, kind)


def as_json(value: Any) -> Any:
    """Returns what a file of JSON holds of a value: None in place of NaN and infinities."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _dump(value, indent=None):
    return json.dumps(as_json(value), indent=indent)
