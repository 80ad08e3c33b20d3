"""Products of rows, sorted by expert, with their experts, which are packed or float."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.lax import PrecisionLike
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

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
from .._jax.specs import (
    AnyMesh,
    Axes,
    fitting,
    make_spec,
    spec_of,
    typed_axes,
    unused,
    ways,
)
from ..quant.kernel import PackedInput, Placement
from .backends.grouped import SortedRows, grouped_gradient, grouped_product
from .backends.reference import accumulator_dtype, dot
from .choose import checked_backend
from .collectives import sum_over
from .floats import OPERANDS, Name
from .quantized import packed_product
from .sharded import declared_mesh, device_offsets
from .spec import product_spec


def ragged_matmul(
    x: Float[Array, "m k"],
    w: PackedInput,
    offsets: Int32[Array, " experts_and_1"],
    backend: str | Sequence[str] | None = None,
    precision: PrecisionLike = None,
    result: DTypeLike | None = None,
) -> Float[Array, "m n"]:
    """Returns the product of each row of x with its packed expert.

    Rows `offsets[e]` to `offsets[e + 1]` belong to expert e. Weights and sums are
    rounded as in `matmul`.
    """
    mesh, x, q, layer, offsets = for_product(x, w.q, w.layer, offsets)
    spec = replace(
        product_spec(q),
        batch=0,
        is_ragged=True,
        mesh=mesh,
        backend=checked_backend(backend),
        precision=precision,
        result=None if result is None else jnp.dtype(result).name,
    )
    return packed_product(spec, x, q, layer, offsets)


def offsets_of(
    group_sizes: Int[Array, " experts"], num_rows: int, num_experts: int
) -> Int32[Array, " experts_and_1"]:
    """Returns offsets: rows `offsets[e]` to `offsets[e + 1]` belong to expert e."""
    sizes = as_array("group_sizes", group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers. Got {sizes.dtype}.")
    if sizes.shape != (num_experts,):
        raise ValueError(
            f"`group_sizes` must have shape [{num_experts}], one for each expert. Got "
            f"{sizes.shape}."
        )
    if (values := known_values(group_sizes)) is not None:
        if np.any(values < 0):
            raise ValueError(f"`group_sizes` must not be negative. Got {values}.")
        if values.sum() > num_rows:
            raise ValueError(
                f"`group_sizes` must sum to at most the {num_rows} rows of `x`. Got "
                f"{values.sum()}."
            )
    # Inside a trace, the sum cannot be checked. Ends after the last row are clipped.
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


@jax.tree_util.register_static
@dataclass(frozen=True)
class _RaggedProduct:
    """How to compute the rows x, the rows y or the experts w from the other two."""

    output: Name
    precision: PrecisionLike
    result: DTypeLike | None  # the dtype of y; None for the dtype of x
    # On a mesh, the product is a `shard_map` over `axis_names`. The fields after it are
    # the mesh axes that split the rows, the experts, K and N.
    mesh: AnyMesh | None = None
    axis_names: frozenset[str] = frozenset()
    rows: Axes = ()
    experts: Axes = ()
    k: Axes = ()
    n: Axes = ()


def ragged_float_product(
    x: Float[Array, "m k"],
    w: Float[Array, "experts k n"],
    offsets: Int32[Array, " experts_and_1"],
    precision: PrecisionLike = None,
    result: DTypeLike | None = None,
    placement: Placement | None = None,
    roles: str = "kn",
) -> Float[Array, "m n"]:
    """Returns the product of each row of x, sorted by expert, with its expert.

    The result has the dtype `result`, or else the dtype of `x`. `placement` is the
    placement of the experts' kernel, which is used for Auto mesh axes. `roles` lists
    the axes that `w` shares with this kernel: "k", "n" or "kn".
    """
    # The mesh axes that split the rows, the experts, K and N come from the operands'
    # types (Explicit axes) or from the placement (Auto axes).
    mesh, x, w, offsets = for_product(x, varying_with(w, x, offsets), offsets)
    product = _RaggedProduct("y", precision, result)
    if mesh is not None:
        (rows, k), (experts, _, n) = typed_axes(x), typed_axes(w)
        axis_names = explicit_axes(mesh)
    elif not is_manual() and (mesh := declared_mesh(placement)) is not None:
        assert placement is not None
        (rows,), (experts, k, n) = placement.row_axes(1), placement.matrix_axes(3)
        k, n = k if "k" in roles else (), n if "n" in roles else ()
        axis_names = axes_of_type(mesh, AxisType.Auto)
    else:
        return _multiply(product, x, w, offsets)
    if axis_names:
        # A mesh axis can split only one axis of an array, and has to divide its size.
        sizes = {name: mesh.shape[name] for name in axis_names}
        used: set[str] = set()
        split_axes: list[Axes] = []
        for axes, size in zip(
            (rows, experts, k, n), (x.shape[0], *w.shape), strict=True
        ):
            axes = tuple(name for name in axes if name in axis_names)
            split_axes.append(fitting(unused(axes, used), sizes, size))
            used.update(split_axes[-1])
        product = _RaggedProduct("y", precision, result, mesh, axis_names, *split_axes)
    return _multiply(product, x, w, offsets)


@custom_vmap
def _compute(
    product: _RaggedProduct, left: Array, right: Array, offsets: Array
) -> Array:
    result = jnp.dtype((product.output == "y" and product.result) or left.dtype)
    mesh = product.mesh
    if mesh is None:
        compute = functools.partial(_compute_in_loops, product, result)
        # Explicit mode has no sharding rules for the slices of rows in these loops.
        return call_in_auto_mode(
            compute, lambda _: PartitionSpec(), left, right, offsets
        )
    row_axes, expert_axes, k, n = product.rows, product.experts, product.k, product.n
    specs = {
        "x": make_spec(row_axes, k),
        "w": make_spec(expert_axes, k, n),
        "y": make_spec(row_axes, n),
    }
    # Results are summed over the mesh axes that split a contracted axis. They are also
    # summed over those that split experts, because each device computes zeros for rows
    # of other devices' experts.
    summed = {"y": expert_axes + k, "x": expert_axes + n, "w": row_axes}[product.output]

    def compute_on_device(left: Array, right: Array, offsets: Array) -> Array:
        num_experts = (offsets.shape[0] - 1) // ways(mesh.shape, expert_axes)
        num_rows = left.shape[0]
        offsets = device_offsets(offsets, num_rows, row_axes, num_experts, expert_axes)
        part_dtype = accumulator_dtype(result) if summed else result
        part = _compute_in_loops(product, part_dtype, left, right, offsets)
        return sum_over(part, summed, result)

    left_name, right_name = OPERANDS[product.output]
    in_specs = (specs[left_name], specs[right_name], PartitionSpec())
    if explicit_mesh(left, right) is not None:
        operands = zip((left, right, offsets), in_specs, strict=True)
        left, right, offsets = (split_by(a, mesh, spec) for a, spec in operands)
    return jax.shard_map(
        compute_on_device,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=specs[product.output],
        axis_names={*product.axis_names},
        check_vma=False,
    )(left, right, offsets)


def _compute_in_loops(
    product: _RaggedProduct, dtype: np.dtype, left: Array, right: Array, offsets: Array
) -> Array:
    if product.output == "w":

        def sum_over_rows(x: Array, g: Array) -> Array:
            return lax.dot_general(
                x,
                g,
                (((0,), (0,)), ((), ())),
                precision=product.precision,
                preferred_element_type=accumulator_dtype(x.dtype),
            )

        return grouped_gradient(left, right, offsets, sum_over_rows, dtype)
    is_transposed = product.output == "x"
    multiply = functools.partial(
        dot, transpose=is_transposed, precision=product.precision
    )
    outputs = right.shape[-2 if is_transposed else -1]

    def take_expert(expert: Array) -> Array:
        return take_layer(right, expert).astype(left.dtype)

    return grouped_product(left, offsets, take_expert, multiply, outputs, dtype)


@_compute.def_vmap
def _compute_batch(
    size: int,
    is_batched: list,
    product: _RaggedProduct,
    left: Array,
    right: Array,
    offsets: Array,
) -> tuple[Array, bool]:
    # Sorts the rows of all products in the batch by expert, and computes one product.
    # On a mesh, XLA decides how the sorted rows are split.
    if product.mesh is not None:
        product = _RaggedProduct(product.output, product.precision, product.result)
    _, left_batched, right_batched, offsets_batched = is_batched
    has_batch_of_experts = right_batched or product.output == "w"

    def compute_sorted(left: Array, right: Array, offsets: Array) -> Array:
        left = with_mapped_axis(size, left, left_batched)
        offsets = with_mapped_axis(size, offsets, offsets_batched)
        rows = SortedRows.sort(offsets, left.shape[1], has_batch_of_experts)
        if product.output == "w":
            right = rows.take(with_mapped_axis(size, right, right_batched))
            dw = _compute(product, rows.take(left), right, rows.offsets)
            return dw.reshape(size, -1, *dw.shape[1:])
        if has_batch_of_experts:
            right = right.reshape(-1, *right.shape[2:])
        y = _compute(product, rows.take(left), right, rows.offsets)
        return rows.put_back(y)

    y = call_in_auto_mode(
        compute_sorted, lambda _: PartitionSpec(), left, right, offsets
    )
    return y, True


# For the rows x_e of expert e, y_e = x_e w_e. So dx_e = g_e w_e^T and dw_e = x_e^T g_e,
# where g is first cast to the dtype of x. See `_multiply` in floats.py for the reason.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _RaggedProduct, x: Array, w: Array, offsets: Array) -> Array:
    return _compute(product, x, w, offsets)


def _multiply_fwd(
    product: _RaggedProduct, x: Array, w: Array, offsets: Array
) -> tuple[Array, tuple]:
    return _compute(product, x, w, offsets), (x, w, offsets)


def _multiply_bwd(
    product: _RaggedProduct, residuals: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, None]:
    x, w, offsets = residuals
    g = g.astype(x.dtype)
    dx = _compute(replace(product, output="x"), g, w, offsets)
    dw = _compute(replace(product, output="w"), x, g, offsets).astype(w.dtype)
    if (mesh := explicit_mesh(x, w)) is not None:
        dx, dw = split_by(dx, mesh, spec_of(x)), split_by(dw, mesh, spec_of(w))
    return dx, dw, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
