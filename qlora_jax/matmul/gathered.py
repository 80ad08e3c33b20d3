"""Gathers the packed weights of a kernel once, for several products (FSDP)."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, reshard
from jaxtyping import Array

from .._jax.modes import explicit_axes, explicit_mesh, is_manual
from .._jax.specs import typed_axes
from ..quant.placement import Placement
from ..quant.qtensor import QTensor, float_scales, with_scales
from .layout import Layout, lay_out
from .quantized import product_spec
from .sharded import (
    auto_axes,
    declared_layout,
    declared_mesh,
    gather_weights,
)


@dataclass(frozen=True)
class Gather:
    """The layout of a product that gathers weights, on a mesh's `axis_names`."""

    layout: Layout
    mesh: Any
    axis_names: frozenset[str]


def find_gather(q: Any, x: Array) -> Gather | None:
    """Returns what products with rows like those of x `[*rows, D]` gather, or None."""
    if not q.is_packed:
        return None
    spec, blocks = product_spec(q), q.scales.shape
    *_, k, _ = q.matrix_shape
    shape = *blocks[: spec.batch], *x.shape[:-1], k
    mesh = explicit_mesh(x, q)
    if mesh is not None:
        if {*mesh.axis_types} != {AxisType.Explicit}:
            return None  # types say nothing of the other axes
        names, weights = explicit_axes(mesh), typed_axes(q.codes)
        axes = [*weights[: spec.batch], *typed_axes(x)[:-1], ()]
        layout = lay_out(spec, mesh.shape, axes, weights, shape, blocks)
    else:
        mesh = declared_mesh(q.placement)
        if mesh is None or is_manual():
            return None
        names = frozenset(auto_axes(mesh))
        layout = declared_layout(spec, mesh, shape, blocks)
    return Gather(layout, mesh, names) if layout.is_gathered else None


def gathered(q: QTensor, gather: Gather) -> QTensor:
    """Returns a kernel on the device with codes and float32 scales gathered."""
    layout, place = gather.layout, lambda a: a
    if AxisType.Explicit in gather.mesh.axis_types:
        sharding = NamedSharding(gather.mesh, layout.weights)
        place = lambda a: reshard(a, sharding)
    codes, scales = jax.shard_map(
        functools.partial(gather_weights, layout),
        mesh=gather.mesh,
        in_specs=(layout.weights, layout.weights),
        out_specs=(layout.gathered_weights, layout.gathered_weights),
        axis_names={*gather.axis_names},
        check_vma=False,
    )(place(q.codes), place(float_scales(q)))
    placement = _gathered_placement(q.placement, layout)
    return with_scales(replace(q, codes=codes, placement=placement), scales)


def _gathered_placement(
    placement: Placement | None, layout: Layout
) -> Placement | None:
    if placement is None:
        return None
    return replace(placement, kernel=(*layout.batch, layout.k.kept, layout.n.kept))
