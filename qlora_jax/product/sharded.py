"""Runs packed products on one device, or on several in a `shard_map`.

A `Layout` describes how arrays are split. Explicit mesh axes are read from types, and
Auto axes from the kernel's `Placement`. In Auto mode without a placement, XLA's
partitioner decides how to split the product, and gathers decoded weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, PyTree

from .._jax.modes import (
    axes_of_type,
    explicit_axes,
    explicit_mesh,
    in_auto_mode,
    is_local,
    is_manual,
    split_by,
    with_mapped_axis,
)
from .._jax.pytree import take_layer
from .._jax.specs import AnyMesh, Axes, make_spec, typed_axes
from ..quant.kernel import Placement
from ..quant.qtensor import QTensor, float_scales, with_scales
from . import choose
from .backends.grouped import SortedRows
from .backends.reference import accumulator_dtype
from .collectives import gather, sum_over
from .layout import Layout, lay_out
from .spec import Operands, ProductSpec, product_spec


class MeshLayout(NamedTuple):
    """The layout of a product, and the mesh axes of its `shard_map`."""

    layout: Layout
    mesh: AnyMesh
    axis_names: frozenset[str]

    def shard_map(self, fn: Callable, in_specs: tuple, out_specs: PyTree) -> Callable:
        """Returns a function that runs `fn(layout, ...)` on each device's parts."""
        return jax.shard_map(
            functools.partial(fn, self.layout),
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={*self.axis_names},
            check_vma=False,
        )


