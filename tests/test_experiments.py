"""Experiments: the files of this repository, and a user's own, with and without mistakes."""

import ast
import textwrap
from unittest import mock

import jax
import pytest
from conftest import REPOSITORY, seqmnist

from seqmnist import config as config_lib
from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.networks.model import READOUTS
from seqmnist.training import members
from seqmnist.training.steps import make_system

FILES = sorted((REPOSITORY / "experiments").glob("*.py"))


def test_every_experiment_is_found():
    assert len(FILES) >= 11


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@jax.numpy_dtype_promotion("standard")  # Optax's Adam is not strict
@mock.patch.dict(READOUTS)  # other tests go through this table, so nothing may stay in it
def test_an_experiment_describes_a_network_that_can_be_built(file):
    config_lib._run_plugins.cache_clear()
    config = config_lib.validated(config_lib.load_experiment(str(file)))
    assert members.list_members(config)
    assert make_system(config, num_steps=100).drops_out == (config.model.dropout > 0)
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert f"--config=experiments/{file.name}" in docstring
    assert "Duration: " in docstring
    assert "Reference: " in docstring


WORKING = {
    "changes the defaults": """
        from seqmnist import config as config_lib
        def get_config():
            config = config_lib.get_config()
            config.model.cell = "gru"
            return config""",
    "builds a configuration": """
        from seqmnist.config import Config, ModelConfig
        def get_config():
            return Config(model=ModelConfig(cell="gru"))""",
}

# The code, and words of the line.
MISTAKES = {
    "returns None": ("def get_config(): pass", ["NoneType"]),
    "returns an int": ("def get_config(): return 3", ["int"]),
    "returns a dict": ("def get_config(): return {'seed': 1}", ["dict"]),
    "has no function": ("import math", ["needs a get_config()"]),
    "has a value": ("get_config = 3", ["needs a get_config()"]),
    "raises": (
        "def get_config():\n    raise ValueError('why: ' + 40 * 'a long text\\n' + 'the end')",
        ["ValueError", "why: a long text a long text", "a long text the end"],
    ),
    "raises without a text": ("raise KeyError", ["KeyError"]),
    "exits": ("import sys; sys.exit(0)", ["SystemExit"]),
    "is not Python": ("def get_config(:", ["SyntaxError"]),
    "imports what is missing": ("import not_installed", ["not_installed"]),
    "uses what is undefined": ("def get_config(): return undefined", ["NameError", "undefined"]),
    "sets an unknown field": (
        """
        from seqmnist.config import Config
        def get_config():
            config = Config()
            config.train.epochs = 1
            return config""",
        ["config.train.epochs", "train.num_epochs"],
    ),
    "sets an unknown group": (
        """
        from seqmnist.config import Config
        def get_config():
            config = Config()
            config.trian.num_epochs = 1
            return config""",
        ["trian"],
    ),
}


def write(folder, code):
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(code))
    return path


@pytest.mark.parametrize("code", WORKING.values(), ids=WORKING)
def test_an_experiment_of_ones_own(code, tmp_path):
    config = config_lib.load_experiment(str(write(tmp_path, code)))
    assert config == Config(model=ModelConfig(cell="gru"))


@pytest.mark.parametrize(("code", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_an_experiment_is_one_line(code, words, tmp_path):
    with pytest.raises(UserError) as caught:
        config_lib.load_experiment(str(write(tmp_path, code)))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ["--config=", "mine.py", *words])


def test_an_interrupt_is_no_mistake_of_the_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        config_lib.load_experiment(write(tmp_path, "raise KeyboardInterrupt"))


@pytest.mark.parametrize("name", ["raises", "exits", "is not Python", "returns None"])
def test_the_shell_sees_one_line_and_exit_code_2(name, tmp_path):
    code, words = MISTAKES[name]
    result = seqmnist(f"--workdir={tmp_path / 'run'}", f"--config={write(tmp_path, code)}")
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)
    assert not (tmp_path / "run").exists()
