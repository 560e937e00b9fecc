"""Each notebook runs on tiny shapes, its two files say the same, and the committed one keeps its pictures."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
TINY = {
    "01_why_permute": {"FRAMES": 8, "HEIGHT": 4, "WIDTH": 5, "BLOCK": 16},
    "02_port_flux_weights": {"HEIGHT": 12, "WIDTH": 16, "STEPS": 4, "BLOCK": 8, "DENSITY": 0.6},
    "03_calibrate_cogvideox": {"FRAMES": 3, "HEIGHT": 8, "WIDTH": 10, "STEPS": 3, "BLOCK": 8, "DENSITY": 0.7},
    "04_your_own_model": {"FRAMES": 6, "HEIGHT": 4, "WIDTH": 5, "LAYERS": 2, "BLOCK": 8, "DENSITY": 0.4},
}


def parameters(notebook):
    """The cell tagged "parameters": plain assignments that a reader may change."""
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def execute(notebook):
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_every_notebook_is_here():
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(TINY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_tiny_shapes(path):
    notebook = jupytext.read(path)
    cell = parameters(notebook)
    names = {line.split("=")[0].strip() for line in cell.source.splitlines()}
    assert set(TINY[path.stem]) <= {name.strip() for line in names for name in line.split(",")}
    cell.source += "\n" + "\n".join(f"{name} = {value}" for name, value in TINY[path.stem].items())
    execute(notebook)
    assert len(pictures(notebook)) >= 3
    stderr = [o.text for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert not stderr, "".join(stderr)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_pair_says_the_same(path):
    source = jupytext.read(path)
    committed = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in source.cells], (
        "write the .ipynb again with the command in CONTRIBUTING.md"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebook_keeps_its_outputs_and_nothing_of_its_machine(path):
    committed = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(committed)
    ran = [c.execution_count for c in committed.cells if c.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1)), "executed once, from top to bottom"
    assert len(pictures(committed)) >= 3
    text = path.with_suffix(".ipynb").read_text()
    assert not re.search(r"/(home|root|tmp|Users)/|site-packages", text)
    assert len(text) < 1_500_000
