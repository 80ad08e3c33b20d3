"""Products of rows that are sorted by expert with a stack of experts, packed or not."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from .._jax.memory import is_concrete
from .._jax.modes import call_in_auto_mode, for_product, varying_with, with_mapped_axis
from .._jax.pytree import take_layer
from ..quant.kernel import PackedInput
from .backends.grouped import SortedRows, grouped_gradient, grouped_product
from .backends.reference import accumulator_dtype, dot
from .choose import checked_backend
from .quantized import packed_product, product_spec


def ragged_matmul(
    x: Float[Array, "m k"],
    w: PackedInput,
    offsets: Int32[Array, " experts_and_1"],
    backend: str | Sequence[str] | None = None,
    precision: Any = None,
    result: Any = None,
) -> Float[Array, "m n"]:
    """Returns the product of each row of x with its packed expert, as `matmul` does.

    In the dtype `result`, or that of `x`.
    """
    mesh, x, q, layer, offsets = for_product(x, w.q, w.layer, offsets)
    settings = {
        "backend": checked_backend(backend),
        "precision": precision,
        "result": None if result is None else jnp.dtype(result).name,
    }
    spec = replace(product_spec(q), batch=0, is_ragged=True, mesh=mesh, **settings)
    return packed_product(spec, x, q, layer, offsets)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Product:
    """One of the products among the rows x and y and the experts w `[E, K, N]`."""

    of: Literal["x", "w", "y"]  # the result
    precision: Any
    result: Any  # the dtype of y


def ragged_float_product(
    x: Float[Array, "m k"],
    w: Float[Array, "experts k n"],
    offsets: Int32[Array, " experts_and_1"],
    precision: Any = None,
    result: Any = None,
) -> Float[Array, "m n"]:
    """Returns the product of each row of x with its expert.

    In the dtype `result`, or that of `x`.
    """
    _, x, w, offsets = for_product(x, varying_with(w, x, offsets), offsets)
    return _multiply(_Product("y", precision, result), x, w, offsets)


@custom_vmap
def _compute(product: _Product, left: Array, right: Array, offsets: Array) -> Array:
    run = functools.partial(_in_loops, product)
    return call_in_auto_mode(run, lambda _: PartitionSpec(), left, right, offsets)


def _in_loops(product: _Product, left: Array, right: Array, offsets: Array) -> Array:
    settings: Any = {"precision": product.precision}
    if product.of == "w":
        # Summed over rows.
        multiply = lambda x, g: jax.lax.dot_general(
            x,
            g,
            (((0,), (0,)), ((), ())),
            preferred_element_type=accumulator_dtype(x.dtype),
            **settings,
        )
        return grouped_gradient(left, right, offsets, multiply)
    is_transposed = product.of == "x"
    weights = lambda e: take_layer(right, e).astype(left.dtype)
    multiply = functools.partial(dot, transpose=is_transposed, **settings)
    outputs = right.shape[-2 if is_transposed else -1]
    dtype = (product.of == "y" and product.result) or left.dtype
    return grouped_product(left, offsets, weights, multiply, outputs, dtype)


@_compute.def_vmap
def _batched(
    size: int, batched: list, product: _Product, left: Array, right: Array, offsets: Any
) -> tuple[Array, bool]:
    """One product of all rows, sorted by expert again."""
    _, left_batched, right_batched, offsets_batched = batched
    mapped = functools.partial(with_mapped_axis, size)
    left, offsets = mapped(left, left_batched), mapped(offsets, offsets_batched)
    own_experts = right_batched or product.of == "w"
    rows = SortedRows.of(offsets, left.shape[1], own_experts)
    if product.of == "w":
        right = rows.take(mapped(right, right_batched))
        dw = _compute(product, rows.take(left), right, rows.offsets)
        return dw.reshape(size, -1, *dw.shape[1:]), True
    if own_experts:
        right = right.reshape(-1, *right.shape[2:])
    y = _compute(product, rows.take(left), right, rows.offsets)
    return rows.put_back(y), True


# The derivation is that of `floats`, for each expert.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _Product, x: Array, w: Array, offsets: Array) -> Array:
    return _compute(product, x, w, offsets)


def _multiply_fwd(
    product: _Product, x: Array, w: Array, offsets: Array
) -> tuple[Array, tuple]:
    return _compute(product, x, w, offsets), (x, w, offsets)


def _multiply_bwd(
    product: _Product, residuals: tuple, g: Array
) -> tuple[Array, Array, None]:
    x, w, offsets = residuals
    g = g.astype(x.dtype)
    dx = _compute(replace(product, of="x"), g, w, offsets)
    dw = _compute(replace(product, of="w"), x, g, offsets)
    return dx, dw.astype(w.dtype), None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def offsets_of(group_sizes: Any, rows: Any, experts: int) -> Array:
    """Returns where the rows of each expert begin and end, int32 `[E + 1]`."""
    sizes = jnp.asarray(group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers. Got {sizes.dtype}.")
    if sizes.shape != (experts,):
        raise ValueError(
            f"`group_sizes` must have shape [{experts}], one for each expert. Got "
            f"{sizes.shape}."
        )
    if is_concrete(sizes) and sizes.size:
        with jax.ensure_compile_time_eval():
            least, total = int(jnp.min(sizes)), int(jnp.sum(sizes))
        if least < 0:
            raise ValueError(f"`group_sizes` must not be negative. Got {sizes}.")
        if total > rows:
            raise ValueError(
                f"`group_sizes` must sum to at most the {rows} rows of `x`. Got "
                f"{total}."
            )
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
