"""How A and B start.

An *initializer* maps a PRNG key, a kernel (in float, or packed already) and the
adapter's settings to the adapter and the kernel that it belongs to. An initializer that
moves part of the weights into the adapter returns a changed float kernel; others return
the one that they were given. Weights are packed afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from .config import QLoRAConfig
from .lora import LoRA


@dataclass(frozen=True)
class AdapterSettings:
    """What a config says of one adapter.

    Attributes:
        rank: The rank r.
        scaling: Multiplier of the product.
        dropout: Rate of dropout on the adapter's input.
        dtype: Dtype of A and B.
    """

    rank: int
    scaling: float
    dropout: float = 0.0
    dtype: Any = "float32"

    @classmethod
    def of(cls, config: QLoRAConfig, path: str) -> "AdapterSettings":
        """Returns the settings of the adapter at `path`."""
        rank, scaling = config.rank_of(path), config.scaling_of(path)
        return cls(rank, scaling, config.dropout, config.lora_dtype)


Initializer = Callable[[Any, Kernel, AdapterSettings], tuple[LoRA, Kernel]]


def kaiming_uniform(
    key: Any, kernel: Kernel, settings: AdapterSettings
) -> tuple[LoRA, Kernel]:
    """Returns an adapter that adds nothing yet (see `init_lora`), and the kernel."""
    geometry = kernel.geometry
    lora = init_lora(
        key,
        geometry.matrix_shape(kernel.shape),
        geometry,
        rank=settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
        dtype=settings.dtype,
    )
    return lora, kernel


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
