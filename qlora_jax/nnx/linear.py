"""A linear layer with a packed kernel, for use in place of `nnx.Linear`."""

from typing import Any

import jax
from flax import nnx

from ..adapters.config import QLoRAConfig
from ..trees.init import init
from .rules import RULES
from .subclass import packed_call
from .wrap import adapt


class QLoRALinear(nnx.Linear):
    """`nnx.Linear` with a packed kernel and a LoRA, for use in its place.

    `y = x W + scaling * (x A) B + bias` (QLoRA, Dettmers et al. 2023, section 3): W is
    a `ql.nnx.Packed` in `kernel`, A `[in, r]` and B `[r, out]` are `nnx.LoRAParam` in
    `kernel_lora.a` and `kernel_lora.b`. `ql.nnx.merge` gives an `nnx.Linear` back.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> layer = ql.nnx.QLoRALinear(64, 8, rank=4, alpha=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape, layer.kernel_lora.a.shape
        ((2, 8), (64, 4))
    """

    qlora_original = nnx.Linear
    qlora_rule = RULES.find(nnx.Linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 16,
        alpha: float | None = None,
        fmt: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        freeze_base: bool = True,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        lora_dtype: Any = "float32",
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes a float kernel, packs it and adds the adapter.

        Args:
            in_features: Size of the input's last axis.
            out_features: Size of the output's last axis.
            rank: As in `QLoRAConfig`, like all settings up to `lora_dtype`.
            alpha: LoRA's alpha; by default the rank.
            fmt: Number format of the kernel.
            block_size: Weights that share a scale.
            double_quant: Whether the scales are quantized too.
            freeze_base: False keeps the kernel an `nnx.Param`, trained through its
                quantization.
            dropout: Rate of dropout on the adapter's input.
            rank_stabilized: Scale by alpha / sqrt(rank).
            lora_dtype: Dtype of A and B.
            rngs: As in `nnx.Linear`; `dropout` too if there is dropout.
            **linear: The options of `nnx.Linear`: `use_bias`, `dtype`, `param_dtype`,
                `precision`, `kernel_init`, `bias_init` and so on.

        Raises:
            TypeError: As `QLoRAConfig`.
            ValueError: As `QLoRAConfig`, or if `linear` has `dot_general` or
                `preferred_element_type`, which a packed kernel does not support.
        """
        unsupported = {"dot_general", "preferred_element_type"} & set(linear)
        if unsupported:
            raise ValueError(
                "options must be those that a packed kernel supports. Got "
                f"{sorted(unsupported)}. Use nnx.Linear and ql.nnx.wrap."
            )
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        config = QLoRAConfig(
            rank=rank,
            alpha=alpha,
            fmt=fmt,
            block_size=block_size,
            double_quant=double_quant,
            freeze_base=freeze_base,
            dropout=dropout,
            rank_stabilized=rank_stabilized,
            lora_dtype=lora_dtype,
            targets="kernel",
        )
        params = {"kernel": self.kernel.get_value()}
        base, lora = init(rngs.params(), params, config)
        adapt(self, "kernel", "kernel", base["kernel"], lora["kernel"], rngs)

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the layer, as `nnx.Linear` does.

        Args:
            inputs: A floating-point array `[..., in_features]`.
            out_sharding: Sharding of the result, with Explicit mesh axes.

        Returns:
            `[..., out_features]`, in the dtype that `nnx.Linear` would give it.

        Raises:
            ValueError: If the kernel has more than two axes, as inside a scan over
                layers whose filters do not name `ql.nnx.Packed`.

        Example:
            >>> import jax.numpy as jnp, qlora_jax as ql
            >>> from flax import nnx
            >>> layer = ql.nnx.QLoRALinear(64, 8, rank=4, rngs=nnx.Rngs(0))
            >>> layer(jnp.ones((2, 64))).shape
            (2, 8)
        """
        return packed_call(self, inputs, out_sharding)
