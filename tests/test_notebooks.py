"""Notebooks: they run from top to bottom, and are stored with what that shows."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def kinds(cell):
    """What a cell shows besides printed lines: pictures, tables."""
    return [sorted(out["data"]) for out in cell.get("outputs", []) if "data" in out]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_stored_as_it_ran(path):
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    for old, new in zip(stored.cells, notebook.cells, strict=True):
        assert kinds(old) == kinds(new), "python scripts/run_notebooks.py"
    assert str(FOLDER.parent) not in path.read_text(encoding="utf-8")  # nothing of this machine


def test_there_are_few():
    assert 1 <= len(NOTEBOOKS) <= 3
