"""The configuration: typed, validated, and free of JAX.

The dataclasses below are the only list of fields: names, types, defaults, meanings and valid
values. An experiment is a Python file whose `get_config()` returns a `Config`; the command line
overrides single fields; `validated` checks the whole. From there on it is only read.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import pathlib
import re
import runpy
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from seqmnist import paths
from seqmnist.errors import UserError, adding, nearest, one_line

T = TypeVar("T")

# What float32 can hold.
SMALLEST, LARGEST = 1e-37, 3.4e38
_COUNT = "[0, 1000000000]"


def _field(
    default: Any,
    meaning: str,
    *,
    within: str | None = None,
    choices: tuple[str, ...] = (),
    form: str | None = None,
) -> Any:
    """A field, what it means, and its valid values: an interval like "[0, 1)", names or a form.

    With default `dict` it holds values by name; `checked_options` knows their names and types.
    """
    metadata = {"meaning": meaning, "within": within, "choices": choices, "form": form}
    if default is dict:
        return dataclasses.field(default_factory=dict, hash=False, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Group:
    def __setattr__(self, name, value):
        if name not in type(self).__dataclass_fields__:
            group = type(self).__name__.removesuffix("Config").lower()
            check_field_name(f"{group}.{name}".removeprefix("."))
        super().__setattr__(name, value)


@dataclasses.dataclass
class DataConfig(_Group):
    """Which images, and how they reach the device."""

    name: str = _field(
        "auto",
        "mnist, fashion_mnist, kmnist, k49, emnist_balanced, emnist_letters, emnist_digits, "
        "cifar10; mnist_5k, digits, which need no file; npz or folder, your own files in "
        "manual_dir; tfds:NAME, prepared by TFDS in data_dir; or another name in sources.LOADERS. "
        "auto is mnist if available, else mnist_5k",
    )
    data_dir: str | None = _field(None, "folder of prepared datasets; none is TFDS's own folder")
    manual_dir: str | None = _field(
        None,
        "folder of the published archives, instead of a download; or a folder of pictures, or a "
        ".npz file",
    )
    verify_checksums: bool = _field(True, "refuse archives whose SHA-256 is not the registered one")
    grayscale: bool = _field(False, "make colored images gray")
    size: int | None = _field(
        None, "resize images to this many pixels per side", within="[1, 4096]"
    )
    validation_fraction: float = _field(
        0.2, "share of the training archive, its tail, that is held out", within="[0, 1)"
    )
    input_mode: str = _field(
        "resident",
        "resident: the dataset lives in device memory; stream: batches are read from disk",
        choices=("resident", "stream"),
    )


@dataclasses.dataclass(unsafe_hash=True)  # a network is compiled for its configuration
class ModelConfig(_Group):
    """How an image becomes a sequence, and what reads it."""

    view: str = _field(
        "rows",
        "how an image is read: rows, columns, pixels, patches_k where k divides both sides, "
        "permuted_pixels (the order of arXiv 1707.09520), bit_reversed_pixels (that of S4 and S5), "
        "hilbert_pixels, or another name in views.VIEWS",
    )
    reverse: bool = _field(False, "read the sequence from its end")
    subsample: int = _field(1, "read every n-th time step", within="[1, 1000000]")
    cell: str = _field("simple_rnn", "the recurrent layer, a name in cells.CELLS")
    cell_options: dict = _field(dict, "options of the cell, keywords of its class: .NAME=VALUE")
    hidden_size: int = _field(64, "units per layer and direction", within="[1, 65536]")
    num_layers: int = _field(1, "number of recurrent layers", within="[1, 128]")
    bidirectional: bool = _field(False, "each layer reads in both directions: 2 H outputs")
    block: str = _field(
        "plain",
        "plain: cell on cell; residual: norm, cell, gate and a skip connection",
        choices=("plain", "residual"),
    )
    dropout: float = _field(0.0, "probability of dropping a layer's output", within="[0, 1)")
    readout: str = _field("last", "which outputs of the last layer are read: last, mean or max")
    dtype: str = _field(
        "float32",
        "factors of the layers' products with parameters; sums and states stay float32",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass
class OptimizerConfig(_Group):
    """How gradients become updates."""

    name: str = _field("rmsprop", "a name in optim.OPTIMIZERS; rmsprop is computed as in Keras")
    options: dict = _field(dict, "options of the optimizer, keywords of its function: .NAME=VALUE")
    learning_rate: float = _field(1e-3, "peak learning rate", within=f"[{SMALLEST}, {LARGEST}]")
    schedule: str = _field(
        "constant",
        "constant; cosine: half a cosine down to zero; plateau: lower whenever the training loss "
        "of an epoch stops falling",
        choices=("constant", "cosine", "plateau"),
    )
    plateau_factor: float = _field(
        0.1, "factor by which plateau lowers the learning rate", within="(0, 1)"
    )
    plateau_patience: int = _field(
        5,
        "epochs without a lower training loss before plateau lowers the learning rate",
        within="[1, 1000000]",
    )
    warmup_fraction: float = _field(
        0.0, "share of the run in which the learning rate rises from zero", within="[0, 1)"
    )
    momentum: float = _field(0.9, "momentum of sgd", within="[0, 1)")
    weight_decay: float = _field(
        1e-4,
        "decoupled weight decay of adamw, for matrices that are no RecurrentParams",
        within=f"[0, {LARGEST}]",
    )
    clip_norm: float | None = _field(
        None,
        "largest global norm of a gradient; none does not clip",
        within=f"[{SMALLEST}, {LARGEST}]",
    )
    recurrent_factor: float = _field(
        1.0,
        "learning rate of RecurrentParams (how long linear cells remember), as a share of "
        "learning_rate",
        within="[0, 1]",
    )


@dataclasses.dataclass
class TrainConfig(_Group):
    """How long, and in batches of which size."""

    batch_size: int = _field(128, "examples per step", within="[1, 65536]")
    num_epochs: int = _field(5, "passes over the training set", within="[1, 1000000]")
    accumulate: int = _field(
        1, "parts that each device's batch is computed in, to save memory", within="[1, 65536]"
    )
    truncate: int = _field(0, "gradients stop after every n time steps; 0 never", within=_COUNT)
    early_stopping: int = _field(
        0,
        "stop after n epochs in a row without a lower validation loss, and restore the parameters "
        "of the lowest; 0 never",
        within=_COUNT,
    )
    log_every_steps: int = _field(
        0,
        "write loss and norms of every n-th step of the run to steps.jsonl; 0 never",
        within=_COUNT,
    )
    augment: str = _field("none", "distortion of training images, a name in augment.AUGMENTATIONS")


@dataclasses.dataclass
class MembersConfig(_Group):
    """How many networks one program trains."""

    num: int = _field(
        1, "independent runs of each setting, with seeds seed, seed + 1, …", within="[1, 4096]"
    )
    sweep: str = _field(
        "{}",
        'settings as JSON: an object such as {"optimizer.learning_rate": [0.001, 0.01]} is a grid, '
        "a list of objects lists settings; for fields in members.SWEEPABLE, and float options",
    )


@dataclasses.dataclass
class MeshConfig(_Group):
    """How the work spreads over devices; changes results only by rounding."""

    member: int = _field(
        0,
        "devices over which members spread; 0 is the largest number that divides theirs",
        within="[0, 65536]",
    )
    data: int = _field(
        0, "devices over which a batch is split; 0 chooses by device and size", within="[0, 65536]"
    )


@dataclasses.dataclass
class CheckpointConfig(_Group):
    """When the state of a run is saved, besides at its end and when it is stopped."""

    every_epochs: int = _field(1, "save after every n epochs; 0 never", within=_COUNT)
    every_steps: int = _field(0, "save after every n steps of the run; 0 never", within=_COUNT)
    keep: int = _field(3, "how many of the newest checkpoints are kept", within="[1, 1000000]")
    keep_best: bool = _field(False, "also keep the one with the lowest validation loss")


@dataclasses.dataclass
class ProfileConfig(_Group):
    """What is measured during a run; changes no result."""

    steps: str | None = _field(
        None, "steps of the run, counted from 0, that the profiler traces", form="START:STOP"
    )


@dataclasses.dataclass
class Config(_Group):
    """Everything that determines a run, except the machine."""

    seed: int = _field(
        0, "seed of initialization, order, dropout and augmentation", within="[0, 4294967295]"
    )
    plugins: str = _field("", "Python files, separated by commas, that add cells, views, etc.")
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    members: MembersConfig = dataclasses.field(default_factory=MembersConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


# Groups of earlier versions, which changed no result; they are ignored in files.
_RETIRED = ("scan",)

# Fields of `data` that are folders of this machine.
PLACES = ("data_dir", "manual_dir")

# What a resumed run may change: how it runs, but not its results. Data are compared by content.
NEUTRAL = ("data.name", "data.verify_checksums", "data.grayscale", "data.size")
NEUTRAL += tuple(f"data.{name}" for name in PLACES)
NEUTRAL += ("plugins", "data.input_mode", "mesh.member", "mesh.data", "profile.steps")
NEUTRAL += ("train.log_every_steps",)
NEUTRAL += tuple(f"checkpoint.{field.name}" for field in dataclasses.fields(CheckpointConfig))

# Fields that do nothing with some of the library's choices of another field: that field, with
# which choices they act, and with which they do not. A plugin's choice may read any field.
_PLATEAU = ("optimizer.schedule", "plateau", "constant cosine")
_CELLS = "simple_rnn irnn gru lstm lem slstm min_gru min_lstm delta_net"
_ACTS_WITH = {
    "optimizer.momentum": ("optimizer.name", "sgd", "rmsprop adam adamw"),
    "optimizer.weight_decay": ("optimizer.name", "adamw", "rmsprop adam sgd"),
    "optimizer.recurrent_factor": ("model.cell", "lru rg_lru s5 s6", _CELLS),
    "optimizer.plateau_factor": _PLATEAU,
    "optimizer.plateau_patience": _PLATEAU,
}


class Field(NamedTuple):
    """A field that holds a value."""

    name: str  # dotted, e.g. "train.batch_size"
    kind: type  # bool, int, float, str, or dict: options
    is_optional: bool  # whether it may be None
    default: Any
    metadata: Mapping[str, Any]  # "meaning", and valid values: "within", "choices", "form"


def get_config() -> Config:
    """Returns the notebook's settings, for an experiment to change."""
    return Config()


