"""Run the notebooks and store them with what they show, without what is written to stderr."""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    for path in parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb")):
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
    main()
