"""The product on one device or on many, in a `shard_map` over a `Layout`.

Explicit mesh axes are read from types, Auto axes from the kernel's `Placement`. In Auto
mode without one, XLA's partitioner decides, and gathers decoded weights.
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
from jaxtyping import Array

from .._jax.modes import (
    axes_of_type,
    explicit_axes,
    in_auto_mode,
    is_local,
    is_manual,
    split_by,
    with_mapped_axis,
)
from .._jax.pytree import take_layer
from .._jax.specs import Axes, typed_axes
from ..quant.placement import Placement
from . import choose
from .backends.grouped import SortedRows
from .backends.reference import accumulator_dtype
from .collectives import gather, sum_over
from .layout import Layout, lay_out
from .spec import Operands, ProductSpec


class MeshLayout(NamedTuple):
    """The layout of a product, and the mesh axes that its `shard_map` is over."""

    layout: Layout
    mesh: Any
    names: frozenset[str]

    def run(self, fn: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        """Returns `fn(layout, ...)` of one device's parts as a function of arrays."""
        return jax.shard_map(
            functools.partial(fn, self.layout),
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={*self.names},
            check_vma=False,
        )


def find_layout(
    spec: ProductSpec,
    x_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    x_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> MeshLayout | None:
    """Returns the layout of a product on its mesh; None if no mesh is known.

    The axes are those of types, for a mesh with Explicit axes. Over Auto axes the
    kernel's placement says them.
    """
    if spec.mesh is not None:
        sizes = spec.mesh.shape
        layout = lay_out(spec, sizes, x_axes, weight_axes, x_shape, scales_shape)
        return MeshLayout(layout, spec.mesh, explicit_axes(spec.mesh))
    mesh = None if is_manual() else declared_mesh(spec.placement)
    if mesh is None:
        return None
    assert spec.placement is not None
    auto = axes_of_type(mesh, AxisType.Auto)
    only_auto = lambda axes: tuple(a for a in axes if a in auto)
    weight_axes = [*map(only_auto, spec.placement.matrix_axes(len(scales_shape)))]
    rows = spec.placement.row_axes(len(x_shape) - 1 - spec.batch)
    x_axes = [*weight_axes[: spec.batch], *map(only_auto, rows), ()]
    sizes = {name: mesh.shape[name] for name in auto}
    layout = lay_out(spec, sizes, x_axes, weight_axes, x_shape, scales_shape)
    return MeshLayout(layout, mesh, auto)


def declared_mesh(placement: Placement | None) -> Any:
    """The mesh of a kernel's placement, or None if that does not apply here."""
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
    x, codes, scales, layer, offsets = operands
    axes: tuple[Any, Any] = (), ()
    if spec.mesh is not None:
        axes = typed_axes(x), typed_axes(codes)[layer is not None :]
    found = find_layout(spec, *axes, x.shape, scales.shape)
    if found is None:
        return choose.run(spec, operands, is_local=is_local())
    layout, mesh, names = found
    codes_spec = layout.weights
    if layer is not None:
        codes_spec = PartitionSpec(None, *codes_spec)
    if spec.mesh is not None:
        if {*mesh.axis_types} != {AxisType.Explicit}:
            # Types say nothing of the other axes: the product runs in Auto mode.
            run = functools.partial(sharded_product, replace(spec, mesh=None))
            return in_auto_mode(run, mesh, layout.result)(operands)
        x, codes = split_by(x, mesh, layout.x), split_by(codes, mesh, codes_spec)
        scales = split_by(scales, mesh, layout.weights)
        if offsets is not None:
            offsets = split_by(offsets, mesh, PartitionSpec())
        if not names:
            placed = Operands(x, codes, scales, layer, offsets)
            return choose.run(spec, placed, is_local=False)
    in_specs = (layout.x, codes_spec, layout.weights, PartitionSpec())
    run = found.run(_on_one_device, in_specs, layout.result)
    return run(x, codes, scales, (layer, offsets))


@sharded_product.def_vmap
def _batched(
    size: int, batched: list, spec: ProductSpec, operands: Operands
) -> tuple[Array, bool]:
    """One more row axis where only x is batched; else one more batch axis."""
    x, codes, scales, layer, _ = operands
    _, (x_batched, codes_batched, scales_batched, layer_batched, _) = batched
    if spec.is_ragged:
        return _ragged_batched(size, batched[1], spec, operands), True
    if not (codes_batched or scales_batched or layer_batched):
        operands = operands._replace(x=jnp.moveaxis(x, 0, spec.batch))
        return jnp.moveaxis(sharded_product(spec, operands), spec.batch, 0), True
    if layer_batched:
        # Different layers at once: they have to be cut out.
        axes = (0 if codes_batched else None, 0)
        codes = jax.vmap(take_layer, axes)(codes, layer)
        layer, codes_batched = None, True
    mapped = functools.partial(with_mapped_axis, size)
    codes = mapped(codes, codes_batched)
    if layer is not None:  # behind the axis of layers
        codes = jnp.moveaxis(codes, 0, 1)
    x, scales = mapped(x, x_batched), mapped(scales, scales_batched)
    spec = replace(spec, batch=spec.batch + 1)
    return sharded_product(spec, Operands(x, codes, scales, layer)), True


def _ragged_batched(
    size: int, batched: Any, spec: ProductSpec, operands: Operands
) -> Array:
    """One product of all rows, sorted by expert again."""
    if spec.mesh is not None:  # types say nothing of sorted rows
        run = functools.partial(
            _ragged_batched, size, batched, replace(spec, mesh=None)
        )
        return in_auto_mode(run, spec.mesh, PartitionSpec())(operands)
    x, codes, scales, layer, offsets = operands
    x_batched, own_experts, _, layer_batched, offsets_batched = batched
    mapped = functools.partial(with_mapped_axis, size)
    if layer is not None and (own_experts or layer_batched):
        axes = (0 if own_experts else None, 0 if layer_batched else None)
        codes, layer, own_experts = jax.vmap(take_layer, axes)(codes, layer), None, True
    if own_experts:
        codes, scales = (a.reshape(-1, *a.shape[2:]) for a in (codes, scales))
    x, offsets = mapped(x, x_batched), mapped(offsets, offsets_batched)
    rows = SortedRows.of(offsets, x.shape[1], own_experts)
    operands = Operands(rows.take(x), codes, scales, layer, rows.offsets)
    return rows.put_back(sharded_product(spec, operands))


def _on_one_device(
    layout: Layout, x: Array, codes: Array, scales: Array, numbers: tuple
) -> Array:
    """Gathers weights, multiplies and sums, as the layout says."""
    layer, offsets = numbers
    if layer is not None and layout.is_gathered:
        codes, layer = take_layer(codes, layer), None
    codes, scales = gather_weights(layout, codes, scales)
    spec = layout.local
    # The weights are now those of x's own slice of what is contracted: mesh axes that
    # split x split them, and no others do (`Layout.contracted`), and sizes agree.
    per_byte = spec.format.codes_per_byte
    rows = codes.shape[-2] * per_byte
    assert spec.k <= rows < spec.k + per_byte, (spec, codes.shape)
    assert x.shape[-1] == (codes.shape[-1] if spec.transpose else spec.k), x.shape
    assert scales.shape[-2] == -(-spec.k // spec.block_size), (spec, scales.shape)
    if offsets is not None:
        (rows,), experts = layout.lead, layout.experts.kept
        offsets = own_offsets(offsets, x.shape[0], rows, scales.shape[0], experts)
    result = jnp.dtype(spec.result or x.dtype)
    if layout.summed:
        spec = replace(spec, result=accumulator_dtype(result).name)
    y = choose.run(spec, Operands(x, codes, scales, layer, offsets), is_local=True)
    return sum_over(y, layout.summed, result)


def own_offsets(
    offsets: Array, rows: int, row_axes: Axes, experts: int, expert_axes: Axes
) -> Array:
    """Returns the offsets of one device's rows and experts, in a `shard_map`."""
    if row_axes:
        offsets = jnp.clip(offsets - lax.axis_index(row_axes) * rows, 0, rows)
    if expert_axes:
        first = lax.axis_index(expert_axes) * experts
        offsets = lax.dynamic_slice_in_dim(offsets, first, experts + 1)
    return offsets


def gather_weights(layout: Layout, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Gathers one device's codes and scales, as a layout says, inside a `shard_map`."""
    if layout.experts.gathered:
        codes, scales = gather(codes, scales, layout.experts.gathered, -3)
    if layout.n.gathered:
        codes, scales = gather(codes, scales, layout.n.gathered, -1)
    if layout.k.gathered:
        codes, scales = gather(codes, scales, layout.k.gathered, -2)
    return codes, scales
