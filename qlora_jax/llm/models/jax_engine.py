"""Language models that run in `Decoder`, the decoder of this package."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

import qlora_jax as ql

from .checkpoint import abstract_params, load
from .config import DecoderConfig, Experts
from .decoder import Decoder
from .decoder_names import decoder_names
from .folder import ModelFolder, has_vision
from .sharding import place_arguments

# The linear layers that are packed. As in transformers, the head stays in float, and so
# do the routers of experts and the gates of shared ones.
LAYERS = r"layers(_\d+)?/(?!.*/(router|shared_expert_gate)/).*/kernel"


@dataclass(frozen=True)
class JaxEngine:
    """Everything that the application needs to know about a model in `Decoder`.

    `TorchEngine` has the same attributes and methods, except for `decoder`, and
    describes them.
    """

    path: pathlib.Path
    decoder: DecoderConfig
    name: ClassVar[Literal["jax"]] = "jax"
    layers: ClassVar[str] = LAYERS
    contract: ClassVar[Mapping[Any, str]] = {}
    head_module: ClassVar[str] = "lm_head"
    generation_problem: ClassVar[None] = None
    can_pack_rows: ClassVar[bool] = True

    @functools.cached_property
    def files(self) -> ModelFolder:
        """The files of the model."""
        return ModelFolder(self.path)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return self.decoder.vocab_size

    @property
    def experts(self) -> Experts | None:
        """The settings of the experts; None without experts."""
        return self.decoder.experts

    @property
    def head_key(self) -> str:
        """The key of the head in trees; if it is tied, the key of the embedding."""
        return "embed_tokens" if self.decoder.tie_embeddings else "lm_head"

    @property
    def has_vision(self) -> bool:
        """Whether the decoder is the text half of a model with a vision part."""
        return has_vision(self.decoder)

    @property
    def shapes(self) -> dict[str, Any]:
        """The shapes of the parameters."""
        return abstract_params(self.decoder)

    @property
    def names(self) -> ql.io.Names:
        """The names of the parameters in the Hugging Face model."""
        return decoder_names(self.decoder)

    @property
    def exported_names(self) -> ql.io.Names:
        """The names in an exported model, which has no vision part."""
        # In models without a vision part, the decoder's module is called "model".
        return decoder_names(dataclasses.replace(self.decoder, module="model"))

    def language_params(self, params: PyTree) -> PyTree:
        """Returns the parameters of the language model, which are all of them."""
        return params

    def load(
        self, dtype: DTypeLike, qlora: ql.QLoRAConfig | None, **options: Any
    ) -> PyTree:
        """Returns the parameters. The arguments are those of `ql.io.load`."""
        return load(self.path, dtype, qlora, **options)[1]

    def make_model(
        self,
        *,
        dtype: DTypeLike = jnp.float32,
        has_dropout: bool = False,
        has_packed_rows: bool = False,
        backend: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Returns the model, which takes packed parameters and the collection `lora`.

        `backend` is as in `ql.matmul`, and `options` are those of `Decoder`. The same
        model serves with and without dropout and packed rows.
        """
        del has_dropout, has_packed_rows
        decoder = Decoder(self.decoder, dtype=dtype, **options)
        return ql.linen.wrap(decoder, scanned=decoder.scanned, backend=backend)

    def place_arguments(
        self, base: PyTree, mesh: Mesh | AbstractMesh
    ) -> dict[str, Any]:
        """Returns the arguments `rules` and `rows` of `ql.sharding.place`."""
        return place_arguments(self.decoder, base, mesh)
