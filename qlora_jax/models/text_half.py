"""Reads the text half of a model with a vision part."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator

import qlora_jax as ql

from .config import DecoderConfig
from .decoder_names import decoder_names
from .families.gemma import text_config

_SETTINGS = (".json", ".jinja", ".model", ".txt")  # suffixes of files without weights


def has_vision(config: DecoderConfig) -> bool:
    """Whether a decoder is the text half of a larger model."""
    return config.module != "model"


def text_tensors(folder: pathlib.Path, config: DecoderConfig) -> "ql.io.Tensors":
    """Returns the tensors of the text half; warns of those that are left out."""
    found, names = ql.io.open_safetensors(folder), decoder_names(config)
    left = [name for name in found if names.is_ignored(name)]
    warnings.warn(
        f"{folder} has a vision part. Its {len(left)} tensors are left out: the text "
        "half is read alone.",
        stacklevel=3,
    )
    # Adapters go by the names of transformers' modules, which files do not have.
    renamed = {}
    for name in found:
        new = re.sub(r"^language_model\.model\.", f"{config.module}.", name)
        renamed[re.sub(r"^language_model\.", "", new)] = found[name]
    return dataclasses.replace(found, _tensors=renamed)


@contextlib.contextmanager
def folder_of_text(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder with the text half's config and tokenizer."""
    text = text_config(ql.io.read_config_json(folder))
    with tempfile.TemporaryDirectory() as scratch:
        new = pathlib.Path(scratch)
        for file in folder.iterdir():
            if file.suffix in _SETTINGS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, new / file.name)
        if (more := folder / "additional_chat_templates").is_dir():
            shutil.copytree(more, new / more.name)
        (new / "config.json").write_text(json.dumps(text, indent=2) + "\n", "utf-8")
        yield new
