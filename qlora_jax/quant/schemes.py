"""Schemes of storing the scales of blocks, as they are or double-quantized."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, Integer

from .._jax.memory import all_below

SCALES_PER_BLOCK = 256

# bitsandbytes divides by max(absmax, 1e-38). XLA on CPUs flushes subnormal numbers, so
# the reciprocal of everything below the smallest normal number is written out.
SMALLEST_NORMAL = np.float32(np.finfo(np.float32).tiny)
_LARGEST_RECIPROCAL = np.float32(1e38)


class StoredScales(NamedTuple):
    """The arrays that hold the scales of a kernel."""

    scales: Any  # one for each block, `[*batch, blocks, N]`, in any dtype
    scale_scales: Any = None  # few for each kernel, `[*batch, count]`
    scale_offset: Any = None  # one for each kernel, `[*batch]`

    def is_finite(self) -> bool:
        """Whether the floats in all arrays are finite."""
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        floats = filter(is_float, jax.tree.leaves(self))
        return all(all_below(x, math.inf) for x in floats)


@dataclass(frozen=True)
class ScaleScheme:
    """A way to store float32 scales `[*batch, blocks, N]` in at most three arrays."""

    name: str  # of the scales, in errors
    # Takes the largest scale of the kernel too, if it `needs_largest` and that is not
    # among the scales.
    encode: Callable[..., StoredScales]
    # Maps the arrays to scales; `encode` inverts it in `Format.scales`.
    decode: Callable[[StoredScales], Array]
    # Maps the shape of the scales to shape and dtype of each stored array.
    arrays: Callable[[tuple[int, ...]], StoredScales]
    # Whether codes are assigned by scales as they are stored. bitsandbytes and GGUF
    # assign them by exact ones.
    rounds: bool = False
    # Whether these depend on the largest weight of the kernel.
    needs_largest: bool = False
    # Maps a number of weights to a magnitude: if all are below it, scales fit.
    limit: Callable[[int], float] = lambda count: math.inf
    overflow: str = ""  # what weights must be, and how to go on, if scales overflow


def _each(dtype: Any) -> Callable[[tuple[int, ...]], StoredScales]:
    return lambda shape: StoredScales(jax.ShapeDtypeStruct(shape, dtype))


FLOAT32 = ScaleScheme(
    "float32",
    encode=StoredScales,
    decode=lambda stored: stored.scales,
    arrays=_each(np.float32),
    overflow="smaller for scales in float32: those of some blocks overflow.",
)
FLOAT16 = ScaleScheme(
    "float16",
    encode=lambda scales: StoredScales(scales.astype(np.float16)),
    decode=lambda stored: stored.scales.astype(np.float32),
    arrays=_each(np.float16),
    limit=lambda count: float(np.finfo(np.float16).max),
    overflow="smaller for scales in float16: those of some blocks overflow.",
)


def reciprocal(x: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Returns `1 / x`, and 1e38 below the smallest normal number, as bitsandbytes."""
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, _LARGEST_RECIPROCAL, 1 / x)


def quotient(x: Float32[Array, "*axes"], by: Any) -> Float32[Array, "*axes"]:
    """Returns `x / by`, rounded once, where `by` is a constant or a broadcast.

    Both are positive, or x is 0.
    """
    # The divisor is `by`, written so that XLA does not see a broadcast and make a
    # product with its reciprocal. It is no selection from a constant: JAX would compute
    # that outside of a scan, and then mistake it for an argument of the product with a
    # custom gradient around this, in Hessian-vector products.
    return x / jnp.maximum(by, jnp.minimum(x, 0))


def _float32_linspace(start: float, stop: float, num: int) -> np.ndarray:
    """`torch.linspace`: float32 steps, counted from the nearer end, rounded once."""
    i, step = (
        np.arange(num),
        (np.float32(stop) - np.float32(start)) / np.float32(num - 1),
    )
    up = float(np.float32(start)) + float(step) * i
    down = float(np.float32(stop)) - float(step) * (num - 1 - i)
    return np.where(i < num // 2, up, down).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic map of double-quantized scales.

    Dettmers 2015 (8-Bit Approximations for Parallelism in Deep Learning), section 2, in
    the form of bitsandbytes' `create_dynamic_map`: for each of seven decades, `2**i`
    midpoints of `linspace(0.1, 1, 2**i + 1)`, both signs, plus 0 and 1.
    """
    data = [0.0, 1.0]
    for i in range(7):
        boundaries = _float32_linspace(0.1, 1.0, 2**i + 1)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        scaled = means * np.float32(10.0 ** (i - 6))
        data += scaled.tolist() + (-scaled).tolist()
    return np.sort(np.asarray(data, np.float32))


DYNAMIC_MAP = _dynamic_map()
DYNAMIC_MAP_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)


def _quantize_scales(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    """Returns codes of the scales, a float32 scale for each 256 codes, and the mean."""
    # In bitsandbytes' order: n * blocks + block.
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
    return StoredScales(codes, scale_scales, offset)


def _nearest(x: Float32[Array, "*axes"]) -> Int32[Array, "*axes"]:
    """Returns the code of the map's nearest value, the lower one at a midpoint."""
    # Equals `jnp.searchsorted`, which is twice as slow to compile, and on CPUs to run.
    codes = jnp.zeros(x.shape, jnp.int32)
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        midpoints = look_up(DYNAMIC_MAP_MIDPOINTS, codes + np.int32(half - 1))
        codes = codes + jnp.where(x > midpoints, np.int32(half), np.int32(0))
    return codes


def look_up(
    table: Float32[np.ndarray, " entries"], index: Integer[Array, "*axes"]
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
    """Returns the sum over the last axis, in pairs."""
    # The order of `jnp.sum`, and so the last bit, depends on batch axes and sharding.
    count = x.shape[-1]
    size = 1 << max(count - 1, 0).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - count)])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def _dequantize_scales(stored: StoredScales) -> Float32[Array, "*batch blocks n"]:
    """Inverts `_quantize_scales`: `map[code] * scale_scale + offset` in float32."""
    codes, scale_scales, offset = stored
    *batch, num_blocks, n = codes.shape
    count = num_blocks * n
    # The few scales of scales are laid out like the codes, and not the other way round:
    # codes that are split over devices stay where they are.
    groups = (*scale_scales.shape, SCALES_PER_BLOCK)
    multipliers = lax.broadcast_in_dim(scale_scales, groups, range(scale_scales.ndim))
    if count != scale_scales.shape[-1] * SCALES_PER_BLOCK:
        multipliers = multipliers.reshape(*batch, math.prod(groups[-2:]))[..., :count]
    multipliers = jnp.swapaxes(multipliers.reshape(*batch, n, num_blocks), -1, -2)
    scaled = look_up(DYNAMIC_MAP, codes.astype(jnp.int32)) * multipliers
    # The maximum changes nothing. It keeps XLA and LLVM from fusing product and sum
    # into one rounding; some versions look through barriers and reduce_precision.
    apart = jnp.maximum(scaled, np.finfo(np.float32).min)
    return apart + lax.broadcast_in_dim(offset, codes.shape, tuple(range(len(batch))))


