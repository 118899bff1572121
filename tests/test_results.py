"""Numbers that docstrings and README quote, against the logs of the runs in experiments/results."""

import ast
import csv
import json
import re

import numpy as np
import pytest
from conftest import REPOSITORY

RESULTS = REPOSITORY / "experiments" / "results"
README = (REPOSITORY / "README.md").read_text()
TABLE = README.split("## Experiments")[1].split("\n## ")[0].splitlines()
_SPREAD = r"0\.\d{4} ± 0\.\d{4}"


def docstring(file):
    return " ".join(ast.get_docstring(ast.parse(file.read_text())).split())


def accuracy_of(folder):
    """Returns the test accuracy of all runs in a folder, as it is quoted."""
    scores = []
    for file in folder.rglob("results.json"):
        found = json.loads(file.read_text())["test"]["accuracy"]
        # Settings that validation did not choose have none.
        scores += [x for x in np.atleast_1d(np.array(found, float)) if np.isfinite(x)]
    mean = f"{np.mean(scores):.4f}"
    return mean if len(scores) == 1 else f"{mean} ± {np.std(scores, ddof=1):.4f}"


@pytest.mark.parametrize("name", [path.stem for path in (REPOSITORY / "experiments").glob("*.py")])
def test_an_experiment_quotes_its_runs(name):
    text = docstring(REPOSITORY / "experiments" / f"{name}.py")
    (line,) = [line for line in TABLE if line.startswith("|") and f"`{name}`" in line]
    if not (RESULTS / name).exists():
        assert "not run in full" in text
        assert "not run in full" in line
        return
    accuracy = accuracy_of(RESULTS / name)
    assert accuracy in text
    assert accuracy in line


@pytest.mark.parametrize("name", [path.parent.name for path in RESULTS.glob("*/study.csv")])
def test_a_study_quotes_its_table(name):
    rows = list(csv.DictReader((RESULTS / name / "study.csv").open()))
    accuracies = {row["test"] for row in rows}
    text = docstring(REPOSITORY / "experiments" / "studies" / f"{name}.py")
    quoted = re.findall(_SPREAD, text)
    assert quoted
    assert set(quoted) <= accuracies


def test_the_table_of_cells_in_the_readme_is_that_of_the_study():
    rows = list(csv.DictReader((RESULTS / "cells_rows" / "study.csv").open()))
    expected = [
        f"| `{row['network'].split()[0]}` | {int(row['parameters']):,} | {row['test']} | "
        f"{row['95 % interval']} |"
        for row in rows
    ]
    assert "\n".join(expected) in README
