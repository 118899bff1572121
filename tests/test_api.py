"""`import seqmnist`: few names, imported lazily, that change no setting of a program."""

import ast
import codeop
import contextlib
import re
import subprocess
import sys
import textwrap
import threading

import jax
import nbformat
import numpy as np
import pytest
from close import assert_close
from conftest import REPOSITORY
from kernel import environment, execute

import seqmnist
from seqmnist import run
from seqmnist.config import Config, DataConfig, TrainConfig
from seqmnist.display import Display
from seqmnist.study import trained

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(title):
    """The Python code in a section of the README."""
    section = README.split(f"## {title}\n")[1].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


SETTINGS, LINES, LOOP = blocks("Use it from Python")
(DEBUG,) = blocks("Read the code")
(PARTS,) = blocks("Networks")

# What a library must leave alone, and what of it has changed.
BEFORE = """
import gc, os, signal, sys, threading, warnings
import jax

def settings():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    process = os.getcwd(), dict(os.environ), gc.isenabled(), gc.get_threshold(), sys.stdout
    return dict(jax.config.values), handlers, hooks, process, len(jax.devices())

before = settings()
"""
AFTER = """
assert settings() == before
assert probabilities.shape == (1000, 10) and beliefs.shape == (28, 5, 10)
assert states.shape == (28, 5, 64) and results["epochs"] == 5
assert (probabilities.argmax(1) == data.arrays("test")[1]).mean() == results["test"]["accuracy"]
"""


def python(code, cwd, environment):
    """Runs code as a user's program."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=120,
        check=False,
    )  # fmt: skip


def test_an_import_alone_is_light(tmp_path):
    code = """
        import sys
        start = set(sys.modules)
        import seqmnist
        assert len(sys.modules) - len(start) < 40, sorted(set(sys.modules) - start)
        assert set(seqmnist.__all__) <= set(dir(seqmnist))
        seqmnist.Config().model.cell = "gru"
        assert issubclass(seqmnist.UserError, Exception)
        assert not {"jax", "numpy", "flax", "rich"} & set(sys.modules)
    """
    result = python(code, tmp_path, environment(tmp_path))
    assert not result.returncode, result.stderr


def test_editors_and_python_see_the_same_names():
    tree = ast.parse((REPOSITORY / "seqmnist" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module.removeprefix("seqmnist.")
        for node in block.body
        for alias in node.names
    }
    assert imported == seqmnist._MODULES
    assert sorted(imported) == sorted(seqmnist.__all__)
    for name in seqmnist.__all__:
        assert getattr(seqmnist, name).__doc__
    with pytest.raises(AttributeError, match="'seqmnist' has no attribute 'trian'"):
        seqmnist.trian  # noqa: B018


def test_the_readme_is_as_brief_as_it_says():
    assert len(list(filter(None, LINES.splitlines()))) == 10
    assert len(list(filter(None, LOOP.splitlines()))) == 1 + 8


@pytest.mark.parametrize("block", [SETTINGS, LINES, LOOP, PARTS, DEBUG])
def test_the_readme_can_be_pasted_into_a_prompt(block):
    """Where a line that is not indented, without an empty one before it, does not end a loop."""
    pasted = []
    for line in [*block.splitlines(), ""]:
        pasted.append(line)
        if codeop.compile_command("\n".join(pasted)):
            pasted.clear()
    assert not pasted


@pytest.mark.slow
def test_the_readme_in_an_interpreter(tmp_path, data_dir):
    """All at once, in README's order."""
    loop = LOOP + "assert (logits.argmax(1) == data.arrays('test')[1]).mean() > 0.5\n"
    parts = PARTS + "assert abs(jax.nn.softmax(logits) - probabilities[:5]).max() < 1e-5\n"
    code = "\n".join((BEFORE, LINES, loop, parts, DEBUG, "assert state.step % 5 == 1", AFTER))
    result = python(code, tmp_path, environment(data_dir))
    assert not result.returncode, result.stderr
    assert not result.stderr
    assert (tmp_path / "runs" / "python" / "results.json").exists()
    assert "Epoch 5/5" in result.stdout


@pytest.mark.slow
def test_the_readme_in_a_kernel(tmp_path, data_dir):
    mistake = "config.model.cell = 'gruu'\nseqmnist.train(config, 'runs/other')"
    code = (f"{SETTINGS}{BEFORE}", LINES, AFTER, mistake)
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, code)))
    kernel = execute(notebook, tmp_path, environment(data_dir), allow_errors=True)
    before, lines, after, mistaken = (cell.outputs for cell in notebook.cells)
    assert before == after == []
    assert len(lines) == 1, lines  # for the whole run
    (output,) = lines
    text = output.data["text/plain"]
    assert "2 for each batch" in text
    assert (tmp_path / "runs" / "programs").is_dir()
    assert text.splitlines()[-2].startswith("Epoch 5/5 - ")
    assert text.splitlines()[-1].startswith("Test on mnist_5k")
    assert kernel.num_updates >= 5 + 5 + 5  # lines before and of epochs; bars of epochs
    (error,) = mistaken
    assert error.ename == "UserError"
    assert len(error.traceback) == 1
    assert error.traceback[0].startswith("error: config.model.cell='gruu' does not exist; ")