def find_layout(
    spec: ProductSpec,
    x_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    x_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> MeshLayout | None:
    """Returns the layout of a product on its mesh, or None if no mesh is known.

    For Explicit axes, `x_axes` and `weight_axes` come from the operands' types. For
    Auto axes, they are ignored, and the kernel's placement is used instead.
    """
    if spec.mesh is not None:
        sizes = spec.mesh.shape
        layout = lay_out(spec, sizes, x_axes, weight_axes, x_shape, scales_shape)
        return MeshLayout(layout, spec.mesh, explicit_axes(spec.mesh))
    mesh = None if is_manual() else declared_mesh(spec.placement)
    if mesh is None:
        return None
    assert spec.placement is not None
    auto_axes = axes_of_type(mesh, AxisType.Auto)

    def take_auto(entries: Sequence[Axes]) -> list[Axes]:
        return [tuple(axis for axis in axes if axis in auto_axes) for axes in entries]

    weight_axes = take_auto(spec.placement.matrix_axes(len(scales_shape)))
    rows = take_auto(spec.placement.row_axes(len(x_shape) - 1 - spec.batch))
    x_axes = [*weight_axes[: spec.batch], *rows, ()]
    sizes = {name: mesh.shape[name] for name in auto_axes}
    layout = lay_out(spec, sizes, x_axes, weight_axes, x_shape, scales_shape)
    return MeshLayout(layout, mesh, auto_axes)


def declared_mesh(placement: Placement | None) -> AnyMesh | None:
    """Returns the mesh for a placement, or None if the current mesh differs from it."""
    if placement is None:
        return None
    mesh, context = placement.mesh, get_abstract_mesh()
    if context.empty:
        return mesh
    # Inside a `shard_map` over some axes, the others are still Auto.
    return context if dict(context.shape) == dict(mesh.shape) else None


@custom_vmap
def sharded_product(spec: ProductSpec, operands: Operands) -> Array:
    """Returns `x @ W` or `x @ W^T` for x `[*batch, *rows, .]`, sharded or not."""
    # 1. Find the layout. Without one, the product runs on one device, or XLA splits it.
    x, codes, scales, layer, offsets = operands
    x_axes, weight_axes = (), ()
    if spec.mesh is not None:
        x_axes, weight_axes = typed_axes(x), typed_axes(codes)[layer is not None :]
    mesh_layout = find_layout(spec, x_axes, weight_axes, x.shape, scales.shape)
    if mesh_layout is None:
        return choose.run(spec, operands, is_local=is_local())
    layout, mesh, axis_names = mesh_layout
    codes_spec = layout.weights
    if layer is not None:
        codes_spec = PartitionSpec(None, *codes_spec)

    # 2. With Explicit axes, split the operands as the layout needs them.
    if spec.mesh is not None:
        if {*mesh.axis_types} != {AxisType.Explicit}:
            # Types show only Explicit axes. This mesh has others, so use Auto mode.
            run = functools.partial(sharded_product, replace(spec, mesh=None))
            return in_auto_mode(run, mesh, layout.result)(operands)
        x, codes = split_by(x, mesh, layout.x), split_by(codes, mesh, codes_spec)
        scales = split_by(scales, mesh, layout.weights)
        if offsets is not None:
            offsets = split_by(offsets, mesh, PartitionSpec())
        if not axis_names:
            split_operands = Operands(x, codes, scales, layer, offsets)
            return choose.run(spec, split_operands, is_local=False)

    # 3. Multiply the parts of each device.
    in_specs = (layout.x, codes_spec, layout.weights, PartitionSpec())
    run = mesh_layout.shard_map(_multiply_on_device, in_specs, layout.result)
    return run(x, codes, scales, (layer, offsets))


@sharded_product.def_vmap
def _batched_product(
    size: int, is_batched: list, spec: ProductSpec, operands: Operands
) -> tuple[Array, bool]:
    # The mapped axis becomes one more row axis if only x has it, and otherwise one more
    # batch axis.
    x, codes, scales, layer, _ = operands
    _, (x_batched, codes_batched, scales_batched, layer_batched, _) = is_batched
    if spec.is_ragged:
        return _batched_ragged_product(size, is_batched[1], spec, operands), True
    if not (codes_batched or scales_batched or layer_batched):
        operands = operands._replace(x=jnp.moveaxis(x, 0, spec.batch))
        return jnp.moveaxis(sharded_product(spec, operands), spec.batch, 0), True
    if layer is not None and layer_batched:
        # Back ends read only one layer of a stack. If the products read different
        # layers, slice them first.
        axes = (0 if codes_batched else None, 0)
        codes = jax.vmap(take_layer, axes)(codes, layer)
        layer, codes_batched = None, True
    codes = with_mapped_axis(size, codes, codes_batched)
    if layer is not None:  # the axis of layers comes first
        codes = jnp.moveaxis(codes, 0, 1)
    x = with_mapped_axis(size, x, x_batched)
    scales = with_mapped_axis(size, scales, scales_batched)
    spec = replace(spec, batch=spec.batch + 1)
    return sharded_product(spec, Operands(x, codes, scales, layer)), True


def _batched_ragged_product(
    size: int, is_batched: Operands, spec: ProductSpec, operands: Operands
) -> Array:
    # Sorts the rows of all products in the batch by expert, and computes one product.
    if spec.mesh is not None:  # types do not show how sorted rows are split
        run = functools.partial(
            _batched_ragged_product, size, is_batched, replace(spec, mesh=None)
        )
        return in_auto_mode(run, spec.mesh, PartitionSpec())(operands)
    x, codes, scales, layer, offsets = operands
    x_batched, experts_batched, _, layer_batched, offsets_batched = is_batched
    if layer is not None and (experts_batched or layer_batched):
        axes = (0 if experts_batched else None, 0 if layer_batched else None)
        codes = jax.vmap(take_layer, axes)(codes, layer)
        layer, experts_batched = None, True
    if experts_batched:
        codes, scales = (a.reshape(-1, *a.shape[2:]) for a in (codes, scales))
    x = with_mapped_axis(size, x, bool(x_batched))
    assert offsets is not None
    offsets = with_mapped_axis(size, offsets, bool(offsets_batched))
    rows = SortedRows.sort(offsets, x.shape[1], bool(experts_batched))
    operands = Operands(rows.take(x), codes, scales, layer, rows.offsets)
    return rows.put_back(sharded_product(spec, operands))


def _multiply_on_device(
    layout: Layout,
    x: Array,
    codes: Array,
    scales: Array,
    layer_and_offsets: tuple[Array | None, Array | None],
) -> Array:
    """Gathers weights, multiplies and sums in a `shard_map`, following the layout."""
    # 1. Gather the weights of a single layer.
    layer, offsets = layer_and_offsets
    if layer is not None and layout.is_gathered:
        codes, layer = take_layer(codes, layer), None
    codes, scales = gather_weights(layout, codes, scales)

    # 2. Check that the same mesh axes split x and the weights along the contracted axis
    #    (`Layout.contracted`).
    spec = layout.local
    per_byte = spec.format.codes_per_byte
    num_rows = codes.shape[-2] * per_byte
    assert spec.k <= num_rows < spec.k + per_byte, (spec, codes.shape)
    assert x.shape[-1] == (codes.shape[-1] if spec.transpose else spec.k), x.shape
    assert scales.shape[-2] == -(-spec.k // spec.block_size), (spec, scales.shape)
    if offsets is not None:
        (row_axes,), expert_axes = layout.lead, layout.experts.active
        num_experts = scales.shape[0]
        offsets = device_offsets(
            offsets, x.shape[0], row_axes, num_experts, expert_axes
        )

    # 3. Multiply, and sum float32 parts over the mesh axes in `Layout.summed`.
    result = jnp.dtype(spec.result or x.dtype)
    if layout.summed:
        spec = replace(spec, result=accumulator_dtype(result).name)
    y = choose.run(spec, Operands(x, codes, scales, layer, offsets), is_local=True)
    return sum_over(y, layout.summed, result)


def device_offsets(
    offsets: Array, num_rows: int, row_axes: Axes, num_experts: int, expert_axes: Axes
) -> Array:
    """Returns the offsets of one device's rows and experts, in a `shard_map`."""
    if row_axes:
        first_row = lax.axis_index(row_axes) * num_rows
        offsets = jnp.clip(offsets - first_row, 0, num_rows)
    if expert_axes:
        first = lax.axis_index(expert_axes) * num_experts
        offsets = lax.dynamic_slice_in_dim(offsets, first, num_experts + 1)
    return offsets


def gather_weights(layout: Layout, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Gathers codes and scales in a `shard_map`, following the layout."""
    if layout.experts.gathered:
        codes, scales = gather(codes, scales, layout.experts.gathered, -3)
    if layout.n.gathered:
        codes, scales = gather(codes, scales, layout.n.gathered, -1)
    if layout.k.gathered:
        codes, scales = gather(codes, scales, layout.k.gathered, -2)
    return codes, scales


# Products gather the weights of a kernel each time (FSDP). The next two functions
# gather them once, for several products.
def find_gather(q: Any, x: Array) -> MeshLayout | None:
    """Returns the layout of products with rows that are split like those of `x`.

    Returns None if these products do not gather weights.
    """
    if not q.is_packed:
        return None
    mesh = explicit_mesh(x, q)
    if mesh is not None and {*mesh.axis_types} != {AxisType.Explicit}:
        return None  # types show only Explicit axes
    spec, scales_shape = replace(product_spec(q), mesh=mesh), q.scales.shape
    x_shape = *scales_shape[: spec.batch], *x.shape[:-1], spec.k
    weight_axes = typed_axes(q.codes)
    x_axes = [*weight_axes[: spec.batch], *typed_axes(x)[:-1], ()]
    mesh_layout = find_layout(spec, x_axes, weight_axes, x_shape, scales_shape)
    if mesh_layout is None or not mesh_layout.layout.is_gathered:
        return None
    return mesh_layout


def gathered(q: QTensor, mesh_layout: MeshLayout) -> QTensor:
    """Returns a kernel in device memory with its codes and float32 scales gathered."""
    layout, mesh = mesh_layout.layout, mesh_layout.mesh
    arrays = [q.codes, float_scales(q)]
    if AxisType.Explicit in mesh.axis_types:
        arrays = [split_by(array, mesh, layout.weights) for array in arrays]
    axes = (*layout.batch, layout.k.active, layout.n.active)
    in_specs, out_specs = (layout.weights,) * 2, (make_spec(*axes),) * 2
    gather_both = mesh_layout.shard_map(gather_weights, in_specs, out_specs)
    codes, scales = gather_both(*arrays)
    placement = q.placement and replace(q.placement, kernel=axes)
    return with_scales(replace(q, codes=codes, placement=placement), scales)
