"""Schemes that store the scales of blocks, either as they are or quantized again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32, Integer

from .._jax.memory import all_below

SCALES_PER_GROUP = 256  # that double quantization quantizes together

SMALLEST_NORMAL = np.float32(np.finfo(np.float32).tiny)


class StoredScales(NamedTuple):
    """The arrays that hold the scales of a kernel, or their shapes."""

    scales: Array  # one for each block, `[*batch, blocks, N]`, in any dtype
    scale_scales: Array | None = None  # a few for each kernel, `[*batch, count]`
    scale_offset: Array | None = None  # one for each kernel, `[*batch]`

    def is_finite(self) -> bool:
        """Whether the floats in all arrays are finite."""
        arrays = jax.tree.leaves(self)
        floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        return all(all_below(x, math.inf) for x in floats)


@dataclass(frozen=True)
class ScaleScheme:
    """A way to store float32 scales `[*batch, blocks, N]` in at most three arrays."""

    name: str  # what error messages call the scales
    # Maps the scales to the stored arrays. If the scheme `uses_largest`, an optional
    # second argument replaces the largest of these scales: that of all kernels that an
    # inference server fuses, or of a kernel whose scales are encoded in parts. Other
    # schemes take no second argument. Callers therefore pass it on as `*largest`, which
    # is empty or holds one array.
    encode: Callable[..., StoredScales]
    # Maps the stored arrays to float32 scales: those that `encode` got, rounded. In
    # `E4M3`, `encode` also divides them by 6.
    decode: Callable[[StoredScales], Array]
    # Maps the shape of the scales to the shape and dtype of each stored array.
    arrays: Callable[[tuple[int, ...]], StoredScales]
    # Whether codes are assigned with the stored scales instead of the exact ones.
    uses_stored_scales: bool = False
    # Whether each stored scale depends on the largest scale of the kernel.
    uses_largest: bool = False
    # Maps the number of weights to a magnitude. If all weights are below it, no scale
    # overflows.
    limit: Callable[[int], float] = field(default=lambda num_weights: math.inf)
    overflow: str = ""  # completes "weights must be ..." if stored scales overflow

    @property
    def array_names(self) -> list[str]:
        """The names of the arrays that the scheme stores."""
        structs = self.arrays((1, 1))._asdict()  # of any shape
        return [name for name, struct in structs.items() if struct is not None]


_shape_struct: Any = jax.ShapeDtypeStruct  # `Any`: `StoredScales` declares arrays


def _scales_of_dtype(dtype: DTypeLike) -> Callable[[tuple[int, ...]], StoredScales]:
    return lambda shape: StoredScales(_shape_struct(shape, dtype))


FLOAT32 = ScaleScheme(
    "float32",
    encode=StoredScales,
    decode=lambda stored: stored.scales,
    arrays=_scales_of_dtype(np.float32),
    overflow="smaller for scales in float32: those of some blocks overflow.",
)
FLOAT16 = ScaleScheme(
    "float16",
    encode=lambda scales: StoredScales(scales.astype(np.float16)),
    decode=lambda stored: stored.scales.astype(np.float32),
    arrays=_scales_of_dtype(np.float16),
    limit=lambda num_weights: float(np.finfo(np.float16).max),
    overflow="smaller for scales in float16: those of some blocks overflow.",
)


def times_reciprocal(
    x: Float32[Array, "*axes"], scale: Float32[Array, "..."]
) -> Float32[Array, "*axes"]:
    """Returns `x * (1 / scale)` for a broadcast scale, rounded twice."""
    # Above 2**125, the reciprocal may be subnormal and be flushed to zero, so x and the
    # scale are multiplied by 2**-4 first, which is exact.
    is_huge = jnp.abs(scale) > 2.0**125
    shrink = jnp.where(is_huge, np.float32(2.0**-4), np.float32(1))
    scale = scale * shrink
    # bitsandbytes divides by max(absmax, 1e-38). XLA on CPUs flushes subnormal numbers
    # to zero, so the reciprocal of any scale below the smallest normal number is 1e38.
    is_tiny = jnp.abs(scale) < SMALLEST_NORMAL
    return (x * shrink) * jnp.where(is_tiny, np.float32(1e38), 1 / scale)


def quotient(
    x: Float32[Array, "*axes"], divisor: Float32[Array, "..."] | np.float32
) -> Float32[Array, "*axes"]:
    """Returns `x / divisor`, rounded once, for a constant or broadcast divisor.

    The divisor must be positive.
    """
    # The minimum is at most 0, so the maximum equals `divisor`. As it depends on x, it
    # hides from XLA that the divisor is a constant or broadcast: XLA would replace the
    # division by a product with the reciprocal, which rounds twice. A select instead of
    # the maximum would not do: if it were between constants, JAX would move it out of a
    # scan, which would then fail in Hessian-vector products (see `_product` in
    # product/matmul.py).
    return x / jnp.maximum(divisor, jnp.minimum(x, 0))


def _float32_linspace(start: float, stop: float, num: int) -> np.ndarray:
    """Equals `torch.linspace`: float32 steps, counted from the nearer end."""
    i = np.arange(num)
    step = float((np.float32(stop) - np.float32(start)) / np.float32(num - 1))
    from_start = float(np.float32(start)) + step * i
    from_stop = float(np.float32(stop)) - step * (num - 1 - i)
    return np.where(i < num // 2, from_start, from_stop).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    # Dettmers 2015 (8-Bit Approximations for Parallelism in Deep Learning), section 2,
    # as bitsandbytes' `create_dynamic_map` computes it: for each of seven decades,
    # `2**i` midpoints of `linspace(0.1, 1, 2**i + 1)` with both signs, and 0 and 1.
    values = [0.0, 1.0]
    for i in range(7):
        boundaries = _float32_linspace(0.1, 1.0, 2**i + 1)
        midpoints = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        scaled = midpoints * np.float32(10.0 ** (i - 6))
        values += scaled.tolist() + (-scaled).tolist()
    return np.sort(np.asarray(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
DYNAMIC_MAP_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)


def _quantize_scales(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    """Returns 8-bit codes of the scales, a scale for each 256 codes, and the mean."""
    *batch, num_blocks, n = scales.shape
    count = num_blocks * n
    # 1. Flatten to [*batch, count] in bitsandbytes' order, n * num_blocks + block, and
    #    subtract the mean.
    flat = jnp.swapaxes(scales, -1, -2).reshape(*batch, count)
    offset = _pairwise_sum(flat) / np.float32(max(count, 1))
    centred = flat - offset[..., None]
    # 2. Pad to whole groups: [*batch, groups, 256].
    groups = -(-count // SCALES_PER_GROUP)
    missing = groups * SCALES_PER_GROUP - count
    centred = jnp.pad(centred, [(0, 0)] * len(batch) + [(0, missing)])
    centred = centred.reshape(*batch, groups, SCALES_PER_GROUP)
    # 3. Normalize each group by its largest magnitude and look up the nearest values.
    scale_scales = jnp.max(jnp.abs(centred), axis=-1, initial=0.0)
    normalized = times_reciprocal(centred, scale_scales[..., None])
    codes = _nearest_map_codes(normalized).astype(jnp.uint8)
    # 4. Drop the padding and restore the layout of the scales, [*batch, blocks, n].
    codes = codes.reshape(*batch, groups * SCALES_PER_GROUP)[..., :count]
    codes = jnp.swapaxes(codes.reshape(*batch, n, num_blocks), -1, -2)
    return StoredScales(codes, scale_scales, offset)


def _nearest_map_codes(x: Float32[Array, "*axes"]) -> Int32[Array, "*axes"]:
    """Returns the code of the map's nearest value, the lower one at a midpoint."""
    # A binary search. `jnp.searchsorted` gives the same codes, but takes twice as long
    # to compile, and to run on CPUs.
    codes = jnp.zeros(x.shape, jnp.int32)
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        midpoints = look_up(DYNAMIC_MAP_MIDPOINTS, codes + np.int32(half - 1))
        codes = codes + jnp.where(x > midpoints, np.int32(half), np.int32(0))
    return codes


