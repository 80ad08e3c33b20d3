"""Opens the tokenizers of folders with transformers."""

import pathlib
from typing import TYPE_CHECKING, Any

from qlora_jax.io.files import check_links, parse_json

from ..reading import ModelError, reading
from .hf_config import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_folder_tokenizer(folder: pathlib.Path) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer of a folder. It runs no code of the folder.

    Its `backend_tokenizer` neither truncates nor pads.
    """
    check_links(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} must have a tokenizer.json. To make one from other files, such "
            "as tokenizer.model, open the folder with transformers' AutoTokenizer, and "
            "save it with `save_pretrained`."
        )
    transformers = import_transformers()
    with reading(f"the tokenizer of {folder}", ModelError):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                "`auto_map` in tokenizer_config.json names code, which is never run. "
                "If tokenizer.json is correct, remove this key."
            ) from None
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
            raise ValueError(
                "`tokenizer_class` must be a class of transformers that is based on "
                f"the library tokenizers. Got {type(tokenizer).__name__}."
            )
        backend = tokenizer.backend_tokenizer
        # Some files enable these, which would change rows without a warning.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return tokenizer


def chat_templates(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Returns the chat templates by name; the main one is "default"."""
    source: Any = tokenizer.chat_template or {}
    templates = {"default": source} if isinstance(source, str) else source
    is_valid = isinstance(templates, dict)
    if not is_valid or not all(isinstance(x, str) for x in templates.values()):
        raise ModelError(
            f"the chat template in {tokenizer.name_or_path} must be text, or texts by "
            f"their names. Got {source!r:.60}."
        )
    return templates


def read_end_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """Returns the tokens that end generation, from a folder's configs."""
    generation = _read_object(folder / "generation_config.json")
    config, ids = _read_object(folder / "config.json"), []
    # Some models with a vision part have the token only in their text settings.
    for section in (generation, config, config.get("text_config")):
        value = section.get("eos_token_id") if isinstance(section, dict) else None
        ids += value if isinstance(value, list) else [value]
    if wrong := [x for x in ids if not (x is None or type(x) is int)]:
        raise ValueError(
            f"`eos_token_id` must be an integer, or a list of them. Got {wrong}."
        )
    # Some files have -1 instead of null. A dict removes duplicates, in order.
    return tuple(dict.fromkeys(x for x in ids if x is not None and x >= 0))


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    value = parse_json(path.read_bytes(), str(path)) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object.")
    return value