@functools.cache
def fields() -> dict[str, Field]:
    """Returns all fields that hold values, by dotted name."""
    return {field.name: field for field in _fields(Config, "")}


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain nested dicts, ready for JSON."""
    return {  # not by dataclasses.asdict: it cannot copy each value that `validated` refuses
        name: to_dict(value) if isinstance(value, _Group) else _copied(value)
        for name, value in vars(config).items()
    }


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a configuration from nested mappings; fields left out take their defaults.

    Raises UserError if a field does not exist, or its value is of the wrong type or out of range.
    """
    return _from_dict(Config, values, "")


def validated(config: Config) -> Config:
    """Returns a checked copy; raises UserError if a value is not valid, or a field does nothing."""
    if not isinstance(config, Config):
        raise UserError(f"the configuration must be a seqmnist.Config; got {config!r:.80}")
    config = from_dict(to_dict(config))
    files = [paths.resolve(name, "config.plugins") for name in plugin_names(config)]
    config.plugins = ",".join(map(str, files))  # a workdir is read from any folder
    for name in PLACES:
        if (folder := getattr(config.data, name)) is not None:
            setattr(config.data, name, str(paths.resolve(folder, f"config.data.{name}")))
    for name in _ACTS_WITH:
        if get(config, name) != fields()[name].default:
            check_acts(config, name)
    for name in ("checkpoint.keep_best", "train.early_stopping"):
        if get(config, name) and not config.data.validation_fraction:
            raise UserError(
                f"config.{name} does nothing with data.validation_fraction=0; leave it out"
            )
    return config


