"""The definition of the product: dequantize, then dot.

Every other back end must equal this one. Back ends take plain arrays and static
settings (`Weights`), never a QTensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from ...quant.blockwise import dequantize_blocks, select_values
from ...quant.formats import get_format
from ...quant.qtensor import round_to


@dataclass(frozen=True)
class Weights:
    """What a back end must know of the packed weights besides their arrays.

    Attributes:
        fmt: Name of the number format.
        block_size: Rows that share a scale.
        k: Rows of the matrix.
        dtype_name: The logical dtype, to which a weight is rounded first.
    """

    fmt: str
    block_size: int
    k: int
    dtype_name: str


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype in which products of `dtype` are summed: float32, or float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(x: Any, w: Any, *, transpose: bool, precision: Any) -> Array:
    """Returns `x @ w` (or `x @ w^T`) over matching batch axes, summed in float32.

    A constant may be a NumPy array here.
    """
    batch = tuple(range(w.ndim - 2))
    contract = w.ndim - 1 if transpose else w.ndim - 2
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (contract,)), (batch, batch)),
        precision=precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )


def decode(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    weights: Weights,
    k: int,
    dtype: Any,
    look_up: Callable = select_values,
    round_to: Callable = round_to,
) -> Float[Array, "*batch k n"]:
    """Returns the weights in `dtype`, rounded to their logical dtype first."""
    fmt, block_size = get_format(weights.fmt), weights.block_size
    w = dequantize_blocks(codes, scales, fmt, block_size, k, look_up)
    return round_to(w, jnp.dtype(weights.dtype_name), dtype)


def product(
    x: Float[Array, "*batch m contracted"],
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    weights: Weights,
    *,
    transpose: bool = False,
    precision: Any = None,
) -> Float[Array, "*batch m outputs"]:
    """Returns `x @ W`, or `x @ W^T` (x then being `[*batch, m, n]`).

    The result has the dtype of `x`; sums are float32.
    """
    w = decode(codes, scales, weights, weights.k, x.dtype)
    y = dot(x, w, transpose=transpose, precision=precision)
    return y.astype(x.dtype)
