"""Parts of products in a `shard_map`: they gather weights, sum, and split offsets."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from .._jax.modes import is_manual
from .._jax.specs import Axes


def sum_over(
    part: Float[Array, "*rows n"], axes: Axes, dtype: np.dtype
) -> Float[Array, "*rows n"]:
    """Returns the sum of all devices' parts over mesh axes, rounded once to `dtype`.

    Call it inside a `shard_map`. The parts are float32 if `dtype` has 16 bits.
    """
    if not axes:
        return part.astype(dtype)
    # An all-reduce is a reduce-scatter followed by an all-gather, and only the first
    # needs float32. Rounding between the two moves 1.5 times the bytes of a 16-bit
    # all-reduce, and a float32 all-reduce moves twice the bytes. The latter is still
    # used if no row axis is divisible, because there are then few rows, and in partly
    # manual programs, where XLA may also split the rows over other mesh axes.
    ways = lax.axis_size(axes)
    divisible = [i for i, size in enumerate(part.shape[:-1]) if size % ways == 0]
    if part.dtype == dtype or not divisible or not is_manual():
        return lax.psum(part, axes).astype(dtype)
    axis = divisible[0]
    total = lax.psum_scatter(part, axes, scatter_dimension=axis, tiled=True)
    return lax.all_gather(total.astype(dtype), axes, axis=axis, tiled=True)


def gather(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: Axes,
    array_axis: int,
) -> tuple[Array, Array]:
    """Gathers codes and scales along N (-1), K (-2) or experts (-3), as one array."""
    # Float32 scales `[..., s, n]` become bytes `[..., 4 s, n]`, and follow the codes as
    # more rows.
    *lead, num_blocks, n = scales.shape
    scale_bytes = lax.bitcast_convert_type(scales, jnp.uint8)  # [..., s, n, 4]
    scale_bytes = jnp.moveaxis(scale_bytes, -1, -2).reshape(*lead, 4 * num_blocks, n)
    num_rows = codes.shape[-2]
    both = jnp.concatenate([codes, scale_bytes], axis=-2)
    # Along K, devices are gathered along a new axis, because the codes of each device
    # have to be separated from its scales before the codes of all devices are joined.
    is_tiled = array_axis != -2
    both = lax.all_gather(both, axes, axis=both.ndim + array_axis, tiled=is_tiled)
    lead = both.shape[: len(lead)]

    def join_parts(parts: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return parts.reshape(*lead, -1, both.shape[-1])

    codes = join_parts(both[..., :num_rows, :])
    scale_bytes = join_parts(both[..., num_rows:, :])
    scale_bytes = scale_bytes.reshape(*lead, -1, 4, both.shape[-1])
    scale_bytes = jnp.moveaxis(scale_bytes, -2, -1)  # [..., s, n, 4]
    return codes, lax.bitcast_convert_type(scale_bytes, jnp.float32)


def device_offsets(
    offsets: Int32[Array, " experts_and_1"],
    row_axes: Axes,
    expert_axes: Axes,
    num_rows: int,
) -> Int32[Array, " device_experts_and_1"]:
    """Returns the offsets of one device's `num_rows` rows and of its experts."""
    if row_axes:
        first_row = lax.axis_index(row_axes) * num_rows
        offsets = jnp.clip(offsets - first_row, 0, num_rows)
    if expert_axes:
        num_experts = (offsets.shape[0] - 1) // lax.axis_size(expert_axes)
        first = lax.axis_index(expert_axes) * num_experts
        offsets = lax.dynamic_slice_in_dim(offsets, first, num_experts + 1)
    return offsets
