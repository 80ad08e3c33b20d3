"""A mixture of experts: a router, and an MLP for each expert.

Each token has one row for each of its experts. The rows are sorted by expert, and each
expert processes its group of rows. No token is dropped.

Shapes: M tokens, C experts per token, E experts.
"""

import re
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import qlora_jax as ql

from .config import DecoderConfig, Experts, LayerKind
from .mlp import DenseMLP
from .products import apply_gate, make_dense, make_norm, name_product


class ExpertsDense(nn.Module):
    """One linear layer per expert, for rows that are sorted by expert."""

    num_experts: int
    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Multiplies each group of rows by the kernel of its expert."""
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = self.num_experts, x.shape[-1], self.features  # [E, K, N]
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        y = lax.ragged_dot(x, kernel, group_sizes, preferred_element_type=jnp.float32)
        if self.use_bias:
            shape = self.num_experts, self.features
            bias = self.param("bias", nn.initializers.zeros, shape)
            row_experts = jnp.repeat(  # [rows], the expert of each
                jnp.arange(self.num_experts), group_sizes, total_repeat_length=len(x)
            )
            y = y + bias.astype(jnp.float32)[row_experts]
        return y.astype(x.dtype)


class ExpertMLPs(nn.Module):
    """The gated MLPs of all experts, for rows that are sorted by expert."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Applies each expert's MLP to its group of rows."""
        c, experts = self.config, self.config.experts
        assert experts is not None

        def project(x: Array, width: int, name: str) -> Array:
            settings = experts.count, width, c.mlp_bias, self.dtype
            return ExpertsDense(*settings, name=name)(x, group_sizes)

        width = experts.width or c.intermediate_size
        if experts.joined is not None:
            gate_up = name_product(project(x, 2 * width, "gate_up_proj"))
            if experts.joined == "alternating":
                gate, up = split_alternating(gate_up)
            else:
                gate, up = jnp.split(gate_up, 2, axis=-1)
        else:
            gate = name_product(project(x, width, "gate_proj"))
            up = name_product(project(x, width, "up_proj"))
        return project(apply_gate(c, gate, up), c.hidden_size, "down_proj")


