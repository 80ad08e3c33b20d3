"""Additional inputs of layers: a vector for each layer and token (Gemma 4 E2B, E4B).

Each layer receives these vectors besides the residual stream. A vector is the sum of
two terms: an entry of a second embedding, and a projection of the embedded token.
Shapes: B batch, T tokens, L layers, D hidden size, P size of these vectors.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import qlora_jax as ql

from .config import DecoderConfig, LayerKind
from .products import apply_gate, make_dense, make_norm, name_product


class PerLayerEmbedding(nn.Module):
    """Computes the inputs of all layers."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "per_layer_embedding"

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], embedded: Float[Array, "B T D"]
    ) -> Float[Array, "L B T P"]:
        """Returns the inputs of each layer."""
        c, dtype = self.config, self.dtype
        width, shape = c.per_layer_width, (*tokens.shape, c.num_layers, -1)
        embed = nn.Embed(
            c.vocab_size, c.num_layers * width, dtype=dtype, name="embed_tokens"
        )
        rows = embed(tokens).astype(jnp.float32).reshape(shape)
        # Gemma rounds this factor to the dtype of the model. It does the same with the
        # factor of the main embedding.
        rows = rows * jnp.asarray(width**0.5, dtype).astype(jnp.float32)
        project = make_dense(c.num_layers * width, False, dtype, "model_projection")
        projected = project(embedded.astype(dtype)) * c.hidden_size**-0.5
        projected = make_norm(c, dtype, "projection_norm")(projected.reshape(shape))
        inputs = (projected.astype(jnp.float32) + rows) * 2**-0.5
        return jnp.moveaxis(inputs.astype(dtype), 2, 0)

    @staticmethod
    def tensor_names(config: DecoderConfig) -> dict[str, str]:
        """Returns the Hugging Face names of these parameters, by path."""
        return {
            "embed_tokens/embedding": "embed_tokens_per_layer.weight",
            "model_projection/kernel": "per_layer_model_projection.weight",
            "projection_norm/scale": "per_layer_projection_norm.weight",
        }


class PerLayerInput(nn.Module):
    """Computes what a layer's additional input adds to the residual stream."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "per_layer_input"
    split_outputs: ClassVar[tuple[str, ...]] = ("input_gate",)
    split_inputs: ClassVar[tuple[str, ...]] = ("input_projection",)

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], inputs: Float[Array, "B T P"]):
        """Returns the output, without the residual."""
        c, dtype = self.config, self.dtype
        gate = make_dense(c.per_layer_width, False, dtype, "input_gate")
        gated = apply_gate(c, name_product(gate(x)), inputs)
        project = make_dense(c.hidden_size, False, dtype, "input_projection")
        return make_norm(c, dtype, "norm")(name_product(project(gated)))

    @staticmethod
    def tensor_names(
        config: DecoderConfig, kind: LayerKind
    ) -> dict[str, str | ql.io.Entry]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        return {
            "input_gate/kernel": "per_layer_input_gate.weight",
            "input_projection/kernel": "per_layer_projection.weight",
            "norm/scale": "post_per_layer_input_norm.weight",
        }
