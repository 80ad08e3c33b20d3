"""Scales that minimize the squared error of each block, found by search.

The rule of a format takes the scale from the largest weight of a block, which then has
no error. A smaller scale rounds the other weights on a finer grid, and a larger one may
move the largest weight to another value of the table. Codes and stored scales are those
of the format, so files and decoders need nothing else.

For a scale s and the values c that w / s is rounded to, the error is

    sum(h * (w - s c)**2),    which is least at s + sum(h (w - s c) c) / sum(h c c),

with weights h of the error. Each candidate for s is therefore improved by one step of
least squares, without another pass over the weights (as in llama.cpp's quantizer).
"""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from .formats import Format, Packing
from .schemes import DOUBLE, E2M1_MAX, E4M3, E8M0, FLOAT32

# How the scale of a block is chosen: by the rule of the format, or by search.
ScaleRule = Literal["absmax", "search"]

# A kernel is searched in at most this many parts, of this size in float32.
PART_BYTES = 2 * 2**20
MAX_PARTS = 16


def check_scale_rule(scales: object) -> None:
    """Raises ValueError unless `scales` is the name of a rule for scales."""
    if scales not in get_args(ScaleRule):
        raise ValueError(f"`scales` must be 'absmax' or 'search'. Got {scales!r}.")


def candidate_ratios(fmt: Format) -> tuple[float, ...]:
    """Returns the scales to try, divided by the scale of the largest weight."""
    if fmt.scales is E8M0:
        return 0.5, 2.0
    if fmt.bits == 8:
        return 0.97, 0.985, 1.015, 1.03, 1.045, 1.06
    if fmt.is_uniform:
        return 0.76, 0.83, 0.89, 0.94, 1.0, 1.06, 1.13
    # Beyond 1.06, the next good scale rounds the largest weight to the second largest
    # value of the table.
    largest, second = np.unique(np.abs(fmt.table))[:-3:-1]
    jump = float(largest / second)
    return 0.8, 0.88, 0.94, 1.06, 0.96 * jump, 1.02 * jump


def search_scales(
    blocks: Float[Array, "*batch blocks b n"],
    scales: Float32[Array, "*batch blocks n"],
    packing: Packing,
    importance: Float32[Array, "*batch blocks b one"] | None,
    *largest: Array,
) -> Float32[Array, "*batch blocks n"]:
    """Returns better scales than `scales`, or `scales` where the search finds none.

    Args:
        blocks: The weights.
        scales: The scales by the rule of the format.
        packing: The format. Errors are measured with scales as its scheme stores them,
            except in double quantization, which stores 256 scales together.
        importance: Weights of the squared errors along K, the same for all columns. A
            block whose weights are all zero is searched without them.
        largest: The second argument of `ScaleScheme.encode`, if the scheme needs it.
    """
    operands = [blocks, scales]
    if importance is not None:
        peak = jnp.max(importance, axis=-2, keepdims=True)
        operands.append(jnp.sqrt(jnp.where(peak > 0, importance / peak, 1)))

    num_blocks, axis = blocks.shape[-3], blocks.ndim - 3
    num_parts = _count_parts(num_blocks, 4 * blocks.size)
    if num_parts == 1:
        return _search_part(packing, largest, *operands)

    # Block i * num_parts + j belongs to part j, so that a part has blocks of all
    # devices where a mesh splits the axis of blocks.
    def search_part(j: Array) -> Array:
        def take(x: Array) -> Array:
            split = num_blocks // num_parts, num_parts
            x = x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])
            return lax.dynamic_index_in_dim(x, j, axis + 1, keepdims=False)

        return _search_part(packing, largest, *map(take, operands))

    best = lax.map(search_part, jnp.arange(num_parts))
    return jnp.moveaxis(best, 0, axis + 1).reshape(scales.shape)


