"""The fused TPU kernel: `x @ W` and `g @ W.T` from packed codes, W never in HBM."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ...spec import ProductSpec
from . import grid
from .chips import Chip
from .tiling import Tiling, plan


@functools.partial(jax.jit, static_argnames=("chip", "interpret"))
def product(
    spec: ProductSpec,
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array | None = None,
    *,
    chip: Chip,
    interpret: Any = False,
) -> Array:
    """Returns `x @ W`, or `x @ W.T`, accumulated in float32.

    In `spec.result`, or the dtype of `x`.

    x is `[M, .]`, codes uint8 `[K/2, N]` (int8: `[K, N]`), scales float32 `[K/B, N]`;
    a batch of weights, such as experts, adds an axis `E` in front of each. With a
    `layer`, an int32 scalar, codes have an axis `L` before that, and are not sliced.
    """
    batched = x.ndim == 3
    if layer is None:
        codes, layer = codes[None], jnp.int32(0)
    if not batched:
        x, codes, scales = x[None], codes[:, None], scales[None]
    rows, cols = codes.shape[2] * spec.format.codes_per_byte, codes.shape[3]
    found = plan(spec, x.shape[1], cols, x.dtype, chip)
    if isinstance(found, str):
        raise NotImplementedError(found)
    if scales.shape != (codes.shape[1], rows // spec.block_size, cols):
        raise ValueError(
            f"`scales` must be one for every {spec.block_size} rows of the weight. Got "
            f"shapes {scales.shape} of `scales` and {codes.shape} of `codes`."
        )
    outputs = rows if spec.transpose else cols
    if x.size == 0:
        out = jnp.zeros((*x.shape[:2], outputs), spec.result or x.dtype)
    else:
        x, scales = pad(found, x, scales)
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        out = grid.call(found, layer, x, codes, scales, interpret)[..., :outputs]
    return out if batched else out[0]


def pad(found: Tiling, x: Array, scales: Array) -> tuple[Array, Array]:
    """Pads what is contracted with zeros.

    Codes are not padded: a kernel's block of them may end beyond the array, and what it
    has there has scales of zero.
    """

    def to(array: Array, rows: int, cols: int) -> Array:
        widths = [(0, 0)] * (array.ndim - 2)
        widths += [(0, rows - array.shape[-2]), (0, cols - array.shape[-1])]
        return jnp.pad(array, widths)

    return (
        to(x, x.shape[-2], found.contracted),
        to(scales, found.rows // found.spec.block_size, found.cols),
    )