def look_up(
    table: Float32[np.ndarray, " entries"], index: Integer[Array, "*axes"]
) -> Float32[Array, "*axes"]:
    """Returns `table[index]` without checking bounds."""
    # `jnp.take` has more operations, for negative and invalid indices. Each one costs
    # compile time in every product of an unrolled model.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    index = lax.broadcast_in_dim(index, (*index.shape, 1), range(index.ndim))
    return lax.gather(
        jnp.asarray(table), index, numbers, (1,), mode="promise_in_bounds"
    )


def _pairwise_sum(x: Float32[Array, "*batch count"]) -> Float32[Array, "*batch"]:
    """Returns the sum over the last axis in a fixed order."""
    # `jnp.sum` adds in an order that depends on batch axes and sharding, which would
    # change the last bit of the mean, and with it the codes.
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
    assert scale_scales is not None and offset is not None
    *batch, num_blocks, n = codes.shape
    count = num_blocks * n
    # Repeat each scale of scales for its 256 codes, in the layout of the codes. If the
    # codes are sharded, grouping them by 256 instead would move them between devices.
    groups = (*scale_scales.shape, SCALES_PER_GROUP)
    multipliers = lax.broadcast_in_dim(scale_scales, groups, range(scale_scales.ndim))
    if count != scale_scales.shape[-1] * SCALES_PER_GROUP:
        multipliers = multipliers.reshape(*batch, math.prod(groups[-2:]))[..., :count]
    multipliers = jnp.swapaxes(multipliers.reshape(*batch, n, num_blocks), -1, -2)
    scaled = look_up(DYNAMIC_MAP, codes.astype(jnp.int32)) * multipliers
    # The maximum changes no value. It keeps XLA and LLVM from fusing the product and
    # the sum, which would round once. Barriers and `reduce_precision` do not prevent
    # this in some versions.
    unfused = jnp.maximum(scaled, np.finfo(np.float32).min)
    return unfused + lax.broadcast_in_dim(offset, codes.shape, tuple(range(len(batch))))


