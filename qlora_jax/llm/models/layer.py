"""A layer of the decoder, which is made of parts.

The file of a part has all that is known about it: the module, the Hugging Face names of
its parameters, the kernels that a mesh splits, and the cache. By default, all kernels
of linear layers get adapters. Routers and experts do not, because transformers stores
them as plain parameters. `Entry.parameter` has the names of these parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array

import qlora_jax as ql

from .attention import Attention, LayerData, SharedKV, TokenData
from .config import DecoderConfig, LayerKind
from .delta_rule import GatedDeltaNet
from .experts import MixtureOfExperts, MLPWithExperts
from .mlp import DenseMLP
from .per_layer_input import PerLayerInput
from .products import make_norm

# The parts in which tokens see other tokens.
Mixer = type[Attention] | type[GatedDeltaNet]
PARTS = Attention, GatedDeltaNet, DenseMLP, MixtureOfExperts, MLPWithExperts
PARTS += (PerLayerInput,)


class Layer(nn.Module):
    """Adds the outputs of attention and of an MLP to the residual stream.

    The inputs of attention and of the MLP are normalized, or their outputs, or both.
    """

    config: DecoderConfig
    kinds: tuple[LayerKind, ...]  # of the layers in the stack
    dtype: DTypeLike = jnp.float32
    attention: str | Callable[..., Array] = "xla"
    mlp_tile: int | None = None

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, SharedKV],
        tokens: TokenData,
        layer_data: LayerData,
        cache,
    ):
        """Returns the new carry, and what is new in the layer's cache, or None.

        The carry consists of the residual stream, and of the keys and values that later
        layers share. The whole cache is not returned, because a scan would copy it.
        """
        c, dtype = self.config, self.dtype
        x, shared_kv = carry
        norms = norm_names(c)

        def normalize(x: Array, name: str | None) -> Array:
            return x.astype(dtype) if name is None else make_norm(c, dtype, name)(x)

        x = ql.memory.layer_input(x)
        mixer = self._make_mixer()
        y, new_entry, shared_kv = mixer(
            normalize(x, norms.before_mixer), tokens, layer_data, cache, shared_kv
        )
        x = x + normalize(y, norms.after_mixer).astype(x.dtype)
        mlp = ql.linen.tiled(self._make_mlp(), self.mlp_tile)
        if c.experts is not None and c.experts.beside_mlp:
            y = mlp(x)  # `MLPWithExperts` normalizes its input itself
        else:
            y = mlp(normalize(x, norms.before_mlp))
        x = x + normalize(y, norms.after_mlp).astype(x.dtype)
        if layer_data.additional_input is not None:
            part = PerLayerInput(c, dtype, name=PerLayerInput.part_name)
            x = x + part(x, layer_data.additional_input).astype(x.dtype)
        if c.output_scalars:
            scalar = self.param("layer_scalar", nn.initializers.ones, (1,))
            x = x * scalar.astype(x.dtype)[None, None]
        return (x, shared_kv), new_entry

    def _make_mixer(self) -> Any:
        c, kinds, dtype = self.config, self.kinds, self.dtype
        mixer = mixer_class(kinds[0])
        if issubclass(mixer, Attention):
            return mixer(c, kinds, dtype, self.attention, name=mixer.part_name)
        return mixer(c, kinds, dtype, name=mixer.part_name)

    def _make_mlp(self) -> nn.Module:
        c, kind = self.config, self.kinds[0]
        mlp = mlp_class(c, kind)
        if issubclass(mlp, MixtureOfExperts):
            return mlp(c, self.dtype, name=mlp.part_name)
        width = kind.mlp_width or c.intermediate_size
        return mlp(c, width, self.dtype, name=mlp.part_name)

    @staticmethod
    def tensor_names(
        config: DecoderConfig, kind: LayerKind
    ) -> dict[str, str | ql.io.Entry]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        norms = [name for name in norm_names(config) if name is not None]
        names: dict[str, str | ql.io.Entry] = {
            f"{norm}/scale": f"{norm}.weight" for norm in norms
        }
        if config.output_scalars:
            names["layer_scalar"] = "layer_scalar"
        parts = [mixer_class(kind), mlp_class(config, kind)]
        if config.per_layer_width:
            parts.append(PerLayerInput)
        for part in parts:
            tensor_names = part.tensor_names(config, kind)
            names |= {f"{part.part_name}/{path}": x for path, x in tensor_names.items()}
        return names


class NormNames(NamedTuple):
    """The names of a layer's norms; None for a norm that the layer does not have."""

    before_mixer: str | None
    after_mixer: str | None
    before_mlp: str | None
    after_mlp: str | None


def norm_names(config: DecoderConfig) -> NormNames:
    """Returns the names of a layer's norms, as in the Hugging Face model."""
    # In Llama, "post_attention_layernorm" normalizes the input of the MLP. In Gemma and
    # OLMo, the norm of this name normalizes the output of attention.
    if not config.post_norms:
        return NormNames("input_layernorm", None, "post_attention_layernorm", None)
    before_mixer = before_mlp = None
    if config.pre_norms:
        before_mixer, before_mlp = "input_layernorm", "pre_feedforward_layernorm"
    if config.experts is not None and config.experts.beside_mlp:
        before_mlp = None  # `MLPWithExperts` has this norm
    after_mixer, after_mlp = "post_attention_layernorm", "post_feedforward_layernorm"
    return NormNames(before_mixer, after_mixer, before_mlp, after_mlp)


def mixer_class(kind: LayerKind) -> Mixer:
    """Returns the class of the part in which tokens see other tokens."""
    return Attention if kind.delta_rule is None else GatedDeltaNet


def mlp_class(
    config: DecoderConfig, kind: LayerKind
) -> type[DenseMLP] | type[MixtureOfExperts] | type[MLPWithExperts]:
    """Returns the class of a layer's MLP."""
    if config.experts is not None and config.experts.beside_mlp:
        return MLPWithExperts
    has_experts = config.experts is not None and kind.mlp_width is None
    return MixtureOfExperts if has_experts else DenseMLP