def _double_arrays(shape: tuple[int, ...]) -> StoredScales:
    *batch, blocks, n = shape
    groups = math.ceil(n * blocks / SCALES_PER_BLOCK)
    return StoredScales(
        jax.ShapeDtypeStruct(shape, np.uint8),
        jax.ShapeDtypeStruct((*batch, groups), np.float32),
        jax.ShapeDtypeStruct(tuple(batch), np.float32),
    )


DOUBLE = ScaleScheme(
    "double-quantized",
    encode=_quantize_scales,
    decode=_dequantize_scales,
    arrays=_double_arrays,
    # The sum of so many numbers below it is finite.
    limit=lambda count: float(np.finfo(np.float32).max) / max(count, 1),
    overflow="smaller for double quantization: the sum of the scales overflows. Use "
    "double_quant=False.",
)


def _float16_or_eps(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    stored = FLOAT16.encode(scales).scales
    return StoredScales(jnp.where(stored == 0, jnp.finfo(np.float16).eps, stored))


# As `calculate_qparams` of compressed-tensors 0.20 has them: no scale is zero.
FLOAT16_NOT_ZERO = replace(FLOAT16, encode=_float16_or_eps, rounds=True)


def _exponents(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    """Returns the exponents of powers of two: those below, but above from 1.75 on."""
    # The magnitude of the bits is that of the floats: a carry is the next exponent.
    bits = lax.bitcast_convert_type(scales, jnp.uint32) + np.uint32(1 << 21)
    return StoredScales((bits >> np.uint32(23)).astype(jnp.uint8))


def _powers(stored: StoredScales) -> Float32[Array, "*batch blocks n"]:
    bits = stored.scales.astype(jnp.uint32) << np.uint32(23)
    return lax.bitcast_convert_type(bits, jnp.float32)


# OCP Microscaling Formats 1.0, section 5.4.1. The specification takes the power below;
# compressed-tensors (`generate_mx_scales`) the next one where elements would saturate.
E8M0 = ScaleScheme("e8m0", _exponents, _powers, arrays=_each(np.uint8), rounds=True)

E4M3_MAX, E2M1_MAX = 448.0, 6.0


def _two_levels(
    scales: Float32[Array, "*batch blocks n"],
    largest: Float32[Array, "*batch"] | None = None,
) -> StoredScales:
    """Stores sixths of the scales in e4m3, with the float32 to divide these by."""
    if largest is None:
        largest = jnp.max(scales, axis=(-1, -2), initial=0.0)
    largest = largest[..., None, None]
    # Above 2**125 the reciprocal is subnormal, and below 7.9e-36 the divisor overflows.
    down = jnp.where(largest > 2.0**125, np.float32(2.0**-4), np.float32(1))
    inverse = 1 / jnp.maximum(largest * down, SMALLEST_NORMAL)
    divisor = inverse * (np.float32(E4M3_MAX * E2M1_MAX) * down)
    divisor = jnp.minimum(divisor, np.finfo(np.float32).max)
    divisor = jnp.where(largest < SMALLEST_NORMAL, np.float32(1), divisor)
    stored = divisor * quotient(scales, np.float32(E2M1_MAX))
    stored = stored.astype(jnp.float8_e4m3fn)
    stored = jnp.where(stored == 0, 0.125, stored.astype(np.float32))
    factors = jnp.concatenate([jnp.ones_like(divisor), divisor], axis=-1)[..., 0, :]
    return StoredScales(stored.astype(jnp.float8_e4m3fn), factors)


def _from_two_levels(stored: StoredScales) -> Float32[Array, "*batch blocks n"]:
    scales = stored.scales.astype(np.float32)
    factors = stored.scale_scales[..., None, None, :]
    return quotient(scales * factors[..., 0], factors[..., 1])


# `scale_scales` are a factor and a divisor, one of them 1: ModelOpt multiplies by a
# float32, compressed-tensors divides by its reciprocal, which rounds otherwise.
E4M3 = ScaleScheme(
    "e4m3 under a float32",
    encode=_two_levels,
    decode=_from_two_levels,
    arrays=lambda shape: StoredScales(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((*shape[:-2], 2), np.float32),
    ),
    rounds=True,
    needs_largest=True,
)
