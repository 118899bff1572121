"""Runs that are stopped, killed, damaged or started twice lose nothing, and repeat nothing."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import REPOSITORY, seqmnist

from seqmnist import checkpoints as checkpoint_lib
from seqmnist import config as config_lib
from seqmnist import run
from seqmnist import workdir as workdir_lib
from seqmnist.display import Display
from seqmnist.errors import UserError
from seqmnist.stop import StopRequest
from seqmnist.study import trained
from seqmnist.training.loop import Loop
from seqmnist.workdir import Workdir
from tools import kill_stress

pytestmark = pytest.mark.slow

MEMBERS = {"members": {"num": 2}}
SWEEP = {"members": {"num": 2, "sweep": '{"optimizer.learning_rate": [0.001, 0.01]}'}}


@pytest.fixture(scope="module")
def make_config(data_dir):
    def make(num_epochs=3, **groups):
        groups = {key: dict(value) for key, value in groups.items()}
        groups.setdefault("model", {}).setdefault("hidden_size", 8)
        groups["data"] = {"name": "mnist_5k", "data_dir": str(data_dir), **groups.get("data", {})}
        groups.setdefault("train", {})["num_epochs"] = num_epochs
        return config_lib.from_dict(groups)

    return make


@pytest.fixture(scope="module")
def outcomes(make_config, tmp_path_factory):
    """The outcomes of four uninterrupted epochs, by kind of run."""
    found = {}
    for name, groups in (("alone", {}), ("members", MEMBERS), ("sweep", SWEEP)):
        workdir = tmp_path_factory.mktemp("whole") / name
        run.train(make_config(4, **groups), workdir)
        found[name] = kill_stress.outcome(workdir)
    return found


@pytest.fixture
def whole(outcomes):
    return outcomes["alone"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every workdir of these tests is a relative path."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asks(owner, name, number, stop, times=1):
    """Wraps a function: after a number of calls, a signal arrives."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments, **keywords):
        calls.append(name)
        if len(calls) == times:
            stop.receive(number)
        return function(*arguments, **keywords)

    return owner, name, wrapped


MOMENTS = {
    "before the first step": (Display, "setup", 1),
    "within an epoch": (Display, "epoch", 3),
    "between epochs": (Display, "epoch_line", 2),
    "after the last epoch": (Display, "epoch_line", 4),
    "while scoring": (run, "_score", 1),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGTERM) for moment in MOMENTS),
        *(("after the last epoch", number) for number in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_stop_at_any_moment_loses_nothing(moment, number, make_config, whole, monkeypatch):
    config = make_config(4, checkpoint={"every_epochs": 0})
    stop = StopRequest()
    stop.defer()
    with monkeypatch.context() as patch:
        owner, name, times = MOMENTS[moment]
        patch.setattr(*asks(owner, name, number, stop, times))
        with pytest.raises(SystemExit) as caught:
            run.train(config, "runs/a", stop=stop)
    assert caught.value.code == 128 + number
    assert not pathlib.Path("runs/a/results.json").exists()
    run.train(config, "runs/a")
    assert kill_stress.outcome(pathlib.Path("runs/a")) == whole


@pytest.mark.parametrize("kind", ["stream", "members", "sweep"])
def test_every_kind_of_run_resumes(kind, make_config, outcomes, monkeypatch):
    groups = {"stream": {"data": {"input_mode": "stream"}}, "members": MEMBERS, "sweep": SWEEP}
    config, stop = make_config(4, **groups[kind]), StopRequest()
    with monkeypatch.context() as patch:
        patch.setattr(*asks(Display, "epoch", signal.SIGTERM, stop, 3))
        with pytest.raises(SystemExit):
            run.train(config, "runs/a", stop=stop)
    (*_, last) = sorted(int(path.name) for path in pathlib.Path("runs/a/checkpoints").iterdir())
    assert 50 < last < 75
    run.train(config, "runs/a")
    expected = outcomes["alone" if kind == "stream" else kind]
    assert kill_stress.outcome(pathlib.Path("runs/a")) == expected


def listens(process):
    """Whether a process has set its handlers, of which that of SIGHUP is the last."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGHUP - 1) & 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="handlers are seen on Linux")
def test_signals_reach_the_command_line(data_dir, monkeypatch, request):
    """Each once before training, and once while it trains."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setitem(kill_stress.SETTINGS, "train.num_epochs", 4000)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def start_all(when):
        folders = [pathlib.Path(f"{when}-{number}") for number in numbers]
        processes = [kill_stress.start(folder, str(data_dir), "resident") for folder in folders]
        for process in processes:
            request.addfinalizer(process.kill)
        return processes

    early, late = start_all("early"), start_all("late")
    for process, number in zip(early, numbers, strict=True):
        while not listens(process):
            time.sleep(0.01)
        process.send_signal(number)
    for process, number in zip(early, numbers, strict=True):
        assert (process.communicate()[1], process.returncode) == (
            "Stopped; nothing was lost\n", 128 + number,
        )  # fmt: skip
    for process, number in zip(late, numbers, strict=True):
        metrics = pathlib.Path(f"late-{number}/metrics.jsonl")
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.05)
        process.send_signal(number)
        assert (process.communicate()[1], process.returncode) == ("", 128 + number)