def check_acts(config: Config, name: str) -> None:
    """Raises UserError if a field does nothing with the chosen optimizer or cell."""
    if name not in _ACTS_WITH:
        return
    other, acts, idle = _ACTS_WITH[name]
    if (value := get(config, other)) in idle.split():
        raise UserError(
            f"config.{name} does nothing with {other}={value}; leave it out, or set config.{other} "
            f"to {' or '.join(acts.split())}"
        )


def load_experiment(path: str | os.PathLike) -> Config:
    """Returns what `get_config()` of a Python file returns; raises UserError unless a `Config`."""
    return made_by(path, "--config", "get_config", Config)


def made_by(path: str | os.PathLike, name: str, function: str, kind: type[T]) -> T:
    """Returns what a function in a Python file returns; raises UserError unless of this kind."""

    def make(content):
        found = content.get(function)
        made = found() if callable(found) else None
        if not isinstance(made, kind):
            raise UserError(
                f"it needs a {function}() that returns {kind.__module__}.{kind.__name__}"
                + (f"; got {type(made).__name__}" if callable(found) else "")
            )
        return made

    return from_file(path, name, make)


def plugin_names(config: Config) -> list[str]:
    """Returns the paths in `plugins`, as they are written."""
    return [name for name in config.plugins.split(",") if name]


