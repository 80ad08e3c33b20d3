"""Runs a product on one device, or on several in a `shard_map`.

A `Layout` describes how arrays are split. Explicit mesh axes are read from types, and
Auto axes from the kernel's `Placement`. In Auto mode without a placement, XLA's
partitioner decides how to split the product, and gathers decoded weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, PyTree

from .._jax import modes
from .._jax.modes import (
    auto_only,
    explicit_mesh,
    split_by,
    unmapped_explicit_axes,
    with_mapped_axis,
)
from .._jax.pytree import take_layer
from .._jax.specs import AnyMesh, Axes, make_spec, mesh_axes
from ..quant.kernel import Placement
from ..quant.qtensor import QTensor, float_scales, with_scales
from ..quant.schemes import StoredScales
from . import choose
from .backends.floats import multiply_floats
from .backends.grouped import SortedRows
from .backends.reference import accumulator_dtype
from .collectives import gather, sum_over
from .layout import Layout, lay_out
from .spec import Operands, ProductSpec, product_spec


def fit_to_mesh(
    spec: ProductSpec,
    x: Array,
    weights: PyTree,
    offsets: Array | None,
    weights_move: bool,
) -> tuple[ProductSpec, Array, PyTree, Array | None]:
    """Returns the spec with the mesh of its operands, and operands that fit it.

    `weights_move` is explained in `multiply`.
    """
    x = modes.varying_with(x, weights, offsets)
    if spec.packed_as is None:
        weights = modes.varying_with(weights, x, offsets)
    mesh = explicit_mesh(x, weights, offsets)
    if mesh is None:
        mesh = declared_mesh(spec.placement)
        return replace(spec, mesh=mesh), x, weights, offsets
    operands = modes.without_mapped_axes(mesh, x, weights, offsets)
    if spec.packed_as is None:
        x, weights, _ = operands
        *lead, w_k, n = mesh_axes(weights)
        x_k = mesh_axes(x)[-1]
        k = x_k if weights_move else w_k or x_k
        experts = lead[spec.batch :]
        spec = replace(spec, weight_axes=(*experts, k, n))
    return replace(spec, mesh=mesh), *operands


def declared_mesh(placement: Placement | None) -> AnyMesh | None:
    """Returns a placement's mesh; None if the context differs or has no Auto axes."""
    if placement is None:
        return None
    mesh, context = placement.mesh, get_abstract_mesh()
    if context.empty:
        return mesh
    # Inside a `shard_map` over some of the mesh axes, the others are still Auto.
    is_same = dict(context.shape) == dict(mesh.shape)
    return context if is_same and AxisType.Auto in context.axis_types else None


def in_auto_mode(
    run: Callable[[ProductSpec, Operands], Array],
    spec: ProductSpec,
    out_spec: PartitionSpec,
) -> Callable[[Operands], Array]:
    """Wraps `run(spec, operands)` to run with all axes of an Explicit mesh as Auto."""
    assert spec.mesh is not None

    def run_in_auto_mode(operands: Operands) -> Array:
        mesh = declared_mesh(spec.placement)
        return run(replace(spec, mesh=mesh, weight_axes=None), operands)

    return modes.in_auto_mode(run_in_auto_mode, spec.mesh, out_spec)


