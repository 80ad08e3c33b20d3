"""Products of rows that are sorted by expert, computed one expert at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, PyTree

from ..._jax.modes import varying_with

# Bounds of the number of rows in a tile, which are multiplied at once. Products with
# fewer rows are slow. With larger tiles, experts that have few rows waste more work.
FEWEST_ROWS, MOST_ROWS = 8, 256

# `carry = step(start, is_expert_row, carry)`, for the tile of rows that begins at
# `start`. `is_expert_row` marks the rows of the tile that belong to the current expert.
TileStep = Callable[[Int32[Array, ""], Bool[Array, " tile"], PyTree], PyTree]
# Runs a step on each tile of the current expert's rows and returns the last carry.
ForEachTile = Callable[[TileStep, PyTree], PyTree]


def rows_at_once(num_rows: int, num_experts: int) -> int:
    """Returns the rows of a tile: about a quarter of those of an average expert."""
    if export.is_symbolic_dim(num_rows):  # there may be only one row
        return 1
    target = max(FEWEST_ROWS, num_rows // (4 * max(num_experts, 1)))
    return min(num_rows, MOST_ROWS, 2 ** (target.bit_length() - 1))


def for_each_expert(
    offsets: Int32[Array, " experts_and_1"],
    num_rows: int,
    body: Callable[[Int32[Array, ""], ForEachTile, PyTree], PyTree],
    carry: PyTree,
) -> PyTree:
    """Runs `carry = body(expert, for_each_tile, carry)` for each expert with rows."""
    num_experts = offsets.shape[0] - 1
    size = rows_at_once(num_rows, num_experts)
    if size == 0 or num_experts == 0:
        return carry
    has_rows = offsets[1:] > offsets[:-1]
    order = jnp.argsort(~has_rows, stable=True)  # experts that have rows come first

    def visit_expert(i: Array, carry: PyTree) -> PyTree:
        expert = order[i]
        first, end = offsets[expert], offsets[expert + 1]

        def for_each_tile(step: TileStep, carry: PyTree) -> PyTree:
            def visit_tile(j: Array, carry: PyTree) -> PyTree:
                # The last tile may have to begin earlier, to end within x. The mask
                # then excludes the rows of the tile before it.
                first_in_tile = first + j * size
                start = jnp.minimum(first_in_tile, num_rows - size)
                row = start + jnp.arange(size, dtype=jnp.int32)
                return step(start, (row >= first_in_tile) & (row < end), carry)

            num_tiles = -(-(end - first) // size)
            return lax.fori_loop(0, num_tiles, visit_tile, carry)

        return body(expert, for_each_tile, carry)

    return lax.fori_loop(0, jnp.sum(has_rows), visit_expert, carry)


def grouped_product(
    x: Float[Array, "m contracted"],
    offsets: Int32[Array, " experts_and_1"],
    weights: Callable[[Array], Array],
    multiply: Callable[[Array, Array], Array],
    outputs: int,
    dtype: DTypeLike,
) -> Float[Array, "m outputs"]:
    """Returns `multiply(rows, weights(expert))` of each expert's rows, in `dtype`."""
    num_rows = x.shape[0]
    size = rows_at_once(num_rows, offsets.shape[0] - 1)

    def multiply_expert(expert: Array, for_each_tile: ForEachTile, y: Array) -> Array:
        w = weights(expert)

        def multiply_tile(start: Array, is_expert_row: Array, y: Array) -> Array:
            x_tile = lax.dynamic_slice_in_dim(x, start, size)
            product = multiply(x_tile, w).astype(y.dtype)
            y_tile = lax.dynamic_slice_in_dim(y, start, size)
            y_tile = jnp.where(is_expert_row[:, None], product, y_tile)
            return lax.dynamic_update_slice_in_dim(y, y_tile, start, 0)

        return for_each_tile(multiply_tile, y)

    y = varying_with(jnp.zeros((num_rows, outputs), dtype), x, offsets)
    return for_each_expert(offsets, num_rows, multiply_expert, y)


def grouped_gradient(
    x: Float[Array, "m k"],
    g: Float[Array, "m n"],
    offsets: Int32[Array, " experts_and_1"],
    multiply: Callable[[Array, Array], Array],
    dtype: DTypeLike,
) -> Float[Array, "experts k n"]:
    """Returns `multiply(x, g)` `[K, N]` summed over each expert's rows, in `dtype`."""
    shape = offsets.shape[0] - 1, x.shape[1], g.shape[1]
    size = rows_at_once(x.shape[0], shape[0])

    def sum_expert(expert: Array, for_each_tile: ForEachTile, dw: Array) -> Array:
        def add_tile(start: Array, is_expert_row: Array, total: Array) -> Array:
            def take_expert_rows(rows: Array) -> Array:
                tile = lax.dynamic_slice_in_dim(rows, start, size)
                return jnp.where(is_expert_row[:, None], tile, 0)

            return total + multiply(take_expert_rows(x), take_expert_rows(g))

        struct = jax.eval_shape(multiply, x, g)
        zeros = varying_with(jnp.zeros(struct.shape, struct.dtype), x, g)
        total = for_each_tile(add_tile, zeros).astype(dw.dtype)
        return lax.dynamic_update_index_in_dim(dw, total, expert, 0)

    dw = varying_with(jnp.zeros(shape, dtype), x, g, offsets)
    return for_each_expert(offsets, x.shape[0], sum_expert, dw)


class SortedRows(NamedTuple):
    """The rows of a batch of ragged products `[B, M, .]`, sorted for one product."""

    order: Int32[Array, " rows"]
    offsets: Int32[Array, " experts_and_1"]
    shape: tuple[int, int]

    @classmethod
    def sort(
        cls, offsets: Array, num_rows: int, has_batch_of_experts: bool
    ) -> "SortedRows":
        """Sorts the rows by expert. Rows that belong to no expert come last.

        With `has_batch_of_experts`, each product has its own E experts, which are
        numbered from 0 to B * E - 1. Otherwise, all products share E experts.
        """
        batch, num_experts = offsets.shape[0], offsets.shape[1] - 1
        total_experts = num_experts * (batch if has_batch_of_experts else 1)

        def find_experts(i: Array, offsets: Array) -> Array:
            row = jnp.arange(num_rows, dtype=jnp.int32)
            expert = jnp.searchsorted(offsets[1:], row, side="right")
            has_expert = (row >= offsets[0]) & (expert < num_experts)
            first_expert = i * num_experts * has_batch_of_experts
            return jnp.where(has_expert, expert + first_expert, total_experts)

        expert = jax.vmap(find_experts)(jnp.arange(batch), offsets).reshape(-1)
        ends = jnp.cumsum(jnp.bincount(expert, length=total_experts), dtype=jnp.int32)
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
        return cls(jnp.argsort(expert, stable=True), offsets, (batch, num_rows))

    def take(self, x: Array) -> Array:
        """Returns the rows of an array `[B, M, .]` in sorted order."""
        return x.reshape(-1, x.shape[-1])[self.order]

    def put_back(self, y: Array) -> Array:
        """Inverts `take`."""
        y = jnp.zeros_like(y).at[self.order].set(y, unique_indices=True)
        return y.reshape(*self.shape, y.shape[-1])
