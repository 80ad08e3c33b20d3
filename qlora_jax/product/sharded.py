"""Runs a product on one device, or on several in a `shard_map`.

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
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, PyTree

from .._jax import modes
from .._jax.modes import axes_of_type, explicit_axes, explicit_mesh, split_by
from .._jax.pytree import take_layer
from .._jax.specs import AnyMesh, Axes, make_spec, typed_axes
from ..quant.kernel import Placement
from ..quant.qtensor import QTensor, float_scales, with_scales
from . import choose
from .backends.floats import float_product
from .backends.reference import accumulator_dtype
from .collectives import gather, sum_over
from .layout import Layout, lay_out
from .spec import Operands, ProductSpec, product_spec


def find_mesh(
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
    if spec.packing is None:
        weights = modes.varying_with(weights, x, offsets)
    mesh = explicit_mesh(x, weights, offsets)
    if mesh is None:
        spec = replace(spec, mesh=declared_mesh(spec.placement))
        return spec, x, weights, offsets
    operands = modes.without_mapped_axes(mesh, x, weights, offsets)
    if spec.packing is None:
        x, weights, _ = operands
        *lead, w_k, n = typed_axes(weights)
        x_k = typed_axes(x)[-1]
        k = x_k if weights_move else w_k or x_k
        spec = replace(spec, weight_axes=(*lead[spec.batch :], k, n))
    return replace(spec, mesh=mesh), *operands


def declared_mesh(placement: Placement | None) -> AnyMesh | None:
    """Returns the mesh with Auto axes that a placement is for, if it is in use."""
    if placement is None:
        return None
    mesh, context = placement.mesh, get_abstract_mesh()
    if context.empty:
        return mesh
    # Inside a `shard_map` over some axes, the others are still Auto.
    is_same = dict(context.shape) == dict(mesh.shape)
    return context if is_same and AxisType.Auto in context.axis_types else None


def in_auto_mode(
    run: Callable[[ProductSpec, Operands], Array],
    spec: ProductSpec,
    out_spec: PartitionSpec,
) -> Callable[[Operands], Array]:
    """Wraps `run(spec, operands)` to run with all axes of an Explicit mesh as Auto."""
    mesh = spec.mesh
    assert mesh is not None

    def run_in_auto_mode(operands: Operands) -> Array:
        mesh = declared_mesh(spec.placement)
        return run(replace(spec, mesh=mesh, weight_axes=None), operands)

    return modes.in_auto_mode(run_in_auto_mode, mesh, out_spec)


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
) -> MeshLayout:
    """Returns the layout of a product on its mesh.

    For Explicit axes, `x_axes` and `weight_axes` come from the operands' types. For
    Auto axes, they are ignored, and the kernel's placement is used instead.
    """
    mesh = spec.mesh
    assert mesh is not None
    if spec.is_explicit:
        axis_names = explicit_axes(mesh)
    else:
        assert spec.placement is not None
        axis_names = auto_axes = axes_of_type(mesh, AxisType.Auto)

        def take_auto(entries: Sequence[Axes]) -> list[Axes]:
            return [
                tuple(axis for axis in axes if axis in auto_axes) for axes in entries
            ]

        weight_axes = take_auto(spec.placement.matrix_axes(len(scales_shape)))
        rows = take_auto(spec.placement.row_axes(len(x_shape) - 1 - spec.batch))
        x_axes = [*weight_axes[: spec.batch], *rows, ()]
    layout = lay_out(spec, mesh.shape, x_axes, weight_axes, x_shape, scales_shape)
    return MeshLayout(layout, mesh, axis_names)


def compute(spec: ProductSpec, operands: Operands) -> Array:
    """Returns the product, sharded or not, in the dtype `spec.result`."""
    # 1. Without a mesh, the product runs on one device, or XLA splits it.
    if spec.mesh is None:
        return _compute_local(spec, operands, is_local=modes.is_local())
    # 2. Find the layout.
    left, right, scales, layer, offsets = operands
    x_axes, weight_axes = (), ()
    if spec.is_explicit:
        x_axes, weight_axes = typed_axes(left), typed_axes(right)[layer is not None :]
        if spec.weight_axes is not None:
            weight_axes = [*weight_axes[: spec.batch], *spec.weight_axes]
    blocks = right if scales is None else scales
    shape = blocks.shape
    if spec.output == "w":
        experts = () if offsets is None else (offsets.shape[0] - 1,)
        shape = *left.shape[: spec.batch], *experts, spec.k, right.shape[-1]
    mesh_layout = find_layout(spec, x_axes, weight_axes, left.shape, shape)
    layout, mesh, axis_names = mesh_layout
    right_spec = layout.right
    if layer is not None:
        right_spec = PartitionSpec(None, *right_spec)

    # 3. With Explicit axes, split the operands as the layout needs them.
    if spec.is_explicit:
        # Types show only Explicit axes, so a packed product uses Auto mode if the mesh
        # has other axes. Explicit mode has no rules for the loops of ragged products.
        has_others = {*mesh.axis_types} != {AxisType.Explicit}
        if (spec.packing and has_others) or (spec.is_ragged and not axis_names):
            return in_auto_mode(compute, spec, layout.result)(operands)
        left, right = (
            split_by(left, mesh, layout.left),
            split_by(right, mesh, right_spec),
        )
        if scales is not None:
            scales = split_by(scales, mesh, layout.right)
        if offsets is not None:
            offsets = split_by(offsets, mesh, PartitionSpec())
        if not axis_names:
            operands = Operands(left, right, scales, layer, offsets)
            return _compute_local(spec, operands, is_local=False)

    # 4. Multiply the parts of each device.
    specs = Operands(
        layout.left, right_spec, layout.right, PartitionSpec(), PartitionSpec()
    )
    run = mesh_layout.shard_map(_compute_on_device, (specs,), layout.result)
    return run(Operands(left, right, scales, layer, offsets))


def _compute_local(spec: ProductSpec, operands: Operands, is_local: bool) -> Array:
    if spec.packing is None:
        return float_product(spec, operands)
    return choose.run(spec, operands, is_local=is_local)


def _compute_on_device(layout: Layout, operands: Operands) -> Array:
    """Gathers weights, multiplies and sums in a `shard_map`, following the layout."""
    left, right, scales, layer, offsets = operands
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
    result = jnp.dtype(spec.result or left.dtype)
    if layout.summed:
        spec = replace(spec, result=accumulator_dtype(result).name)
    operands = Operands(left, right, scales, layer, offsets)
    y = _compute_local(spec, operands, is_local=True)
    return sum_over(y, layout.summed, result)


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
    spec, scales_shape = product_spec(q), q.scales.shape
    mesh = explicit_mesh(x, q)
    if mesh is not None and {*mesh.axis_types} != {AxisType.Explicit}:
        return None  # types show only Explicit axes
    if (mesh := mesh or declared_mesh(q.placement)) is None:
        return None
    x_shape = *scales_shape[: spec.batch], *x.shape[:-1], spec.k
    weight_axes = typed_axes(q.codes)
    x_axes = [*weight_axes[: spec.batch], *typed_axes(x)[:-1], ()]
    spec = replace(spec, mesh=mesh)
    mesh_layout = find_layout(spec, x_axes, weight_axes, x_shape, scales_shape)
    return mesh_layout if mesh_layout.layout.is_gathered else None


def gathered(q: QTensor, mesh_layout: MeshLayout) -> QTensor:
    """Returns a kernel in device memory with its codes and float32 scales gathered."""
    layout, mesh = mesh_layout.layout, mesh_layout.mesh
    arrays = [q.codes, float_scales(q)]
    if AxisType.Explicit in mesh.axis_types:
        arrays = [split_by(array, mesh, layout.right) for array in arrays]
    axes = (*layout.batch, layout.k.active, layout.n.active)
    in_specs, out_specs = (layout.right,) * 2, (make_spec(*axes),) * 2
    gather_both = mesh_layout.shard_map(gather_weights, in_specs, out_specs)
    codes, scales = gather_both(*arrays)
    placement = q.placement and replace(q.placement, kernel=axes)
    return with_scales(replace(q, codes=codes, placement=placement), scales)