def test_more_epochs_may_follow(make_config, whole):
    run.train(make_config(2), "runs/a")
    run.train(make_config(4), "runs/a")
    assert kill_stress.outcome(pathlib.Path("runs/a")) == whole


def test_a_run_may_lack_only_its_scores(make_config, capsys):
    results = run.train(make_config(2), "runs/a")
    pathlib.Path("runs/a/results.json").unlink()
    capsys.readouterr()
    assert run.train(make_config(2), "runs/a")["test"] == results["test"]
    assert "\nResuming after the last epoch\n" in capsys.readouterr().out


def test_seconds_of_an_epoch_go_on_after_a_stop(make_config, monkeypatch):
    config, stop = make_config(1), StopRequest()
    with monkeypatch.context() as patch:
        patch.setattr(*asks(run.Session, "advance", signal.SIGTERM, stop))
        now = time.monotonic
        with pytest.raises(SystemExit):
            run.train(config, "a", stop=stop)
        patch.setattr(run.time, "monotonic", lambda: now() / 1e6)  # what follows takes no time
        before = json.loads(next(pathlib.Path("a/checkpoints").rglob("facts/metadata")).read_text())
        results = run.train(config, "a")
    (record,) = Workdir("a").read_metrics()
    assert record["seconds"] == pytest.approx(before["seconds"], abs=0.01)
    assert results["seconds"]["train"] == pytest.approx(before["seconds"], abs=0.01)


def test_the_pace_of_an_epoch_is_that_of_the_steps_of_this_process(
    make_config, monkeypatch, capsys
):
    """With a clock that advances by a second per step, and by much more in between."""
    config, stop, clock = make_config(1, checkpoint={"every_steps": 12}), StopRequest(), [0.0]

    def late(owner, name):
        function = getattr(owner, name)

        def wrapped(*arguments, **keywords):
            clock[0] += 100
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, wrapped)

    def train(loop, begin, *arguments):
        step = begin.step
        for progress in take_steps(loop, begin, *arguments):
            clock[0] += progress.step - step
            step = progress.step
            yield progress

    take_steps = Loop.train
    monkeypatch.setattr(Loop, "train", train)
    late(run.Task, "evaluate")
    late(run.Session, "_save")
    late(run.Display, "setup")
    monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with monkeypatch.context() as patch:
        patch.setattr(*asks(run.Session, "advance", signal.SIGTERM, stop))  # after 8 steps
        with pytest.raises(SystemExit):
            run.train(config, "a", stop=stop)
    run.train(config, "a")
    assert "Epoch 1/1 - 25/25 - 17.0s 1000.0ms/step" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(make_config, capsys, monkeypatch):
    results = run.train(make_config(1), "a")
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("a").rglob("*")}
    monkeypatch.setattr(run, "compose", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert run.train(make_config(1), "a") == json.loads(json.dumps(results))
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path("a").rglob("*")}


