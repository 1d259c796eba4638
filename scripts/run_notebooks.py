"""Run the notebooks and store them with what they show, without what is written to stderr.

python scripts/run_notebooks.py [notebooks/NAME.ipynb …]      default: all
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def main(paths: list[str]) -> None:
    for path in map(Path, paths or sorted(map(str, FOLDER.glob("*.ipynb")))):
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=600, resources=where).execute()
        clean(notebook)
        nbformat.write(notebook, path)
        print(path)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave out warnings and progress bars, and the times of cells: what a second run changes."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.metadata.pop("execution", None)


if __name__ == "__main__":
    main(sys.argv[1:])