def _double_quantized_arrays(shape: tuple[int, ...]) -> StoredScales:
    *batch, blocks, n = shape
    groups = math.ceil(n * blocks / SCALES_PER_GROUP)
    return StoredScales(
        _shape_struct(shape, np.uint8),
        _shape_struct((*batch, groups), np.float32),
        _shape_struct(tuple(batch), np.float32),
    )


DOUBLE = ScaleScheme(
    "double-quantized",
    encode=_quantize_scales,
    decode=_dequantize_scales,
    arrays=_double_quantized_arrays,
    # The mean needs the sum of all scales, which must not overflow.
    limit=lambda num_weights: float(np.finfo(np.float32).max) / max(num_weights, 1),
    overflow="smaller for double quantization: the sum of the scales overflows. Use "
    "double_quant=False.",
)


def _encode_nonzero_float16(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    stored = FLOAT16.encode(scales).scales
    return StoredScales(jnp.where(stored == 0, jnp.finfo(np.float16).eps, stored))


# As in `calculate_qparams` of compressed-tensors 0.20, no scale is zero.
FLOAT16_NOT_ZERO = replace(
    FLOAT16, encode=_encode_nonzero_float16, uses_stored_scales=True
)


def _encode_e8m0(scales: Float32[Array, "*batch blocks n"]) -> StoredScales:
    """Returns the exponent of a power of two: rounded up for mantissas from 1.75."""
    # The bits of a positive float are ordered like its value. Adding a quarter of the
    # mantissa's range carries into the exponent exactly for mantissas of at least 1.75.
    bits = lax.bitcast_convert_type(scales, jnp.uint32) + np.uint32(1 << 21)
    return StoredScales((bits >> np.uint32(23)).astype(jnp.uint8))


def _decode_e8m0(stored: StoredScales) -> Float32[Array, "*batch blocks n"]:
    # Shift into the exponent bits of a float32; the zero mantissa bits stand for 1.0.
    bits = stored.scales.astype(jnp.uint32) << np.uint32(23)
    return lax.bitcast_convert_type(bits, jnp.float32)


# OCP Microscaling Formats 1.0, section 5.4.1. The specification rounds down to a power
# of two. compressed-tensors (`generate_mx_scales`) rounds up where elements would
# saturate otherwise.
E8M0 = ScaleScheme(
    "e8m0",
    _encode_e8m0,
    _decode_e8m0,
    arrays=_scales_of_dtype(np.uint8),
    uses_stored_scales=True,
)

E4M3_MAX, E2M1_MAX = 448.0, 6.0  # the largest numbers of float8 e4m3 and float4 e2m1


# `scale_scales` holds a factor and a divisor, one of which is 1. ModelOpt multiplies by
# a factor. compressed-tensors divides by its reciprocal, which rounds differently.
def _encode_e4m3(
    scales: Float32[Array, "*batch blocks n"],
    largest: Float32[Array, "*batch"] | None = None,
) -> StoredScales:
    """Stores `divisor * scale / 6` in e4m3; decoding divides by `divisor` again."""
    if largest is None:
        largest = jnp.max(scales, axis=(-1, -2), initial=0.0)
    largest = largest[..., None, None]
    # divisor = 448 * 6 / largest, which maps the largest scale to the largest e4m3. If
    # `largest` is above 2**125, its reciprocal may be subnormal and be flushed to zero,
    # so numerator and denominator are multiplied by 2**-4. If `largest` is below
    # 7.9e-36, the divisor would overflow and is clipped.
    shrink = jnp.where(largest > 2.0**125, np.float32(2.0**-4), np.float32(1))
    inverse = 1 / jnp.maximum(largest * shrink, SMALLEST_NORMAL)
    divisor = inverse * (np.float32(E4M3_MAX * E2M1_MAX) * shrink)
    divisor = jnp.minimum(divisor, np.finfo(np.float32).max)
    divisor = jnp.where(largest < SMALLEST_NORMAL, np.float32(1), divisor)
    stored = divisor * quotient(scales, np.float32(E2M1_MAX))
    stored = stored.astype(jnp.float8_e4m3fn)
    # No stored scale may be zero: a zero becomes 0.125, the eps of e4m3.
    stored = jnp.where(stored == 0, 0.125, stored.astype(np.float32))
    # [*batch, 1, 2] without the axis of blocks: [*batch, 2].
    pair = jnp.concatenate([jnp.ones_like(divisor), divisor], axis=-1)[..., 0, :]
    return StoredScales(stored.astype(jnp.float8_e4m3fn), pair)


def _decode_e4m3(stored: StoredScales) -> Float32[Array, "*batch blocks n"]:
    assert stored.scale_scales is not None
    scales = stored.scales.astype(np.float32)
    pair = stored.scale_scales[..., None, None, :]  # a factor and a divisor
    return quotient(scales * pair[..., 0], pair[..., 1])


def next_power_of_two(x: Float32[Array, "*axes"]) -> Float32[Array, "*axes"]:
    """Returns the smallest power of two that is at least x; x itself above 2**127."""
    exponent = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7F800000)
    lower = lax.bitcast_convert_type(exponent, jnp.float32)  # x without its mantissa
    return jnp.where((lower < x) & (x < 2.0**127), 2 * lower, x)


