import pytest

from seqmnist import config as config_lib
from seqmnist.errors import UserError

# The names and defaults that other programs rely on.
DEFAULTS = {
    "seed": 0,
    "data.name": "auto",
    "data.data_dir": None,
    "data.manual_dir": None,
    "data.validation_fraction": 0.2,
    "data.input_mode": "resident",
    "model.view": "rows",
    "model.cell": "simple_rnn",
    "model.hidden_size": 64,
    "model.num_layers": 1,
    "optimizer.name": "rmsprop",
    "optimizer.learning_rate": 1e-3,
    "train.batch_size": 128,
    "train.num_epochs": 5,
}


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_documented_fields_and_defaults(name, default):
    value = config_lib.Config()
    for part in name.split("."):
        value = getattr(value, part)
    assert value == default
    assert name in config_lib.field_names()


def test_round_trips():
    config = config_lib.Config()
    assert config_lib.from_dict(config_lib.to_dict(config)) == config
    assert config_lib.from_dict(config_lib.get_config().to_dict()) == config


def test_an_experiment_sets_fields_that_default_to_none():
    values = config_lib.get_config()
    values.data.manual_dir = "somewhere"
    assert config_lib.from_dict(values.to_dict()).data.manual_dir == "somewhere"


def test_an_integer_is_a_valid_float():
    config = config_lib.from_dict({"optimizer": {"learning_rate": 1}})
    assert config.optimizer.learning_rate == 1.0
    assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.num_epoch", 1, "nearest: train.num_epochs"),
        ("modle", 1, "nearest: model"),
        ("data.name", "minst", "nearest: mnist"),
        ("data.input_mode", "disk", "nearest: stream, resident"),
        ("train.batch_size", 0, r"must lie in \[1, inf\); got 0"),
        ("train.batch_size", 1.5, "must be of type int; got 1.5"),
        ("train.batch_size", True, "must be of type int; got True"),
        ("train.num_epochs", "five", "must be of type int; got 'five'"),
        ("train.num_epochs", None, "must be of type int; got None"),
        ("seed", -1, "must lie in"),
        ("seed", 2**32, "must lie in"),
        ("data.validation_fraction", 1.0, r"must lie in \[0, 1\); got 1.0"),
        ("optimizer.learning_rate", 0.0, r"must lie in \(0, inf\)"),
        ("optimizer.learning_rate", float("nan"), "must lie in"),
        ("optimizer.learning_rate", float("inf"), "must lie in"),
        ("data.verify_checksums", 1, "must be of type bool"),
        ("data.manual_dir", 3, "must be of type str"),
        ("train", 3, "holds fields"),
    ],
)
def test_refuses_what_is_not_valid(name, value, message):
    with pytest.raises(UserError, match=message) as raised:
        config_lib.from_dict(nested(name, value))
    assert f"config.{name}" in str(raised.value)
    assert "\n" not in str(raised.value)
