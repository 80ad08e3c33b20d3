"""Merges an adapter into a base, packs the sum, and measures what packing changes."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from ..open_model import OpenModel


@dataclass(frozen=True)
class Repacked:
    """The cost of merging an adapter into packed weights.

    An error is what packing changes in the merged kernels. Errors and the adapter's
    change are measured by their Frobenius norm, divided by that of the merged kernels.

    Attributes:
        error: The error of all packed kernels together.
        change: How much the adapter changed all these kernels together.
        kept: The share of the adapter's change that survives packing: the total change,
            from the base to the packed kernels, projected onto the adapter's change, as
            a fraction of the adapter's change. If the error is much larger than this
            change, the share can be far below 0 or above 1.
    """

    error: float
    change: float
    kept: float

    def __str__(self):
        return (
            f"packing changed the merged weights by {self.error:.2%}\n"
            f"the adapter had changed them by {self.change:.2%}, of which "
            f"{_describe_share(self.kept)} is left"
        )


def _describe_share(share: float) -> str:
    return "none" if share <= 0 else f"{share:.0%}"


def repack(model: OpenModel, packing: ql.QLoRAConfig) -> tuple[PyTree, Repacked]:
    """Returns the base with the adapter merged and then packed, and what this costs."""
    merged = ql.merge(model.base, model.lora)
    packed = ql.quantize(merged, packing)
    cost = _compare(*map(leaves_by_path, (model.base, merged, packed)))
    if cost.kept < 0.5:
        message = (
            f"Packing keeps {_describe_share(cost.kept)} of what the adapter changed. "
            "Serve the adapter with the base, or train it with `merge_aware`. If the "
            "model is already in 4 bits, its weights round back to their old values "
            "after a small change, so merge into the float model instead."
        )
        warnings.warn(message, UserWarning, stacklevel=2)
    return packed, cost


def _compare(
    base: Mapping[str, Any], merged: Mapping[str, Any], packed: Mapping[str, Any]
) -> Repacked:
    """Compares the packed kernels with the merged ones, given leaves by path."""
    paths = [path for path, leaf in packed.items() if ql.is_packed(leaf)]
    sums = [_sum_products(base[p], merged[p], packed[p]) for p in paths]
    sums = np.asarray(jax.device_get(sums), np.float64)  # [kernels, 4]
    error, change, norm, product = sums.sum(0)
    norm = max(norm, 1e-30)  # no division by 0
    return Repacked(
        error=float(np.sqrt(error / norm)),
        change=float(np.sqrt(change / norm)),
        # The adapter changes the base by C, and packing adds the error E. Projecting
        # C + E onto C gives C times <C + E, C> / <C, C>, which is 1 + <E, C> / <C, C>.
        kept=float(1 + product / change) if change else 1.0,
    )


@jax.jit
def _sum_products(base: PyTree, merged: PyTree, packed: PyTree) -> Float32[Array, "4"]:
    """Returns |error|^2, |change|^2, |merged|^2 and <error, change> of a kernel."""
    arrays = (ql.dequantize(x).astype(jnp.float32) for x in (base, merged, packed))
    base, merged, packed = arrays
    error, change = packed - merged, merged - base
    pairs = (error, error), (change, change), (merged, merged), (error, change)
    return jnp.stack([jnp.sum(x * y) for x, y in pairs])