class MixtureOfExperts(nn.Module):
    """Sums the weighted outputs of each token's experts, and of any shared MLP."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "mlp"
    split_outputs: ClassVar = "gate_proj", "up_proj", "gate_up_proj"
    split_inputs: ClassVar[tuple[str, ...]] = ("down_proj",)

    @nn.compact
    def __call__(self, x):
        """Returns the output, without the residual."""
        experts = self.config.experts
        assert experts is not None
        rows = x.reshape(-1, x.shape[-1])  # [M, D]
        router = make_dense(experts.count, self.config.mlp_bias, self.dtype, "router")
        logits = router(rows[None])[0]  # [M, E]; `make_dense` needs inputs [B, T, K]
        # For the balance loss, training makes the collection "router" mutable and reads
        # the logits from it.
        self.sow("router", "logits", logits)
        weights, chosen = choose_experts(logits, experts)  # [M, C] each
        mlps = ExpertMLPs(self.config, self.dtype, name="experts")
        mixed = mix_experts(mlps, rows, weights, chosen, experts).reshape(x.shape)
        if experts.shared_width:
            mixed += self._apply_shared(x, experts)
        return mixed.astype(x.dtype)

    def _apply_shared(self, x: Array, experts: Experts) -> Float[Array, "B T D"]:
        """Returns the output of the MLP that processes all tokens, with its gate."""
        settings = self.config, experts.shared_width, self.dtype
        y = name_product(DenseMLP(*settings, name="shared_expert")(x))
        gate = make_dense(1, False, self.dtype, "shared_expert_gate")
        gate = name_product(gate(x)).astype(jnp.float32)
        return nn.sigmoid(gate) * y.astype(jnp.float32)

    @staticmethod
    def tensor_names(
        config: DecoderConfig, kind: LayerKind
    ) -> dict[str, str | ql.io.Entry]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        experts = config.experts
        assert experts is not None
        hf_names = experts.names or experts.kernels
        tensors = {"router": f"{experts.router}.weight"}
        for kernel, hf_name in zip(experts.kernels, hf_names, strict=True):
            tensors[f"experts/{kernel}"] = experts.kernel.replace("NAME", hf_name)
        entries = {}
        for path, tensor in tensors.items():
            # In transformers, the kernels of all experts are one parameter, in which
            # gate and up are joined. The router is another parameter. By default,
            # adapters target linear layers, but not such plain parameters. Their module
            # is `mlp`, even in Mixtral, whose files call it `block_sparse_moe`.
            parameter = path.replace("/", ".")
            parameter = re.sub(r"\.(gate|up)_proj", ".gate_up_proj", parameter)
            if path == "router":
                parameter = f"{experts.router.rpartition('.')[2]}.weight"
            entries[f"{path}/kernel"] = ql.io.Entry(
                tensor, parameter=f"mlp.{parameter}"
            )
            if config.mlp_bias:  # as in gpt-oss
                # The biases of all experts are one tensor. It has the name of the
                # kernels' tensor, before ".{expert}", and the suffix "_bias".
                bias = re.sub(r"\.\{expert\}$", "_bias", tensor)
                entries[f"{path}/bias"] = re.sub(r"\.weight$", ".bias", bias)
        if experts.shared_width:
            shared = "shared_expert"
            for path, tensor in DenseMLP.tensor_names(config, kind).items():
                entries[f"{shared}/{path}"] = re.sub(r"^mlp", f"mlp.{shared}", tensor)
            entries[f"{shared}_gate/kernel"] = f"mlp.{shared}_gate.weight"
        return entries


# The path of each norm, and its name in the Hugging Face model.
_NORMS = {
    "dense_input_norm": "pre_feedforward_layernorm",
    "dense_output_norm": "post_feedforward_layernorm_1",
    "experts_input_norm": "pre_feedforward_layernorm_2",
    "experts_output_norm": "post_feedforward_layernorm_2",
}


class MLPWithExperts(nn.Module):
    """An MLP and a mixture of experts in the same layer (Gemma 4 26B-A4B).

    Both read the residual stream, each through its own norm. Their outputs are
    normalized separately and added. The router also has its own norm.
    """

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


def mix_experts(
    mlps: Callable[[Array, Array], Array],
    rows: Float[Array, "M D"],
    weights: Float[Array, "M C"],
    chosen: Int[Array, "M C"],
    experts: Experts,
) -> Float[Array, "M D"]:
    """Returns the weighted sum of each token's experts, in float32.

    `mlps` applies each expert's MLP to its group of rows, like `ExpertMLPs`. `weights`
    and `chosen` are what `choose_experts` returned.
    """
    # There is a row for each pair of a token and one of its experts, sorted by expert.
    order = jnp.argsort(chosen.reshape(-1))
    group_sizes = jnp.bincount(chosen.reshape(-1), length=experts.count)  # [E]
    y = mlps(rows[order // experts.per_token], group_sizes.astype(jnp.int32))
    # Put the rows back into the order of the tokens: [M, C, D].
    y = name_product(y[jnp.argsort(order)]).reshape(*chosen.shape, -1)
    return jnp.einsum("mcd,mc->md", y.astype(jnp.float32), weights)


@jax.custom_vjp
def split_alternating(x: Float[Array, "M both"]) -> tuple[Array, Array]:
    """Returns the columns with even indices, and those with odd indices."""
    return x[:, ::2], x[:, 1::2]


# The gradient interleaves the columns of the two cotangents. JAX's own gradient would
# pad between the columns, and XLA's compiler for TPUs needed more than 20 GB of memory
# for this padding (5,760 columns, JAX 0.12.0.1).
split_alternating.defvjp(
    lambda x: (split_alternating(x), None),
    lambda _, g: (jnp.stack(g, axis=-1).reshape(len(g[0]), -1),),
)


def balance_loss(
    logits: Float[Array, "L M E"], weights: Float[Array, " M"], experts: Experts
) -> Float[Array, ""]:
    """Returns the loss that balances the loads of experts, as in transformers.

    This is the loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6), with
    means over all layers at once. It is `experts.per_token` if all experts process
    equally many tokens. `weights` are 1 for a token, and 0 for padding.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = lax.top_k(probabilities, experts.per_token)  # [L, M, C]
    loads = jnp.sum(jax.nn.one_hot(chosen, experts.count), axis=2)
    # The means over all tokens of all layers, [E].
    total = jnp.sum(weights) * len(logits)
    mean_load, mean_probability = (
        jnp.einsum("lme,m->e", x, weights) / total for x in (loads, probabilities)
    )
    return experts.count * jnp.sum(mean_load * mean_probability)


def choose_experts(
    logits: Float[Array, "M E"], experts: Experts
) -> tuple[Float[Array, "M C"], Int[Array, "M C"]]:
    """Returns the weights of each token's experts, and the indices of these experts.

    The weights are a softmax over the chosen experts if they are normalized, and
    otherwise over all experts.
    """
    logits = logits.astype(jnp.float32)
    largest, chosen = lax.top_k(logits, experts.per_token)
    if experts.normalized:
        return jax.nn.softmax(largest, axis=-1), chosen
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(largest - total), chosen