def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(make_config, whole):
    run.train(make_config(1, model={"cell": "gru"}), "a")
    ours = ("export/classifier.jax_export", "report/beliefs.png", "report.html", "plugins/0/a.py")
    ours += ("profile/plugins/profile/trace", "profile/step.json")
    theirs = ("thesis.txt", "notes.partial", "profile/mine.txt", "damaged/25/arrays")
    theirs += ("plugins/mine.py", "checkpoints/mine.txt")
    for name in (*ours, *theirs):
        path = pathlib.Path("a", name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    run.train(make_config(4), "a", overwrite=True)
    assert kill_stress.outcome(pathlib.Path("a")) == whole
    assert [name for name in ours if pathlib.Path("a", name).exists()] == []
    assert all(pathlib.Path("a", name).read_text() == name for name in theirs)
    kept = {path.name for path in pathlib.Path("a/checkpoints").iterdir()}
    assert kept == {"50", "75", "100", "mine.txt"}


@pytest.mark.parametrize(
    "change", [{"view": "columns"}, {"reverse": True}, {"cell": "irnn"}, {"readout": "mean"}]
)
def test_a_changed_configuration_of_equal_shapes_is_refused(change, make_config):
    run.train(make_config(1), "a")
    values = json.loads(pathlib.Path("a/config.json").read_text())
    values["model"] |= change
    pathlib.Path("a/config.json").write_text(json.dumps(values))
    changed = Workdir("a").read_config()
    longer = config_lib.override(changed, {"train.num_epochs": 2})
    for use in (
        lambda: run.evaluate(changed, "a"),
        lambda: trained.load("a"),
        lambda: run.train(longer, "a"),
    ):
        with pytest.raises(
            UserError, match=rf"config.json has been changed .*{next(iter(change))}"
        ):
            use()


def test_checkpoints_that_are_gone_are_missed(make_config, whole, capsys):
    """As those of a disk that is not there."""
    run.train(make_config(2), "a")
    shutil.move("a/checkpoints", "elsewhere")
    pathlib.Path("a/checkpoints").symlink_to("nowhere")
    with pytest.raises(UserError, match="checkpoints is not a folder"):
        run.train(make_config(4), "a")
    pathlib.Path("a/checkpoints").unlink()
    pathlib.Path("a/checkpoints").mkdir()
    pathlib.Path("a/checkpoints/7").touch()  # these are none
    pathlib.Path("a/checkpoints/007").mkdir()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        run.train(make_config(4), "a")
    pathlib.Path("a/results.json").unlink()
    capsys.readouterr()
    run.train(make_config(4), "a")
    assert "checkpoints is empty; the run begins anew" in capsys.readouterr().out
    assert kill_stress.outcome(pathlib.Path("a")) == whole


def test_a_checkpoint_of_a_newer_version_is_not_resumed(make_config, monkeypatch):
    run.train(make_config(1), "a")
    read = checkpoint_lib._read

    def newer(folder):
        leaves, facts = read(folder)
        return leaves, facts | {"tokens": 7}

    monkeypatch.setattr(checkpoint_lib, "_read", newer)
    with pytest.raises(UserError, match="newer version"):
        run.train(make_config(2), "a")


def test_more_steps_than_can_be_counted_are_refused(make_config):
    with pytest.raises(UserError, match="choose at most 671,088"):
        run.train(make_config(10**6, train={"batch_size": 1}), "a")


def test_overwrite_prepares_before_it_removes(make_config, monkeypatch):
    run.train(make_config(1), "a")
    before = kill_stress.outcome(pathlib.Path("a"))
    with pytest.raises(UserError):
        run.train(make_config(1, mesh={"data": 3}), "a", overwrite=True)
    with monkeypatch.context() as patch:  # killed in the middle of the replacement
        patch.setattr(Workdir, "begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(make_config(2), "a", overwrite=True)
    assert not pathlib.Path("a/config.json").exists()
    with pytest.raises(UserError, match="replacement was interrupted"):
        Workdir("a").read_config()
    result = seqmnist(f"--workdir={pathlib.Path('a').absolute()}")
    assert result.returncode == 0, result.stderr
    assert kill_stress.outcome(pathlib.Path("a")) == before


@pytest.mark.parametrize("name", ["plugins/0/mine.py", "metrics.jsonl", "config.json"])
def test_overwrite_that_cannot_write_leaves_the_run(name, make_config, monkeypatch):
    run.train(make_config(1), "a")
    before = kill_stress.outcome(pathlib.Path("a"))
    write = workdir_lib.write_aside

    def fail(path, content):
        if path == pathlib.Path("a", name).absolute():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(workdir_lib, "write_aside", fail)
    pathlib.Path("mine.py").touch()
    config = make_config(2)
    config.plugins = "mine.py"
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        run.train(config, "a", overwrite=True)
    assert kill_stress.outcome(pathlib.Path("a")) == before


def test_a_link_to_checkpoints_elsewhere_is_replaced_too(make_config, here):
    run.train(make_config(1), "a")
    shutil.move("a/checkpoints", "elsewhere")
    pathlib.Path("a/checkpoints").symlink_to(here / "elsewhere")
    run.train(make_config(2), "a", overwrite=True)
    assert not pathlib.Path("a/checkpoints").is_symlink()
    assert pathlib.Path("elsewhere/25").is_dir()


def damage(kind, folder):
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    largest, facts = files[-1], folder / "facts" / "metadata"
    if kind == "truncated":
        largest.write_bytes(largest.read_bytes()[:100])
    elif kind == "deleted":
        largest.unlink()
    elif kind == "emptied":
        for path in files:
            path.write_bytes(b"")
    elif kind == "facts":
        facts.write_text(facts.read_text().replace('"epoch": 1', '"epoch": 7'))
    elif kind == "no facts":
        facts.write_text("[]")
    else:
        for path in files[-4:]:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0x10
            path.write_bytes(content)


DAMAGES = ["truncated", "deleted", "emptied", "facts", "no facts", "flipped"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_made_again(kind, make_config, whole, capsys):
    run.train(make_config(3), "a")
    damage(kind, pathlib.Path("a/checkpoints/75"))
    # Trains up to the damaged step again, and no further.
    shutil.copy("a/config.json", "config.json")
    pathlib.Path("a/results.json").unlink()
    run.train(make_config(3), "a")
    assert "NOTICE: checkpoints/75 is damaged" in capsys.readouterr().out
    assert pathlib.Path("a/damaged/75").is_dir()
    assert pathlib.Path("a/checkpoints/75").is_dir()
    run.train(make_config(4), "a")
    assert kill_stress.outcome(pathlib.Path("a")) == whole


def test_an_older_checkpoint_is_never_used_silently(make_config, capsys):
    run.train(make_config(2), "a")
    damage("truncated", pathlib.Path("a/checkpoints/50"))
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("a").rglob("*")}
    run.evaluate(make_config(2), "a")
    assert "is damaged" in capsys.readouterr().out
    trained.load("a")
    assert "step 25 of 50" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path("a").rglob("*")}


def test_without_a_whole_checkpoint_nothing_is_deleted(make_config, whole):
    run.train(make_config(2), "a")
    for folder in pathlib.Path("a/checkpoints").iterdir():
        damage("truncated", folder)
    with pytest.raises(UserError, match="no usable checkpoint"):
        run.evaluate(make_config(2), "a")
    with pytest.raises(UserError, match="run the same command again") as caught:
        run.train(make_config(4), "a")
    assert "overwrite" not in str(caught.value)
    run.train(make_config(4), "a")
    assert kill_stress.outcome(pathlib.Path("a")) == whole
    assert {path.name for path in pathlib.Path("a/damaged").iterdir()} == {"25", "50"}


def contents(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def test_an_unreadable_checkpoint_is_not_called_damaged(make_config, monkeypatch):
    run.train(make_config(2), "a")
    before, read_bytes = contents("a/checkpoints"), pathlib.Path.read_bytes

    def refuse(path):
        if "75" not in path.parts and "arrays" in path.parts:
            raise PermissionError(13, os.strerror(13), str(path))
        return read_bytes(path)

    damage("deleted", pathlib.Path("a/checkpoints/50"))  # what Orbax then says is a ValueError
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_bytes", refuse)
        with pytest.raises(UserError, match=r"Permission denied.*nothing was changed"):
            run.train(make_config(3), "a")
    assert not pathlib.Path("a/damaged").exists()
    assert len(contents("a/checkpoints")) == len(before) - 1


@pytest.mark.parametrize(
    ("groups", "word"),
    [
        ({"model": {"hidden_size": 9}}, r"float32\[9\]|float32\[.*9"),
        ({"model": {"num_layers": 2}}, "layers.1"),
        ({"optimizer": {"name": "sgd"}}, "opt_state"),
        ({"members": {"num": 3}}, r"\[3"),
    ],
)
def test_a_configuration_of_another_network_moves_nothing(groups, word, make_config, monkeypatch):
    """As after an edit of config.json whose checkpoints know no settings, or with another Optax."""
    monkeypatch.setattr(Workdir, "check_settings", lambda *_: None)
    run.train(make_config(1), "a")
    other = make_config(2, **groups)
    pathlib.Path("a/config.json").write_text(json.dumps(config_lib.to_dict(other)))
    before = contents("a/checkpoints")
    with pytest.raises(UserError, match=word) as caught:
        run.train(other, "a")
    assert "damaged" not in str(caught.value)
    assert contents("a/checkpoints") == before
    if "optimizer" not in groups:  # a prediction needs no optimizer
        with pytest.raises(UserError, match=word):
            trained.load("a")


@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_kept_and_found(seed, make_config, monkeypatch, capsys):
    """Losses are drawn: by themselves, the last epoch is often the best."""
    rng = np.random.default_rng(seed)
    losses, evaluate = rng.permutation(4) / 10, run.Task.evaluate
    drawn = iter(losses.tolist())

    def listed(task, params, split, diverged=False):
        means = evaluate(task, params, split, diverged)
        return means if split == "test" else {**means, "loss": next(drawn)}

    monkeypatch.setattr(run.Task, "evaluate", listed)
    every = {"every_epochs": int(rng.integers(0, 4)), "every_steps": int(rng.choice([0, 10, 25]))}
    run.train(make_config(2, checkpoint={"keep": 1, "keep_best": True, **every}), "a")
    config = make_config(4, checkpoint={"keep": 1, "keep_best": True, **every})
    run.train(config, "a")  # resumes
    best = 25 * (1 + int(losses.argmin()))
    steps = {int(path.name) for path in pathlib.Path("a/checkpoints").iterdir()}
    assert steps == {best, 100}
    assert trained.load("a", checkpoint="best").step == best
    assert trained.load("a", checkpoint=str(best)).step == best
    assert trained.load("a").step == 100
    capsys.readouterr()
    assert run.evaluate(config, "a", "best") == run.evaluate(config, "a", str(best))
    assert capsys.readouterr().out.count(f"Checkpoint: step {best}") == 2


def test_a_checkpoint_that_a_run_has_removed_meanwhile_is_no_damage(make_config, monkeypatch):
    run.train(make_config(1), "a")
    kind, seen, said = checkpoint_lib.Checkpoints, [], []
    steps, read = kind.steps, kind._try_read
    monkeypatch.setattr(kind, "steps", lambda self: steps(self) if seen else [7])
    monkeypatch.setattr(kind, "_try_read", lambda self, step: seen.append(step) or read(self, step))
    assert trained.load("a", say=said.append).step == 25
    assert seen == [7, 25]
    assert "damaged" not in "".join(said)


def test_a_checkpoint_that_does_not_exist_is_refused(make_config, capsys):
    config = make_config(2, data={"validation_fraction": 0.0})
    run.train(config, "a")
    with pytest.raises(UserError, match="choose newest, best or one of: 32, 64"):
        run.evaluate(config, "a", "33")
    with pytest.raises(UserError, match="no validated epoch"):
        run.evaluate(config, "a", "best")


def test_a_run_that_keeps_no_validated_epoch_says_so(make_config, monkeypatch):
    """Its only checkpoint is of the middle of an epoch."""
    config, stop = make_config(2, checkpoint={"keep": 1, "every_epochs": 0}), StopRequest()
    stop.defer()
    monkeypatch.setattr(*asks(Display, "epoch", signal.SIGTERM, stop, times=2))
    with pytest.raises(SystemExit):
        run.train(config, "a", stop=stop)
    with pytest.raises(UserError, match="keeps no state of a validated epoch"):
        run.evaluate(config, "a", "best")


def test_a_notice_tells_that_the_best_was_not_kept(make_config, monkeypatch):
    drawn, evaluate = iter([0.2, 0.1, 0.4, 0.3]), run.Task.evaluate
    monkeypatch.setattr(
        run.Task,
        "evaluate",
        lambda task, *args: {**evaluate(task, *args), "loss": next(drawn, 0.5)},
    )
    run.train(make_config(4, checkpoint={"keep": 2}), "a")
    said = []
    assert trained.load("a", say=said.append, checkpoint="best").step == 100
    assert "step 50, was not kept" in said[0]


def test_other_settings_are_refused_by_name(make_config):
    run.train(make_config(2), "a")
    other = make_config(2, model={"hidden_size": 9}, train={"batch_size": 64})
    with pytest.raises(UserError) as caught:
        run.train(other, "a")
    assert "config.model.hidden_size: 8 → 9" in str(caught.value)
    assert "config.train.batch_size: 128 → 64" in str(caught.value)
    with pytest.raises(UserError, match=r"train.num_epochs: 2 → 1"):
        run.train(make_config(1), "a")
    cosine = make_config(2, optimizer={"schedule": "cosine"})
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix dtypes
        run.train(cosine, "cosine")
    with pytest.raises(UserError, match="schedule fixes the number of epochs"):
        run.train(make_config(3, optimizer={"schedule": "cosine"}), "cosine")


def test_two_processes_do_not_share_a_workdir(make_config):
    ready = "import sys, time; from seqmnist.workdir import Workdir\n"
    ready += "with Workdir('a').hold(print): print('held', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", ready], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "held\n"
        before = contents("a")
        with pytest.raises(UserError, match="in use by another process"):
            run.train(make_config(1), "a")
        assert contents("a") == before
        other.kill()
    run.train(make_config(1), "a")


def diverging(make_config, num_epochs=2, **groups):
    optimizer = {"name": "sgd", "learning_rate": 30.0, **groups.pop("optimizer", {})}
    return make_config(num_epochs, model={"cell": "irnn"}, optimizer=optimizer, **groups)


def test_a_loss_that_is_not_finite_stops_the_run(make_config):
    config = diverging(make_config, checkpoint={"every_steps": 1})
    with pytest.raises(UserError, match=r"not finite after step (\d+) .*rate 30") as caught:
        run.train(config, "a")
    step = int(str(caught.value).partition("after step ")[2].partition(" ")[0])
    assert step > 1
    assert f"last good checkpoint: checkpoints/{step - 1};" in str(caught.value)
    with pytest.raises(UserError, match=r"in \w+ \(\w+\.py:\d+\)|encountered in"):
        run.train(config, "a", debug_nans=True)


def test_a_number_that_becomes_infinite_is_said_to(make_config):
    config = make_config(1, optimizer={"name": "sgd", "learning_rate": 3e38})
    with pytest.raises(UserError, match="not finite because a number became infinite, after step"):
        run.train(config, "a", debug_nans=True)


def test_a_last_step_that_spoils_the_parameters_is_a_divergence(make_config):
    """The parameters are finite, but no score of theirs is."""
    one_step, sgd = {"batch_size": 4000}, {"name": "sgd", "learning_rate": 1e38}
    config = make_config(1, train=one_step, optimizer=sgd)
    with pytest.raises(UserError, match=r"infinite, after step 1 \(.* checkpoint: none"):
        run.train(config, "a", debug_nans=True)
    sweep = {"members": {"sweep": '{"optimizer.learning_rate": [0.001, 1e38]}'}}
    results = run.train(make_config(1, train=one_step, optimizer=sgd, **sweep), "b")
    assert [setting["diverged"] for setting in results["settings"]] == [0, 1]
    (line,) = Workdir("b").read_metrics()
    for score in ("train/loss", "validation/loss", "validation/accuracy", "parameter_norm"):
        assert [value is None for value in line[score]] == [False, True]


def test_results_without_checkpoints_are_not_overwritten(make_config):
    run.train(make_config(1), "a")
    shutil.rmtree("a/checkpoints")
    before = pathlib.Path("a/results.json").read_bytes()
    with pytest.raises(UserError, match="holds the results of a run but no checkpoint"):
        run.train(make_config(2), "a")
    assert pathlib.Path("a/results.json").read_bytes() == before


def test_the_line_on_divergence_names_the_rate_of_that_step(make_config):
    cosine = {"schedule": "cosine", "warmup_fraction": 0.5}
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(UserError, match="not finite") as caught,
    ):
        run.train(diverging(make_config, optimizer=cosine), "a")
    words = str(caught.value).replace(",", "").split()
    step, rate = int(words[words.index("step") + 1]), float(words[words.index("rate") + 1][:-2])
    assert rate == pytest.approx(30 * (step - 1) / 25, rel=1e-4)  # 25 of 50 steps of warm-up
    sweep = '{"optimizer.learning_rate": [30, 60]}'
    with pytest.raises(UserError, match=r"all 2 members .*rate 30 to 60"):
        run.train(diverging(make_config, members={"sweep": sweep}), "b")


