"""Merges an adapter into a model in 4 bits, and measures what that costs."""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

import qlora_jax as ql

from .base_model import BaseModel
from .scoring import Score


@dataclass(frozen=True)
class Repacked:
    """What packing the merged weights changed.

    Errors are Frobenius norms over those of the merged kernels.

    Attributes:
        error: Of the packed kernels, all together.
        worst_error: Of the kernel with the largest one.
        worst_kernel: Its path.
        change: What the adapter had changed, all together.
        kept: The share of that change which is left: the change of the packed kernels
            along it.
        loss_before: With data, the loss of the model with the adapter, not merged.
        loss_beside: That of the packed model with the adapter, not merged.
        loss_after: That of the merged and packed model.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Repacked(0.0936, 0.0984, "up/kernel", change=0.0128, kept=0.99))
        packing changed the merged weights by 9.36% (up/kernel by 9.84%)
        the adapter had changed them by 1.28%, of which 99% is left
    """

    error: float
    worst_error: float
    worst_kernel: str
    change: float
    kept: float
    loss_before: float | None = None
    loss_beside: float | None = None
    loss_after: float | None = None

    def __str__(self):
        lines = [
            f"packing changed the merged weights by {self.error:.2%} "
            f"({self.worst_kernel} by {self.worst_error:.2%})",
            f"the adapter had changed them by {self.change:.2%}, of which "
            f"{self.kept:.0%} is left",
        ]
        if self.loss_before is not None:
            lines += [
                f"loss with the adapter {self.loss_before:.6f}, beside the packed base "
                f"{self.loss_beside:.6f}, merged and packed {self.loss_after:.6f}"
            ]
        return "\n".join(lines)


def repack(
    model: BaseModel,
    packing: "ql.QLoRAConfig | None",
    score: Callable[[Any, Any], Score] | None,
) -> tuple[Any, Repacked]:
    """Returns the base with the adapter merged and its kernels packed, and the cost.

    `score`, if there are data, gives the score of a base and a lora tree.
    """
    assert packing is not None
    merged = ql.merge(model.base, model.lora)
    packed = ql.quantize(merged, packing)
    found = _compare(*map(ql.leaves_by_path, (model.base, merged, packed)))
    if found.kept < 0.5:
        lost = (
            f"packing keeps {found.kept:.0%} of what the adapter changed: weights that "
            "are in 4 bits already go back to the values that they had. Merge into the "
            "float model, or serve the adapter beside the base."
        )
        warnings.warn(lost, UserWarning, stacklevel=2)
    if score is None:
        return packed, found
    del merged
    alone = ql.quantize(ql.dequantize(model.base), packing)
    losses = {
        "loss_before": score(model.base, model.lora).loss,
        "loss_beside": score(alone, model.lora).loss,
        "loss_after": score(packed, {}).loss,
    }
    return packed, dataclasses.replace(found, **losses)


def _compare(base: dict, merged: dict, packed: dict) -> Repacked:
    """Compares the packed kernels with the merged ones; leaves are by path."""
    paths = [path for path, leaf in packed.items() if isinstance(leaf, ql.QTensor)]
    each = [_sums(base[p], merged[p], packed[p]) for p in paths]
    sums = np.asarray(jax.device_get(each), np.float64)
    error, change, norm, product = sums.sum(0)
    errors = np.sqrt(sums[:, 0] / np.maximum(sums[:, 2], 1e-30))
    worst, norm = int(np.argmax(errors)), max(norm, 1e-30)
    return Repacked(
        error=float(np.sqrt(error / norm)),
        worst_error=float(errors[worst]),
        worst_kernel=paths[worst],
        change=float(np.sqrt(change / norm)),
        kept=float(1 + product / change) if change else 1.0,
    )


@jax.jit
def _sums(base: Any, merged: Any, packed: Any) -> Float32[Array, "4"]:
    """Sums of squares: error, change, merged weights; and of error times change."""
    floats = lambda x: ql.dequantize(x).astype(jnp.float32)
    base, merged, packed = map(floats, (base, merged, packed))
    error, change = packed - merged, merged - base
    pairs = (error, error), (change, change), (merged, merged), (error, change)
    return jnp.stack([jnp.sum(x * y) for x, y in pairs])
