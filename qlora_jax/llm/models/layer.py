"""A layer of the decoder, which is made of parts.

The file of a part has all that is known about it: the module, the Hugging Face names of
its parameters, the kernels that a mesh splits, and the cache. Adapters take all kernels
by default, except those with an `Entry.parameter`, which are not linear layers in
transformers.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array

import qlora_jax as ql

from .attention import Attention, LayerScalars, SharedKV, Tokens
from .config import DecoderConfig, LayerKind
from .delta_rule import GatedDeltaNet
from .experts import MixtureOfExperts
from .latent_attention import LatentAttention
from .mlp import GatedMLP
from .per_layer_input import PerLayerInput
from .products import make_norm

Mixer = type[Attention] | type[GatedDeltaNet]
PARTS = (
    *(Attention, LatentAttention, GatedDeltaNet),
    *(GatedMLP, MixtureOfExperts, PerLayerInput),
)


class Layer(nn.Module):
    """Adds the outputs of attention and of an MLP to the residual stream.

    The inputs of attention and of the MLP are normalized.
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
        tokens: Tokens,
        scalars: LayerScalars,
        cache,
    ):
        """Returns the carry, and what is new in the cache, or None.

        The carry is the residual stream, and keys and values for later layers. The
        whole cache is not returned, because a scan would copy it.
        """
        c, dtype = self.config, self.dtype
        x, shared_kv = carry

        def normalize(x: Array, name: str) -> Array:
            return make_norm(c, dtype, f"{name}_layernorm")(x)

        x = ql.memory.layer_input(x)
        mixer = self._make_mixer()
        y, new_entries, shared_kv = mixer(
            normalize(x, "input"), tokens, scalars, cache, shared_kv
        )
        # Llama calls the norm before the MLP "post_attention". Gemma has a norm of this
        # name after attention.
        if c.post_norms:
            y = normalize(y, "post_attention")
        x = x + y.astype(x.dtype)
        mlp = ql.linen.tiled(self._make_mlp(), self.mlp_tile)
        y = mlp(normalize(x, "pre_feedforward" if c.post_norms else "post_attention"))
        if c.post_norms:
            y = normalize(y, "post_feedforward")
        x = x + y.astype(x.dtype)
        if c.per_layer_width:
            part = PerLayerInput(c, dtype, name=PerLayerInput.part_name)
            x = x + part(x, scalars.inputs).astype(x.dtype)
        if c.output_scalars:
            scalar = self.param("layer_scalar", nn.initializers.ones, (1,))
            x = x * scalar.astype(x.dtype)[None, None]
        return (x, shared_kv), new_entries

    def _make_mixer(self) -> Any:
        c, kinds, dtype = self.config, self.kinds, self.dtype
        mixer = mixer_class(kinds[0])
        if issubclass(mixer, Attention):
            return mixer(c, kinds, dtype, self.attention, name=mixer.part_name)
        return mixer(c, kinds, dtype, name=mixer.part_name)

    def _make_mlp(self) -> nn.Module:
        c, kind = self.config, self.kinds[0]
        if mlp_class(c, kind) is MixtureOfExperts:
            return MixtureOfExperts(c, self.dtype, name=MixtureOfExperts.part_name)
        width = kind.mlp_width or c.intermediate_size
        return GatedMLP(c, width, self.dtype, name=GatedMLP.part_name)

    @staticmethod
    def tensor_names(
        config: DecoderConfig, kind: LayerKind
    ) -> dict[str, str | ql.io.Entry]:
        """Returns the layer's Hugging Face names of its parameters, by path."""
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config.post_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        names: dict[str, str | ql.io.Entry]
        names = {f"{norm}/scale": f"{norm}.weight" for norm in norms}
        if config.output_scalars:
            names["layer_scalar"] = "layer_scalar"
        parts = [mixer_class(kind), mlp_class(config, kind)]
        if config.per_layer_width:
            parts.append(PerLayerInput)
        for part in parts:
            tensor_names = part.tensor_names(config, kind)
            names |= {f"{part.part_name}/{path}": x for path, x in tensor_names.items()}
        return names


def mixer_class(kind: LayerKind) -> Mixer:
    """Returns the class of the part in which tokens see other tokens."""
    if kind.delta_rule is not None:
        return GatedDeltaNet
    return Attention if kind.latent is None else LatentAttention


def mlp_class(
    config: DecoderConfig, kind: LayerKind
) -> type[GatedMLP] | type[MixtureOfExperts]:
    """Returns the class of a layer's MLP."""
    has_experts = config.experts is not None and kind.mlp_width is None
    return MixtureOfExperts if has_experts else GatedMLP
