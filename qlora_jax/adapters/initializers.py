"""Adapter initializers.

An *initializer* maps a key, a kernel (in float or packed) and settings to an adapter
and its kernel. It may move part of the weights of a float kernel into the adapter.
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
    """The settings of one adapter."""

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
    al. 2015), PEFT's default. `matrix_shape` is `(*batch, K, N)`.
    """
    *batch, k, n = matrix_shape
    bound = 1 / max(k, 1) ** 0.5
    a = jax.random.uniform(key, (*batch, k, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*batch, rank, n), dtype)
    return LoRA(a.astype(dtype), b, scaling, float(dropout), geometry)