def with_e4m3_divisor(
    stored: StoredScales, divisor: Float32[Array, "*batch"]
) -> StoredScales:
    """Returns the same scales for another divisor; unchanged where it is not exact.

    It is exact if the divisors differ by a power of two, and no stored scale becomes a
    subnormal number with fewer bits.
    """
    pair = stored.scale_scales  # [*batch, 2]: a factor of 1 and the divisor
    assert pair is not None
    ratio = (divisor / pair[..., 1])[..., None, None]
    scales = (stored.scales.astype(jnp.float32) * ratio).astype(jnp.float8_e4m3fn)
    new_pair = jnp.stack([pair[..., 0], divisor], axis=-1)
    is_equal = _decode_e4m3(StoredScales(scales, new_pair)) == _decode_e4m3(stored)
    is_exact = jnp.all(is_equal, axis=(-1, -2), keepdims=True)  # [*batch, 1, 1]
    return StoredScales(
        jnp.where(is_exact, scales, stored.scales),
        jnp.where(is_exact[..., 0], new_pair, pair),
    )


E4M3 = ScaleScheme(
    "float8 e4m3 with a float32 factor and divisor",
    encode=_encode_e4m3,
    decode=_decode_e4m3,
    arrays=lambda shape: StoredScales(
        _shape_struct(shape, jnp.float8_e4m3fn),
        _shape_struct((*shape[:-2], 2), np.float32),
    ),
    uses_stored_scales=True,
    uses_largest=True,
)
