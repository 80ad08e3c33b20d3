"""Reads chat templates and special tokens from the files of a model."""

import pathlib
from typing import NamedTuple

from ..gguf.open_file import field, open_gguf
from ..gguf.tokenizer_in import chat_templates, special_tokens
from ..models.tokenizer import FolderTokenizer, folder_templates, read_object


class ModelError(ValueError):
    """The files of a model are wrong or incomplete. The fault is not in a row."""


class ModelFiles(NamedTuple):
    """The chat templates and the special tokens of a model."""

    templates: dict[str, str]  # by name; the usual one is named "default"
    special: dict[str, str]  # by the names of variables in templates: "eos_token", ...
    end_ids: tuple[int, ...]  # tokens that end generation


def read_model_files(path: pathlib.Path) -> ModelFiles:
    """Reads the templates and special tokens of a folder or a `.gguf` file."""
    try:
        return _read_gguf(path) if path.suffix == ".gguf" else _read_folder(path)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:  # a wrong type
        raise ModelError(
            f"{path} must have tokenizer files that can be read. {error}"
        ) from error


def _read_folder(folder: pathlib.Path) -> ModelFiles:
    settings = read_object(folder / "tokenizer_config.json")
    ids = []
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    # `type(x) is int` excludes booleans. A dict removes duplicates and keeps the order.
    end_ids = dict.fromkeys(x for x in ids if type(x) is int and x >= 0)
    templates = folder_templates(folder, settings)
    return ModelFiles(templates, FolderTokenizer(folder).special, tuple(end_ids))


def _read_gguf(path: pathlib.Path) -> ModelFiles:
    reader = open_gguf(path)
    ids, end_ids = special_tokens(reader)
    tokens = field(reader, "tokenizer.ggml.tokens")
    special = {name: tokens[index] for name, index in ids.items()}
    return ModelFiles(chat_templates(reader), special, tuple(end_ids))
