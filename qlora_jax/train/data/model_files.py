"""Reads chat templates and special tokens from a model's files."""

import pathlib
from typing import Any, NamedTuple

import qlora_jax as ql

from ...models.gguf.open_file import field, open_gguf
from ...models.gguf.tokenizer_in import chat_templates, special_tokens
from ...models.tokenizer import folder_templates, read_text

# The tokens that chat templates know by these names.
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
SPECIAL += ("cls_token", "mask_token", "additional_special_tokens")


class ModelError(ValueError):
    """A model's files are wrong or lack what the data needs: no row is to blame."""


class ModelFiles(NamedTuple):
    """Chat templates and special tokens of a model."""

    templates: dict[str, str]  # by name; the usual one is "default"
    special: dict[str, Any]  # by name
    end_ids: tuple[int, ...]  # that end what the model generates


def read_model_files(path: pathlib.Path) -> ModelFiles:
    """Reads the templates and special tokens of a folder or a `.gguf` file."""
    try:
        return (_of_gguf if path.suffix == ".gguf" else _of_folder)(path)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = ql.io.parse_json(read_text(path).encode(), str(path))
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return found


def _of_folder(folder: pathlib.Path) -> ModelFiles:
    settings = _read_json(folder / "tokenizer_config.json")
    older = _read_json(folder / "special_tokens_map.json")
    values = {name: settings.get(name, older.get(name)) for name in SPECIAL}
    special = {name: _token(x) for name, x in values.items() if x is not None}
    ends: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [found]
    end_ids = dict.fromkeys(x for x in ends if type(x) is int and x >= 0)
    return ModelFiles(folder_templates(folder, settings), special, tuple(end_ids))


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(x) for x in value]
    found = value.get("content") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise ModelError(f"a special token must be text. Got {value!r:.40}.")
    return found


def _of_gguf(path: pathlib.Path) -> ModelFiles:
    reader = open_gguf(path)
    (ids, ends), tokens = special_tokens(reader), field(reader, "tokenizer.ggml.tokens")
    special = {name: tokens[index] for name, index in ids.items()}
    return ModelFiles(chat_templates(reader), special, tuple(ends))
