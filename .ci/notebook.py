"""Runs examples/colab.ipynb on a tiny model: python .ci/notebook.py FOLDER.

FOLDER is for what it writes. The notebook in the repository must have no outputs.
"""

import json
import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

from qlora_jax.llm.models.tiny import save_tiny

ROOT = pathlib.Path(__file__).parent.parent
TINY = """\
MODEL, DATA, OUT = {model!r}, {data!r}, {out!r}
SETTINGS = dict(steps=4, batch_size=4, max_length=512, warmup=1, eval_examples=1)
SYSTEM, QUESTION = "Name.", "Rosa paid."
"""


def main(folder: pathlib.Path) -> None:
    """Runs every cell but the one that installs."""
    book = nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "strip its outputs"
    cells = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", [])}
    paths = {name: str(folder / name) for name in ("model", "data", "out")}
    save_tiny(paths["model"])
    cells["install"].source = ""
    names = cells["parameters"].source
    cells["parameters"].source = TINY.format(**paths)
    defined = {line.partition(" =")[0] for line in names.splitlines() if " = " in line}
    assert defined == {"MODEL", "DATA", "OUT", "SETTINGS", "SYSTEM", "QUESTION"}
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    report = folder / "report.json"
    for cell in book.cells:
        cell.source = cell.source.replace('"report.json"', f"{str(report)!r}, rounds=1")
    NotebookClient(book, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    assert not json.loads(report.read_text())["is_wrong"]
    images = [x for c in book.cells for x in c.get("outputs", []) if "data" in x]
    assert any("image/png" in x["data"] for x in images), "the plot is missing"
    assert (folder / "out" / "served" / "README.md").is_file()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
