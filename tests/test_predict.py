"""The tool predict, as a user's shell sees it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from seqmnist.study import trained
from tools import cli
from tools import predict as predict_tool


def predict(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.predict", *map(str, arguments)],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )


def test_on_images_as_they_are_it_scores_as_the_run_did(finished_run, tmp_path):
    network = trained.load(finished_run)
    images, labels = network.test_set()
    folder = tmp_path / "digits"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    figures = tmp_path / "figures.json"
    result = predict(
        f"--workdir={finished_run}", "--no_prepare", f"--json={figures}", "--by_row", folder
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(figures.read_text())["images"]
    right = np.array([answer["class"] for answer in answers]) == labels
    assert right.mean() == network.results["test"]["accuracy"]
    assert np.shape(answers[0]["by_row"]) == (28, 10)
    np.testing.assert_allclose(answers[3]["by_row"][-1], answers[3]["probabilities"], atol=1e-5)
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(images) * 29
    assert lines[1].split()[0] == str(answers[0]["class"])
    assert lines[1].endswith("0000.png")
    assert lines[29].endswith("after time step 28 of 28")


def test_a_redrawn_digit_is_prepared(finished_run, tmp_path):
    network = trained.load(finished_run)
    image = network.test_set()[0][3]
    large = Image.fromarray(255 - image).resize((300, 300))
    large.save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", image)
    figures = tmp_path / "figures.json"
    arguments = [f"--workdir={finished_run}", f"--json={figures}"]
    result = predict(*arguments, tmp_path / "a.png", tmp_path / "*.npy")
    assert result.returncode == 0, result.stderr
    one, two = json.loads(figures.read_text())["images"]
    assert one["image"].endswith("a.png")
    np.testing.assert_allclose(one["probabilities"], two["probabilities"], atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["IMAGE"]),
        (["README.md"], ["--workdir", "--artifact"]),
        (["--workdir=x"], ["IMAGE"]),
        (["--workdir=x", "nothing.png"], ["nothing.png", "does not exist"]),
        (["--workdir=x", "*.nothing"], ["*.nothing", "no file matches"]),
        (["--workdir=x", "README.md"], ["README.md", "not an image"]),
        (["--workdir=x", "--no_prepare", "{}/large.png"], ["large.png", "30 × 40"]),
        (["--workdir=x", "{}/blank.png"], ["blank.png", "shows nothing"]),
        (["--workdir=x", "{}/empty.npy"], ["empty.npy", "0 × 0"]),
        (["--workdir=x", "{}"], ["blank.png"]),
        (["--workdir=x", "{}/folder"], ["folder", "no image"]),
        (["--workdir=x", "--artifact=y", "README.md"], ["--artifact", "--workdir"]),
        (["--artifact=y", "--by_row", "README.md"], ["--by_row", "--workdir"]),
        (["--artifact=README.md", "{}/large.png"], ["README.md", "export"]),
        (["--workdir={}", "{}/large.png"], ["config.json", "train"]),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    drawn = np.zeros((40, 30), np.uint8)
    drawn[10:30, 14:17] = 255
    Image.fromarray(drawn).save(tmp_path / "large.png")
    Image.new("L", (28, 28)).save(tmp_path / "blank.png")
    np.save(tmp_path / "empty.npy", np.zeros((0, 0), np.uint8))
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(sys, "argv", ["predict", *(a.format(tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.run(predict_tool._make_parser(), predict_tool._main)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_mistake_is_the_shells_too():
    result = predict("--workdir=x", "nothing.png")
    assert result.returncode == 2
    assert result.stderr == "error: nothing.png does not exist; name an image\n"


def test_help_shows_an_example():
    result = predict("--help")
    assert result.returncode == 0
    assert "python -m tools.predict --workdir=" in result.stdout
