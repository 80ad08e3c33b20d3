"""A model in a Hugging Face folder."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

import qlora_jax as ql
from qlora_jax.io.files import check_links
from qlora_jax.io.model_folder import read_config_json
from qlora_jax.io.tensors import Tensors

from ..reading import reading
from .config import DecoderConfig
from .decoder_names import decoder_names
from .families import config_from_hf, text_only_config

# Suffixes of the files in a folder that contain settings, not weights.
_SETTINGS_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_CONTEXT_KEY = "max_position_embeddings"
_ROWS_PER_PART = 4096  # number of rows of tied tensors that are compared at a time


def has_vision(config: DecoderConfig) -> bool:
    """Whether a decoder is the text half of a model with a vision part."""
    return config.module != "model"


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFolder:
    """A folder with `config.json`, `*.safetensors` and a tokenizer."""

    path: pathlib.Path

    def __post_init__(self):
        # For all of its files here, because some of them are read by other libraries.
        check_links(self.path)

    @cached_property
    def config(self) -> DecoderConfig:
        """The config of the decoder; raises if `Decoder` does not support the model."""
        raw = read_config_json(self.path)
        ql.io.read_quantization(self.path)  # raises if the format is not supported
        with reading(self.path / "config.json"):
            return config_from_hf(raw)

    @property
    def context_length(self) -> int:
        """The context length in tokens."""
        raw, key = text_only_config(read_config_json(self.path)), _CONTEXT_KEY
        if type(length := raw.get(key)) is not int or length < 1:
            raise ValueError(
                f"{self.path} must have a context length, `{key}`, which is a positive "
                f"integer. Got {length!r}."
            )
        return length

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization settings in the files; empty for float weights."""
        return ql.io.read_quantization(self.path)

    @property
    def stored_tensors(self) -> Tensors:
        """The tensors under the names in the files, with those of a vision part."""
        return ql.io.open_safetensors(self.path)

    def open_tensors(self) -> Tensors:
        """Returns the decoder's tensors by Hugging Face name, after some checks."""
        tensors = self.stored_tensors
        if has_vision(self.config):
            tensors = self._select_text(tensors)
        if self.config.tie_embeddings:
            # transformers would use a head in the file instead of the embedding.
            embedding = f"{self.config.module}.embed_tokens.weight"
            check_tied(tensors, "lm_head.weight", embedding)
        return tensors

    def _select_text(self, tensors: Tensors) -> Tensors:
        """Renames the tensors of the text half; warns that the others are ignored."""
        names = decoder_names(self.config)
        ignored = [name for name in tensors if names.is_ignored(name)]
        warnings.warn(
            f"{self.path} has a vision part. Its {len(ignored)} tensors are ignored: "
            "only the text half is read.",
            stacklevel=4,
        )
        # Files may have names from older versions of transformers, which call the
        # decoder `language_model.model` or `model`, and the head
        # `language_model.lm_head`. Adapters use the names of the current modules.
        decoder = r"^(language_model\.model|model(?=\.(layers|embed_tokens|norm)\.))\."
        head, renamed = r"^language_model\.lm_head\.", {}
        for name in tensors:
            new_name = re.sub(decoder, f"{self.config.module}.", name)
            new_name = re.sub(head, "lm_head.", new_name)
            renamed[new_name] = tensors[name]
        return tensors.with_tensors(renamed)

    @contextlib.contextmanager
    def open_description(self) -> Iterator[pathlib.Path]:
        """Yields a folder with the config and the tokenizer of the decoder."""
        if not has_vision(self.config):
            yield self.path
            return
        config = text_only_config(read_config_json(self.path))
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            for file in self.path.iterdir():
                # Neither the list of the files of weights, nor the image processors.
                is_left_out = file.name.endswith(
                    (".index.json", "processor_config.json")
                )
                if file.suffix in _SETTINGS_SUFFIXES and not is_left_out:
                    shutil.copyfile(file, folder / file.name)
            if (templates := self.path / "additional_chat_templates").is_dir():
                shutil.copytree(templates, folder / templates.name)
            text = json.dumps(config, indent=2) + "\n"
            (folder / "config.json").write_text(text, "utf-8")
            yield folder


def check_tied(tensors: Tensors, name: str, other_name: str) -> None:
    """Raises if a file has two tensors that are tied in the model, and differ."""
    if not {name, other_name} <= tensors.keys():
        return
    tensor, other = tensors[name], tensors[other_name]
    is_equal = tensor.shape == other.shape
    if is_equal:
        # Slices read only a part of large arrays at a time.
        starts = range(0, tensor.shape[0], _ROWS_PER_PART)
        parts = (slice(start, start + _ROWS_PER_PART) for start in starts)
        is_equal = all(np.array_equal(tensor[part], other[part]) for part in parts)
    if not is_equal:
        raise ValueError(
            "`tie_word_embeddings` in config.json must be false, since the file "
            f"has an {name} that differs from {other_name}. Got true."
        )
