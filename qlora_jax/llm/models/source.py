"""Opens the files of a model, whatever their format."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..gguf.file import is_gguf
from ..gguf.model import GGUFModel
from .config import DecoderConfig
from .folder import ChatSettings, ModelFolder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ModelSource(Protocol):
    """The files of a model. Weights and tokenizers are read when they are needed."""

    # Whether packed weights whose bytes cannot be moved are decoded by default.
    is_recoded: ClassVar[bool]

    @property
    def path(self) -> pathlib.Path: ...  # noqa: D102
    @property
    def config(self) -> DecoderConfig: ...  # noqa: D102
    @property
    def context_length(self) -> int: ...  # noqa: D102
    @property
    def quantization(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def stored_tensors(self) -> Mapping[str, Any]: ...  # noqa: D102
    def open_tensors(self) -> Mapping[str, Any]: ...  # noqa: D102
    def build_tokenizer(self) -> "Tokenizer": ...  # noqa: D102
    def read_chat(self) -> ChatSettings: ...  # noqa: D102
    def open_description(  # noqa: D102
        self,
    ) -> contextlib.AbstractContextManager[pathlib.Path]: ...


def open_source(path: str | pathlib.Path) -> ModelSource:
    """Returns the model in a Hugging Face folder or a `.gguf` file."""
    path = pathlib.Path(path)
    return GGUFModel(path) if is_gguf(path) else ModelFolder(path)