def test_a_schedule_of_few_steps_and_a_long_warm_up_runs(make_config):
    optimizer = {"schedule": "cosine", "warmup_fraction": 0.6}
    with jax.numpy_dtype_promotion("standard"):
        results = run.train(make_config(1, optimizer=optimizer, train={"batch_size": 3200}), "a")
    assert results["steps"] == 1


def test_runs_in_threads_finish_and_change_no_setting(make_config):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    options, config = dict(jax.config.values), make_config(1, checkpoint={"every_steps": 2})
    threads = [threading.Thread(target=run.train, args=(config, k), daemon=True) for k in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)  # Orbax, left to itself, waits for ever
    for name in "ab":
        assert Workdir(name).read_results()["steps"] == 25
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert options == dict(jax.config.values)


def test_a_save_that_failed_does_not_disturb_another_thread(make_config, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/checkpoints/25")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", refuse)
        with pytest.raises(UserError, match="No space left"):
            run.train(make_config(2), "a")
    thread = threading.Thread(target=run.train, args=(make_config(1), "b"))
    thread.start()
    thread.join()
    assert Workdir("b").read_results()["steps"] == 25


@pytest.mark.parametrize("limit", [500, 5_000])
def test_a_disk_that_takes_no_more_ends_in_one_line(limit, make_config, data_dir, whole):
    """A limit on the size of files stands for a full disk, wherever something is written."""
    arguments = ["--workdir=a", "--config=config.py", f"--config.data.data_dir={data_dir}"]
    values = config_lib.to_dict(make_config(4))
    pathlib.Path("config.py").write_text(
        f"from seqmnist import config\n\ndef get_config():\n    return config.from_dict({values})\n"
    )
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY));"
        "from seqmnist.main import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    result = subprocess.run(
        [sys.executable, "-B", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "File too large" in line
    assert "resumes" in line
    run.train(make_config(4), "a")
    assert kill_stress.outcome(pathlib.Path("a")) == whole


def test_events_say_what_the_records_say(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.train(make_config(2), "a")
    run.train(make_config(3), "a")
    (file,) = pathlib.Path("a").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file))
    accumulator.Reload()
    losses = {
        event.step: float(np.frombuffer(event.tensor_proto.tensor_content, np.float32)[0])
        if event.tensor_proto.tensor_content
        else event.tensor_proto.float_val[0]
        for event in accumulator.Tensors("train/loss")
    }
    expected = {line["step"]: line["train/loss"] for line in Workdir("a").read_metrics()}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_run_of_other_data_is_refused(make_config, monkeypatch):
    config = make_config(1)
    run.train(config, "a")
    compose = run.compose

    def compose_other(*arguments):
        task = compose(*arguments)
        return task._replace(dataset=task.dataset.__class__(**{
            **vars(task.dataset), "fingerprint": "0123456789"
        }))  # fmt: skip

    monkeypatch.setattr(run, "compose", compose_other)
    for other in (make_config(2), make_config(1, data={"name": "auto"})):
        with pytest.raises(UserError, match="trained on other data"):
            run.train(other, "a")
    with pytest.raises(UserError, match="trained on other data"):
        run.evaluate(config, "a")


