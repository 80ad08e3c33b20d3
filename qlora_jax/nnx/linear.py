"""A drop-in linear layer with a packed kernel and an adapter."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from ..adapters.call import OutSharding
from ..adapters.config import QLoRAConfig, check_layer_config
from ..trees.init import init
from .rules import RULES
from .subclass import packed_call
from .wrap import adapt

DEFAULT = QLoRAConfig()


class QLoRALinear(nnx.Linear):
    """A drop-in replacement for `nnx.Linear`, with a packed kernel and a LoRA.

    It computes `x W + scaling * (x A) B + bias` (QLoRA, Dettmers et al. 2023, section
    3): W is a `ql.nnx.Packed` in `kernel`, and A `[in, r]` and B `[r, out]` are
    `nnx.LoRAParam` in `kernel_lora.a` and `kernel_lora.b`. `ql.nnx.merge` returns an
    `nnx.Linear`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> layer = ql.nnx.QLoRALinear(64, 8, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape, layer.kernel_lora.a.shape
        ((2, 8), (64, 4))
    """

    # As in the classes that `subclass` makes, for `merge` and `packed_call`.
    qlora_original = nnx.Linear
    qlora_rule = RULES.find(nnx.Linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QLoRAConfig = DEFAULT,
        *,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes a float kernel, packs it and adds the adapter.

        Args:
            in_features: Size of the input's last axis.
            out_features: Size of the output's last axis.
            config: How the kernel is packed and adapted, without settings by pattern.
            rngs: As in `nnx.Linear`; with dropout, it needs a stream `dropout` too.
            **linear: The options of `nnx.Linear`: `use_bias`, `dtype`, `param_dtype`,
                `precision`, `kernel_init`, `bias_init` and so on.

        Raises:
            TypeError: If `config` is not a `QLoRAConfig`.
            ValueError: If `config` excludes the kernel, or has settings by pattern; or
                if `linear` has `dot_general` or `preferred_element_type`, which a
                packed kernel does not support.
        """
        check_layer_config(config)
        if unsupported := {"dot_general", "preferred_element_type"} & set(linear):
            raise ValueError(
                "options must be those that a packed kernel supports. Got "
                f"{sorted(unsupported)}. Use nnx.Linear and ql.nnx.wrap."
            )
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        params = {"kernel": self.kernel.get_value()}
        base, lora = init(rngs.params(), params, config)
        adapt(self, "kernel", "kernel", base["kernel"], lora["kernel"], rngs)

    def __call__(
        self, inputs: Float[Array, "..."], out_sharding: OutSharding = None
    ) -> Float[Array, "..."]:
        """Returns `[..., out_features]`, in the dtype that `nnx.Linear` would give it.

        Args:
            inputs: A floating-point array `[..., in_features]`.
            out_sharding: Sharding of the result, with Explicit mesh axes.

        Raises:
            ValueError: If the kernel has more than two axes, as inside a scan over
                layers whose filters do not name `ql.nnx.Packed`.
        """
        return packed_call(self, inputs, out_sharding)
