"""Products with float weights, such as A and B of a LoRA.

On one device, and over Auto mesh axes, they are plain operations of XLA. Over Explicit
mesh axes, a `shard_map` multiplies the parts of each device, because XLA's partitioner
computes some dots wrong (docs/development/traps.md).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.lax import PrecisionLike
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .._jax import modes
from .._jax.pytree import take_layer
from .._jax.specs import (
    AnyMesh,
    Axes,
    dividing_prefix,
    free_prefix,
    make_spec,
    mesh_axes,
)
from ..quant.kernel import Placement, declared_mesh
from .backends.grouped import grouped_gradient, grouped_product
from .backends.reference import accumulator_dtype, dot
from .collectives import device_offsets, sum_over

# If x has at most this many elements, `_weight_gradient` does not swap operands.
LARGEST_UNSWAPPED = 2**16

# Each of x, w and y = x w is a product of the two others: dx = g w^T, dw = x^T g, where
# the gradient g has the shape of y. The operands of each are listed left, then right.
ArrayName = Literal["x", "w", "y"]
OPERANDS: dict[ArrayName, tuple[ArrayName, ArrayName]] = {
    "y": ("x", "w"),
    "x": ("y", "w"),
    "w": ("x", "y"),
}


class _Split(NamedTuple):
    """The mesh axes that split each axis of a product. A mesh axis splits only one."""

    lead: tuple[Axes, ...]  # batch and rows
    experts: Axes
    k: Axes
    n: Axes


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Plan:
    """The static facts of a product y of x `[*batch, *rows, K]`, or of a gradient."""

    batch: int  # the number of batch axes, not counting experts
    precision: PrecisionLike
    dtype: np.dtype  # of the result
    output: ArrayName = "y"  # what is computed from the two others
    mesh: AnyMesh | None = None  # of the `shard_map`, which splits `axis_names`
    axis_names: frozenset[str] = frozenset()
    split: _Split = _Split((), (), (), ())


def float_product(
    x: Float[Array, "*batch_rows k"],
    w: Float[Array, "*batch k n"],
    precision: PrecisionLike = None,
    dtype: DTypeLike | None = None,
    *,
    weights_move: bool = True,
) -> Float[Array, "*batch_rows n"]:
    """Returns `x @ w` in `dtype`, or else in the float32 or float64 of its sums.

    Both have the same batch axes and dtype. If they are split differently along K over
    Explicit mesh axes, w is resharded to match x, or if not `weights_move`, x to match
    w.
    """
    plan = _Plan(w.ndim - 2, precision, jnp.dtype(dtype or accumulator_dtype(x.dtype)))
    x, w = modes.varying_with(x, w), modes.varying_with(w, x)
    if (mesh := modes.explicit_mesh(x, w)) is None:
        return _product(plan, x, w, None)
    x, w = modes.without_mapped_axes(mesh, x, w)
    *x_lead, x_k = mesh_axes(x)
    *batch, w_k, n = mesh_axes(w)
    k = x_k if weights_move else w_k or x_k
    return _product(
        _over_explicit(plan, mesh, x_lead, [*batch, k, n], x, w), x, w, None
    )


def ragged_float_product(
    x: Float[Array, "m k"],
    w: Float[Array, "experts k n"],
    offsets: Int32[Array, " experts_and_1"],
    precision: PrecisionLike = None,
    dtype: DTypeLike | None = None,
    *,
    placement: Placement | None = None,
    shared: str = "kn",
) -> Float[Array, "m n"]:
    """Returns the products of rows with their experts, in `dtype`, or that of `x`.

    Rows `offsets[e]` to `offsets[e + 1]` of x are multiplied by `w[e]`. `placement` is
    that of the experts' kernel, for Auto mesh axes, and `shared` names the axes that w
    shares with this kernel: "k" for A, "n" for B.
    """
    # `lax.ragged_dot` multiplies all rows by all experts on CPUs and GPUs.
    plan = _Plan(0, precision, jnp.dtype(dtype or x.dtype))
    x, w = modes.varying_with(x, w, offsets), modes.varying_with(w, x, offsets)
    if (mesh := modes.explicit_mesh(x, w, offsets)) is not None:
        x, w, offsets = modes.without_mapped_axes(mesh, x, w, offsets)
        rows, k = mesh_axes(x)
        experts, _, n = mesh_axes(w)
        plan = _over_explicit(plan, mesh, [rows], [experts, k, n], x, w)
    elif placement is not None and (mesh := declared_mesh(placement)) is not None:
        experts, k, n = modes.auto_only(mesh, placement.matrix_axes(3))
        w_axes = [experts, k if "k" in shared else (), n if "n" in shared else ()]
        rows = modes.auto_only(mesh, placement.row_axes(1))
        split = _find_split(mesh.shape, rows, w_axes, x.shape, w.shape, 0)
        axis_names = modes.axes_of_type(mesh, AxisType.Auto)
        plan = replace(plan, mesh=mesh, axis_names=axis_names, split=split)
    return _product(plan, x, w, offsets)


def _over_explicit(
    plan: _Plan,
    mesh: AnyMesh,
    x_lead: Sequence[Axes],
    w_axes: Sequence[Axes],
    x: Array,
    w: Array,
) -> _Plan:
    split = _find_split(mesh.shape, x_lead, w_axes, x.shape, w.shape, plan.batch)
    axis_names = modes.unmapped_explicit_axes(mesh)
    return replace(plan, mesh=mesh, axis_names=axis_names, split=split)


def _find_split(
    sizes: Mapping[str, int],
    x_lead: Sequence[Axes],
    w_axes: Sequence[Axes],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    batch: int,
) -> _Split:
    """Assigns each mesh axis to one axis of the product, the rows before the weights.

    `x_lead` splits `[*batch, *rows]`, and `w_axes` splits `[*batch, K, N]`, or experts
    `[E, K, N]`.
    """
    used: set[str] = set()

    def assign(axes: Axes, size: int) -> Axes:
        axes = dividing_prefix(free_prefix(axes, used), sizes, size)
        used.update(axes)
        return axes

    leads = [w or x for w, x in zip(w_axes[:batch], x_lead, strict=False)]
    leads += x_lead[batch:]
    lead = tuple(map(assign, leads, x_shape))
    weights = zip(w_axes[batch:], w_shape[batch:], strict=True)
    *experts, k, n = (assign(axes, size) for axes, size in weights)
    return _Split(lead, experts[0] if experts else (), k, n)


# Sums are float32 and rounded once, and g is cast to the dtype of x: autodiff would
# multiply float32 by bfloat16, which is several times slower on devices with bfloat16
# matrix units. Gradients are products with custom gradients, too, because JAX cannot
# differentiate the loops of a ragged product.
@jax.custom_vjp
def _product(plan: _Plan, left: Array, right: Array, offsets: Array | None) -> Array:
    """Returns the array that `plan.output` names."""
    if plan.mesh is None:
        return _multiply(plan, left, right, offsets)
    return _multiply_on_mesh(plan, left, right, offsets)


def _product_fwd(
    plan: _Plan, left: Array, right: Array, offsets: Array | None
) -> tuple[Array, tuple]:
    return _product(plan, left, right, offsets), (plan, left, right, offsets)


def _product_bwd(residuals: tuple, g: Array) -> tuple:
    plan, left, right, offsets = residuals
    left_name, right_name = OPERANDS[plan.output]
    g = g.astype(left.dtype)
    arrays = {left_name: left, right_name: right, plan.output: g}

    def gradient(name: ArrayName) -> Array:
        operands = (arrays[operand] for operand in OPERANDS[name])
        gradient_plan = replace(plan, output=name, dtype=arrays[name].dtype)
        d = _product(gradient_plan, *operands, offsets)
        return modes.with_sharding_of(d, arrays[name])

    return None, gradient(left_name), gradient(right_name), None


_product.defvjp(_product_fwd, _product_bwd)


def _multiply_on_mesh(
    plan: _Plan, left: Array, right: Array, offsets: Array | None
) -> Array:
    mesh, dtype = plan.mesh, plan.dtype
    assert mesh is not None
    lead, experts, k, n = plan.split
    specs = {
        "x": make_spec(*lead, k),
        "w": make_spec(*lead[: plan.batch], *[experts] * (offsets is not None), k, n),
        "y": make_spec(*lead, n),
    }
    # A device computes zeros for the rows of other devices' experts.
    rows = sum(lead[plan.batch :], ())
    summed = {"y": k + experts, "x": n + experts, "w": rows}[plan.output]
    in_specs = [specs[name] for name in OPERANDS[plan.output]]
    if AxisType.Explicit in mesh.axis_types:
        operands = zip((left, right), in_specs, strict=True)
        left, right = (modes.split_by(a, mesh, spec) for a, spec in operands)

    def multiply_on_device(left: Array, right: Array, offsets: Array | None) -> Array:
        if offsets is not None:
            (row_axes,) = lead
            num_rows = left.shape[0]
            offsets = device_offsets(offsets, row_axes, experts, num_rows)
        part_dtype = accumulator_dtype(dtype) if summed else dtype
        part_plan = replace(plan, dtype=part_dtype)
        return sum_over(_multiply(part_plan, left, right, offsets), summed, dtype)

    if plan.axis_names:
        return jax.shard_map(
            multiply_on_device,
            mesh=mesh,
            in_specs=(*in_specs, make_spec()),
            out_specs=specs[plan.output],
            axis_names={*plan.axis_names},
            check_vma=False,
        )(left, right, offsets)
    multiply = functools.partial(_multiply, plan)
    # All Explicit axes split axes of a `vmap`. Explicit mode has no rules for the loops
    # of a ragged product.
    if offsets is not None:
        multiply = modes.in_auto_mode(multiply, mesh, specs[plan.output])
    return multiply(left, right, offsets)


def _multiply(plan: _Plan, left: Array, right: Array, offsets: Array | None) -> Array:
    """Multiplies arrays that are on one device, or that XLA splits."""
    output, dtype = plan.output, plan.dtype
    sum_rows = functools.partial(_weight_gradient, plan)
    multiply = functools.partial(dot, transpose=output == "x", precision=plan.precision)
    if offsets is None:
        product = sum_rows if output == "w" else multiply
        return product(left, right).astype(dtype)
    if output == "w":
        return grouped_gradient(left, right, offsets, sum_rows, dtype)

    def take_expert(expert: Array) -> Array:
        return take_layer(right, expert).astype(left.dtype)

    outputs = right.shape[-2 if output == "x" else -1]
    return grouped_product(left, offsets, take_expert, multiply, outputs, dtype)


def _weight_gradient(plan: _Plan, x: Array, g: Array) -> Array:
    """Returns `x^T g`, summed over all rows."""
    batch = plan.batch
    if modes.is_local():
        # XLA would copy the operands to sum over several row axes, so they are merged.
        # On a mesh they stay separate, because different mesh axes may split them.
        shape = *x.shape[:batch], math.prod(x.shape[batch:-1])
        x, g = (array.reshape(*shape, array.shape[-1]) for array in (x, g))
    # XLA transposes the left operand in memory, so the narrow operand (whose last axis
    # is the LoRA rank) should be on the left. The barrier hides the transposition of
    # the result, because XLA would otherwise swap the operands back. Swapping takes
    # time to compile, and saves less than 0.1 ms for a small x on two CPU cores.
    is_large = not export.is_symbolic_dim(x.size) and x.size > LARGEST_UNSWAPPED
    is_swapped = is_large and x.shape[-1] > g.shape[-1]
    rows, batch_axes = tuple(range(batch, x.ndim - 1)), tuple(range(batch))
    dw = lax.dot_general(
        *((g, x) if is_swapped else (x, g)),
        ((rows, rows), (batch_axes, batch_axes)),
        precision=plan.precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )
    return lax.optimization_barrier(dw).swapaxes(-1, -2) if is_swapped else dw
