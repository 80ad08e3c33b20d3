"""How A and B start."""

from typing import Any

import jax
import jax.numpy as jnp

from ..quant.geometry import Geometry
from .lora import LoRA


def init_lora(
    key: Any,
    matrix_shape: tuple[int, ...],
    geometry: Geometry,
    *,
    rank: int,
    scaling: float,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> LoRA:
    """Returns an adapter that adds nothing yet: B zero, A Kaiming-uniform.

    A is drawn from `U(-1/sqrt(K), 1/sqrt(K))`: Kaiming-uniform with a = sqrt(5) (He et
    al. 2015), PEFT's default.

    Args:
        key: PRNG key.
        matrix_shape: `(*batch, K, N)` of the kernel.
        geometry: How the kernel's axes map to that.
        rank: The rank r.
        scaling: Multiplier of the product.
        dropout: Rate of dropout on the adapter's input.
        dtype: Dtype of A and B.
    """
    *batch, k, n = matrix_shape
    bound = 1 / max(k, 1) ** 0.5
    a = jax.random.uniform(key, (*batch, k, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*batch, rank, n), dtype)
    return LoRA(a.astype(dtype), b, scaling, float(dropout), geometry)
