"""Products of rows that are sorted by expert with a stack of experts, packed or not."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int32

from .._jax.arguments import as_array, known_values
from .._jax.modes import (
    axes_of_type,
    call_in_auto_mode,
    explicit_axes,
    explicit_mesh,
    for_product,
    is_manual,
    split_by,
    varying_with,
    with_mapped_axis,
)
from .._jax.pytree import take_layer
from .._jax.specs import Axes, fitting, make_spec, spec_of, typed_axes, unused, ways
from ..quant.kernel import PackedInput
from ..quant.placement import Placement
from .backends.grouped import SortedRows, grouped_gradient, grouped_product
from .backends.reference import accumulator_dtype, dot
from .choose import checked_backend
from .collectives import sum_over
from .quantized import packed_product, product_spec
from .sharded import declared_mesh, own_offsets


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
class _RaggedProduct:
    """One of the products among the rows x and y and the experts w `[E, K, N]`."""

    of: Literal["x", "w", "y"]  # the result
    precision: Any
    result: Any  # the dtype of y
    # Over which the product is a `shard_map`, and the mesh axes of rows, experts, K, N.
    mesh: Any = None
    names: frozenset[str] = frozenset()
    rows: Axes = ()
    experts: Axes = ()
    k: Axes = ()
    n: Axes = ()


def ragged_float_product(
    x: Float[Array, "m k"],
    w: Float[Array, "experts k n"],
    offsets: Int32[Array, " experts_and_1"],
    precision: Any = None,
    result: Any = None,
    placement: Placement | None = None,
    roles: str = "kn",
) -> Float[Array, "m n"]:
    """Returns the product of each row of x with its expert.

    In the dtype `result`, or that of `x`.

    Args:
        x: Rows, sorted by expert.
        w: The experts.
        offsets: Where the rows of each expert begin and end.
        precision: As in `jax.lax.dot_general`.
        result: The dtype.
        placement: That of the experts' kernel, over Auto mesh axes.
        roles: Which of the kernel's axes `w` has.
    """
    mesh, x, w, offsets = for_product(x, varying_with(w, x, offsets), offsets)
    product = _RaggedProduct("y", precision, result)
    axes: tuple[Axes, ...] | None = None
    if mesh is not None:
        (rows, k), (experts, _, n) = typed_axes(x), typed_axes(w)
        axes, names = (rows, experts, k, n), explicit_axes(mesh)
    elif not is_manual() and (mesh := declared_mesh(placement)) is not None:
        assert placement is not None
        experts, k, n = placement.matrix_axes(3)
        axes, names = (
            (*placement.row_axes(1), experts, k, n),
            axes_of_type(mesh, AxisType.Auto),
        )
        axes = (*axes[:2], k if "k" in roles else (), n if "n" in roles else ())
    if mesh is not None and axes is not None and names:
        sizes, used, found = {name: mesh.shape[name] for name in names}, set(), []
        for own, size in zip(axes, (x.shape[0], *w.shape), strict=True):
            kept = tuple(name for name in own if name in names)
            found.append(fitting(unused(kept, used), sizes, size))
            used.update(found[-1])
        product = _RaggedProduct("y", precision, result, mesh, names, *found)
    return _multiply(product, x, w, offsets)


@custom_vmap
def _compute(
    product: _RaggedProduct, left: Array, right: Array, offsets: Array
) -> Array:
    result = jnp.dtype((product.of == "y" and product.result) or left.dtype)
    if product.mesh is None:
        run = functools.partial(_in_loops, product, result)
        return call_in_auto_mode(run, lambda _: PartitionSpec(), left, right, offsets)
    p = product
    specs = {
        "x": make_spec(p.rows, p.k),
        "w": make_spec(p.experts, p.k, p.n),
        "y": make_spec(p.rows, p.n),
    }
    summed = {"y": p.experts + p.k, "x": p.experts + p.n, "w": p.rows}[p.of]
    names = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}[p.of]

    def on_one_device(left: Array, right: Array, offsets: Array) -> Array:
        experts = (offsets.shape[0] - 1) // ways(p.mesh.shape, p.experts)
        own = own_offsets(offsets, left.shape[0], p.rows, experts, p.experts)
        wide = accumulator_dtype(result) if summed else result
        part = _in_loops(p, wide, left, right, own)
        return sum_over(part, summed, result)

    in_specs = (*(specs[name] for name in names), PartitionSpec())
    if explicit_mesh(left, right) is not None:
        operands = zip((left, right, offsets), in_specs, strict=True)
        left, right, offsets = (split_by(a, p.mesh, spec) for a, spec in operands)
    return jax.shard_map(
        on_one_device,
        mesh=p.mesh,
        in_specs=in_specs,
        out_specs=specs[p.of],
        axis_names={*p.names},
        check_vma=False,
    )(left, right, offsets)


def _in_loops(
    product: _RaggedProduct, result: Any, left: Array, right: Array, offsets: Array
) -> Array:
    settings: Any = {"precision": product.precision}
    if product.of == "w":
        # Summed over rows.
        multiply = lambda x, g: lax.dot_general(
            x,
            g,
            (((0,), (0,)), ((), ())),
            preferred_element_type=accumulator_dtype(x.dtype),
            **settings,
        )
        return grouped_gradient(left, right, offsets, multiply, result)
    is_transposed = product.of == "x"
    weights = lambda e: take_layer(right, e).astype(left.dtype)
    multiply = functools.partial(dot, transpose=is_transposed, **settings)
    outputs = right.shape[-2 if is_transposed else -1]
    return grouped_product(left, offsets, weights, multiply, outputs, result)


@_compute.def_vmap
def _batched(
    size: int,
    batched: list,
    product: _RaggedProduct,
    left: Array,
    right: Array,
    offsets: Any,
) -> tuple[Array, bool]:
    """One product of all rows, sorted by expert again."""
    if product.mesh is not None:  # XLA splits sorted rows
        product = _RaggedProduct(product.of, product.precision, product.result)
    if explicit_mesh(left, right, offsets) is not None:
        run = functools.partial(_batched_in_loops, size, batched, product)
        out = lambda _: PartitionSpec()
        return call_in_auto_mode(run, out, left, right, offsets), True
    return _batched_in_loops(size, batched, product, left, right, offsets), True


def _batched_in_loops(
    size: int,
    batched: list,
    product: _RaggedProduct,
    left: Array,
    right: Array,
    offsets: Any,
) -> Array:
    _, left_batched, right_batched, offsets_batched = batched
    mapped = functools.partial(with_mapped_axis, size)
    left, offsets = mapped(left, left_batched), mapped(offsets, offsets_batched)
    own_experts = right_batched or product.of == "w"
    rows = SortedRows.of(offsets, left.shape[1], own_experts)
    if product.of == "w":
        right = rows.take(mapped(right, right_batched))
        dw = _compute(product, rows.take(left), right, rows.offsets)
        return dw.reshape(size, -1, *dw.shape[1:])
    if own_experts:
        right = right.reshape(-1, *right.shape[2:])
    y = _compute(product, rows.take(left), right, rows.offsets)
    return rows.put_back(y)


# The derivation is that of `floats`, for each expert.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _RaggedProduct, x: Array, w: Array, offsets: Array) -> Array:
    return _compute(product, x, w, offsets)


def _multiply_fwd(
    product: _RaggedProduct, x: Array, w: Array, offsets: Array
) -> tuple[Array, tuple]:
    return _compute(product, x, w, offsets), (x, w, offsets)


def _multiply_bwd(
    product: _RaggedProduct, residuals: tuple, g: Array
) -> tuple[Array, Array, None]:
    x, w, offsets = residuals
    g = g.astype(x.dtype)
    dx = _compute(replace(product, of="x"), g, w, offsets)
    dw = _compute(replace(product, of="w"), x, g, offsets).astype(w.dtype)
    if (mesh := explicit_mesh(x, w)) is not None:
        dx, dw = split_by(dx, mesh, spec_of(x)), split_by(dw, mesh, spec_of(w))
    return dx, dw, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def offsets_of(group_sizes: Any, rows: Any, experts: int) -> Array:
    """Returns where the rows of each expert begin and end, int32 `[E + 1]`."""
    sizes = as_array("group_sizes", group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers. Got {sizes.dtype}.")
    if sizes.shape != (experts,):
        raise ValueError(
            f"`group_sizes` must have shape [{experts}], one for each expert. Got "
            f"{sizes.shape}."
        )
    if (values := known_values(group_sizes)) is not None:
        if np.any(values < 0):
            raise ValueError(f"`group_sizes` must not be negative. Got {values}.")
        if values.sum() > rows:
            raise ValueError(
                f"`group_sizes` must sum to at most the {rows} rows of `x`. Got "
                f"{values.sum()}."
            )
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
