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
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec
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
from .._jax.specs import Axes, make_spec, mesh_axes
from ..quant.kernel import declared_mesh
from ..quant.qtensor import QTensor, float_scales, with_scales
from ..quant.schemes import StoredScales
from . import choose
from .backends.grouped import SortedRows
from .backends.reference import accumulator_dtype
from .collectives import device_offsets, gather, sum_over
from .layout import Layout, lay_out
from .spec import Operands, ProductSpec, product_spec


def in_auto_mode(
    run: Callable[[ProductSpec, Operands], Array],
    spec: ProductSpec,
    out_spec: PartitionSpec,
) -> Callable[[Operands], Array]:
    """Wraps `run(spec, operands)` to run with all axes of an Explicit mesh as Auto."""
    assert spec.mesh is not None

    def run_in_auto_mode(operands: Operands) -> Array:
        return run(replace(spec, mesh=declared_mesh(spec.placement)), operands)

    return modes.in_auto_mode(run_in_auto_mode, spec.mesh, out_spec)


def find_layout(
    spec: ProductSpec,
    x_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    x_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> Layout:
    """Returns the layout of a product on its mesh.

    For Explicit axes, `x_axes` and `weight_axes` come from the operands' types. For
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
        row_axes = spec.placement.row_axes(len(x_shape) - 1 - spec.batch)
        rows = auto_only(mesh, row_axes)
        x_axes = [*weight_axes[: spec.batch], *rows, ()]
    layout = lay_out(spec, mesh.shape, x_axes, weight_axes, x_shape, scales_shape)
    return replace(layout, mesh=mesh, axis_names=axis_names)


@custom_vmap
def compute(spec: ProductSpec, operands: Operands) -> Array:
    """Returns the product, sharded or not, in `spec.result_dtype`."""
    # 1. Without a mesh, the product runs on one device, or XLA splits it.
    if (mesh := spec.mesh) is None:
        return choose.run(spec, operands)
    # 2. Find the layout.
    x, codes, scales, layer, _ = operands
    x_axes, weight_axes = (), ()
    if spec.is_explicit:
        x_axes = mesh_axes(x)
        weight_axes = mesh_axes(codes)[layer is not None :]  # skips the layers
    layout = find_layout(spec, x_axes, weight_axes, x.shape, scales.shape)
    layers = () if layer is None else (None,)
    codes_spec = PartitionSpec(*layers, *layout.weights)
    specs = layout.x, codes_spec, layout.weights, PartitionSpec(), PartitionSpec()

    # 3. With Explicit axes, split the operands as the layout needs them.
    if spec.is_explicit:
        # Types show only Explicit axes, so the product uses Auto mode if the mesh has
        # other axes. A ragged product uses it if no `shard_map` follows, because
        # Explicit mode has no rules for its loops.
        has_other_axes = {*mesh.axis_types} != {AxisType.Explicit}
        if has_other_axes or (spec.is_ragged and not layout.axis_names):
            return in_auto_mode(compute, spec, layout.result)(operands)
        arrays = zip(operands, specs, strict=True)
        operands = Operands._make(
            None if array is None else split_by(array, mesh, array_spec)
            for array, array_spec in arrays
        )
        if not layout.axis_names:  # all Explicit axes split axes of a vmap
            return choose.run(spec, operands)

    # 4. Multiply the parts of each device.
    return _shard_map(_compute_on_device, layout, specs, layout.result)(*operands)


# Inside a vmap, types do not show how a mesh splits the mapped axis, and back ends
# would decode shared weights for each product. So the mapped axis becomes one of the
# axes of the operands.
@compute.def_vmap
def _compute_batch(
    size: int, is_batched: list, spec: ProductSpec, operands: Operands
) -> tuple[Array, bool]:
    x, codes, scales, layer, offsets = operands
    _, is_mapped = is_batched
    x_mapped, codes_mapped, scales_mapped, layer_mapped, offsets_mapped = is_mapped
    if spec.is_ragged and spec.is_explicit:
        # Types do not show how the sorted rows of several products are split.
        def compute_products(spec: ProductSpec, operands: Operands) -> Array:
            return _compute_batch(size, is_batched, spec, operands)[0]

        return in_auto_mode(compute_products, spec, PartitionSpec())(operands), True
    # 1. Back ends read only one layer of a stack. If the products read different
    #    layers, or layers of different stacks of experts, slice them first.
    if layer is not None and (layer_mapped or (spec.is_ragged and codes_mapped)):
        axes = 0 if codes_mapped else None, 0 if layer_mapped else None
        codes, layer = jax.vmap(take_layer, axes)(codes, layer), None
        codes_mapped = True
    # 2. A mapped axis that only x has becomes one more row axis.
    if not (spec.is_ragged or codes_mapped or scales_mapped):
        x = jnp.moveaxis(x, 0, spec.batch)
        y = compute(spec, Operands(x, codes, scales, layer))
        return jnp.moveaxis(y, spec.batch, 0), True
    x = with_mapped_axis(size, x, x_mapped)
    # 3. The rows of all ragged products are sorted by expert, for a single product.
    if offsets is not None:
        offsets = with_mapped_axis(size, offsets, offsets_mapped)
        rows = SortedRows.sort(offsets, x.shape[1], bool(codes_mapped))
        if codes_mapped:
            codes = codes.reshape(-1, *codes.shape[2:])
            scales = scales.reshape(-1, *scales.shape[2:])
        operands = Operands(rows.take(x), codes, scales, layer, rows.offsets)
        return rows.put_back(compute(spec, operands)), True
    # 4. Any other mapped axis becomes one more batch axis.
    codes = with_mapped_axis(size, codes, codes_mapped)
    if layer is not None:  # the axis of layers comes first
        codes = jnp.moveaxis(codes, 0, 1)
    scales = with_mapped_axis(size, scales, scales_mapped)
    spec = replace(spec, batch=spec.batch + 1)
    return compute(spec, Operands(x, codes, scales, layer)), True


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
    x, codes, scales, layer, offsets = arrays
    spec = layout.local
    # 1. Gather the weights of a single layer.
    if layer is not None and layout.is_gathered:
        codes, layer = take_layer(codes, layer), None
    codes, scales = gather_weights(layout, codes, scales)
    # 2. Check that the same mesh axes split x and the weights along the contracted axis
    #    (`Layout.contracted`).
    contracted = codes.shape[-1] if spec.transpose else spec.k
    assert x.shape[-1] == contracted, (spec, x.shape)
    assert scales.shape[-2] == spec.k // spec.block_size, (spec, scales.shape)
    if offsets is not None:
        (row_axes,), expert_axes = layout.lead, layout.experts.active
        offsets = device_offsets(offsets, row_axes, expert_axes, x.shape[0])

    # 3. Multiply, and sum float32 parts over the mesh axes in `Layout.summed`.
    result_dtype = spec.result_dtype
    if layout.summed:
        spec = replace(spec, result_dtype=accumulator_dtype(result_dtype))
    operands = Operands(x, codes, scales, layer, offsets)
    y = choose.run(spec, operands)
    return sum_over(y, layout.summed, result_dtype)


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
    spec, scales_shape = product_spec(q, x.dtype), q.scales.shape
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
        arrays = [split_by(array, mesh, layout.weights) for array in arrays]
    axes = (*layout.batch, layout.k.active, layout.n.active)
    in_specs, out_specs = (layout.weights,) * 2, (make_spec(*axes),) * 2
    gather_both = _shard_map(gather_weights, layout, in_specs, out_specs)
    codes, scales = gather_both(*arrays)
    placement = q.placement and replace(q.placement, kernel=axes)
    q = replace(q, codes=codes, placement=placement)
    return with_scales(q, StoredScales(scales))
