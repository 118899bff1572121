"""Runs that are killed, stopped, damaged or started twice lose nothing, and repeat nothing."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import time

import jax
import pytest

from seqmnist import checkpoints as checkpoint_lib
from seqmnist import config as config_lib
from seqmnist import records, run
from seqmnist.display import Display
from seqmnist.errors import UserError
from tools import kill_stress


@pytest.fixture(scope="module")
def make_config(data_dir):
    def make(num_epochs=3, **groups):
        groups = {key: dict(value) for key, value in groups.items()}
        groups.setdefault("model", {}).setdefault("hidden_size", 8)
        groups.setdefault("data", {}).update(name="mnist_5k", data_dir=str(data_dir))
        groups.setdefault("train", {})["num_epochs"] = num_epochs
        return config_lib.from_dict(groups)

    return make


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    """The outcome of four epochs that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    run.train(make_config(4), workdir)
    return kill_stress.outcome(workdir)


def interrupt(monkeypatch, number):
    """Sends this process a signal when the third epoch begins."""
    show = Display.epoch

    def epoch(self, title, num_steps):
        context = show(self, title, num_steps)
        if title.startswith("Epoch 3"):
            os.kill(os.getpid(), number)
        return context

    monkeypatch.setattr(Display, "epoch", epoch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("input_mode", ["resident", "stream"])
def test_a_signal_stops_in_order(number, input_mode, make_config, whole, tmp_path, monkeypatch):
    config = make_config(4, data={"input_mode": input_mode})
    with monkeypatch.context() as patch:
        interrupt(patch, number)
        with pytest.raises(SystemExit) as caught:
            run.train(config, tmp_path)
    assert caught.value.code == 128 + number
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 50 < step < 75
    assert not (tmp_path / "results.json").exists()
    run.train(config, tmp_path)
    assert kill_stress.outcome(tmp_path) == whole


def test_killed_runs_end_as_if_nothing_had_been(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(kill_stress.SETTINGS, "train.num_epochs", 4)
    outcomes, seconds = [], 60.0
    generator = random.Random()
    for name, num_kills, input_mode in (
        ("undisturbed", 0, "resident"),
        ("killed", 2, "resident"),
        ("killed, streamed", 1, "stream"),
    ):
        for _ in range(num_kills):
            process = kill_stress.start(tmp_path / name, str(data_dir), input_mode)
            time.sleep(generator.uniform(0.3, 1) * seconds)
            process.kill()
            process.communicate()
        began = time.monotonic()
        process = kill_stress.start(tmp_path / name, str(data_dir), input_mode)
        kill_stress._finish(process)
        seconds = time.monotonic() - began
        outcomes.append(kill_stress.outcome(tmp_path / name))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_more_epochs_may_follow(make_config, whole, tmp_path):
    run.train(make_config(2), tmp_path)
    run.train(make_config(4), tmp_path)
    assert kill_stress.outcome(tmp_path) == whole


def test_a_finished_run_is_not_trained_again(make_config, tmp_path, capsys, monkeypatch):
    results = run.train(make_config(1), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(run, "_compose", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    again = run.train(make_config(1), tmp_path)
    assert again == json.loads(json.dumps(results))
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_overwrite_starts_afresh_and_spares_what_is_not_the_runs(make_config, whole, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to someone")
    run.train(make_config(1, model={"cell": "gru"}), tmp_path)
    run.train(make_config(4), tmp_path, overwrite=True)
    assert kill_stress.outcome(tmp_path) == whole
    assert (tmp_path / "thesis.txt").read_text() == "dear to someone"


def damage(kind, folder):
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    largest = files[-1]
    if kind == "truncated":
        largest.write_bytes(largest.read_bytes()[:100])
    elif kind == "deleted":
        largest.unlink()
    elif kind == "emptied":
        for path in files:
            path.write_bytes(b"")
    elif kind == "facts":
        path = folder / "facts" / "metadata"
        path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 7'))
    else:
        for path in files[-4:]:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0x10
            path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "deleted", "emptied", "facts", "flipped"])
def test_a_damaged_checkpoint_is_set_aside(kind, make_config, whole, tmp_path, capsys):
    run.train(make_config(3), tmp_path)
    damage(kind, tmp_path / "checkpoints" / "75")
    run.train(make_config(4), tmp_path)
    assert "NOTICE: checkpoints/75 is damaged" in capsys.readouterr().out
    assert (tmp_path / "damaged" / "75").is_dir()
    assert kill_stress.outcome(tmp_path) == whole


def test_without_a_whole_checkpoint_there_is_one_line(make_config, tmp_path):
    run.train(make_config(2), tmp_path)
    for folder in (tmp_path / "checkpoints").iterdir():
        damage("truncated", folder)
    with pytest.raises(UserError, match="no usable checkpoint"):
        run.evaluate(make_config(2), tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint .* --overwrite"):
        run.train(make_config(3), tmp_path)


def test_the_newest_and_the_best_are_kept(make_config, tmp_path):
    config = make_config(5, checkpoint={"keep": 1, "keep_best": True, "every_steps": 20})
    run.train(config, tmp_path)
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["validation/accuracy"])["step"]
    assert max(steps) == 125
    assert best in steps
    assert len(steps) <= 3  # every_steps saves under the accuracy of the epoch before


def test_other_settings_are_refused_by_name(make_config, tmp_path):
    run.train(make_config(2), tmp_path)
    other = make_config(2, model={"hidden_size": 9}, train={"batch_size": 64})
    with pytest.raises(UserError) as caught:
        run.train(other, tmp_path)
    assert "config.model.hidden_size: 8 → 9" in str(caught.value)
    assert "config.train.batch_size: 128 → 64" in str(caught.value)
    with pytest.raises(UserError, match=r"train.num_epochs: 2 → 1"):
        run.train(make_config(1), tmp_path)
    cosine = make_config(2, optimizer={"schedule": "cosine"})
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix dtypes
        run.train(cosine, tmp_path / "cosine")
    with pytest.raises(UserError, match="the schedule of the learning rate fixes the epochs"):
        run.train(make_config(3, optimizer={"schedule": "cosine"}), tmp_path / "cosine")


def test_two_processes_do_not_share_a_workdir(make_config, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="in use by another process"):
        run.train(make_config(1), tmp_path)
    os.close(descriptor)
    assert list(tmp_path.iterdir()) == []
    run.train(make_config(1), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(make_config, tmp_path):
    config = make_config(
        2,
        model={"cell": "irnn"},
        optimizer={"name": "sgd", "learning_rate": 30.0},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(
        UserError, match=r"not finite after step (\d+) .*learning rate 30"
    ) as caught:
        run.train(config, tmp_path)
    step = int(str(caught.value).partition("after step ")[2].partition(" ")[0])
    assert f"last good checkpoint: checkpoints/{step - 1};" in str(caught.value)
    with pytest.raises(UserError, match=r"encountered in \w+ \(\w+\.py:\d+\)"):
        run.train(config, tmp_path, debug_nans=True)


@pytest.mark.parametrize("function", ["append_line", "write_json"])
def test_a_full_disk_loses_nothing(function, make_config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(path, value):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(records, function, fail)
        with pytest.raises(UserError, match=r"No space left on device.*last checkpoint"):
            run.train(make_config(4), tmp_path)
    run.train(make_config(4), tmp_path)
    assert kill_stress.outcome(tmp_path) == whole


def test_events_say_what_the_records_say(make_config, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run.train(make_config(2), tmp_path)
    run.train(make_config(3), tmp_path)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {
        event.step: value.tensor.float_val[0]
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    }
    assert losses == pytest.approx({line["step"]: line["train/loss"] for line in lines})


def test_a_checkpoint_of_other_data_is_refused(make_config, tmp_path):
    config = make_config(2)
    run.train(config, tmp_path)
    like = run._compose(config, Display())._replace(dataset=run._compose(config, Display()).dataset)
    checkpoints = checkpoint_lib.Checkpoints(tmp_path, config.checkpoint)
    saved = checkpoints.restore(like.like(), print)
    checkpoints.close()
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoints = checkpoint_lib.Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(saved._replace(fingerprint="of other data"))
    checkpoints.close()
    with pytest.raises(UserError, match="trained on other data"):
        run.train(make_config(3), tmp_path)
