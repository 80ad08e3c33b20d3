"""Reads chat templates and special tokens from the files of a model."""

import pathlib

from ..models.folder import ChatSettings, ModelFolder
from ..reading import reading


class ModelError(ValueError):
    """The files of a model are wrong or incomplete. The fault is not in a row."""


def read_model_files(path: pathlib.Path) -> ChatSettings:
    """Reads the templates and special tokens of a model's folder."""
    with reading(f"the tokenizer of {path}", ModelError):
        return ModelFolder(path).read_chat()
