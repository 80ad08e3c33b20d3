"""PEFT's adapters, one for each weight, to and from those of a stack of weights.

A stack has one rank and one scaling. An adapter of a smaller rank is padded with zero
columns of A and zero rows of B, which get no gradient and so stay zero. Scalings that
differ go into B, relative to the smallest one: powers of two change no digit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ...adapters.lora import LoRA
from ...quant.kernel import Kernel


class Factors(NamedTuple):
    """The adapter of one weight, as PEFT has it.

    Attributes:
        a: `[r, K]`.
        b: `[N, r]`.
        scaling: Multiplier of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float


def stack(
    kernel: Kernel,
    factors: Mapping[tuple[int, ...], Factors],
    *,
    dropout: float,
    dtype: Any,
    allow_rounding: bool,
) -> LoRA:
    """Returns the adapter of a kernel from those of its weights.

    Args:
        kernel: The kernel.
        factors: The adapters by batch index; weights without one get zeros.
        dropout: Rate of dropout on the adapter's input.
        dtype: Dtype of A and B; None for that of the factors.
        allow_rounding: Whether B may be rounded where scalings differ.

    Raises:
        ValueError: If the factors differ in dtype and none is given, or if scalings
            differ so that B would be rounded.
    """
    batch, k, n = _sizes(kernel)
    rank = max(len(f.a) for f in factors.values())
    dtypes = {x.dtype for f in factors.values() for x in (f.a, f.b)}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            "A and B of one stack must have one dtype; say which in `dtype`. Got "
            f"{sorted(map(str, dtypes))}."
        )
    dtype = jnp.dtype(dtypes.pop() if dtype is None else dtype)
    scalings = sorted({f.scaling for f in factors.values()})
    common = common_scaling(scalings)
    is_exact = all(math.frexp(_ratio(s, common))[0] == 0.5 for s in scalings)
    a, b = np.zeros((*batch, k, rank), dtype), np.zeros((*batch, rank, n), dtype)
    for index, one in factors.items():
        r = len(one.a)
        a[index][:, :r] = one.a.T
        own = one.b.T.astype(dtype)
        b[index][:r] = _times(own, one.scaling, common)
        is_exact &= np.array_equal(_times(b[index][:r], common, one.scaling), own)
    if not is_exact and not allow_rounding:
        raise ValueError(
            "scalings of one stack must differ by powers of two: they are kept in B, "
            f"which others would round. Got {scalings}. Set `allow_rounding` to accept "
            "an error of one unit in the last place."
        )
    a, b = jnp.asarray(a), jnp.asarray(b)
    return LoRA(a, b, common, float(dropout), kernel.geometry)


def common_scaling(scalings: Sequence[float]) -> float:
    """Returns the scaling of a stack whose weights have these: the smallest.

    Example:
        >>> common_scaling([2.0, 4.0])
        2.0
    """
    return min(scalings)


def unstack(lora: LoRA, index: tuple[int, ...], rank: int, scaling: float) -> Factors:
    """Returns the adapter of one weight of a stack.

    Args:
        lora: The stack's adapter, of NumPy arrays.
        index: Which weight.
        rank: Its rank; 0 if it has no adapter.
        scaling: Its scaling.

    Raises:
        ValueError: If the stack's rank is smaller, or what is cut off is not zero.
    """
    a, b = lora.a[index], lora.b[index]
    if rank > a.shape[-1]:
        raise ValueError(f"its rank must be at least {rank}. Got {a.shape[-1]}.")
    if a[:, rank:].any() or b[rank:].any():
        raise ValueError(
            f"A and B must be zero beyond rank {rank}, its rank in the config."
        )
    b = _times(b[:rank], lora.scaling, scaling)
    return Factors(np.ascontiguousarray(a[:, :rank].T), b.T.copy(), scaling)


def _sizes(kernel: Kernel) -> tuple[tuple[int, ...], int, int]:
    *batch, k, n = kernel.geometry.matrix_shape(kernel.shape)
    return tuple(batch), k, n


def _ratio(scaling: float, common: float) -> float:
    # Products multiply by a float32 scaling.
    return float(np.float32(scaling)) / float(np.float32(common))


def _times(b: np.ndarray, scaling: float, common: float) -> np.ndarray:
    """Returns `b * (scaling / common)`, rounded once to its own dtype."""
    ratio = _ratio(scaling, common)
    with np.errstate(over="ignore", under="ignore"):
        return b if ratio == 1 else (b.astype(np.float64) * ratio).astype(b.dtype)
