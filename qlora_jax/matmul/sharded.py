"""The product on one device or on many, in a `shard_map` over a `Layout`.

Explicit mesh axes are read from types, Auto axes from the kernel's `Placement`. In Auto
mode without one, XLA's partitioner decides, and gathers decoded weights.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh, reshard
from jaxtyping import Array

from .._jax.modes import explicit_axes, in_auto_mode, is_local, is_manual
from .._jax.pytree import take_layer
from .._jax.specs import Axes, make_spec, typed_axes
from ..quant.placement import Placement
from . import choose
from .collectives import gather_columns, gather_rows
from .layout import Layout, lay_out
from .spec import ProductSpec


class Operands(NamedTuple):
    """The arrays of a product, as in `Backend.product`; x is `[*batch, *rows, .]`."""

    x: Array
    codes: Array
    scales: Array
    layer: Array | None


@custom_vmap
def sharded_product(
    spec: ProductSpec, x: Array, codes: Array, scales: Array, layer: Array | None
) -> Array:
    """Returns `x @ W` or `x @ W^T` for x `[*batch, *rows, .]`, sharded or not."""
    operands = Operands(x, codes, scales, layer)
    if spec.mesh is not None:
        return _by_types(spec, spec.mesh, operands)
    mesh = None if is_manual() else declared_mesh(spec.placement)
    if mesh is None:
        return choose.run(spec, *operands, is_local=is_local())
    return _by_placement(spec, mesh, operands)


@sharded_product.def_vmap
def _batched(
    size: int,
    batched: list,
    spec: ProductSpec,
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array | None,
) -> tuple[Array, bool]:
    """One more row axis where only x is batched; else one more batch axis."""
    _, x_batched, codes_batched, scales_batched, layer_batched = batched
    if not (codes_batched or scales_batched or layer_batched):
        x = jnp.moveaxis(x, 0, spec.batch)
        y = sharded_product(spec, x, codes, scales, layer)
        return jnp.moveaxis(y, spec.batch, 0), True
    if layer_batched:
        # Different layers at once: they have to be cut out.
        axes = (0 if codes_batched else None, 0)
        codes = jax.vmap(take_layer, axes)(codes, layer)
        layer, codes_batched = None, True
    at = 0 if layer is None else 1  # behind the axis of layers
    codes = jnp.moveaxis(codes, 0, at) if codes_batched else _repeat(codes, size, at)
    x = x if x_batched else _repeat(x, size, 0)
    scales = scales if scales_batched else _repeat(scales, size, 0)
    spec = replace(spec, batch=spec.batch + 1)
    return sharded_product(spec, x, codes, scales, layer), True


def _repeat(a: Array, size: int, axis: int) -> Array:
    shape = (*a.shape[:axis], size, *a.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(a, axis), shape)


def _by_types(spec: ProductSpec, mesh: Any, operands: Operands) -> Array:
    """The product of operands with Explicit mesh axes."""
    x, codes, scales, layer = operands
    x_axes, weight_axes = typed_axes(x), typed_axes(codes)[layer is not None :]
    layout = lay_out(spec, mesh.shape, x_axes, weight_axes, x.shape, scales.shape)
    if {*mesh.axis_types} != {AxisType.Explicit}:
        # Types say nothing of the other axes: the product runs in Auto mode.
        run = functools.partial(sharded_product, replace(spec, mesh=None))
        return in_auto_mode(run, mesh, layout.result)(*operands)
    names = explicit_axes(mesh)
    place = lambda a, spec: reshard(a, NamedSharding(mesh, spec))
    x, scales = place(x, layout.x), place(scales, layout.weights)
    codes = place(codes, layout.weights if layer is None else layout.stack)
    placed = Operands(x, codes, scales, layer)
    if not names:
        return choose.run(spec, *placed, is_local=False)
    return _run(layout, mesh, {*names}, placed)


def declared_mesh(placement: Placement | None) -> Any:
    """The mesh of a kernel's placement, or None if that does not apply here."""
    if placement is None:
        return None
    mesh, context = placement.mesh, get_abstract_mesh()
    if context.empty:
        return mesh
    # Inside a `shard_map` over some axes, the others are still Auto.
    return context if dict(context.shape) == dict(mesh.shape) else None


def auto_axes(mesh: Any) -> set[str]:
    """The names of a mesh's Auto axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Auto}


def _by_placement(spec: ProductSpec, mesh: Any, operands: Operands) -> Array:
    """The product of operands with Auto mesh axes, sharded as the kernel declares."""
    layout = declared_layout(spec, mesh, operands.x.shape, operands.scales.shape)
    return _run(layout, mesh, auto_axes(mesh), operands)


def declared_layout(
    spec: ProductSpec, mesh: Any, x_shape: Sequence[int], scales_shape: Sequence[int]
) -> Layout:
    """Returns the layout on a mesh with Auto axes, from the kernel's placement."""
    assert spec.placement is not None
    auto = auto_axes(mesh)
    only_auto = lambda axes: tuple(a for a in axes if a in auto)
    weight_axes = spec.placement.matrix_axes(len(scales_shape))
    rows = spec.placement.row_axes(len(x_shape) - 1 - spec.batch)
    x_axes: list[Axes] = [*weight_axes[: spec.batch], *rows, ()]
    return lay_out(
        spec,
        {name: mesh.shape[name] for name in auto},
        [*map(only_auto, x_axes)],
        [*map(only_auto, weight_axes)],
        x_shape,
        scales_shape,
    )


def _run(layout: Layout, mesh: Any, axis_names: set[str], operands: Operands) -> Array:
    """Runs a layout in a `shard_map`."""
    x, codes, scales, layer = operands
    codes_spec = layout.weights if layer is None else layout.stack
    layers, layer_specs = ((), ()) if layer is None else ((layer,), (make_spec(),))
    return jax.shard_map(
        functools.partial(_on_one_device, layout),
        mesh=mesh,
        in_specs=(layout.x, codes_spec, layout.weights, *layer_specs),
        out_specs=layout.result,
        axis_names=axis_names,
        check_vma=False,
    )(x, codes, scales, *layers)


def _on_one_device(
    layout: Layout, x: Array, codes: Array, scales: Array, *layers: Array
) -> Array:
    """Gathers weights, multiplies and reduces, as the layout says."""
    layer = layers[0] if layers else None
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
    y = choose.run(spec, x, codes, scales, layer, is_local=True)
    return lax.psum(y, layout.contracted) if layout.contracted else y


def gather_weights(layout: Layout, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Gathers one device's codes and scales, as a layout says, inside a `shard_map`."""
    if layout.n.gathered:
        codes, scales = gather_columns(codes, scales, layout.n.gathered)
    if layout.k.gathered:
        codes, scales = gather_rows(codes, scales, layout.k.gathered)
    return codes, scales
