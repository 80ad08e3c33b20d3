"""PEFT's adapters, one for each weight, to and from those of a stack of weights.

A stack has one rank. An adapter of a smaller rank is padded with zero columns of A and
zero rows of B, which get no gradient and so stay zero.
"""

from collections.abc import Mapping
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
) -> LoRA:
    """Returns the adapter of a kernel from those of its weights.

    Args:
        kernel: The kernel.
        factors: The adapters by batch index; weights without one get zeros.
        dropout: Rate of dropout on the adapter's input.
        dtype: Dtype of A and B; None for that of the factors.

    Raises:
        ValueError: If the factors differ in dtype and none is given.
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
    a, b = np.zeros((*batch, k, rank), dtype), np.zeros((*batch, rank, n), dtype)
    for index, one in factors.items():
        r = len(one.a)
        a[index][:, :r] = one.a.T
        b[index][:r] = one.b.T
    # That of a weight without an adapter counts for nothing.
    common = next(iter(factors.values())).scaling
    each = [factors[i].scaling if i in factors else common for i in np.ndindex(*batch)]
    scaling = common if set(each) == {common} else tuple(each)
    a, b = jnp.asarray(a), jnp.asarray(b)
    return LoRA(a, b, scaling, float(dropout), kernel.geometry)


def unstack(lora: LoRA, index: tuple[int, ...], rank: int) -> Factors:
    """Returns the adapter of one weight of a stack.

    Args:
        lora: The stack's adapter, of NumPy arrays.
        index: Which weight.
        rank: Its rank; 0 if it has no adapter.

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
    a, b = np.ascontiguousarray(a[:, :rank].T), b[:rank].T.copy()
    return Factors(a, b, lora.scaling_at(index))


def _sizes(kernel: Kernel) -> tuple[tuple[int, ...], int, int]:
    *batch, k, n = kernel.geometry.matrix_shape(kernel.shape)
    return tuple(batch), k, n
