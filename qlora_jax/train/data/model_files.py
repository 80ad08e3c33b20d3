"""Reads chat templates and special tokens from a model's files."""

import pathlib
from typing import Any, NamedTuple

from ...models.folder_tokenizer import FolderTokenizer, read_object
from ...models.gguf.open_file import field, open_gguf
from ...models.gguf.tokenizer_in import chat_templates, special_tokens
from ...models.tokenizer import folder_templates


class ModelError(ValueError):
    """A model's files are wrong or lack what the data needs: no row is to blame."""


class ModelFiles(NamedTuple):
    """Chat templates and special tokens of a model."""

    templates: dict[str, str]  # by name; the usual one is "default"
    special: dict[str, str]  # by name, as chat templates know them
    end_ids: tuple[int, ...]  # that end what the model generates


def read_model_files(path: pathlib.Path) -> ModelFiles:
    """Reads the templates and special tokens of a folder or a `.gguf` file."""
    try:
        return (_of_gguf if path.suffix == ".gguf" else _of_folder)(path)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} must have tokenizer files that can be read. {error}"
        ) from error


def _of_folder(folder: pathlib.Path) -> ModelFiles:
    settings = read_object(folder / "tokenizer_config.json")
    ends: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        found = read_object(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [found]
    end_ids = dict.fromkeys(x for x in ends if type(x) is int and x >= 0)
    templates = folder_templates(folder, settings)
    return ModelFiles(templates, FolderTokenizer(folder).special, tuple(end_ids))


def _of_gguf(path: pathlib.Path) -> ModelFiles:
    reader = open_gguf(path)
    (ids, ends), tokens = special_tokens(reader), field(reader, "tokenizer.ggml.tokens")
    special = {name: tokens[index] for name, index in ids.items()}
    return ModelFiles(chat_templates(reader), special, tuple(ends))
