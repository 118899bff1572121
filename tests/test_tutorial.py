"""The tutorial: it runs, its outputs are today's, and its text says what they show."""

import json
import re
import shutil

import nbformat
import pytest
from conftest import REPOSITORY
from kernel import environment, execute

PATH = REPOSITORY / "experiments" / "tutorial.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
TEXT = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
SOLUTIONS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)

# What the text says of the outputs, of any machine's.
CLAIMS = """
assert sum(leaf.size for leaf in jax.tree.leaves(network.params)) == 6602
assert (answers == test_labels).mean() == results["test"]["accuracy"] > 0.8
assert seeds["ensemble"]["test"]["accuracy"] > max(seeds["test"]["accuracy"])
assert (accuracy[:24] < 0.2).all() and (accuracy[25:] > 0.3).all()
assert median[6] < median[27] / 2 and median[0] > 2 * median[6]
assert (images[:, 0] == 0).mean() > 0.9 and np.linalg.norm(U, 2) > 1
"""
OF_SOLUTIONS = """
assert difference < 1e-5
assert gru["parameters"] == 18698 and upwards["settings"][0]["test"]["accuracy"]["mean"] > 0.7
assert (mean_accuracy > accuracy + 0.1)[[13, 19]].all() and mean_accuracy[27] < accuracy[27]
assert 1e-10 < ratios["simple_rnn"] < 1e-7 and ratios["lstm"] == 0 and ratios["lru"] > 1e-3
"""


def outputs(notebook):
    """Names of outputs by cell, with their text but for numbers, folders and devices."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            content = output.get("data", {output.get("name"): output.get("text", "")})
            text = "".join(content.get("text/plain", content.get("stdout", "")))
            text = re.sub(r"(from|Device:).*\n(~?/.*)?|[ ─]+", "", text)
            yield [output.output_type, *sorted(content), re.sub(r"[0-9][\d.,]*(e-\d+)?", "#", text)]


def test_the_file_is_small_and_knows_no_machine():
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert not re.search(r"/(home|root|tmp|Users|work)\b|execution\"|iopub", text)
    assert [cell.id for cell in NOTEBOOK.cells] == [
        f"cell-{number:02}" for number in range(1, len(NOTEBOOK.cells) + 1)
    ]
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    names = [name for cell in code for output in cell.outputs for name in output.get("data", ())]
    assert names.count("image/png") >= 7
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)


def test_the_solutions_are_hidden():
    assert TEXT.count("<details>") == TEXT.count("</details>") == len(SOLUTIONS) == 5
    assert TEXT.index("## Solutions") < TEXT.index("<details>")


def test_figures_in_the_text_are_those_of_the_outputs():
    shown = json.dumps([cell.get("outputs", []) for cell in NOTEBOOK.cells])
    for number in ("6,602", "0.844", "0.771", "0.835", "0.723", "0.801", "0.7412 to 0.7790"):
        assert number in shown
    for number in ("6,602", "0.844", "0.771", "0.835", "0.72 to 0.80", "0.741 to\n0.779"):
        assert number in TEXT


@pytest.mark.slow
def test_it_runs(tmp_path, data_dir):
    for name in ("seqmnist", "tools", "experiments"):  # its runs are written beside them
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    notebook = nbformat.from_dict(NOTEBOOK)
    added = [nbformat.v4.new_code_cell(code) for code in (CLAIMS, *SOLUTIONS, OF_SOLUTIONS)]
    before = list(outputs(notebook))
    notebook.cells += added
    execute(notebook, tmp_path / "experiments", environment(data_dir, tmp_path))
    notebook.cells = notebook.cells[: -len(added)]
    assert list(outputs(notebook)) == before