def test_a_checkpoint_of_the_first_edition_is_read(make_config, whole):
    """Its digest covers the arrays in the order of the state; its configuration has more groups."""
    run.train(make_config(2), "a")
    values = json.loads(pathlib.Path("a/config.json").read_text())
    values["scan"] = {"method": "auto", "unroll": "auto"}
    pathlib.Path("a/config.json").write_text(json.dumps(values))
    leaves, facts = checkpoint_lib._read(pathlib.Path("a/checkpoints/50").absolute())
    order = [name for field in ("params", "opt_state", "step", "seed")
             for name in leaves if name.startswith(f"0.{field}")]  # fmt: skip
    order += ["1.loss", "1.correct", "1.count", "1.gradient_norm", "1.update_norm"]
    import hashlib

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in order:
        digest.update(leaves[name].tobytes())
    written = json.loads(pathlib.Path("a/checkpoints/50/facts/metadata").read_text())
    assert written["sha256"] == digest.hexdigest()
    run.train(make_config(4), "a")
    assert kill_stress.outcome(pathlib.Path("a")) == whole


def test_a_file_in_the_place_of_checkpoints_changes_nothing(make_config):
    run.train(make_config(1), "a")
    shutil.rmtree("a/checkpoints")
    pathlib.Path("a/checkpoints").write_text("a file")
    before = contents("a")
    with pytest.raises(UserError, match="checkpoints is not a folder"):
        run.train(make_config(2), "a")
    assert contents("a") == before


def test_a_run_resumes_from_a_folder_of_any_name(make_config, whole):
    for name in ("a b", "ü", "100%", "a{b}", "#1", "$HOME", "a:b", "a'b\"c"):
        run.train(make_config(2), pathlib.Path("runs", name))
    run.train(make_config(4), f"runs/{name}")
    assert kill_stress.outcome(pathlib.Path("runs", name)) == whole


@pytest.mark.parametrize(("now", "then"), [("mnist", "mnist_5k"), ("mnist_5k", "mnist")])
def test_a_run_on_what_was_there_names_what_it_was(now, then):
    dataset = types.SimpleNamespace(name=now, directory="data", fingerprint="b")
    task = types.SimpleNamespace(config=config_lib.Config(), dataset=dataset)
    with pytest.raises(UserError, match=f"set config.data.name={then}, manual_dir"):
        run._check_data(task, "a", "a")
