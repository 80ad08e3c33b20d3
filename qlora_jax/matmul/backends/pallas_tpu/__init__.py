"""The fused TPU kernel: `x @ W` and `g @ W.T` from packed codes, W never in HBM.

A weight `[K, N]` is stored as `codes`, uint8 `[K/2, N]` (row 2i in the high nibble;
int8: `[K, N]`), and `scales`, float32 `[K/B, N]`. Arrays and static values only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import kernel
from .chips import CHIPS, chip_at_hand
from .plan import Plan, plan

__all__ = ["CHIPS", "can_serve", "chip_at_hand", "product"]


def can_serve(
    m: int,
    rows: int,
    cols: int,
    dtype: Any,
    *,
    fmt: str,
    block_size: int,
    transpose: bool = False,
    decode: str = "select",
    vmem_mib: int = 48,
) -> str | None:
    """Says why `product` would refuse, or None when it would not.

    Args:
        m: Rows of the left operand.
        rows: Rows `K` of the weight.
        cols: Columns `N` of the weight.
        dtype: The left operand's dtype.
        fmt: Format of the codes.
        block_size: Rows of the weight that share a scale.
        transpose: Whether the product is with the transposed weight.
        decode: How codes become weights: "shuffle", "sublane" or "select".
        vmem_mib: VMEM that blocks may take, in MiB.

    Example:
        >>> can_serve(16, 4096, 512, "bfloat16", fmt="nf4", block_size=64)
        >>> can_serve(16, 4096, 512, "bfloat16", fmt="nf4", block_size=48)
        '`block_size` must be 32 or a multiple of 64. Got 48.'
    """
    found = plan(
        m,
        rows,
        cols,
        jnp.dtype(dtype),
        fmt=fmt,
        block_size=block_size,
        transpose=transpose,
        form=decode,
        vmem=vmem_mib * 2**20,
    )
    return found if isinstance(found, str) else None


@functools.partial(
    jax.jit,
    static_argnames=(
        "fmt",
        "block_size",
        "transpose",
        "decode",
        "vmem_mib",
        "interpret",
    ),
)
def product(
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array | None = None,
    *,
    fmt: str,
    block_size: int,
    transpose: bool = False,
    decode: str = "select",
    vmem_mib: int = 48,
    interpret: Any = False,
) -> Array:
    """Returns `x @ W`, or `x @ W.T`, from the packed codes of `W`.

    Args:
        x: `[M, K]`, or `[M, N]` with `transpose`; bfloat16 or float32. With a batch of
            weights, such as experts, `[E, M, .]`.
        codes: uint8 `[K/2, N]` (int8: `[K, N]`), after an axis `E` if `x` has one, and
            before all else an axis `L` if `layer` is given.
        scales: float32 `[K/B, N]`, after an axis `E` if `x` has one: those of the
            weight that is taken.
        layer: Which of the `L` weights to take, an int32 scalar. The kernel reads that
            weight where it lies: nothing is sliced out of the stack.
        fmt: Format of the codes: "nf4", "fp4", "int4" or "int8".
        block_size: Rows of the weight that share a scale.
        transpose: Whether to multiply by the transposed weight.
        decode: How codes become weights: "shuffle" (v6e, tpu7x), "sublane" (v4, v5e,
            v5p) or "select" (anywhere); all give the same weights.
        vmem_mib: VMEM that blocks may take, in MiB: 96 suits v5e and v6e, which have
            128; 48 those with 64.
        interpret: False, or what `pallas_call` takes, to run on another platform.

    Returns:
        `[M, N]` (or `[M, K]`; `[E, M, .]`) in the dtype of `x`, accumulated in float32.

    Raises:
        NotImplementedError: If the kernel cannot serve this; the text says why.
        ValueError: If the shapes contradict one another.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.full((64, 128), 0xFF, jnp.uint8)  # 15 is 1.0 in nf4
        >>> scales, x = jnp.ones((2, 128)), jnp.ones((1, 128))
        >>> product(x, codes, scales, fmt="nf4", block_size=64, interpret=True)[0, :2]
        Array([128., 128.], dtype=float32)
    """
    batched = x.ndim == 3
    if layer is None:
        codes, layer = codes[None], jnp.int32(0)
    if not batched:
        x, codes, scales = x[None], codes[:, None], scales[None]
    rows, cols = _weight_shape(x, codes, scales, fmt, transpose)
    found = plan(
        x.shape[1],
        rows,
        cols,
        x.dtype,
        fmt=fmt,
        block_size=block_size,
        transpose=transpose,
        form=decode,
        vmem=vmem_mib * 2**20,
    )
    if isinstance(found, str):
        raise NotImplementedError(found)
    if scales.shape != (codes.shape[1], rows // block_size, cols):
        raise ValueError(
            f"`scales` must be one for every {block_size} rows of the weight. Got "
            f"shapes {scales.shape} of `scales` and {codes.shape} of `codes`."
        )
    outputs = rows if transpose else cols
    if x.size == 0:
        out = jnp.zeros((*x.shape[:2], outputs), x.dtype)
    else:
        if (found.rows, found.cols) != (rows, cols):
            codes, layer = codes[layer][None], jnp.int32(0)
            x, codes, scales = _pad(found, x, codes, scales)
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        out = kernel.call(found, layer, x, codes, scales, interpret)[..., :outputs]
    return out if batched else out[0]


def _weight_shape(
    x: Array, codes: Array, scales: Array, fmt: str, transpose: bool
) -> tuple[int, int]:
    """Returns the weight's rows and columns, after a look at all shapes."""
    if (x.ndim, codes.ndim, scales.ndim) != (3, 4, 3) or not codes.shape[
        1
    ] == scales.shape[0] == x.shape[0]:
        raise ValueError(
            "`x`, `codes` and `scales` must have matching axes in front. Got shapes "
            f"{x.shape}, {codes.shape} and {scales.shape}."
        )
    rows, cols = codes.shape[2] * (1 if fmt == "int8" else 2), codes.shape[3]
    expected = cols if transpose else rows
    if x.shape[2] != expected:
        raise ValueError(
            f"`x` must have {expected} columns for a weight of {rows} rows and {cols} "
            f"columns with {transpose=}. Got {x.shape[2]}."
        )
    return rows, cols


def _pad(
    found: Plan, x: Array, codes: Array, scales: Array
) -> tuple[Array, Array, Array]:
    """Pads what is contracted with zeros; scales of zero make weights of zero."""

    def pad(array, rows, cols):
        widths = [(0, 0)] * (array.ndim - 2)
        widths += [(0, rows - array.shape[-2]), (0, cols - array.shape[-1])]
        return jnp.pad(array, widths)

    return (
        pad(x, x.shape[-2], found.contracted),
        pad(codes, found.rows // found.codes_a_byte, found.cols),
        pad(scales, found.rows // found.block_size, found.cols),
    )
