"""A workdir on the disks that people have."""

import errno
import fcntl
import json
import os

import pytest
from conftest import REPOSITORY

from seqmnist.errors import UserError
from seqmnist.workdir import PLAN, Workdir, replacing, write_json

SCORES = ("loss", "accuracy")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK])
def test_a_disk_without_locks_will_do(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    notices = []
    for _ in range(2):  # nothing is left that would keep out the second
        with Workdir(tmp_path / "run").hold(notices.append):
            assert (tmp_path / "run").is_dir()
    assert all("has no locks" in notice for notice in notices)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a folder"):
        Workdir(tmp_path).check_usable()


@pytest.mark.parametrize("name", ["seconds", "versions", "settings", "members", "ensemble"])
def test_results_that_no_run_writes_are_refused(name, tmp_path):
    scores = {"loss": 0.5, "accuracy": 0.9}
    results = {"validation": scores, "test": scores, "epochs": 1, "steps": 1, "parameters": 1}
    results["dataset"] = {"name": "x", "fingerprint": "x", "train": 1, "validation": 1, "test": 1}
    write_json(tmp_path / "results.json", results)
    assert Workdir(tmp_path).read_results() == results
    write_json(tmp_path / "results.json", results | {name: 3})
    with pytest.raises(UserError, match=f"has no valid '{name}'"):
        Workdir(tmp_path).read_results()


SWEEP = REPOSITORY / "experiments" / "results" / "sweep_learning_rate" / "results.json"
SWEPT = json.loads(SWEEP.read_text())
SCORED = {"loss": 0.5, "accuracy": 0.9}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {name: None}) for name in ("settings", "ensemble")),
        *(("settings", {"settings": wrong}) for wrong in ([], [1], [{"diverged": 0}])),
        *(("members", {"members": wrong}) for wrong in ([], [0], [{}])),
        ("best", {"best": "0"}),
        ("test", {"ensemble": {"members": [0], "test": {}}}),
        *(("loss", {"test": {**SCORED, "loss": wrong}}) for wrong in ([[1], {}], [], {})),
    ],
)
def test_results_of_members_that_no_run_writes_are_refused(name, change, tmp_path):
    write_json(tmp_path / "results.json", SWEPT)
    assert Workdir(tmp_path).read_results() == SWEPT
    write_json(tmp_path / "results.json", SWEPT | change)
    with pytest.raises(UserError, match=rf"results\.json .*\b{name}\b.*; restore it"):
        Workdir(tmp_path).read_results()


def test_the_folder_of_a_study_is_not_that_of_a_run(tmp_path):
    write_json(tmp_path / PLAN, {})
    with pytest.raises(UserError, match="holds a study"):
        Workdir(tmp_path).check_usable()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_folder_of_runs_names_one_of_them(depth, tmp_path):
    (run := tmp_path / "/".join(["gru"] * depth)).mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError) as caught:
        Workdir(tmp_path).read_config()
    assert str(caught.value).endswith(f"config.json does not exist; name a run, e.g. {run}")


def test_an_incomplete_last_line_is_ignored(tmp_path):
    """A process that is killed while it writes leaves one."""
    record = dict.fromkeys(("epoch", "step"), 1) | {"seconds": 1.0}
    record |= {f"{split}/{key}": 0.5 for split in ("train", "validation") for key in SCORES}
    lines = "".join(json.dumps(record) + "\n" for _ in range(2))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"epoch": 3, "st')
    assert Workdir(tmp_path).read_metrics() == [record, record]
    (tmp_path / "metrics.jsonl").write_text(lines.replace("1.0", "null"))
    with pytest.raises(UserError, match="has no valid 'seconds'"):
        Workdir(tmp_path).read_metrics()


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "report").touch()
    with (
        pytest.raises(UserError, match="report is not a folder; move it"),
        replacing(tmp_path / "report"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
