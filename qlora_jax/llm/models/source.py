"""Opens the files of a model, whatever their format."""

import pathlib

from ..gguf.file import is_gguf
from ..gguf.model import GGUFModel
from .folder import ModelFolder

# The kinds of files have the same attributes and methods.
ModelSource = ModelFolder | GGUFModel


def open_source(path: str | pathlib.Path) -> ModelSource:
    """Returns the model in a Hugging Face folder or a `.gguf` file."""
    path = pathlib.Path(path)
    return GGUFModel(path) if is_gguf(path) else ModelFolder(path)