def _count_parts(num_blocks: int, num_bytes: int) -> int:
    """Returns the smallest number of equal parts that are small enough."""
    # A part has at least two blocks: XLA's sums over the only block of each column take
    # six times as long on CPUs.
    divisors = [1, *range(2, min(MAX_PARTS, num_blocks // 2) + 1)]
    divisors = [i for i in divisors if num_blocks % i == 0]
    enough = [i for i in divisors if num_bytes <= i * PART_BYTES]
    return enough[0] if enough else divisors[-1]


def _search_part(
    packing: Packing,
    largest: tuple[Array, ...],
    blocks: Array,
    scales: Array,
    root: Array | None = None,
) -> Array:
    """Searches without parts. `root` is the square root of the importance."""
    fmt, scheme = packing.format, packing.scheme
    # E4M3 divides the scales that it is given by 6 before it stores them.
    factor = np.float32(E2M1_MAX if scheme is E4M3 else 1)

    def store(scales: Array) -> Array:
        """Returns scales as they will be decoded, times `factor`."""
        if scheme is FLOAT32 or scheme is DOUBLE:
            return scales
        if scheme.needs_largest:  # a larger scale cannot be stored
            scales = jnp.minimum(scales, largest[0][..., None, None])
        return scheme.decode(scheme.encode(scales, *largest)) * factor

    def measure(scale: Array) -> tuple[Array, Array, Array]:
        """Returns the error of a stored scale, a better scale and that one's error."""
        # Sums are in units of the scale, and errors are compared in units of `scales`,
        # so that squares of very large and very small weights neither overflow nor
        # vanish.
        normalized = blocks.astype(jnp.float32) * (factor / scale)[..., None, :]
        values = nearest_values(normalized, fmt)
        error = normalized - values
        if root is not None:  # of the weights of squares and products
            error, values = error * root, values * root
        error_sum = jnp.sum(error * error, axis=-2)
        slope = jnp.sum(error * values, axis=-2)
        curvature = jnp.sum(values * values, axis=-2)
        # With the same values, a scale of 1 + t units has the error
        # error_sum - 2 t slope + t^2 curvature, which is least at slope / curvature.
        step = jnp.where(curvature > 0, slope / curvature, 0)
        refined = store(scale * (1 + step))
        step = refined / scale - 1
        refined_sum = error_sum - step * (2 * slope - step * curvature)
        unit = jnp.square(scale / scales)
        return unit * error_sum, refined, unit * refined_sum

    def choose(best: tuple[Array, Array], error: Array, scale: Array) -> tuple:
        # A comparison with NaN is false. Blocks of zeros and blocks with NaN have no
        # finite error, and therefore keep their first scale.
        is_better = error < best[0]
        return jnp.where(is_better, error, best[0]), jnp.where(
            is_better, scale, best[1]
        )

    def try_ratio(best: tuple[Array, Array], ratio: Array) -> tuple[tuple, None]:
        scale = store(reference * ratio)
        error, refined, refined_error = measure(scale)
        best = choose(best, error, scale)
        return choose(best, refined_error, refined), None

    reference = _signed_scales(blocks, fmt) if _has_signed_scales(fmt) else scales
    error, refined, refined_error = measure(store(scales))
    best = choose((error, scales), refined_error, refined)
    ratios = jnp.asarray(candidate_ratios(fmt), jnp.float32)
    (_, best_scales), _ = lax.scan(try_ratio, best, ratios)
    return best_scales


def _has_signed_scales(fmt: Format) -> bool:
    """Whether searched scales may be negative, which uses the value -8 for both signs.

    In 8 bits, the value -128 makes no difference.
    """
    return fmt.is_uniform and fmt.bits == 4


def _signed_scales(
    blocks: Float[Array, "*blocks b n"], fmt: Format
) -> Float32[Array, "*blocks n"]:
    """Returns the scales that map the largest weight, of either sign, to -8."""
    highest, lowest = jnp.max(blocks, axis=-2), jnp.min(blocks, axis=-2)
    signed = jnp.where(highest > -lowest, highest, lowest).astype(jnp.float32)
    return signed / fmt.table[0]


def nearest_values(x: Float32[Array, "..."], fmt: Format) -> Float32[Array, "..."]:
    """Returns the table value that is nearest to each number, whatever its code."""
    ascending = np.unique(fmt.table)
    if fmt.is_uniform:
        return jnp.clip(jnp.round(x), ascending[0], ascending[-1])
    # One comparison for each midpoint. A binary search, as for codes, takes as long.
    midpoints = (ascending[1:] + ascending[:-1]) / np.float32(2)
    nearest = jnp.full_like(x, ascending[0])
    for midpoint, value in zip(midpoints, ascending[1:], strict=True):
        nearest = jnp.where(x > midpoint, value, nearest)
    return nearest
