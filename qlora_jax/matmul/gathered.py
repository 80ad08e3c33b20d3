"""Gathers the packed weights of a kernel once, for several products (FSDP)."""

from dataclasses import replace
from typing import Any

from jax.sharding import AxisType
from jaxtyping import Array

from .._jax.modes import explicit_mesh, split_by
from .._jax.specs import make_spec, typed_axes
from ..quant.qtensor import QTensor, float_scales, with_scales
from .quantized import product_spec
from .sharded import MeshLayout, find_layout, gather_weights


def find_gather(q: Any, x: Array) -> MeshLayout | None:
    """Returns the layout of products with rows like those of x `[*rows, D]`.

    None if they gather no weights.
    """
    if not q.is_packed:
        return None
    mesh = explicit_mesh(x, q)
    if mesh is not None and {*mesh.axis_types} != {AxisType.Explicit}:
        return None  # types say nothing of the other axes
    spec, blocks = replace(product_spec(q), mesh=mesh), q.scales.shape
    shape = *blocks[: spec.batch], *x.shape[:-1], spec.k
    weight_axes = typed_axes(q.codes)
    x_axes = [*weight_axes[: spec.batch], *typed_axes(x)[:-1], ()]
    found = find_layout(spec, x_axes, weight_axes, shape, blocks)
    return found if found is not None and found.layout.is_gathered else None


def gathered(q: QTensor, found: MeshLayout) -> QTensor:
    """Returns a kernel on the device with codes and float32 scales gathered."""
    layout, arrays = found.layout, (q.codes, float_scales(q))
    if AxisType.Explicit in found.mesh.axis_types:
        arrays = [split_by(a, found.mesh, layout.weights) for a in arrays]
    axes = (*layout.batch, layout.k.kept, layout.n.kept)
    own, whole = (layout.weights,) * 2, (make_spec(*axes),) * 2
    codes, scales = found.run(gather_weights, own, whole)(*arrays)
    placement = q.placement and replace(q.placement, kernel=axes)
    return with_scales(replace(q, codes=codes, placement=placement), scales)