def read_plugins(config: Config) -> list[bytes]:
    """Returns the content of each file of `plugins`; raises UserError if one cannot be read."""
    contents = []
    for name in plugin_names(config):
        try:
            contents.append(paths.resolve(name, "config.plugins").read_bytes())
        except OSError as error:
            raise UserError(
                f"config.plugins={name} cannot be read ({error.strerror}); name a Python file, "
                "without a comma in its path"
            ) from error
    return contents


def load_plugins(config: Config) -> None:
    """Runs the files of `plugins`, which add to tables such as `CELLS`.

    They are run again if they have changed, or others since, which may have replaced an entry.
    """
    if names := plugin_names(config):
        _run_plugins(tuple(names), tuple(read_plugins(config)))


@functools.lru_cache(maxsize=1)  # what was run last is not run again
def _run_plugins(names, contents):  # with other contents, they have to be run again
    owners = {}
    for name in names:
        with adding(name, owners):
            from_file(name, "config.plugins", lambda content: None)


def from_file(path, name, use):
    """Runs a Python file and returns what `use` makes of its content, a dict."""
    file = paths.resolve(path, name)
    if not file.is_file():
        folders = pathlib.Path("experiments"), pathlib.Path(path).parent
        there = {each.stem: each for folder in folders for each in folder.glob("*.py")}
        similar = difflib.get_close_matches(file.stem, there, n=1)
        remedy = f"did you mean {there[similar[0]]}?" if similar else "name a Python file"
        raise UserError(f"{name}={path} is not a file; {remedy}")
    try:
        return use(runpy.run_path(str(file)))
    except UserError as error:
        raise UserError(f"{name}={path}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's code may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{name}={path} cannot be loaded: {reason}; correct the file") from error