def find_layout(
    spec: ProductSpec,
    left_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    left_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> Layout:
    """Returns the layout of a product on its mesh.

    For Explicit axes, `left_axes` and `weight_axes` come from the operands' types. For
    Auto axes, they are ignored, and the kernel's placement is used instead.
    """
    mesh = spec.mesh
    assert mesh is not None
    if spec.is_explicit:
        axis_names = unmapped_explicit_axes(mesh)
    else:
        assert spec.placement is not None
        axis_names = modes.axes_of_type(mesh, AxisType.Auto)
        weight_axes = auto_only(mesh, spec.placement.matrix_axes(len(scales_shape)))
        row_axes = spec.placement.row_axes(len(left_shape) - 1 - spec.batch)
        rows = auto_only(mesh, row_axes)
        left_axes = [*weight_axes[: spec.batch], *rows, ()]
    layout = lay_out(spec, mesh.shape, left_axes, weight_axes, left_shape, scales_shape)
    return replace(layout, mesh=mesh, axis_names=axis_names)


@custom_vmap
def compute(spec: ProductSpec, operands: Operands) -> Array:
    """Returns the product, sharded or not, in `spec.result_dtype`."""
    # 1. Without a mesh, the product runs on one device, or XLA splits it.
    if (mesh := spec.mesh) is None:
        return choose.run(spec, operands)
    # 2. Find the layout.
    left, right, scales, layer, offsets = operands
    left_axes, weight_axes = (), ()
    if spec.is_explicit:
        left_axes = mesh_axes(left)
        weight_axes = mesh_axes(right)[layer is not None :]  # skips the layers
        if spec.weight_axes is not None:
            weight_axes = [*weight_axes[: spec.batch], *spec.weight_axes]
    # Each row of float weights counts as a block, so their own shape is used. For their
    # gradient, `right` is the gradient of y, so their shape is put together.
    scales_shape = (right if scales is None else scales).shape
    if spec.output == "w":
        experts = () if offsets is None else (offsets.shape[0] - 1,)
        scales_shape = *left.shape[: spec.batch], *experts, spec.k, right.shape[-1]
    layout = find_layout(spec, left_axes, weight_axes, left.shape, scales_shape)
    layers = () if layer is None else (None,)
    right_spec = PartitionSpec(*layers, *layout.right)
    # As in `Operands`: left, right, scales, layer and offsets.
    specs = layout.left, right_spec, layout.right, PartitionSpec(), PartitionSpec()

    # 3. With Explicit axes, split the operands as the layout needs them.
    if spec.is_explicit:
        # Types show only Explicit axes, so a packed product uses Auto mode if the mesh
        # has other axes. A ragged product uses it if no `shard_map` follows, because
        # Explicit mode has no rules for its loops.
        has_other_axes = {*mesh.axis_types} != {AxisType.Explicit}
        needs_auto = spec.packed_as is not None and has_other_axes
        if needs_auto or (spec.is_ragged and not layout.axis_names):
            return in_auto_mode(compute, spec, layout.result)(operands)
        arrays = zip(operands, specs, strict=True)
        operands = Operands._make(
            None if array is None else split_by(array, mesh, array_spec)
            for array, array_spec in arrays
        )
        if not layout.axis_names:  # all Explicit axes split axes of a vmap
            return choose.run(spec, operands)

    # 4. Multiply the parts of each device. Float products with Explicit axes need this
    #    too, because XLA's partitioner computes some of them wrong
    #    (docs/development/traps.md).
    return _shard_map(_compute_on_device, layout, specs, layout.result)(*operands)


# Inside a vmap, types do not show how a mesh splits the mapped axis, and back ends
# would decode shared weights for each product. So the mapped axis becomes one of the
# axes of the operands.
@compute.def_vmap
def _compute_batch(
    size: int, is_batched: list, spec: ProductSpec, operands: Operands
) -> tuple[Array, bool]:
    left, right, scales, layer, offsets = operands
    _, is_mapped = is_batched
    left_mapped, right_mapped, scales_mapped, layer_mapped, offsets_mapped = is_mapped
    if spec.packed_as is None and spec.mesh is None and offsets is None:
        # XLA batches float products without copying an operand that is not mapped.
        axes = 0 if left_mapped else None, 0 if right_mapped else None

        def multiply_pair(left: Array, right: Array) -> Array:
            return multiply_floats(spec, Operands(left, right))

        return jax.vmap(multiply_pair, axes)(left, right), True
    if spec.is_ragged and spec.is_explicit:
        # Types do not show how the sorted rows of several products are split.
        def compute_products(spec: ProductSpec, operands: Operands) -> Array:
            return _compute_batch(size, is_batched, spec, operands)[0]

        return in_auto_mode(compute_products, spec, PartitionSpec())(operands), True
    # 1. Back ends read only one layer of a stack. If the products read different
    #    layers, or layers of different stacks of experts, slice them first.
    if layer is not None and (layer_mapped or (spec.is_ragged and right_mapped)):
        axes = 0 if right_mapped else None, 0 if layer_mapped else None
        right, layer = jax.vmap(take_layer, axes)(right, layer), None
        right_mapped = True
    # 2. A mapped axis that only the left operand has becomes one more row axis.
    if not (spec.is_ragged or spec.output == "w" or right_mapped or scales_mapped):
        left = jnp.moveaxis(left, 0, spec.batch)
        y = compute(spec, Operands(left, right, scales, layer))
        return jnp.moveaxis(y, spec.batch, 0), True
    left = with_mapped_axis(size, left, left_mapped)
    # 3. The rows of all ragged products are sorted by expert, for a single product.
    if offsets is not None:
        offsets = with_mapped_axis(size, offsets, offsets_mapped)
        has_batch_of_experts = bool(right_mapped or spec.output == "w")
        rows = SortedRows.sort(offsets, left.shape[1], has_batch_of_experts)
        if spec.output == "w":
            right = rows.take(with_mapped_axis(size, right, right_mapped))
        elif right_mapped:
            right = right.reshape(-1, *right.shape[2:])
            scales = None if scales is None else scales.reshape(-1, *scales.shape[2:])
        operands = Operands(rows.take(left), right, scales, layer, rows.offsets)
        y = compute(spec, operands)
        if spec.output == "w":
            return y.reshape(size, -1, *y.shape[1:]), True
        return rows.put_back(y), True
    # 4. Any other mapped axis becomes one more batch axis.
    right = with_mapped_axis(size, right, right_mapped)
    if layer is not None:  # the axis of layers comes first
        right = jnp.moveaxis(right, 0, 1)
    if scales is not None:
        scales = with_mapped_axis(size, scales, scales_mapped)
    spec = replace(spec, batch=spec.batch + 1)
    return compute(spec, Operands(left, right, scales, layer)), True


def _shard_map(
    fn: Callable, layout: Layout, in_specs: tuple, out_specs: PyTree
) -> Callable:
    """Returns a function that runs `fn(layout, ...)` on each device's parts."""
    return jax.shard_map(
        functools.partial(fn, layout),
        mesh=layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={*layout.axis_names},
        check_vma=False,
    )


def _compute_on_device(layout: Layout, *arrays: Any) -> Array:
    """Gathers weights, multiplies and sums in a `shard_map`, following the layout."""
    left, right, scales, layer, offsets = arrays
    spec = layout.local
    if scales is not None:
        # 1. Gather the packed weights of a single layer.
        if layer is not None and layout.is_gathered:
            right, layer = take_layer(right, layer), None
        right, scales = gather_weights(layout, right, scales)
        # 2. Check that the same mesh axes split x and the weights along the contracted
        #    axis (`Layout.contracted`).
        per_byte = spec.format.codes_per_byte
        num_rows = right.shape[-2] * per_byte
        assert spec.k <= num_rows < spec.k + per_byte, (spec, right.shape)
        k = right.shape[-1] if spec.transpose else spec.k
        assert left.shape[-1] == k, (spec, left.shape)
        assert scales.shape[-2] == -(-spec.k // spec.block_size), (spec, scales.shape)
    if offsets is not None:
        offsets = device_offsets(layout, offsets, left.shape[0])

    # 3. Multiply, and sum float32 parts over the mesh axes in `Layout.summed`.
    result_dtype = jnp.dtype(spec.result_dtype or left.dtype)
    if layout.summed:
        spec = replace(spec, result_dtype=accumulator_dtype(result_dtype).name)
    operands = Operands(left, right, scales, layer, offsets)
    y = choose.run(spec, operands, is_device=True)
    return sum_over(y, layout.summed, result_dtype)


def device_offsets(layout: Layout, offsets: Array, num_rows: int) -> Array:
    """Returns the offsets of one device's rows and experts, in a `shard_map`."""
    (row_axes,), expert_axes = layout.lead, layout.experts.active
    if row_axes:
        first_row = lax.axis_index(row_axes) * num_rows
        offsets = jnp.clip(offsets - first_row, 0, num_rows)
    if expert_axes:
        num_experts = (offsets.shape[0] - 1) // lax.axis_size(expert_axes)
        first = lax.axis_index(expert_axes) * num_experts
        offsets = lax.dynamic_slice_in_dim(offsets, first, num_experts + 1)
    return offsets


def gather_weights(layout: Layout, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Gathers codes and scales in a `shard_map`, following the layout."""
    for split, array_axis in (layout.experts, -3), (layout.n, -1), (layout.k, -2):
        if split.gathered:
            codes, scales = gather(codes, scales, split.gathered, array_axis)
    return codes, scales


# Products gather the weights of a kernel each time (FSDP). The next two functions
# gather them once, for several products.
def find_gather(q: Any, x: Array) -> Layout | None:
    """Returns the layout of products with rows that are split like those of `x`.

    Returns None if these products do not gather weights.
    """
    if not q.is_packed:
        return None
    spec, scales_shape = product_spec(q), q.scales.shape
    mesh = explicit_mesh(x, q)
    if mesh is not None and {*mesh.axis_types} != {AxisType.Explicit}:
        return None  # types show only Explicit axes
    if (mesh := mesh or declared_mesh(q.placement)) is None:
        return None
    x_shape = *scales_shape[: spec.batch], *x.shape[:-1], spec.k
    weight_axes = mesh_axes(q.codes)
    x_axes = [*weight_axes[: spec.batch], *mesh_axes(x)[:-1], ()]
    spec = replace(spec, mesh=mesh)
    layout = find_layout(spec, x_axes, weight_axes, x_shape, scales_shape)
    return layout if layout.is_gathered else None


def gathered(q: QTensor, layout: Layout) -> QTensor:
    """Gathers the codes, in device memory, and the float32 scales of a kernel."""
    arrays, mesh = [q.codes, float_scales(q)], layout.mesh
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        arrays = [split_by(array, mesh, layout.right) for array in arrays]
    axes = (*layout.batch, layout.k.active, layout.n.active)
    in_specs, out_specs = (layout.right,) * 2, (make_spec(*axes),) * 2
    gather_both = _shard_map(gather_weights, layout, in_specs, out_specs)
    codes, scales = gather_both(*arrays)
    placement = q.placement and replace(q.placement, kernel=axes)
    q = replace(q, codes=codes, placement=placement)
    return with_scales(q, StoredScales(scales))
