"""A search for the scale of each block, to make its squared error small.

By the rule of a format, the scale of a block follows from its largest weight. In most
formats, this weight is then decoded almost exactly. A smaller scale rounds the other
weights on a finer grid. With a larger scale, the largest weight may be rounded to
another value of the table. Only the choice of scales differs. Codes and scales are
stored as in the format, so files and decoders do not change.

Let s be a scale, and let c be the values of the table that w / s is rounded to. With
weights h of the squared errors, the error of the block is

    sum(h * (w - s c)**2).

For fixed c, it is least if s is replaced by

    s + sum(h (w - s c) c) / sum(h c c).

The search tries several candidates for s. For each one, it also tries this replacement,
whose error follows from the same sums, so that no further pass over the weights is
needed. llama.cpp's quantizer does the same.
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

# To save memory, a kernel is searched in parts, each of at most this many bytes in
# float32. There are at most MAX_PARTS parts, so those of very large kernels are larger.
PART_BYTES = 2 * 2**20
MAX_PARTS = 16


def check_scale_rule(scales: object) -> None:
    """Raises ValueError unless `scales` is the name of a rule for scales."""
    if scales not in get_args(ScaleRule):
        raise ValueError(f"`scales` must be 'absmax' or 'search'. Got {scales!r}.")


def candidate_ratios(fmt: Format) -> tuple[float, ...]:
    """Returns the candidates, as multiples of a block's reference scale.

    The reference is the scale by the rule of the format. In uniform 4-bit formats, it
    is that of `_signed_scales` instead.
    """
    if fmt.scales is E8M0:
        return 0.5, 2.0
    if fmt.bits == 8:
        return 0.97, 0.985, 1.015, 1.03, 1.045, 1.06
    if fmt.is_uniform:
        return 0.76, 0.83, 0.89, 0.94, 1.0, 1.06, 1.13
    # Up to 1.06, the largest weight is still rounded to the largest value of the table.
    # A larger scale is good only if it rounds this weight well to the second largest
    # value, as the candidates in `jumps` do. NVFP4 has two of them, because in its
    # small blocks, the second one lowers the error by 1%.
    *_, second, largest = np.unique(np.abs(fmt.table))  # in ascending order
    jump = float(largest / second)
    jumps = (0.96 * jump, 1.02 * jump) if fmt.scales is E4M3 else (0.99 * jump,)
    return 0.8, 0.88, 0.94, 1.06, *jumps


def search_scales(
    blocks: Float[Array, "*batch blocks b n"],
    scales: Float32[Array, "*batch blocks n"],
    packing: Packing,
    importance: Float32[Array, "*batch blocks b 1"] | None,
    *largest: Array,
) -> Float32[Array, "*batch blocks n"]:
    """Returns better scales than `scales`, or `scales` where the search finds none.

    Args:
        blocks: The weights of the kernel.
        scales: The scales by the rule of the format.
        packing: The format. Errors are measured with the rounded scales that its scheme
            stores. The rounding of double quantization is ignored, because it depends
            on 256 scales at once.
        importance: The weight of the squared errors in each row of K, for all columns.
            If it is zero in all rows of a block, all rows have equal weights.
        largest: The second argument of `ScaleScheme.encode`, or empty if it has none.
    """
    operands = [blocks, scales]
    if importance is not None:
        # Only ratios within a block matter. With at most 1, no sum can overflow.
        highest = jnp.max(importance, axis=-2, keepdims=True)
        operands.append(jnp.sqrt(jnp.where(highest > 0, importance / highest, 1)))

    num_blocks, axis = blocks.shape[-3], blocks.ndim - 3
    num_parts = _count_parts(num_blocks, 4 * blocks.size)
    if num_parts == 1:
        return _search_part(packing, largest, *operands)

    # Block i * num_parts + j belongs to part j. If a mesh splits the axis of blocks,
    # each part then has blocks of every device, so that no device is idle.
    def search_part(j: Array) -> Array:
        def take(x: Array) -> Array:
            split = num_blocks // num_parts, num_parts
            x = x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :])
            return lax.dynamic_index_in_dim(x, j, axis + 1, keepdims=False)

        return _search_part(packing, largest, *map(take, operands))

    best = lax.map(search_part, jnp.arange(num_parts))
    return jnp.moveaxis(best, 0, axis + 1).reshape(scales.shape)


def _count_parts(num_blocks: int, num_bytes: int) -> int:
    """Returns the smallest number of equal parts of at most `PART_BYTES` each.

    If even the largest possible number makes larger parts, it is returned.
    """
    # A part has at least two blocks of each column. With only one, the sums of XLA on
    # CPUs take six times as long.
    divisors = [1, *range(2, min(MAX_PARTS, num_blocks // 2) + 1)]
    divisors = [i for i in divisors if num_blocks % i == 0]
    enough = [i for i in divisors if num_bytes <= i * PART_BYTES]
    return enough[0] if enough else divisors[-1]


def _search_part(
    packing: Packing,
    largest: tuple[Array, ...],
    blocks: Array,
    scales: Array,
    sqrt_importance: Array | None = None,
) -> Array:
    fmt, scheme = packing.format, packing.scheme
    # E4M3 divides the scales that it encodes by 6, and decoding does not undo that. The
    # search multiplies decoded scales by 6, to compare them with those it encoded.
    e4m3_factor = np.float32(E2M1_MAX if scheme is E4M3 else 1)
    may_be_negative = fmt.is_uniform and fmt.bits == 4
    reference = _signed_scales(blocks, fmt) if may_be_negative else scales

    def store(scales: Array) -> Array:
        """Returns the scales that are decoded, without the division by 6."""
        if scheme is FLOAT32 or scheme is DOUBLE:
            return scales
        if scheme.uses_largest:  # a larger scale cannot be stored
            scales = jnp.minimum(scales, largest[0][..., None, None])
        return scheme.decode(scheme.encode(scales, *largest)) * e4m3_factor

    def measure(scale: Array) -> tuple[Array, Array, Array]:
        """Returns the error of a scale, then the refined scale and its error.

        The refined scale is the best one for the same values c, rounded by `store`.
        """
        # The weights are divided by the decoded scale, `scale / e4m3_factor`, before
        # they are squared, so that large ones do not overflow and small ones do not
        # vanish. The sums are thus in units of this scale. To compare the errors of
        # different scales, `squared_ratio` converts them to units of `scales`.
        error_sum, slope, curvature = _sum_errors(
            blocks, e4m3_factor / scale, fmt, sqrt_importance
        )
        # If the values c stay the same and the scale is multiplied by 1 + t, the error
        # is error_sum - 2 t slope + t^2 curvature, least at t = slope / curvature.
        step = jnp.where(curvature > 0, slope / curvature, 0)
        refined = store(scale * (1 + step))
        step = refined / scale - 1
        refined_sum = error_sum - step * (2 * slope - step * curvature)
        squared_ratio = jnp.square(scale / scales)
        return squared_ratio * error_sum, refined, squared_ratio * refined_sum

    def keep_better(best: tuple[Array, Array], error: Array, scale: Array) -> tuple:
        # A comparison with NaN is false. For blocks of zeros and for blocks with NaN,
        # no error is finite, so they keep the scale by the rule of the format.
        is_better = error < best[0]
        lower_error = jnp.where(is_better, error, best[0])
        return lower_error, jnp.where(is_better, scale, best[1])

    def try_ratio(best: tuple[Array, Array], ratio: Array) -> tuple[tuple, None]:
        scale = store(reference * ratio)
        error, refined, refined_error = measure(scale)
        best = keep_better(best, error, scale)
        return keep_better(best, refined_error, refined), None

    error, refined, refined_error = measure(store(scales))
    best = keep_better((error, scales), refined_error, refined)
    ratios = jnp.asarray(candidate_ratios(fmt), jnp.float32)
    (_, best_scales), _ = lax.scan(try_ratio, best, ratios)
    return best_scales


def _sum_errors(
    blocks: Float[Array, "*blocks b n"],
    inverse_scale: Float32[Array, "*blocks n"],
    fmt: Format,
    sqrt_importance: Float32[Array, "*blocks b 1"] | None,
) -> tuple[Array, Array, Array]:
    """Returns sums over each block of e^2, e c and c^2, weighted by the importance.

    Here c is the value of the table that is nearest to a weight times the inverse
    scale, and e is their difference.
    """
    normalized = blocks.astype(jnp.float32) * inverse_scale[..., None, :]
    values = nearest_values(normalized, fmt)
    if sqrt_importance is not None:
        normalized, values = normalized * sqrt_importance, values * sqrt_importance
    # Without the barrier, XLA on CPUs would look for the nearest values again for each
    # of the arrays that depend on them.
    values = lax.optimization_barrier(values)
    error = normalized - values
    return (
        jnp.sum(error * error, axis=-2),
        jnp.sum(error * values, axis=-2),
        jnp.sum(values * values, axis=-2),
    )


def _signed_scales(
    blocks: Float[Array, "*blocks b n"], fmt: Format
) -> Float32[Array, "*blocks n"]:
    """Returns the scales that map the weight with the largest magnitude to -8.

    The values of 4-bit integers are -8 to 7. With a scale of either sign, the largest
    weight can be rounded to -8, whether it is positive or negative. 8-bit integers have
    no negative scales, because -128 and 127 hardly differ in magnitude.
    """
    highest, lowest = jnp.max(blocks, axis=-2), jnp.min(blocks, axis=-2)
    signed = jnp.where(highest > -lowest, highest, lowest).astype(jnp.float32)
    return signed / fmt.table[0]


def nearest_values(x: Float32[Array, "..."], fmt: Format) -> Float32[Array, "..."]:
    """Returns the table value that is nearest to each number."""
    ascending = fmt.table[fmt.order]
    if fmt.is_uniform:
        return jnp.clip(jnp.round(x), ascending[0], ascending[-1])
    # Compare with each threshold. The binary search of `assign_codes`, followed by a
    # choice among the values, took as long here.
    nearest = jnp.full_like(x, ascending[0])
    for threshold, value in zip(fmt.thresholds, ascending[1:], strict=True):
        nearest = jnp.where(x > threshold, value, nearest)
    return nearest
