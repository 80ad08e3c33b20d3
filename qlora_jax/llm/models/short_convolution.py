"""A gated short convolution, which replaces attention (LFM2).

Shapes: B batch, T tokens, D hidden size, W width of the convolution.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from .attention import LayerData, SharedKV, TokenData
from .config import DecoderConfig, LayerKind
from .delta_rule import LayerStates, convolve, next_states
from .products import linear_names, make_dense, name_product


class ShortConvolution(nn.Module):
    """Mixes the last few tokens by a convolution of each channel.

    One gate multiplies the inputs of the convolution, and another one its outputs. A
    token of a packed row sees only its own sequence.
    """

    config: DecoderConfig
    kinds: tuple[LayerKind, ...]  # of the layers in the stack
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "conv"
    split_outputs: ClassVar[tuple[str, ...]] = ("in_proj",)
    split_inputs: ClassVar[tuple[str, ...]] = ("out_proj",)

    @nn.compact
    def __call__(
        self, x, tokens: TokenData, layer_data: LayerData, cache, shared_kv: SharedKV
    ):
        """Returns the output, the new inputs if there is a cache, and `shared_kv`."""
        c, width = self.config, convolution_width_of(self.kinds)
        channels, has_bias = c.hidden_size, c.convolution_bias
        project = make_dense(3 * channels, has_bias, self.dtype, "in_proj")
        gate, output_gate, inputs = jnp.split(name_product(project(x)), 3, axis=-1)
        inputs = gate * inputs
        init = nn.initializers.lecun_normal()
        weights = self.param("conv", init, (channels, 1, width))[:, 0]
        old_inputs = None if cache is None else cache.inputs
        mixed = convolve(inputs, weights, tokens.segment_ids, old_inputs)
        if has_bias:
            bias = self.param("conv_bias", nn.initializers.zeros, (channels,))
            mixed += bias.astype(jnp.float32)[None, None]
        mixed = (output_gate.astype(jnp.float32) * mixed).astype(self.dtype)
        project = make_dense(channels, has_bias, self.dtype, "out_proj")
        output = name_product(project(mixed))
        return output, next_states(inputs, cache, tokens.num_tokens), shared_kv

    @staticmethod
    def tensor_names(config: DecoderConfig, kind: LayerKind) -> dict[str, str]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        has_bias = dict.fromkeys(["in_proj", "out_proj"], config.convolution_bias)
        names = linear_names("conv", has_bias) | {"conv": "conv.conv.weight"}
        return names | (
            {"conv_bias": "conv.conv.bias"} if config.convolution_bias else {}
        )

    @staticmethod
    def init_cache(
        config: DecoderConfig,
        kinds: tuple[LayerKind, ...],
        batch: int,
        length: int,
        dtype: DTypeLike,
    ) -> LayerStates:
        """Returns zeros for the inputs of a stack of layers."""
        width = convolution_width_of(kinds) - 1
        shape = len(kinds), batch, width, config.hidden_size
        return LayerStates(jnp.zeros(shape, dtype))


def convolution_width_of(kinds: tuple[LayerKind, ...]) -> int:
    """Returns the width that the convolutions of all layers of a stack have."""
    width = kinds[0].convolution_width
    assert width is not None
    return width
