"""The dense MLP of a layer."""

import functools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from .config import DecoderConfig, LayerKind
from .products import apply_gate, linear_names, make_dense, name_product


class DenseMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig
    width: int
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "mlp"
    split_outputs: ClassVar = "gate_proj", "up_proj", "gate_up_proj"
    split_inputs: ClassVar[tuple[str, ...]] = ("down_proj",)

    @nn.compact
    def __call__(self, x):
        """Returns the output, without the residual."""
        c, width = self.config, self.width
        dense = functools.partial(make_dense, use_bias=c.mlp_bias, dtype=self.dtype)
        if c.fused:
            fused = name_product(dense(2 * width, name="gate_up_proj")(x))
            gate, up = jnp.split(fused, 2, axis=-1)
        else:
            gate = name_product(dense(width, name="gate_proj")(x))
            up = name_product(dense(width, name="up_proj")(x))
        # This product has no name: most layers end with it, so that no other part of
        # the layer needs it in the backward pass.
        return dense(c.hidden_size, name="down_proj")(apply_gate(c, gate, up))

    @staticmethod
    def tensor_names(config: DecoderConfig, kind: LayerKind) -> dict[str, str]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        projections = ["gate_proj", "up_proj", "down_proj"]
        if config.fused:
            projections = ["gate_up_proj", "down_proj"]
        return linear_names("mlp", dict.fromkeys(projections, config.mlp_bias))
