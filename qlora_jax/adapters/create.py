"""Creates the adapters that a config describes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..quant.kernel import Kernel
from ..quant.views import take_rows
from .base import Adapter, ProductCall
from .config import QLoRAConfig
from .dora import DoRA, column_norms
from .lora import SETTINGS, LoRA
from .merge_aware import MergeAware
from .trained import TrainedRows, new_trained


def new_adapter(key: Array, kernel: Kernel, config: QLoRAConfig, path: str) -> Adapter:
    """Returns a new adapter, with which a leaf of the base tree keeps its values.

    The leaf is a target of LoRA, or is trained in full or by rows. `key` is only used
    for a target.
    """
    if rows := config.rows_of(path):

        def take(table: Kernel) -> Array:
            return take_rows(table, jnp.array(rows))

        for _ in kernel.shape[:-2]:  # a stack of tables
            take = jax.vmap(take)
        values = lax.stop_gradient(take(kernel))
        dtype = jnp.promote_types(values.dtype, config.lora_dtype)
        return TrainedRows(values.astype(dtype), rows)
    if config.is_trained(path):
        return new_trained(kernel.value, config.lora_dtype)
    return _new_low_rank(key, kernel, config, path)


def _new_low_rank(
    key: Array, kernel: Kernel, config: QLoRAConfig, path: str
) -> Adapter:
    """Returns a new LoRA, MergeAware or DoRA of a kernel of the base tree.

    A is drawn from `U(-1/sqrt(K), 1/sqrt(K))`: Kaiming-uniform with a = sqrt(5) (He et
    al. 2015), PEFT's default. B is zero. Magnitudes start as the norms of the columns.
    """
    *batch, k, n = kernel.matrix_shape
    rank, scaling = config.rank_of(path), config.scaling_of(path)
    # 1. Initial A [*batch, K, r] and B [*batch, r, N].
    bound, dtype = 1 / max(k, 1) ** 0.5, config.lora_dtype
    a = jax.random.uniform(key, (*batch, k, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*batch, rank, n), dtype)
    if (packing := config.merged_packing(kernel.packing)) is not None:
        packing.check_rows(k)
        settings = scaling, 0.0, kernel.geometry, packing
        return MergeAware(a.astype(dtype), b, *settings)
    lora = LoRA(a.astype(dtype), b, scaling, config.dropout, kernel.geometry)
    if not config.use_dora:
        return lora
    # 2. The magnitudes of a DoRA.
    dtype = jnp.promote_types(dtype, jnp.float32)
    norms = functools.partial(column_norms, call=ProductCall(), dtype="float32")
    m = jax.jit(norms)(lora, kernel).astype(dtype)
    return DoRA(**lora.arrays, m=m, **{name: getattr(lora, name) for name in SETTINGS})
