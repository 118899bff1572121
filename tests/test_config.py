import dataclasses
import json
import pathlib

import pytest
from conftest import REPOSITORY

from seqmnist import config as config_lib
from seqmnist import main
from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError

# The names and defaults that other programs rely on.
DEFAULTS = {
    "seed": 0,
    "data.name": "auto",
    "data.data_dir": None,
    "data.manual_dir": None,
    "data.verify_checksums": True,
    "data.validation_fraction": 0.2,
    "data.input_mode": "resident",
    "model.view": "rows",
    "model.reverse": False,
    "model.subsample": 1,
    "model.cell": "simple_rnn",
    "model.hidden_size": 64,
    "model.num_layers": 1,
    "model.bidirectional": False,
    "model.block": "plain",
    "model.dropout": 0.0,
    "model.readout": "last",
    "optimizer.name": "rmsprop",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_fraction": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "optimizer.clip_norm": None,
    "optimizer.recurrent_factor": 1.0,
    "train.batch_size": 128,
    "train.num_epochs": 5,
    "train.augment": "none",
    "members.num": 1,
    "members.sweep": "{}",
    "mesh.member": 0,
    "mesh.data": 0,
    "checkpoint.every_epochs": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 3,
    "checkpoint.keep_best": False,
    "profile.steps": None,
}


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_documented_fields_and_defaults(name, default):
    field = config_lib.fields()[name]
    assert field.default == config_lib.get(Config(), name) == default
    assert type(field.default) is type(default)
    assert field.metadata["meaning"]


def test_every_default_is_valid():
    assert config_lib.validated(Config()) == Config()


def test_round_trips_through_json():
    config = config_lib.override(Config(), {"train.num_epochs": 7, "data.manual_dir": "there"})
    text = json.dumps(config_lib.to_dict(config))
    assert config_lib.from_dict(json.loads(text)) == config


def test_the_command_line_sets_every_field():
    values = {field.name: field.default for field in config_lib.fields().values()}
    values["model.cell_options.r_min"], values["optimizer.options.nesterov"] = 0.5, True
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    flags = vars(main.make_parser(arguments).parse_args(arguments))
    assert {name: flags[f"config.{name}"] for name in values} == values


def test_an_experiment_changes_its_own_copy():
    config = config_lib.get_config()
    config.data.manual_dir = "somewhere"
    config.train.num_epochs = 7
    assert config_lib.validated(config).data.manual_dir == str(pathlib.Path("somewhere").absolute())
    assert config_lib.get_config() == Config()


@pytest.mark.parametrize(
    ("name", "nearest"), [("train.epochs", "train.num_epochs"), ("sed", "seed")]
)
def test_an_experiment_cannot_set_an_unknown_field(name, nearest):
    config, group, last = Config(), *name.rpartition(".")[::2]
    with pytest.raises(UserError, match=f"config.{name} does not exist; nearest: .*{nearest}"):
        setattr(config_lib.get(config, group) if group else config, last, 1)


def test_overriding_leaves_the_original_alone():
    before = Config()
    after = config_lib.override(before, {"model.hidden_size": 8, "seed": 3})
    assert (after.model.hidden_size, after.seed) == (8, 3)
    assert before == Config()


def test_a_value_that_cannot_be_copied_is_refused():
    named = Config(data=config_lib.DataConfig(name=json)), "data.name must be of type str"
    for config, message in (named, (Config(data=config_lib.DataConfig), "data is a group")):
        for each in (config, config_lib.override(config, {"seed": 3})):
            with pytest.raises(UserError, match=f"config.{message}.*; got <"):
                config_lib.validated(each)


def test_an_integer_is_a_valid_float():
    config = config_lib.from_dict({"optimizer": {"learning_rate": 1}})
    assert config.optimizer.learning_rate == 1.0
    assert type(config.optimizer.learning_rate) is float


def test_a_group_of_earlier_versions_is_read_but_cannot_be_set():
    assert config_lib.from_dict({"seed": 1, "scan": {"method": "auto"}}) == Config(seed=1)
    with pytest.raises(UserError, match=r"config.scan.method does not exist"):
        config_lib.check_field_name("scan.method")


