"""A workdir on the disks that people have."""

import errno
import fcntl
import os

import pytest

from seqmnist.errors import UserError
from seqmnist.workdir import PLAN, Workdir, write_json


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


def test_the_folder_of_a_study_is_not_that_of_a_run(tmp_path):
    write_json(tmp_path / PLAN, {})
    with pytest.raises(UserError, match="holds a study"):
        Workdir(tmp_path).check_usable()
