"""Run every notebooks/*.py and write the .ipynb beside it, outputs and pictures included: `make notebooks`."""

import base64
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def write(path: Path) -> None:
    """Run one notebook on its full shapes. The .ipynb of a notebook that fails is left as it was."""
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # random ids would change with every run
        cell.metadata.pop("execution", None)  # so would the times
        if "readme" in cell.metadata.get("tags", []):  # the picture that the README shows
            (picture,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
            docs = path.parents[1] / "docs"
            docs.mkdir(exist_ok=True)
            (docs / f"{path.stem}.png").write_bytes(base64.b64decode(picture))
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.py")):
        sys.stdout.write(f"running {path.name}\n")
        sys.stdout.flush()
        write(path)
