"""A model in a GGUF file, and its description as Hugging Face files."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ..models.config import DecoderConfig
from ..models.families import config_from_hf
from ..models.folder import ChatSettings
from .decoder_in import GGUFTensor, gguf_fmt, read_gguf
from .file import GGUFFile, open_gguf
from .tokenizer_in import chat_templates, gguf_tokenizer, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """The model in a file of llama.cpp: a `ModelSource` (see `models/source.py`)."""

    path: pathlib.Path
    # Whether the file is always read with the option `recode` of `ql.io.load`. Tensors
    # in block formats that this package lacks are decoded to floats, exactly.
    is_recoded: ClassVar[bool] = True

    @cached_property
    def file(self) -> GGUFFile:
        """The file."""
        return open_gguf(self.path)

    @cached_property
    def _contents(
        self,
    ) -> tuple[DecoderConfig, dict[str, GGUFTensor], dict[str, Any]]:
        return read_gguf(self.file)

    @property
    def config(self) -> DecoderConfig:
        """The config of the decoder; raises if `Decoder` does not support the model."""
        return self._contents[0]

    @property
    def context_length(self) -> int:
        """The context length in tokens."""
        key = f"{self.file.values.get('general.architecture')}.context_length"
        if not (length := self.file.values.get(key)):
            raise ValueError(f"{self.path} must have a context length, `{key}`.")
        return int(length)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The format of the packed layers."""
        return {"quant_method": "gguf", "fmt": gguf_fmt(self.file)}

    @property
    def stored_tensors(self) -> Mapping[str, Any]:
        """The tensors by Hugging Face name."""
        return self._contents[1]

    def open_tensors(self) -> Mapping[str, Any]:
        """Returns `stored_tensors`: a GGUF file has no vision part to leave out."""
        return self.stored_tensors

    def build_tokenizer(self) -> "Tokenizer":
        """Returns the tokenizer."""
        return gguf_tokenizer(self.file)

    def read_chat(self) -> ChatSettings:
        """Returns the chat templates and the special tokens."""
        special_ids, end_ids = special_tokens(self.file)
        tokens: Any = self.file.values.get("tokenizer.ggml.tokens")
        special = {name: tokens[index] for name, index in special_ids.items()}
        return ChatSettings(chat_templates(self.file), special, tuple(end_ids))

    @contextlib.contextmanager
    def open_description(self) -> Iterator[pathlib.Path]:
        """Yields a temporary folder with the config and the tokenizer."""
        config, _, raw = self._contents
        # `context_length` raises if the file has none.
        raw = raw | {"max_position_embeddings": self.context_length}
        if config_from_hf(raw) != config:
            raise ValueError(
                "a GGUF model must have an equivalent Hugging Face config. This "
                f"{self.file.values['general.architecture']} has none. For example, a "
                "GGUF file has the frequencies of an extended context, but not the "
                "rule that produced them."
            )
        chat = self.read_chat()
        special_ids, _ = special_tokens(self.file)
        ids: dict[str, Any] = {f"{name}_id": i for name, i in special_ids.items()}
        ends = [*chat.end_ids]
        eos = {"eos_token_id": ends if ends[1:] else ends[0]} if ends else {}
        files: dict[str, Any] = {
            "config.json": raw | ids,
            "generation_config.json": ids | eos,
        }
        tokenizer = None
        if "tokenizer.ggml.model" in self.file.values:
            tokenizer = self.build_tokenizer()
            templates: Any = chat.templates
            if [*templates] == ["default"]:
                templates = templates["default"]
            else:
                templates = [{"name": k, "template": x} for k, x in templates.items()]
            files["tokenizer_config.json"] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **{name: tokenizer.id_to_token(i) for name, i in special_ids.items()},
                **({"chat_template": templates} if templates else {}),
            }
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            for name, values in files.items():
                text = json.dumps(values, indent=2) + "\n"
                (folder / name).write_text(text, "utf-8")
            if tokenizer is not None:
                tokenizer.save(str(folder / "tokenizer.json"))
            yield folder