def test_equal_networks_share_a_key():
    assert hash(ModelConfig(hidden_size=8)) == hash(
        dataclasses.replace(ModelConfig(), hidden_size=8)
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.num_epoch", 1, "nearest: train.num_epochs"),
        ("modle", 1, "nearest: mode"),
        ("model.block", "plane", "nearest: plain"),
        ("data.input_mode", "disk", "nearest: stream, resident"),
        ("train.batch_size", 0, r"must lie in \[1, 65536\]; got 0"),
        ("train.batch_size", 10**12, r"must lie in \[1, 65536\]; got 1000000000000"),
        ("train.batch_size", 10**400, r"must lie in \[1, 65536\]; got a number of 1329 bits"),
        ("train.batch_size", 1.5, "must be of type int; got 1.5"),
        ("train.batch_size", True, "must be of type int; got True"),
        ("train.num_epochs", "five", "must be of type int; got 'five'"),
        ("train.num_epochs", None, "must be of type int; got None"),
        ("train.num_epochs", 2**63, "must lie in"),
        ("model.num_layers", 10**9, "must lie in"),
        ("seed", -1, "must lie in"),
        ("seed", 2**32, "must lie in"),
        ("data.validation_fraction", 1.0, r"must lie in \[0, 1\); got 1.0"),
        ("optimizer.learning_rate", 0.0, "must lie in"),
        ("optimizer.learning_rate", 1e39, "must lie in"),
        ("optimizer.learning_rate", 10**400, "must lie in"),
        ("optimizer.learning_rate", float("nan"), "must lie in"),
        ("optimizer.learning_rate", float("inf"), "must lie in"),
        ("data.verify_checksums", 1, "must be of type bool"),
        ("data.manual_dir", 3, "must be of type str"),
        ("profile.steps", "5", "must be START:STOP"),
        ("profile.steps", f"0:{'9' * 5000}", "must be START:STOP"),
        ("train", 3, "is a group of fields"),
        ("train", {"x.y": 3}, "does not exist"),
    ],
)
def test_refuses_what_is_not_valid(name, value, message):
    with pytest.raises(UserError, match=message) as raised:
        config_lib.from_dict(nested(name, value))
    assert f"config.{name}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "values", [{"model.cell": "gru"}, {"model": {"cell_options.r_min": 0.5}}, {"train.": {}}]
)
def test_names_of_groups_are_nested(values):
    with pytest.raises(UserError) as caught:
        config_lib.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "acts_with"),
    [
        ({"optimizer.momentum": 0.5}, "optimizer.name to sgd"),
        ({"optimizer.momentum": 0.5, "optimizer.name": "adam"}, "optimizer.name to sgd"),
        ({"optimizer.weight_decay": 0.0, "optimizer.name": "adam"}, "optimizer.name to adamw"),
        ({"optimizer.recurrent_factor": 0.5, "model.cell": "gru"}, "model.cell to lru"),
        ({"checkpoint.keep_best": True, "data.validation_fraction": 0.0}, "leave it out"),
    ],
)
def test_a_setting_that_does_nothing_is_refused(values, acts_with):
    config = config_lib.override(Config(), values)
    with pytest.raises(UserError, match=f"{next(iter(values))} does nothing .*{acts_with}"):
        config_lib.validated(config)


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer.momentum": 0.5, "optimizer.name": "sgd"},
        {"optimizer.weight_decay": 0.0, "optimizer.name": "adamw"},
        {"optimizer.recurrent_factor": 0.5, "model.cell": "lru"},
        {"optimizer.recurrent_factor": 0.5, "model.cell": "of_a_plugin"},
        {"optimizer.momentum": 0.5, "optimizer.name": "of_a_plugin"},
        {"checkpoint.keep_best": True},
    ],
)
def test_a_setting_that_acts_is_kept(values):
    config = config_lib.override(Config(), values)
    assert config_lib.validated(config) == config


COSINE = {"optimizer.schedule": "cosine"}
STOPPING = {"train.early_stopping": 2}


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ({}, dict.fromkeys(config_lib.NEUTRAL, "x"), []),
        ({}, {"train.num_epochs": 6}, []),
        ({}, {"train.num_epochs": 4}, ["config.train.num_epochs: 5 → 4"]),
        (COSINE, {**COSINE, "train.num_epochs": 6}, ["num_epochs: 5 → 6", "schedule fixes"]),
        (COSINE, {**COSINE, "seed": 1}, ["(config.seed: 0 → 1);"]),
        (STOPPING, {**STOPPING, "train.num_epochs": 6}, ["5 → 6; early stopping depends"]),
        ({}, {"seed": 1, "model.cell": "gru"}, ["config.seed: 0 → 1", "'simple_rnn' → 'gru'"]),
        ({}, {"members.num": 2}, ["config.members.num: 1 → 2"]),
    ],
)
def test_a_resumed_run_may_change_how_it_runs_but_no_result(before, after, refused):
    before, after = (config_lib.override(Config(), values) for values in (before, after))
    if not refused:
        config_lib.check_resumable(before, after)
        return
    with pytest.raises(UserError) as caught:
        config_lib.check_resumable(before, after)
    assert all(words in str(caught.value) for words in refused)
    assert "\n" not in str(caught.value)


def test_another_network_cannot_be_evaluated():
    other = config_lib.override(Config(), {"train.num_epochs": 9, "data.name": "mnist_5k"})
    config_lib.check_same_network(Config(), other)
    others = {"model.hidden_size": 9, "members.num": 2, "optimizer.name": "sgd", "seed": 5}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"config.{name}: "):
            config_lib.check_same_network(Config(), config_lib.override(Config(), {name: value}))


@pytest.mark.parametrize("path", ["notebook", "notebook.py", "experiments/notebok.py"])
def test_an_experiment_that_is_no_file_is_looked_for(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=r"not a file; did you mean experiments/notebook\.py\?"):
        config_lib.load_experiment(path)
    with pytest.raises(UserError, match="not a file; name a Python file"):
        config_lib.load_experiment("@")
