"""The configuration: frozen, typed, validated, and free of JAX.

The dataclasses below are the only list of fields, defaults and valid values. An experiment
is a Python file whose `get_config()` starts from the one below and sets what differs; the
command line overrides single fields; `from_dict` turns the result into a `Config`.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from seqmnist.errors import UserError, nearest


def _field(
    default, *, within: str | None = None, choices: tuple[str, ...] = (), form: str | None = None
):
    """A field with its valid values: an interval such as "[0, 1)", or names, or a form."""
    metadata = {"within": within, "choices": choices, "form": form}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they reach the device.

    Attributes:
      name: the dataset. `auto` is mnist, or mnist_5k where mnist is not to be had.
      data_dir: where prepared datasets live; None is TFDS's own folder.
      manual_dir: a folder with the four IDX archives, used instead of downloading.
      verify_checksums: refuse archives whose SHA-256 is not the registered one.
      validation_fraction: the share of the training split, its tail in archive order, that
        is held out for validation.
      input_mode: `resident` keeps the dataset in device memory; `stream` reads each batch
        from disk.
    """

    name: str = _field("auto", choices=("auto", "mnist", "fashion_mnist", "kmnist", "mnist_5k"))
    data_dir: str | None = None
    manual_dir: str | None = None
    verify_checksums: bool = True
    validation_fraction: float = _field(0.2, within="[0, 1)")
    input_mode: str = _field("resident", choices=("resident", "stream"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """How an image becomes a sequence, and what reads it.

    Attributes:
      view: a name in `views.VIEWS`.
      reverse: read the sequence from its end.
      subsample: read every `subsample`-th time step.
      cell: a name in `cells.CELLS`.
      hidden_size: H, the units of each layer, in each direction.
      num_layers: recurrent layers, one on top of the other.
      bidirectional: each layer reads in both directions, side by side: 2 H outputs.
      block: `plain` puts cell on cell; `residual` is what a deep stack of linear recurrences
        needs, see `model.ResidualBlock`.
      dropout: the probability with which an output of a layer is zero in training.
      readout: which outputs of the last layer are read: the `last`, their `mean` or their `max`.
    """

    view: str = "rows"
    reverse: bool = False
    subsample: int = _field(1, within="[1, 784]")
    cell: str = "simple_rnn"
    hidden_size: int = _field(64, within="[1, inf)")
    num_layers: int = _field(1, within="[1, inf)")
    bidirectional: bool = False
    block: str = _field("plain", choices=("plain", "residual"))
    dropout: float = _field(0.0, within="[0, 1)")
    readout: str = "last"


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """How a recurrence is computed; every way gives the same numbers but for rounding.

    Attributes:
      method: of linear recurrences: step by step, or in O(log T) `parallel` steps; `auto`
        decides by device and length.
      unroll: time steps a loop iteration; `auto` is what was fastest, compilation included: one.
    """

    method: str = _field("auto", choices=("auto", "sequential", "parallel"))
    unroll: str = _field("auto", choices=("auto", "1", "2", "4", "7", "14", "28"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      name: a name in `optim.OPTIMIZERS`; rmsprop is Keras's, as the notebook uses it.
      learning_rate: the step size, at its highest.
      schedule: the learning rate over a run: `constant`, or a half `cosine` down to zero.
      warmup_fraction: the share of a run's steps in which the learning rate rises from zero.
      momentum: of sgd.
      weight_decay: of adamw, decoupled, for all parameters but biases and RecurrentParams.
      clip_norm: the largest global norm of a gradient; None does not clip.
      recurrent_factor: the learning rate of RecurrentParams (the eigenvalues and input
        normalization of linear recurrences), as a share of the others'.
    """

    name: str = "rmsprop"
    learning_rate: float = _field(1e-3, within="(0, inf)")
    schedule: str = _field("constant", choices=("constant", "cosine"))
    warmup_fraction: float = _field(0.0, within="[0, 1)")
    momentum: float = _field(0.9, within="[0, 1)")
    weight_decay: float = _field(1e-4, within="[0, inf)")
    clip_norm: float | None = _field(None, within="(0, inf)")
    recurrent_factor: float = _field(1.0, within="[0, 1]")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in which portions.

    Attributes:
      batch_size: B, examples a step.
      num_epochs: passes over the training set.
      augment: what happens to training images, a name in `augment.AUGMENTATIONS`.
    """

    batch_size: int = _field(128, within="[1, inf)")
    num_epochs: int = _field(5, within="[1, inf)")
    augment: str = "none"


@dataclasses.dataclass(frozen=True)
class MembersConfig:
    """How many networks one program trains; see `members`.

    Attributes:
      num: independent runs of each setting, of the seeds seed, seed + 1, …
      sweep: settings, as JSON: {"optimizer.learning_rate": [0.001, 0.01], …} is a grid; a list of
        objects with one value a field is a list. See `members.SWEEPABLE` for the fields.
    """

    num: int = _field(1, within="[1, inf)")
    sweep: str = "{}"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the work spreads over devices; changes results by rounding only.

    Attributes:
      member: devices over which members spread; 0 is as many as divide them.
      data: devices over which each batch is split; 0 decides by device and batch size.
    """

    member: int = _field(0, within="[0, inf)")
    data: int = _field(0, within="[0, inf)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved; it is always saved at the end and when stopped.

    Attributes:
      every_epochs: save after every so many epochs; 0 does not.
      every_steps: save after every so many steps of the run; 0 does not.
      keep: how many of the newest checkpoints are kept.
      keep_best: keep, besides, the one with the highest validation accuracy.
    """

    every_epochs: int = _field(1, within="[0, inf)")
    every_steps: int = _field(0, within="[0, inf)")
    keep: int = _field(3, within="[1, inf)")
    keep_best: bool = False


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is measured on the way; changes no result.

    Attributes:
      steps: START:STOP, the steps of the run, counted from 0, of which a profiler's trace is
        written to the workdir; None is none.
    """

    steps: str | None = _field(None, form="START:STOP")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run, but for the machine.

    Attributes:
      seed: the one source of randomness: initialization, epoch order, dropout, augmentation.
    """

    seed: int = _field(0, within="[0, 4294967295]")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    scan: ScanConfig = ScanConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    members: MembersConfig = MembersConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()


# What a resumed run may change: how it is done, but not what comes out. The dataset is compared
# by its content.
NEUTRAL = ("data.name", "data.data_dir", "data.manual_dir", "data.verify_checksums")
NEUTRAL += ("data.input_mode", "mesh.member", "mesh.data", "profile.steps")
NEUTRAL += tuple(f"checkpoint.{field.name}" for field in dataclasses.fields(CheckpointConfig))


def get_config() -> config_dict.ConfigDict:
    """Returns the notebook's settings, for an experiment to change and a flag to override."""
    return _to_config_dict(Config())


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def check_resumable(before: Config, after: Config) -> None:
    """Sees to it that a run that one configuration began can go on with another.

    Raises:
      UserError: they differ in what changes the result; the message names each field and both
        values.
    """
    changes = {k: v for k, v in _changes(before, after).items() if k not in NEUTRAL}
    old, new = before.train.num_epochs, after.train.num_epochs
    fixed_rate = after.optimizer.schedule == "constant" and not after.optimizer.warmup_fraction
    if old < new and fixed_rate:
        del changes["train.num_epochs"]
    if changes:
        hint = "" if fixed_rate else "; the schedule of the learning rate fixes the epochs"
        raise UserError(
            f"--workdir holds a run with other settings ({', '.join(changes.values())}{hint}); "
            "choose another --workdir, or start this one afresh with --overwrite"
        )


def check_same_network(before: Config, after: Config) -> None:
    """Sees to it that what one configuration trained can be evaluated with another.

    Raises:
      UserError: they differ in the network; the message names each field and both values.
    """
    groups = ("model", "members", "optimizer")
    changes = [v for k, v in _changes(before, after).items() if k.partition(".")[0] in groups]
    if changes:
        raise UserError(
            f"--workdir holds another network ({', '.join(changes)}); leave these fields as they "
            "were when it was trained"
        )


def _changes(before, after) -> dict[str, str]:
    old, new = _flatten(to_dict(before)), _flatten(to_dict(after))
    return {k: f"config.{k}: {old[k]!r} → {new[k]!r}" for k in new if old[k] != new[k]}


def _flatten(values, prefix=""):
    flat = {}
    for name, value in values.items():
        is_group = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def field_names(kind: type = Config, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields, e.g. "train" and "train.batch_size"."""
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            names += field_names(hint, f"{prefix}{name}.")
    return names


def check_field_name(name: str) -> None:
    """Raises UserError, with the nearest names, unless `name` is a field of Config."""
    if name not in field_names():
        raise UserError(f"config.{name} does not exist; nearest: {nearest(name, field_names())}")


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and validates a configuration from nested mappings.

    Args:
      values: fields by name; fields left out take their defaults.

    Raises:
      UserError: a field does not exist, or its value is of the wrong type or out of range.
    """
    return _from_dict(Config, values, prefix="")


def _to_config_dict(config) -> config_dict.ConfigDict:
    result = config_dict.ConfigDict()
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif value is None:  # ConfigDict needs the type to parse a later value
            value = config_dict.placeholder(_value_type(hint))
        result[name] = value
    return result


def _from_dict(kind, values, prefix):
    if not isinstance(values, Mapping):
        raise UserError(f"{f'config.{prefix}'[:-1]} holds fields; it cannot be set to {values!r}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            check_field_name(f"{prefix}{name}")
    given = {}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            continue
        name, hint, value = prefix + field.name, hints[field.name], values[field.name]
        if dataclasses.is_dataclass(hint):
            given[field.name] = _from_dict(hint, value, name + ".")
        else:
            given[field.name] = _checked(name, hint, field.metadata, value)
    return kind(**given)


def _value_type(hint) -> type:
    """The type of a field's values: `str` for both `str` and `str | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if option is not types.NoneType)


def _checked(name, hint, metadata, value):
    if value is None and isinstance(hint, types.UnionType):
        return None
    kind = _value_type(hint)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: a bool is an int to Python, not to a reader
        raise UserError(f"config.{name} must be of type {kind.__name__}; got {value!r}")
    within, choices, form = (metadata.get(key) for key in ("within", "choices", "form"))
    if within and not _lies_within(value, within):
        raise UserError(f"config.{name} must lie in {within}; got {value!r}")
    if choices and value not in choices:
        raise UserError(
            f"config.{name}={value!r} does not exist; nearest: {nearest(value, choices)}"
        )
    if form and not re.fullmatch(re.sub("[A-Z]+", "[0-9]+", form), value):
        raise UserError(f"config.{name} must be {form}, in whole numbers; got {value!r}")
    return value


def _lies_within(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)
