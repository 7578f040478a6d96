"""The notebooks run from top to bottom as they stand, and are shipped with their results."""

from pathlib import Path

import nbformat
import pytest

SHOWS = {
    "audit_a_behaviour": lambda names: names["done"].figures and names["found"].alarm,
    "steer": lambda names: names["same"] and "feature 139" in str(names["found"]),
    "first_look": lambda names: names["seen"].tokens[-2] == " Paris",
    "trace_a_circuit": lambda names: abs(names["graph"].value[-1] - 4.22) < 0.01,
}
SLOW = ("audit_a_behaviour", "first_look", "steer", "trace_a_circuit")  # a minute or two each
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_shipped_executed_and_without_errors(path):
    for cell in cells(path):
        assert cell.execution_count
        assert all(output.output_type != "error" for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_opens_in_colab(path):
    """A badge; a first cell that installs where the package is not there; a log-in that waits."""
    assert "colab.research.google.com" in cells(path, "markdown")[0].source
    install, login = (cell.source for cell in cells(path)[:2])
    assert "find_spec" in install and "demo,tpu" in install
    assert login.startswith("GATED = False") and "login()" in login


@pytest.mark.real
@pytest.mark.parametrize("path", [
    pytest.param(p, marks=[pytest.mark.slow] * (p.stem in SLOW), id=p.stem) for p in NOTEBOOKS
])  # fmt: skip
def test_it_runs(path, capsys):
    namespace: dict = {}
    for cell in cells(path):
        exec(compile(cell.source, path.name, "exec"), namespace)
    assert capsys.readouterr().out
    assert "<iframe srcdoc=" in namespace["shown"]("<p>a page</p>").data
    assert SHOWS[path.stem](namespace)
