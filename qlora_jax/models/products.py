"""Products, accumulated in float32, and the layers made of them; norms."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .config import DecoderConfig


def einsum_f32(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    """Returns `jnp.einsum(spec, a, b)` in float32; gradients sum in float32 too."""
    return _einsum(spec, a, b)


# Autodiff would multiply a float32 cotangent by a bfloat16 operand, which hardware with
# bfloat16 matrix units cannot do fast. The VJP casts the cotangent first.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec, a, b) -> Any:
    multiply = lambda a: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    left, right, _ = re.split(",|->", spec)
    is_row = math.prod(a.shape[:-1]) == 1 and left[-2] not in right
    if a.dtype.itemsize > 2 or not is_row:
        return multiply(a)
    # XLA on CPUs converts the whole matrix to float32 for a single row, which takes up
    # to ten times as long as the product of two rows: the second has zeros.
    two_rows = lambda a: jnp.concatenate([a, jnp.zeros_like(a)], -2)
    on_cpu = lambda a: multiply(two_rows(a))[..., :1, :]
    return lax.platform_dependent(a, cpu=on_cpu, default=multiply)


def _einsum_fwd(spec, a, b):
    return _einsum(spec, a, b), (a, b)


# y sums a * b over the letters that it lacks. So the gradient of a sums g * b over
# those that a lacks: an einsum whose output is a's letters; and likewise for b.
def _einsum_bwd(spec, residuals, g):
    a, b = residuals
    ins, out = spec.split("->")
    left, right = ins.split(",")
    g = g.astype(a.dtype)
    da: Any = _einsum(f"{out},{right}->{left}", g, b)
    db: Any = _einsum(f"{left},{out}->{right}", a, g)
    return da.astype(a.dtype), db.astype(b.dtype)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def dense_dot(x, kernel, dims, precision=None, **unused):
    """The `dot_general` of `nn.Dense`: `[B, T, K] @ [K, N]`, in `x.dtype`."""
    del dims, precision, unused
    return einsum_f32("btk,kn->btn", x, kernel).astype(x.dtype)


def make_dense(features: int, use_bias: bool, dtype: Any, name: str) -> nn.Dense:
    """Returns a linear layer that multiplies by `dense_dot`."""
    return nn.Dense(features, use_bias, dtype, dot_general=dense_dot, name=name)


def gated(config: DecoderConfig, gate: Array, up: Array) -> Array:
    """Returns `activation(gate) * up`, computed in float32."""
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if config.activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, 7), 1 + jnp.clip(up, -7, 7)
        return (gate * nn.sigmoid(1.702 * gate) * up).astype(dtype)
    activate = nn.silu if config.activation == "silu" else nn.gelu  # gelu: by tanh
    return (activate(gate) * up).astype(dtype)


def keep(x: Array) -> Array:
    """Names a layer's product, which `keep_products` saves."""
    return checkpoint_name(x, "product")


# Layers save their products for the backward pass. Norms and activations are computed
# again: their float32 arrays would be most of a step's memory, and take longer to write
# and read than to compute.
# "attention" is what `ql.memory.splash_attention` needs in its backward pass.
keep_products = jax.checkpoint_policies.save_only_these_names(
    "product", "lora_product", "dora_product", "dora_norms", "attention"
)


class UnitOffsetRMSNorm(nn.Module):
    """Root-mean-square norm times `1 + scale`, computed in float32."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Returns the normalized last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = jnp.expand_dims(1 + scale.astype(jnp.float32), range(x.ndim - 1))
        return (x / jnp.sqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


def make_norm(config: DecoderConfig, dtype: Any, name: str) -> nn.Module:
    """Returns the norm that a decoder uses."""
    kind = UnitOffsetRMSNorm if config.unit_offset_norms else nn.RMSNorm
    return kind(epsilon=config.rms_norm_eps, dtype=dtype, name=name)
