"""Double quantization: scales in 8 bits (QLoRA, Dettmers et al. 2023, section 3)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from .codes import reciprocal
from .formats import DYNAMIC_MAP, DYNAMIC_MAP_MIDPOINTS, SCALES_PER_BLOCK


def quantize_scales(
    scales: Float32[Array, "*batch blocks n"],
) -> tuple[
    UInt8[Array, "*batch blocks n"],
    Float32[Array, "*batch groups"],
    Float32[Array, "*batch"],
]:
    """Quantizes the scales themselves.

    The mean is taken off, and 256 scales at a time are stored in the signed 8-bit
    dynamic map, in bitsandbytes' order `n * blocks + block`.

    Returns:
        The scales' codes, one float32 scale for each 256 of them, and the mean.
    """
    *batch, num_blocks, n = scales.shape
    count = num_blocks * n
    flat = jnp.swapaxes(scales, -1, -2).reshape(*batch, count)
    offset = _sum(flat) / np.float32(max(count, 1))
    centred = flat - offset[..., None]
    groups = -(-count // SCALES_PER_BLOCK)
    missing = groups * SCALES_PER_BLOCK - count
    centred = jnp.pad(centred, [(0, 0)] * len(batch) + [(0, missing)])
    centred = centred.reshape(*batch, groups, SCALES_PER_BLOCK)
    scale_scales = jnp.max(jnp.abs(centred), axis=-1, initial=0.0)
    normalized = centred * reciprocal(scale_scales)[..., None]
    codes = _nearest(normalized).astype(jnp.uint8)
    codes = codes.reshape(*batch, groups * SCALES_PER_BLOCK)[..., :count]
    codes = jnp.swapaxes(codes.reshape(*batch, n, num_blocks), -1, -2)
    return codes, scale_scales, offset


def _nearest(x: Float32[Array, "*axes"]) -> Int32[Array, "*axes"]:
    """Returns the code of the map's value nearest to `x`, the lower one at a midpoint.

    Equals `jnp.searchsorted`, which takes twice as long to compile, and to run on CPUs.
    """
    codes = jnp.zeros(x.shape, jnp.int32)
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        midpoints = _look_up(DYNAMIC_MAP_MIDPOINTS, codes + np.int32(half - 1))
        codes = codes + jnp.where(x > midpoints, np.int32(half), np.int32(0))
    return codes


def _look_up(
    table: Float32[np.ndarray, " entries"], index: Int32[Array, "*axes"]
) -> Float32[Array, "*axes"]:
    """Returns `table[index]`; no bounds are checked."""
    # Indexing and reshaping take more operations, and each costs compile time in every
    # product of an unrolled model.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    index = lax.broadcast_in_dim(index, (*index.shape, 1), range(index.ndim))
    return lax.gather(
        jnp.asarray(table), index, numbers, (1,), mode="promise_in_bounds"
    )


def _sum(x: Float32[Array, "*batch count"]) -> Float32[Array, "*batch"]:
    """Returns the sum over the last axis, in pairs.

    In this order whatever the batch axes and the sharding: XLA chooses one for
    `jnp.sum`, so that a kernel alone and in a stack would differ in the last bit.
    """
    count = x.shape[-1]
    size = 1 << max(count - 1, 0).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - count)])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def dequantize_scales(
    codes: UInt8[Array, "*batch blocks n"],
    scale_scales: Float32[Array, "*batch groups"],
    offset: Float32[Array, "*batch"],
) -> Float32[Array, "*batch blocks n"]:
    """Inverts `quantize_scales`: `map[code] * scale_scale + offset` in float32."""
    *batch, num_blocks, n = codes.shape
    count = num_blocks * n
    # The few scales of scales are laid out like the codes, and not the other way round:
    # codes that are split over devices stay where they are.
    groups = (*scale_scales.shape, SCALES_PER_BLOCK)
    multipliers = lax.broadcast_in_dim(scale_scales, groups, range(scale_scales.ndim))
    if count != scale_scales.shape[-1] * SCALES_PER_BLOCK:
        multipliers = multipliers.reshape(*batch, math.prod(groups[-2:]))[..., :count]
    multipliers = jnp.swapaxes(multipliers.reshape(*batch, n, num_blocks), -1, -2)
    scaled = _look_up(DYNAMIC_MAP, codes.astype(jnp.int32)) * multipliers
    # The maximum changes nothing. It keeps XLA and LLVM from fusing product and sum
    # into one rounding; some versions look through barriers and reduce_precision.
    apart = jnp.maximum(scaled, np.finfo(np.float32).min)
    return apart + lax.broadcast_in_dim(offset, codes.shape, tuple(range(len(batch))))
