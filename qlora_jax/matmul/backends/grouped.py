"""Products of rows that are sorted by expert, with one expert's weights at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float, Int32

from ..._jax.modes import varying_with

# Rows that are multiplied at once: with fewer, products are slow, and with more, those
# of an expert are padded by more.
FEWEST_ROWS, MOST_ROWS = 8, 256


def rows_at_once(rows: Any, experts: int) -> int:
    """Returns the rows of a tile: about a quarter of those of an expert."""
    if export.is_symbolic_dim(rows):  # there may be a single one
        return 1
    wanted = max(FEWEST_ROWS, rows // (4 * max(experts, 1)))
    return min(rows, MOST_ROWS, 2 ** (wanted.bit_length() - 1))


def for_each_expert(
    offsets: Int32[Array, " experts_and_1"],
    rows: Any,
    body: Callable[[Any, Callable[[Callable, Any], Any], Any], Any],
    carry: Any,
) -> Any:
    """Calls `carry = body(expert, for_each_tile, carry)` for experts that have rows.

    `for_each_tile(step, carry)` calls `carry = step(start, mine, carry)` for each tile
    of the expert's rows: where it starts, and which of its rows are the expert's.
    """
    experts = offsets.shape[0] - 1
    size = rows_at_once(rows, experts)
    if size == 0 or experts == 0:
        return carry
    has_rows = offsets[1:] > offsets[:-1]
    order = jnp.argsort(~has_rows, stable=True)

    def one(i: Any, carry: Any) -> Any:
        expert = order[i]
        first, end = offsets[expert], offsets[expert + 1]

        def for_each_tile(step: Callable, carry: Any) -> Any:
            def tile(j: Any, carry: Any) -> Any:
                # The last tile starts so that it ends with the rows.
                wanted = first + j * size
                start = jnp.minimum(wanted, rows - size)
                at = start + jnp.arange(size, dtype=jnp.int32)
                return step(start, (at >= wanted) & (at < end), carry)

            return lax.fori_loop(0, -(-(end - first) // size), tile, carry)

        return body(expert, for_each_tile, carry)

    return lax.fori_loop(0, jnp.sum(has_rows), one, carry)


def grouped_product(
    x: Float[Array, "m contracted"],
    offsets: Int32[Array, " experts_and_1"],
    weights: Callable[[Any], Any],
    multiply: Callable[[Array, Any], Array],
    outputs: int,
    dtype: Any,
) -> Float[Array, "m outputs"]:
    """Returns `multiply(rows, weights(expert))` of the rows of each expert.

    In `dtype`. Weights are computed once for all rows of an expert.
    """
    rows = x.shape[0]
    size = rows_at_once(rows, offsets.shape[0] - 1)

    def of_expert(expert: Any, for_each_tile: Callable, y: Array) -> Array:
        w = weights(expert)

        def step(start: Any, mine: Array, y: Array) -> Array:
            cut = lambda a: lax.dynamic_slice_in_dim(a, start, size)
            new = multiply(cut(x), w).astype(y.dtype)
            part = jnp.where(mine[:, None], new, cut(y))
            return lax.dynamic_update_slice_in_dim(y, part, start, 0)

        return for_each_tile(step, y)

    y = varying_with(jnp.zeros((rows, outputs), dtype), x, offsets)
    return for_each_expert(offsets, rows, of_expert, y)


def grouped_gradient(
    x: Float[Array, "m k"],
    g: Float[Array, "m n"],
    offsets: Int32[Array, " experts_and_1"],
    multiply: Callable[[Array, Array], Array],
    dtype: Any,
) -> Float[Array, "experts k n"]:
    """Returns the sums of `multiply(x, g)`, `[K, N]`, over the rows of each expert.

    In `dtype`.
    """
    shape = offsets.shape[0] - 1, x.shape[1], g.shape[1]
    size = rows_at_once(x.shape[0], shape[0])

    def of_expert(expert: Any, for_each_tile: Callable, dw: Array) -> Array:
        def step(start: Any, mine: Array, total: Array) -> Array:
            cut = lambda a: lax.dynamic_slice_in_dim(a, start, size)
            own = lambda a: jnp.where(mine[:, None], cut(a), 0)
            return total + multiply(own(x), own(g))

        like = jax.eval_shape(multiply, x, g)
        total = for_each_tile(step, varying_with(jnp.zeros(*_of(like)), x, g))
        return lax.dynamic_update_index_in_dim(dw, total.astype(dw.dtype), expert, 0)

    dw = varying_with(jnp.zeros(shape, dtype), x, g, offsets)
    return for_each_expert(offsets, x.shape[0], of_expert, dw)


def _of(like: Any) -> tuple[tuple[int, ...], Any]:
    return like.shape, like.dtype


class SortedRows(NamedTuple):
    """The rows of a batch of ragged products `[B, M, .]`, sorted for one product."""

    order: Int32[Array, " rows"]
    offsets: Int32[Array, " experts_and_1"]
    shape: tuple[Any, Any]

    @classmethod
    def of(cls, offsets: Array, rows: Any, own_experts: bool) -> "SortedRows":
        """Sorts by expert; with `own_experts`, by expert `[B * E]`.

        Rows of no expert come last.
        """
        batch, experts = offsets.shape[0], offsets.shape[1] - 1
        total = experts * (batch if own_experts else 1)

        def expert_of_rows(i: Array, offsets: Array) -> Array:
            at = jnp.arange(rows, dtype=jnp.int32)
            expert = jnp.searchsorted(offsets[1:], at, side="right")
            has_expert = (at >= offsets[0]) & (expert < experts)
            return jnp.where(has_expert, expert + i * experts * own_experts, total)

        expert = jax.vmap(expert_of_rows)(jnp.arange(batch), offsets).reshape(-1)
        ends = jnp.cumsum(jnp.bincount(expert, length=total), dtype=jnp.int32)
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
        return cls(jnp.argsort(expert, stable=True), offsets, (batch, rows))

    def take(self, x: Array) -> Array:
        """Returns the rows of `[B, M, .]`, sorted."""
        return x.reshape(-1, x.shape[-1])[self.order]

    def put_back(self, y: Array) -> Array:
        """Inverts `take`."""
        y = jnp.zeros_like(y).at[self.order].set(y, unique_indices=True)
        return y.reshape(*self.shape, y.shape[-1])
