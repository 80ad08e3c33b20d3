"""Runs examples/colab.ipynb on a tiny model: python .ci/notebook.py FOLDER.

FOLDER is for what it writes. The notebook in the repository must have no outputs.
"""

import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

from qlora_jax.llm.models.tiny import save_tiny

ROOT = pathlib.Path(__file__).parent.parent
# The settings of a CPU, but with a tiny model and few steps.
TINY = """
SETTINGS |= dict(model="tiny", steps=3, max_length=256, eval_examples=1, eval_every=3)
"""


def main(folder: pathlib.Path) -> None:
    """Runs every cell but the one that installs."""
    book = nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "strip its outputs"
    cells = {tag: cell for cell in book.cells for tag in cell.metadata.get("tags", [])}
    cells["install"].source = ""
    cells["settings"].source += TINY
    save_tiny(folder / "tiny")
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # The folder has no clone of the repository.
    NotebookClient(
        book, timeout=600, resources={"metadata": {"path": folder}}
    ).execute()
    outputs = [x for cell in book.cells for x in cell.get("outputs", [])]
    assert any("image/png" in x.get("data", {}) for x in outputs), "the plot is missing"
    text = "".join(x.get("text", "") for x in outputs)
    assert "products: 96 of 96 are right" in text
    assert "at most 0.0 GB" in text and "s per step" in text
    assert (folder / "run" / "model-3" / "model.safetensors").is_file()
    print(text)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
