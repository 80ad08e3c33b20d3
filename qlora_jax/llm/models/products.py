"""Products with float32 accumulation, and the linear layers and norms of a decoder."""

import functools
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .config import DecoderConfig


def einsum_f32(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    """Returns `jnp.einsum(spec, a, b)` in float32; gradients sum in float32 too."""
    # A wrapper with types: pyright loses those of a custom VJP with static arguments.
    return _einsum(spec, a, b)


# Autodiff would multiply a float32 cotangent by a bfloat16 operand, which hardware with
# bfloat16 matrix units cannot do fast. The VJP casts the cotangent first.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec, a, b) -> Array:
    def multiply(a: Array) -> Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def multiply_two_rows(a: Array) -> Array:
        padded = jnp.concatenate([a, jnp.zeros_like(a)], -2)  # [..., 2, K]
        return multiply(padded)[..., :1, :]

    # A row of zeros (see below) can be added along axis -2 of `a`, unless `b` has it.
    left, right, _ = re.split(",|->", spec)
    is_row = math.prod(a.shape[:-1]) == 1 and left[-2] not in right
    if a.dtype.itemsize > 2 or not is_row:
        return multiply(a)
    # To multiply a single row, XLA on CPUs converts the whole matrix to float32, which
    # takes up to ten times as long as multiplying two rows. So add a row of zeros.
    return lax.platform_dependent(a, cpu=multiply_two_rows, default=multiply)


def _einsum_fwd(spec, a, b):
    return _einsum(spec, a, b), (a, b)


# An einsum sums a * b over the letters that its output lacks. The gradient for a sums
# g * b over the letters that a lacks, which is an einsum whose output has the letters
# of a. The gradient for b sums a * g in the same way.
def _einsum_bwd(spec, residuals, g):
    a, b = residuals
    inputs, output = spec.split("->")
    left, right = inputs.split(",")
    g = g.astype(a.dtype)
    da = einsum_f32(f"{output},{right}->{left}", g, b)
    db = einsum_f32(f"{left},{output}->{right}", a, g)
    return da.astype(a.dtype), db.astype(b.dtype)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


class _DenseDot:
    """Multiplies `[B, T, K] @ [K, N]` in `x.dtype`: the `dot_general` of `nn.Dense`."""

    is_plain_product = True  # a packed product may take its place

    def __call__(self, x, kernel, dims, precision=None, **unused):
        del dims, precision, unused  # `nn.Dense` always contracts the last axis of x
        return einsum_f32("btk,kn->btn", x, kernel).astype(x.dtype)


_dense_dot = _DenseDot()


def make_dense(features: int, use_bias: bool, dtype: DTypeLike, name: str) -> nn.Dense:
    """Returns a linear layer for inputs `[B, T, K]`, whose product is `einsum_f32`."""
    return nn.Dense(features, use_bias, dtype, dot_general=_dense_dot, name=name)


def linear_names(module: str, has_bias: Mapping[str, bool]) -> dict[str, str]:
    """Returns the Hugging Face names of linear layers and their biases, by path."""
    names = {}
    for name, is_biased in has_bias.items():
        names[f"{name}/kernel"] = f"{module}.{name}.weight"
        if is_biased:
            names[f"{name}/bias"] = f"{module}.{name}.bias"
    return names


def apply_gate(config: DecoderConfig, gate: Array, up: Array) -> Array:
    """Returns `activation(gate) * up`, computed in float32."""
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if config.activation == "clamped_swiglu":
        # gpt-oss fixes these constants: `swiglu_limit` is 7, `swiglu_alpha` 1.702.
        gate, up = jnp.minimum(gate, 7), 1 + jnp.clip(up, -7, 7)
        return (gate * nn.sigmoid(1.702 * gate) * up).astype(dtype)
    return (activate(config, gate) * up).astype(dtype)


def activate(config: DecoderConfig, x: Array) -> Array:
    """Returns the activation of an array."""
    # Flax's gelu is the tanh approximation by default.
    return {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}[config.activation](x)


def name_product(x: Array) -> Array:
    """Names a layer's product, so that `keep_products` saves it."""
    return checkpoint_name(x, "product")


# Layers save their products for the backward pass, which recomputes norms and
# activations: the float32 arrays of norms and activations would be most of a step's
# memory, and would take longer to write and read than to compute.
# The names with "lora" and "dora" are those of the products of adapters. "attention"
# names what `ql.memory.splash_attention` needs in its backward pass.
keep_products = jax.checkpoint_policies.save_only_these_names(
    "product", "lora_product", "dora_product", "dora_norms", "attention"
)


class UnitOffsetRMSNorm(nn.Module):
    """Root-mean-square norm times `1 + scale`, computed in float32."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Normalizes the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        # Expand explicitly, as `jax_numpy_rank_promotion` may be set to "raise".
        scale = jnp.expand_dims(1 + scale.astype(jnp.float32), range(x.ndim - 1))
        return (x / jnp.sqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


def make_norm(config: DecoderConfig, dtype: DTypeLike, name: str) -> nn.Module:
    """Returns a norm layer of the kind that the decoder uses."""
    norm = UnitOffsetRMSNorm if config.unit_offset_norms else nn.RMSNorm
    return norm(epsilon=config.rms_norm_eps, dtype=dtype, name=name)
