"""What a user can get wrong: one line that names the thing, exit code 2, and nothing changed."""

import gzip
import shutil
import sys
import threading

import pytest
from conftest import seqmnist

from seqmnist import main
from seqmnist.errors import UserError
from seqmnist.stop import StopRequest
from tools import cli, report

RUN = "--workdir=run"  # a finished run of two epochs
NEW = "--workdir=new"  # nothing is there
C = "--config."


def rewrite(name, change):
    def prepare(folder):
        path = folder / "run" / name
        path.write_text(change(path.read_text()))

    return prepare


def unlink(name):
    return lambda folder: (folder / "run" / name).unlink()


def damage_checkpoints(folder):
    (folder / "run" / "results.json").unlink()
    for path in (folder / "run" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def remove_checkpoints(folder):
    shutil.rmtree(folder / "run" / "checkpoints")


def archives(change=lambda folder: None):
    def prepare(folder):
        manual = folder / "archives"
        manual.mkdir()
        for path in ARCHIVES.values():
            (manual / path).write_bytes(gzip.compress(b"not an archive", mtime=0))
        change(manual)

    return prepare


ARCHIVES = {
    f"{split} {kind}": f"{prefix}-{kind}-{rank}-ubyte.gz"
    for split, prefix in (("train", "train"), ("test", "t10k"))
    for kind, rank in (("images", "idx3"), ("labels", "idx1"))
}
TRAIN_IMAGES = ARCHIVES["train images"]
MNIST_FROM = [NEW, f"{C}data.name=mnist", f"{C}data.manual_dir=archives"]
UNVERIFIED = [*MNIST_FROM, f"{C}data.verify_checksums=false"]

REFUSALS = [
    # arguments, words of the line, what is done beforehand
    ([], ["--workdir"]),
    (["--workdir="], ["--workdir"]),
    ([NEW, "--wrokdir=x"], ["wrokdir"]),
    ([NEW, "surplus"], ["surplus"]),
    ([NEW, "--mode=tarin"], ["mode", "train", "evaluate"]),
    ([NEW, "--overwrite=perhaps"], ["overwrite"]),
    ([NEW, "--config=experiments/none.py"], ["experiments/none.py"]),
    ([NEW, "--config="], ["--config"]),
    ([NEW, "--config=experiments"], ["experiments"]),
    ([NEW, "--config=README.md"], ["--config"]),
    ([NEW, "--config=broken.py"], ["undefined"]),
    ([NEW, "--config=unknown.py"], ["train.epochs"]),
    ([NEW, f"{C}train.num_epoch=1"], ["train.num_epoch", "train.num_epochs"]),
    ([NEW, f"{C}trian.num_epochs=1"], ["trian.num_epochs", "train.num_epochs"]),
    ([NEW, f"{C}seed.x=1"], ["seed"]),
    ([NEW, f"{C}seed=-1"], ["seed"]),
    ([NEW, f"{C}train=3"], ["train"]),
    ([NEW, f"{C}train.num_epochs"], ["train.num_epochs"]),
    ([NEW, f"{C}train.num_epochs=two"], ["train.num_epochs", "two"]),
    ([NEW, f"{C}train.num_epochs=1.5"], ["train.num_epochs", "1.5"]),
    ([NEW, f"{C}train.num_epochs=0"], ["train.num_epochs", "[1, 1000000]"]),
    ([NEW, f"{C}train.batch_size=-1"], ["train.batch_size", "[1, 65536]"]),
    ([NEW, f"{C}train.augment=flip"], ["train.augment", "flip", "affine"]),
    ([NEW, f"{C}optimizer.learning_rate=fast"], ["optimizer.learning_rate", "fast"]),
    ([NEW, f"{C}optimizer.learning_rate=nan"], ["optimizer.learning_rate"]),
    ([NEW, f"{C}optimizer.name=rmsprob"], ["optimizer.name", "rmsprop"]),
    ([NEW, f"{C}optimizer.schedule=linear"], ["optimizer.schedule", "linear"]),
    ([NEW, f"{C}optimizer.warmup_fraction=1"], ["optimizer.warmup_fraction"]),
    ([NEW, f"{C}optimizer.momentum=1"], ["optimizer.momentum"]),
    ([NEW, f"{C}optimizer.weight_decay=-1"], ["optimizer.weight_decay"]),
    ([NEW, f"{C}optimizer.clip_norm=0"], ["optimizer.clip_norm"]),
    ([NEW, f"{C}optimizer.recurrent_factor=2"], ["optimizer.recurrent_factor"]),
    ([NEW, f"{C}model.cell=simple_rn"], ["model.cell", "simple_rnn"]),
    ([NEW, f"{C}model.view=row"], ["model.view", "rows"]),
    ([NEW, f"{C}model.hidden_size=0"], ["model.hidden_size"]),
    ([NEW, f"{C}model.num_layers=0"], ["model.num_layers"]),
    ([NEW, f"{C}model.dropout=1"], ["model.dropout"]),
    ([NEW, f"{C}model.readout=first"], ["model.readout", "last"]),
    ([NEW, f"{C}model.block=dense"], ["model.block"]),
    ([NEW, f"{C}model.bidirectional=maybe"], ["model.bidirectional"]),
    ([NEW, f"{C}model.subsample=28"], ["model.subsample"]),
    ([NEW, f"{C}scan.unroll=3"], ["scan.unroll"]),
    ([NEW, "--epochs=3"], ["--config.train.num_epochs"]),
    ([NEW, f"{C}optimizer.momentum=0.5"], ["optimizer.momentum", "rmsprop", "sgd"]),
    ([NEW, f"{C}optimizer.weight_decay=0.5"], ["optimizer.weight_decay", "adamw"]),
    ([NEW, f"{C}optimizer.recurrent_factor=0.5"], ["optimizer.recurrent_factor", "lru"]),
    ([NEW, C + 'members.sweep={"optimizer.momentum": [0.1]}'], ["optimizer.momentum", "sgd"]),
    ([NEW, f"{C}model.hidden_size=1{400 * '0'}"], ["model.hidden_size", "bits"]),
    ([NEW, f"{C}train.num_epochs={2**63}"], ["train.num_epochs"]),
    ([NEW, f"{C}train.num_epochs=1{400 * '0'}"], ["train.num_epochs", "bits"]),
    ([NEW, f"{C}train.batch_size=1{400 * '0'}"], ["train.batch_size", "bits"]),
    ([NEW, f"{C}train.batch_size=1{5000 * '0'}"], ["train.batch_size"]),
    ([NEW, f"{C}members.num={2**63}"], ["members.num"]),
    ([NEW, f"{C}members.num=1{400 * '0'}"], ["members.num", "bits"]),
    ([NEW, f"{C}model.num_layers={10**9}"], ["model.num_layers"]),
    ([NEW, f"{C}checkpoint.every_steps={2**63}"], ["checkpoint.every_steps"]),
    ([NEW, f"{C}mesh.data={10**12}"], ["mesh.data"]),
    ([NEW, f"{C}optimizer.clip_norm=1e39"], ["optimizer.clip_norm"]),
    ([NEW, f"{C}optimizer.learning_rate=1e-60"], ["optimizer.learning_rate"]),
    ([NEW, C + 'members.sweep={"optimizer.learning_rate": [1e39]}'], ["1e+39"]),
    ([NEW, C + 'members.sweep={"optimizer.learning_rate": [1e-60]}'], ["1e-60"]),
    (
        [NEW, C + 'members.sweep={"optimizer.learning_rate": [1], "optimizer.learning_rate": [2]}'],
        ["members.sweep", "optimizer.learning_rate twice"],
    ),
    ([NEW, f"{C}members.sweep={100_000 * '['}"], ["members.sweep", "JSON"]),
    ([NEW, C + 'members.sweep={"optimizer.weight_decay": [0.1]}'], ["weight_decay", "adamw"]),
    (
        [NEW, f"{C}checkpoint.keep_best", f"{C}data.validation_fraction=0"],
        ["checkpoint.keep_best", "does nothing", "data.validation_fraction"],
    ),
    ([NEW, f"{C}train.batch_size={10**12}"], ["train.batch_size"]),
    ([NEW, f"{C}members.num={10**6}"], ["members.num"]),
    ([NEW, f"{C}model.hidden_size=65536"], ["GiB of memory", "model.hidden_size"]),
    ([NEW, f"{C}optimizer.learning_rate=1e39"], ["optimizer.learning_rate"]),
    ([NEW, f"{C}profile.steps=1:{5000 * '9'}"], ["profile.steps"]),
    ([NEW, "--config=exits.py"], ["exits.py", "SystemExit"]),
    ([NEW, "--config=none.py"], ["get_config()", "NoneType"]),
    (["--workdir=w[17]"], ["'['"]),
    (["--workdir=a/b*"], ["'*'"]),
    (["--workdir=a\\b"], ["storage"]),
    (["--workdir=gs://bucket/run"], ["address"]),
    (["--workdir=gs:"], ["gs:"]),
    (["--workdir=~nobody_of_this_name/x"], ["home folder"]),
    (["--workdir=a\nb"], ["printable"]),
    (["--workdir=\udcff"], ["printable"]),
    (["--workdir=a\0b"], ["printable"]),
    (["--workdir=a?b/run"], ["'?'"]),
    (["--workdir=s3:x"], ["s3:"]),
    ([NEW, f"{C}data.data_dir=~nobody_of_this_name"], ["data.data_dir", "home folder"]),
    ([NEW, f"{C}data.data_dir=a\nb"], ["data.data_dir", "printable"]),
    ([NEW, f"{C}data.data_dir={300 * 'x'}"], ["data.data_dir", "too long"]),
    ([NEW, f"{C}data.manual_dir={300 * 'x'}"], ["data.manual_dir", "too long"]),
    ([NEW, f"{C}data.manual_dir=a\0b"], ["data.manual_dir", "printable"]),
    ([NEW, "--config=~nobody_of_this_name/x.py"], ["--config", "home folder"]),
    ([NEW, f"--config={300 * 'x'}"], ["--config", "too long"]),
    ([NEW, f"{C}data.data_dir=d[0]"], ["data.data_dir", "'['"]),
    ([NEW, f"{C}data.manual_dir=~nobody_of_this_name"], ["data.manual_dir"]),
    ([NEW, f"{C}data.name=minst"], ["data.name", "mnist"]),
    ([NEW, f"{C}data.input_mode=file"], ["data.input_mode", "stream"]),
    ([NEW, f"{C}data.validation_fraction=1"], ["data.validation_fraction"]),
    ([NEW, f"{C}data.data_dir=README.md"], ["README.md"]),
    ([NEW, f"{C}data.name=mnist", f"{C}data.manual_dir=nowhere"], ["nowhere"]),
    ([NEW, f"{C}checkpoint.keep=0"], ["checkpoint.keep"]),
    ([NEW, f"{C}checkpoint.every_steps=-1"], ["checkpoint.every_steps"]),
    ([NEW, f"{C}profile.steps=5"], ["profile.steps", "START:STOP"]),
    ([NEW, f"{C}profile.steps=0:99999"], ["profile.steps", "STOP <= 125"]),
    ([NEW, f"{C}members.num=0"], ["members.num"]),
    ([NEW, f"{C}members.num=2", f"{C}data.input_mode=stream"], ["data.input_mode", "resident"]),
    ([NEW, f"{C}members.num=2", f"{C}seed=4294967295"], ["members.num", "4294967295"]),
    ([NEW, f"{C}members.sweep=x"], ["members.sweep", "JSON"]),
    ([NEW, C + 'members.sweep={"optimizer.lr": [1]}'], ["optimizer.lr", "optimizer.learning_rate"]),
    ([NEW, C + 'members.sweep={"optimizer.learning_rate": [-1]}'], ["-1"]),
    ([NEW, f"{C}mesh.member=2"], ["mesh.member", "members"]),
    ([NEW, f"{C}mesh.data=3"], ["mesh.data=3", "128"]),
    ([NEW, f"{C}mesh.data=64"], ["64 devices"]),
    ([NEW, f"{C}train.accumulate=3"], ["train.accumulate=3", "examples", "choose"]),
    ([NEW, "--coordinator=127.0.0.1:1"], ["--num_processes"]),
    ([NEW, "--coordinator=here", "--num_processes=1", "--process_id=0"], ["HOST:PORT"]),
    ([NEW, "--coordinator=h:1", "--num_processes=1", "--process_id=1"], ["--process_id=1"]),
    ([NEW, "--distributed"], ["--coordinator"]),
    (["--workdir=README.md/run"], ["README.md"]),
    (["--workdir=README.md"], ["README.md"]),
    (["--workdir=" + 300 * "x"], ["workdir"]),
    (["--workdir=/proc/run"], ["/proc/run"]),
    ([NEW, "--mode=evaluate"], ["new", "train"]),
    ([RUN, "--mode=evaluate", "--config=experiments/nothing.py"], ["--config", "--mode=evaluate"]),
    ([RUN, "--mode=evaluate", "--overwrite"], ["--overwrite", "--mode=evaluate"]),
    ([RUN, "--mode=evaluate", "--debug_nans"], ["--debug_nans", "--mode=evaluate"]),
    ([RUN, f"{C}seed=1"], ["config.seed: 0 → 1", "--overwrite"]),
    ([RUN, f"{C}model.cell=gru"], ["config.model.cell: 'simple_rnn' → 'gru'"]),
    ([RUN, f"{C}train.num_epochs=1"], ["config.train.num_epochs: 2 → 1"]),
    ([RUN, "--mode=evaluate", f"{C}model.hidden_size=9"], ["hidden_size: 64 → 9"]),
    ([RUN], ["config.json"], rewrite("config.json", lambda text: text[:100])),
    ([RUN], ["config.json"], rewrite("config.json", lambda text: "[]")),
    ([RUN], ["modle"], rewrite("config.json", lambda text: text.replace("model", "modle"))),
    ([RUN], ["results.json"], rewrite("results.json", lambda text: text[:100])),
    ([RUN], ["results.json"], rewrite("results.json", lambda text: "[]")),
    ([RUN], ["results.json"], rewrite("results.json", lambda text: "null")),
    ([RUN], ["results.json"], rewrite("results.json", lambda text: '{"epochs": 2}')),
    ([RUN], ["results.json"], rewrite("results.json", lambda text: 100_000 * "[")),
    ([RUN], ["config.json"], rewrite("config.json", lambda text: 100_000 * "[")),
    ([RUN], ["config.json"], rewrite("config.json", lambda text: '{"train": 3}')),
    ([RUN, "--mode=evaluate"], ["results.json"], rewrite("results.json", lambda text: "[]")),
    ([RUN], ["config.json", "--overwrite"], unlink("config.json")),
    ([RUN, "--mode=evaluate"], ["config.json"], unlink("config.json")),
    ([RUN, "--mode=evaluate"], ["checkpoints"], remove_checkpoints),
    ([RUN, "--mode=evaluate"], ["checkpoint"], damage_checkpoints),
    (MNIST_FROM, ["ubyte.gz", "SHA-256"], archives()),
    (UNVERIFIED, ["ubyte"], archives()),
    (UNVERIFIED, [TRAIN_IMAGES], archives(lambda folder: (folder / TRAIN_IMAGES).unlink())),
    (UNVERIFIED, ["ubyte"], archives(lambda folder: (folder / TRAIN_IMAGES).write_bytes(b"x"))),
    (UNVERIFIED, ["ubyte"], archives(lambda folder: (folder / TRAIN_IMAGES).write_bytes(b""))),
    ([NEW, f"{C}model.cell_options={{"], ["cell_options", "is not JSON"]),
    ([NEW, "--coordinator=h:0", "--num_processes=1", "--process_id=0"], ["h:0", "1 to 65535"]),
    ([NEW, "--coordinator=h:99999", "--num_processes=1", "--process_id=0"], ["h:99999", "PORT"]),
]


@pytest.fixture(scope="module")
def playground(tmp_path_factory, data_dir):
    """A folder with a finished run, and files that are not what they are taken for."""
    folder = tmp_path_factory.mktemp("playground")
    (folder / "experiments").mkdir()
    (folder / "README.md").write_text("# not Python")
    (folder / "exits.py").write_text("raise SystemExit(0)")
    (folder / "none.py").write_text("def get_config():\n  return None\n")
    (folder / "broken.py").write_text("def get_config():\n  return undefined\n")
    (folder / "unknown.py").write_text(
        "from seqmnist.config import get_config as get\n\ndef get_config():\n"
        "  config = get()\n  config.train.epochs = 1\n  return config\n"
    )
    result = seqmnist(
        RUN,
        f"{C}data.name=mnist_5k",
        f"{C}data.data_dir={data_dir}",
        f"{C}train.num_epochs=2",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return folder


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def prepare(case, playground, data_dir, folder):
    """Copies the playground, and returns the arguments of a case."""
    arguments, _, *changes = case
    unused = shutil.ignore_patterns() if RUN in arguments else shutil.ignore_patterns("run")
    shutil.copytree(playground, folder, ignore=unused)
    for change in changes:
        change(folder)
    if RUN not in arguments and not any("data_dir" in argument for argument in arguments):
        arguments = [*arguments, f"{C}data.data_dir={data_dir}"]
        if not any("data.name" in argument for argument in arguments):
            arguments = [*arguments, f"{C}data.name=mnist_5k"]
    return arguments


def name_of(case):
    return " ".join(case[0])[:80]


IN_A_JOB = [case for case in REFUSALS if "--distributed" in case[0]]


@pytest.mark.parametrize("case", [c for c in REFUSALS if c not in IN_A_JOB], ids=name_of)
def test_a_mistake_is_refused_in_one_line(case, playground, data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    arguments = prepare(case, playground, data_dir, folder)
    before = content(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        main._run(arguments, StopRequest())
    line = str(caught.value)
    assert line.isprintable()
    assert all(word in line for word in case[1]), line
    assert content(folder) == before


# Most after the sixtieth import JAX.
SAMPLE = [*REFUSALS[:60:6], *REFUSALS[61::20], *IN_A_JOB]


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=name_of)
def test_a_command_line_ends_in_one_line(case, playground, data_dir, tmp_path):
    folder = tmp_path / "here"
    arguments = prepare(case, playground, data_dir, folder)
    before = content(folder)
    result = seqmnist(*arguments, cwd=folder)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in case[1]), line
    assert content(folder) == before


def test_there_are_enough_of_them():
    assert len(REFUSALS) >= 130


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "3"),
        ("metrics.jsonl", "{}"),
        ("metrics.jsonl", "null"),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", 100_000 * "["),
        ("results.json", "[]"),
        ("results.json", '{"epochs": 2}'),
        ("config.json", "3"),
    ],
)
def test_a_tool_refuses_what_no_run_writes(name, text, playground, tmp_path, monkeypatch, capsys):
    shutil.copytree(playground / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", RUN])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # a command line sets it
    assert cli.call(report._make_parser(), report._main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert content(tmp_path) == before