def get(config: Config, name: str) -> Any:
    """Returns the value of a field by its dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def override(config: T, values: Mapping[str, Any]) -> T:
    """Returns a copy of a configuration, or of a group, with other values by dotted name."""
    config = _copied(config)
    for name, value in values.items():
        group, _, last = name.rpartition(".")
        holder = get(config, group) if group else config
        if isinstance(holder, dict):
            holder[last] = value
        else:
            setattr(holder, last, value)
    return config


def _copied(value):
    """Returns a copy of a configuration, of a group or of options; any other value as it is."""
    if isinstance(value, _Group):
        return dataclasses.replace(value, **{k: _copied(v) for k, v in vars(value).items()})
    return dict(value) if isinstance(value, dict) else value


def option_group(name: str) -> str | None:
    """Returns "model.cell_options" of "model.cell_options.NAME", or None for any other name."""
    group = name.rpartition(".")[0]
    return group if group in fields() and fields()[group].kind is dict else None


def checked(name: str, value: Any) -> Any:
    """Returns the value of a field, converted to its type.

    Raises UserError if there is no such field, or the value is of the wrong type or out of range.
    """
    check_field_name(name)
    return _checked(fields()[name], value)


def checked_options(
    function: Callable, values: Mapping[str, Any], group: str, choice: str
) -> dict[str, Any]:
    """Returns options of a class or function, converted to their types.

    Its options are its keyword-only arguments that have a default, whose type is theirs. The
    annotation `Annotated[float, "[0, 1)"]` also gives an interval. An array is a float that is
    swept. Errors name the `group` of fields, such as "model.cell_options", and the `choice`, such
    as "model.cell=lru".

    Raises UserError if there is no such option, or a value is of the wrong type or out of range.
    """
    if isinstance(function, type):
        function = function.__init__
    hints, known = typing.get_type_hints(function, include_extras=True), {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            default = parameter.default
            within = f"[-{LARGEST}, {LARGEST}]" if isinstance(default, float) else None
            within = next(iter(getattr(hints.get(name), "__metadata__", ())), within)
            metadata = {"within": within, "choices": (), "form": None}
            known[name] = Field(f"{group}.{name}", type(default), False, default, metadata)
    for name in values:
        if name not in known:
            there = f"choose one of: {', '.join(known)}" if known else "leave it out"
            raise UserError(f"config.{group}.{name} does not exist with {choice}; {there}")
        if hasattr(values[name], "dtype") and known[name].kind is not float:
            raise UserError(f"config.{group}.{name} cannot be swept; only options that are floats")
    return {k: v if hasattr(v, "dtype") else _checked(known[k], v) for k, v in values.items()}


def changes(before: Config, after: Config) -> dict[str, str]:
    """Returns how two configurations differ: {field: "config.FIELD: 'old' → 'new'"}."""
    pairs = {name: (get(before, name), get(after, name)) for name in fields()}
    return {k: f"config.{k}: {old!r} → {new!r}" for k, (old, new) in pairs.items() if old != new}


def check_resumable(before: Config, after: Config) -> None:
    """Raises UserError if the two differ in more than what a resumed run may change."""
    changed = {k: v for k, v in changes(before, after).items() if k not in NEUTRAL}
    fixed_rate = after.optimizer.schedule == "constant" and not after.optimizer.warmup_fraction
    may_grow = fixed_rate and not after.train.early_stopping
    if before.train.num_epochs < after.train.num_epochs and may_grow:
        del changed["train.num_epochs"]
    if changed:
        hint = ""
        if "train.num_epochs" in changed and not may_grow:
            what = "early stopping depends on" if fixed_rate else "the learning-rate schedule fixes"
            hint = f"; {what} the number of epochs"
        raise UserError(
            f"--workdir holds a run with other settings ({', '.join(changed.values())}{hint}); "
            "choose another --workdir, or replace this run with --overwrite"
        )


def settings(config: Config) -> dict[str, Any]:
    """Returns the fields that determine what a step of a run does."""
    names = fields().keys() - {*NEUTRAL, "train.num_epochs"}
    return {name: get(config, name) for name in sorted(names)}


def check_same_network(before: Config, after: Config) -> None:
    """Raises UserError if what one configuration trained is another network under the other."""
    groups = ("model", "members", "optimizer", "seed")
    changed = [v for k, v in changes(before, after).items() if k.partition(".")[0] in groups]
    if changed:
        raise UserError(
            f"--workdir holds another network ({', '.join(changed)}); leave these fields out"
        )


def check_field_name(name: str) -> None:
    """Raises UserError, with the nearest names, unless `name` is a field or a group of fields."""
    groups = {field.rpartition(".")[0] for field in fields()} - {""}
    name = option_group(name) or name
    if name not in fields() and name not in groups:
        raise UserError(f"config.{name} does not exist; nearest: {nearest(name, fields())}")


def _fields(group, prefix) -> Iterator[Field]:
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{field.name}.")
        else:
            kind, *none = typing.get_args(hint) or (hint,)
            default = {} if kind is dict else field.default
            yield Field(prefix + field.name, kind, bool(none), default, field.metadata)


def _from_dict(group, values, prefix):
    if not isinstance(values, Mapping):
        raise UserError(f"{f'config.{prefix}'[:-1]} is a group of fields; got {values!r}")
    given, hints = {}, typing.get_type_hints(group)
    for name, value in values.items():
        if not prefix and name in _RETIRED:
            continue
        if name not in hints:
            check_field_name(f"{prefix}{name}")
            raise UserError(f"config.{prefix}{name} is written as one name; nest its groups")
        if dataclasses.is_dataclass(hints[name]):
            given[name] = _from_dict(hints[name], value, f"{prefix}{name}.")
        else:
            given[name] = _checked(fields()[f"{prefix}{name}"], value)
    return group(**given)


def _checked(field, value):
    name, kind = field.name, field.kind
    if value is None and field.is_optional:
        return None
    is_huge = isinstance(value, int) and value.bit_length() > 128  # too long to print
    shown = f"a number of {value.bit_length()} bits" if is_huge else repr(value)
    within, choices, form = (field.metadata[key] for key in ("within", "choices", "form"))
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= LARGEST else math.inf
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is dict and isinstance(value, Mapping):
        value = {k: v.item() if hasattr(v, "item") else v for k, v in value.items()}  # of NumPy
        for key, each in value.items():
            if not isinstance(each, str | bool | int | float):
                raise UserError(f"config.{name}.{key} must be a number, text or bool; got {each!r}")
        return value
    if type(value) is not kind:  # not isinstance: a bool is an int to Python, not to a reader
        raise UserError(f"config.{name} must be of type {kind.__name__}; got {shown}")
    if within and not _lies_within(value, within):
        raise UserError(f"config.{name} must lie in {within}; got {shown}")
    if choices and value not in choices:
        raise UserError(f"config.{name}={shown} does not exist; nearest: {nearest(value, choices)}")
    if form and not re.fullmatch(re.sub("[A-Z]+", "[0-9]{1,12}", form), value):
        raise UserError(f"config.{name} must be {form}, in whole numbers; got {shown}")
    return value


def _lies_within(value, interval):
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # False for NaN
