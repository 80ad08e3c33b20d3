"""An MLP and a mixture of experts in the same layer (Gemma 4 26B-A4B).

Both read the residual stream, each through its own norm. Their outputs are normalized
separately and added. The router also has its own norm.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import qlora_jax as ql

from .config import DecoderConfig, Experts, LayerKind
from .experts import ExpertMLPs, choose_experts, mix_experts
from .mlp import DenseMLP
from .products import make_dense, make_norm, name_product

# The path of each norm, and its name in the Hugging Face model.
_NORMS = {
    "dense_input_norm": "pre_feedforward_layernorm",
    "dense_output_norm": "post_feedforward_layernorm_1",
    "experts_input_norm": "pre_feedforward_layernorm_2",
    "experts_output_norm": "post_feedforward_layernorm_2",
}


class MLPWithExperts(nn.Module):
    """Returns the sum of the normalized outputs of an MLP and of a token's experts."""

    config: DecoderConfig
    width: int  # of the MLP
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "mlp"
    split_outputs: ClassVar[tuple[str, ...]] = DenseMLP.split_outputs
    split_inputs: ClassVar[tuple[str, ...]] = DenseMLP.split_inputs

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]):
        """Returns the output, without the residual; `x` is not normalized yet."""
        c, experts = self.config, self.config.experts
        assert experts is not None

        def normalize(x: Array, name: str) -> Array:
            return make_norm(c, self.dtype, name)(x)

        mlp = DenseMLP(c, self.width, self.dtype, name="dense")
        y = name_product(mlp(normalize(x, "dense_input_norm")))
        dense = normalize(y, "dense_output_norm")
        # The router and the experts process rows of tokens: [M, D].
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self._route(rows, experts)
        mlps = ExpertMLPs(c, self.dtype, name="experts")
        expert_rows = normalize(rows, "experts_input_norm")
        mixed = mix_experts(mlps, expert_rows, weights, chosen, experts)
        mixed = normalize(mixed.reshape(x.shape), "experts_output_norm")
        return dense + mixed

    def _route(
        self, rows: Float[Array, "M D"], experts: Experts
    ) -> tuple[Float[Array, "M C"], Array]:
        """Returns the weights and the indices of each token's experts."""
        c = self.config
        scale = self.param("router_scale", nn.initializers.ones, (c.hidden_size,))
        rows = nn.RMSNorm(c.rms_norm_eps, self.dtype, use_scale=False)(rows)
        rows = rows * scale.astype(self.dtype)[None] * c.hidden_size**-0.5
        router = make_dense(experts.count, False, self.dtype, "router")
        logits = router(rows[None])[0]  # [M, E]; `make_dense` needs inputs [B, T, K]
        weights, chosen = choose_experts(logits, experts)
        scales = self.param("expert_scales", nn.initializers.ones, (experts.count,))
        return weights * scales.astype(jnp.float32)[chosen], chosen

    @staticmethod
    def tensor_names(
        config: DecoderConfig, kind: LayerKind
    ) -> dict[str, str | ql.io.Entry]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        experts = config.experts
        assert experts is not None
        names: dict[str, str | ql.io.Entry] = {
            f"dense/{path}": name
            for path, name in DenseMLP.tensor_names(config, kind).items()
        }
        names |= {f"{path}/scale": f"{name}.weight" for path, name in _NORMS.items()}
        names |= {
            "router/kernel": "router.proj.weight",
            "router_scale": "router.scale",
            "expert_scales": "router.per_expert_scale",
        }
        for kernel in experts.kernels:
            # One parameter [E, N, K] contains the kernels of all experts.
            parameter = f"experts.{kernel}"
            names[f"experts/{kernel}/kernel"] = ql.io.Entry(
                f"{parameter}.{{expert}}", parameter=parameter, stack_roles="nk"
            )
        return names