@pytest.mark.slow
def test_the_readme_in_a_thread(tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    failures = []

    def work():
        try:
            exec("\n".join((BEFORE, LINES, AFTER)), {})
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.fixture
def mnist_5k(data_dir):
    return Config(data=DataConfig("mnist_5k", data_dir), train=TrainConfig(num_epochs=2))


def test_batches_hold_each_example_once(digits):
    images, labels = digits
    batches = list(seqmnist.epoch_batches(images, labels.astype(np.uint8), 32, seed=1))
    assert [batch.image.shape for batch in batches] == 5 * [(32, 28, 28)]
    seen = np.concatenate([batch.image[batch.mask] for batch in batches])
    assert sorted(map(bytes, seen)) == sorted(map(bytes, images))
    seen_labels = np.concatenate([batch.label[batch.mask] for batch in batches])
    assert seen_labels.dtype == np.int32
    assert {(bytes(x), int(y)) for x, y in zip(seen, seen_labels, strict=True)} == {
        (bytes(x), int(y)) for x, y in zip(images, labels, strict=True)
    }
    for wrong in ((images / 255, labels), (images, labels + 0.5), (images, labels[1:])):
        with pytest.raises(seqmnist.UserError, match="images uint8"):
            next(seqmnist.epoch_batches(*wrong))
    again = next(seqmnist.epoch_batches(images, labels, 32, seed=1))
    np.testing.assert_array_equal(again.image, batches[0].image)
    other = next(seqmnist.epoch_batches(images, labels, 32, seed=1, epoch=1))
    assert not np.array_equal(other.image, batches[0].image)


def test_a_loop_of_ones_own_trains_as_a_run_does(finished_run, data_dir):
    network = trained.load(finished_run)
    data = seqmnist.load_data("mnist_5k", data_dir=data_dir)
    images, labels = (array[:3200] for array in data.arrays("train"))
    system = seqmnist.make_system(network.config, spec=data.spec)
    state = seqmnist.init_state(network.config, system, seed=0)
    train_step = jax.jit(seqmnist.train_step, static_argnums=0)
    for batch in seqmnist.epoch_batches(images, labels):
        state, _ = train_step(system, state, batch)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, network.params)), strict=True):
        assert_close(ours, theirs)


class Interrupted(Display):
    """Where a person interrupts the kernel, within the second epoch."""

    def epoch(self, epoch, num_epochs, num_steps):
        @contextlib.contextmanager
        def interrupt():
            def update(step, means):
                if epoch == 2:
                    raise KeyboardInterrupt

            yield update

        return interrupt()


@pytest.mark.slow
def test_a_slow_disk_and_new_data_cause_no_warnings(mnist_5k, tmp_path, caplog, monkeypatch):
    from orbax.checkpoint import checkpoint_manager as orbax  # warns if saving lasts a second

    monkeypatch.setattr(orbax, "_WAIT_FOR_PREV_SAVE_WARNING_THRESHOLD_SECS", 0)
    mnist_5k.data.name, mnist_5k.data.data_dir = "digits", tmp_path
    seqmnist.train(mnist_5k, tmp_path / "run")
    assert not caplog.records


@pytest.mark.slow
def test_what_is_interrupted_resumes_in_the_same_process(mnist_5k, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt) as caught:  # whose frames a notebook keeps
        run.train(mnist_5k, tmp_path, display=Interrupted())
    resumed = seqmnist.train(mnist_5k, str(tmp_path))
    assert "Resuming in epoch 2, after 0 of its steps" in capsys.readouterr().out
    assert caught.value
    assert resumed["steps"] == 50


@pytest.mark.parametrize(
    ("call", "words"),
    {
        "arguments in the wrong order": (
            lambda: seqmnist.train("runs", Config()),
            "must be a seqmnist.Config; got 'runs'",
        ),
        "no such dataset": (lambda: seqmnist.load_data("mnist5k"), "choose one of: auto, mnist,"),
        "no such field": (
            lambda: seqmnist.load_data("mnist_5k", greyscale=True),
            "config.data.greyscale does not exist; nearest: data.grayscale",
        ),
    }.values(),
)
def test_a_mistake_is_one_line(call, words):
    with pytest.raises(seqmnist.UserError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 28, 28)),
        np.zeros((28, 28), np.uint8),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((0, 28, 28), np.uint8),
    ],
    ids=["floats", "one image", "another size", "none"],
)
def test_what_the_network_cannot_read_is_refused(images, finished_run):
    network = seqmnist.load(finished_run)
    for method in (network.probabilities, network.beliefs, network.hidden_states):
        with pytest.raises(seqmnist.UserError, match=r"reads images uint8 .N, 28, 28., 0 to 255"):
            method(images)
    assert repr(network).endswith(": rows → 1 × simple_rnn(8) → last → logits, step 25)")
