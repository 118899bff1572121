"""Paths that a user writes: what they become, and where they are refused."""

import pathlib

import pytest

from seqmnist import config as config_lib
from seqmnist import paths, run
from seqmnist.config import Config, DataConfig
from seqmnist.datasets import sources
from seqmnist.errors import UserError
from seqmnist.study import trained
from seqmnist.workdir import Workdir


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder in which a test runs; `home`, beside it, is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", "here/runs/a"),
        (pathlib.Path("runs/a"), "here/runs/a"),
        ("a näme with spaces", "here/a näme with spaces"),
        ("~/x", "home/x"),
        ("~", "home"),
        (pathlib.Path("~/x"), "home/x"),
        ("a~", "here/a~"),
        ("c:/x", "here/c:/x"),
        ("2024-01-01T10:30", "here/2024-01-01T10:30"),
    ],
)
@pytest.mark.parametrize("function", [paths.resolve, paths.resolve_storage])
def test_a_path_is_expanded_and_absolute(function, text, expected, here):
    assert function(text, "--flag") == here.parent / expected
    assert not any(here.iterdir())


def test_an_absolute_path_and_its_links_are_kept(here):
    (here / "link").symlink_to(here.parent)
    assert paths.resolve(here / "link" / "x", "--flag") == here / "link" / "x"


# No file can have these names.
IMPOSSIBLE = {
    "": "is empty",
    5: "is no path",
    "  ": "is empty",
    "a\nb": "not printable",
    "a\0b": "not printable",
    "a\x1b[31m": "not printable",
    "\udcff": "not printable",
    300 * "x": "too long",
    "gs://bucket/run": "address",
    "s3://bucket/run": "address",
    "https://example.org": "address",
    "~nobody_of_this_name/x": "home folder",
}
# Storage libraries would take these for others.
NOT_STORABLE = ["w[17]", "w[17]/run", "a]", "a*", "a?", "a\\b", "gs:", "gs:x/run", "s3:x"]


def assert_refuses(function, name, words, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert words in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(("text", "words"), IMPOSSIBLE.items(), ids=map(ascii, IMPOSSIBLE))
@pytest.mark.parametrize("function", [paths.resolve, paths.resolve_storage])
def test_what_no_file_can_be_called_is_refused(function, text, words, here):
    assert_refuses(function, "--flag", words, text, "--flag")
    assert not any(here.iterdir())


@pytest.mark.parametrize("text", NOT_STORABLE)
def test_what_storage_takes_for_something_else_is_refused_there_only(text, here):
    assert_refuses(paths.resolve_storage, "--flag", "choose another path", text, "--flag")
    assert paths.resolve(text, "--flag") == here / text


def test_a_name_below_a_bad_folder_is_refused(here, monkeypatch):
    (here / "w[17]").mkdir()
    monkeypatch.chdir(here / "w[17]")
    assert_refuses(paths.resolve_storage, "--flag", "'['", "run", "--flag")


def test_a_relative_path_in_a_removed_folder_is_refused(here, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    assert_refuses(paths.resolve, "--flag", "cannot be used", "run", "--flag")
    monkeypatch.chdir(here)


def prepare(**folders):
    return sources.prepare(DataConfig("mnist", **folders))


ENTRANCES = {
    "Workdir": (Workdir, "--workdir"),
    "run.train": (lambda path: run.train(Config(), path), "--workdir"),
    "run.evaluate": (lambda path: run.evaluate(Config(), path), "--workdir"),
    "trained.load": (trained.load, "--workdir"),
    "data_dir": (lambda path: prepare(data_dir=path), "config.data.data_dir"),
    "manual_dir": (lambda path: prepare(manual_dir=path), "config.data.manual_dir"),
    "load_experiment": (config_lib.load_experiment, "--config"),
}


@pytest.mark.parametrize(("function", "name"), ENTRANCES.values(), ids=ENTRANCES)
def test_every_entrance_refuses_before_anything_is_written(function, name, here):
    assert_refuses(function, name, "not printable", "a\nb")
    assert_refuses(function, name, "home folder", "~nobody_of_this_name/x")
    if name in ("--workdir", "config.data.data_dir"):
        assert_refuses(function, name, "'['", "w[17]")
    assert not any(here.iterdir())
