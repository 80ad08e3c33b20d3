"""Products of float matrices whose gradients multiply in the dtype of the input."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.lax import PrecisionLike
from jaxtyping import Array

from .._jax.modes import (
    explicit_axes,
    for_product,
    is_local,
    split_by,
    varying_with,
    with_mapped_axis,
)
from .._jax.specs import AnyMesh, Axes, make_spec, spec_of, typed_axes, unused
from .backends.reference import accumulator_dtype, dot
from .collectives import sum_over

# If x has at most this many elements, `_compute_w_gradient` does not swap operands.
LARGEST_UNSWAPPED = 2**16

# Each of x, w and y = x w is a product of the two others: dx = g w^T, dw = x^T g, where
# the gradient g has the shape of y.
Name = Literal["x", "w", "y"]
OPERANDS: dict[Name, tuple[Name, Name]] = {
    "y": ("x", "w"),
    "x": ("y", "w"),
    "w": ("x", "y"),
}


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Product:
    """How to compute x `[*batch, *rows, K]`, w `[*batch, K, N]` or y from the rest."""

    output: Name
    batch: int  # the number of batch axes
    precision: PrecisionLike
    k: Axes = ()  # mesh axes that split K, unless batch or row axes use them
    n: Axes = ()  # the same for N
    mesh: AnyMesh | None = None  # with Explicit axes, from the operands' types


def float_product(
    x: Array, w: Array, precision: PrecisionLike = None, *, w_moves: bool = False
) -> Array:
    """Returns `x @ w` in float32, for x `[*batch, *rows, K]`.

    If x and w are split differently along K on a mesh, x is resharded to match w. With
    `w_moves`, w is resharded to match x.
    """
    mesh, x, w = for_product(x, varying_with(w, x))
    product = _Product("y", w.ndim - 2, precision)
    if mesh is not None:
        (*_, x_k), (*_, w_k, n) = typed_axes(x), typed_axes(w)
        k = x_k if w_moves else w_k or x_k
        product = replace(product, k=k, n=n, mesh=mesh)
    return _multiply(product, x, w)


def _compute(product: _Product, left: Array, right: Array) -> Array:
    """Computes a product on a mesh, on one device, or on arrays that XLA splits."""
    if product.mesh is not None:
        return _compute_on_mesh(product, left, right)
    if product.output == "w":
        return _compute_w_gradient(product, left, right)
    is_transposed = product.output == "x"
    return dot(left, right, transpose=is_transposed, precision=product.precision)


# y = x w, so dx = g w^T and dw = x^T g, summed over rows. Autodiff would multiply the
# float32 g by bfloat16 operands. This is a float32 product, which is several times
# slower on devices with bfloat16 matrix units. The custom gradient casts g first.
_multiply = jax.custom_vjp(_compute, nondiff_argnums=(0,))


def _multiply_fwd(
    product: _Product, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(product, left, right), (left, right)


def _multiply_bwd(
    product: _Product, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    left, right = OPERANDS[product.output]
    arrays: dict[Name, Array] = dict(zip((left, right), residuals, strict=True))
    arrays[product.output] = g.astype(residuals[0].dtype)
    mesh = product.mesh

    def gradient(name: Name) -> Array:
        operands = (arrays[operand] for operand in OPERANDS[name])
        # On a mesh, the gradient is differentiable again.
        compute = _compute if mesh is None else _multiply
        d = compute(replace(product, output=name), *operands).astype(arrays[name].dtype)
        return d if mesh is None else split_by(d, mesh, spec_of(arrays[name]))

    return gradient(left), gradient(right)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@custom_vmap
def _compute_on_mesh(product: _Product, left: Array, right: Array) -> Array:
    # Each device multiplies its own parts of operands with Explicit mesh axes, because
    # XLA's partitioner computes some of these products wrong
    # (docs/development/traps.md).
    # 1. Assign mesh axes to the array axes, in the order batch, rows, K, N.
    mesh = product.mesh
    assert mesh is not None
    axis_names = explicit_axes(mesh)
    batch, num_lead = product.batch, left.ndim - 1
    left_axes, right_axes = typed_axes(left), typed_axes(right)
    pairs = zip(left_axes[:batch], right_axes[:batch], strict=True)
    batch_axes = [right_entry or left_entry for left_entry, right_entry in pairs]
    used = {*mesh.axis_names} - axis_names

    def take_unused(axes: Axes) -> Axes:
        free = unused(axes, used)
        used.update(free)
        return free

    lead = [take_unused(axes) for axes in (*batch_axes, *left_axes[batch:num_lead])]
    k, n = take_unused(product.k), take_unused(product.n)
    specs = {
        "x": make_spec(*lead, k),
        "w": make_spec(*lead[:batch], k, n),
        "y": make_spec(*lead, n),
    }
    # 2. Multiply the parts of each device, and sum over the contracted mesh axes.
    summed = {"y": k, "x": n, "w": sum(lead[batch:], ())}[product.output]

    def compute_on_device(left: Array, right: Array) -> Array:
        part = _compute(replace(product, mesh=None), left, right)
        return sum_over(part, summed, part.dtype)

    left_spec, right_spec = (specs[name] for name in OPERANDS[product.output])
    left, right = split_by(left, mesh, left_spec), split_by(right, mesh, right_spec)
    if not axis_names:
        return compute_on_device(left, right)
    return jax.shard_map(
        compute_on_device,
        mesh=mesh,
        in_specs=(left_spec, right_spec),
        out_specs=specs[product.output],
        axis_names={*axis_names},
        check_vma=False,
    )(left, right)


@_compute_on_mesh.def_vmap
def _compute_batch_on_mesh(
    size: int, is_batched: list, product: _Product, left: Array, right: Array
) -> tuple[Array, bool]:
    # The mapped axis becomes one more row axis if w is not mapped, and otherwise one
    # more batch axis.
    _, left_batched, right_batched = is_batched
    if product.output != "w" and not right_batched:
        y = _compute_on_mesh(product, jnp.moveaxis(left, 0, product.batch), right)
        return jnp.moveaxis(y, product.batch, 0), True
    left = with_mapped_axis(size, left, left_batched)
    right = with_mapped_axis(size, right, right_batched)
    product = replace(product, batch=product.batch + 1)
    return _compute_on_mesh(product, left, right), True


def _compute_w_gradient(product: _Product, x: Array, g: Array) -> Array:
    num_batch = product.batch
    if is_local():
        # XLA would copy the operands to sum over several row axes, so they are merged.
        # On a mesh they stay separate, because different mesh axes may split them.
        shape = *x.shape[:num_batch], math.prod(x.shape[num_batch:-1])
        x, g = (array.reshape(*shape, array.shape[-1]) for array in (x, g))
    batch = tuple(range(num_batch))
    rows = tuple(range(num_batch, x.ndim - 1))
    # XLA transposes the left operand in memory, so the narrow operand (whose last axis
    # is the LoRA rank) should be on the left. The barrier hides the transposition of
    # the result, because XLA would otherwise swap the operands back. Swapping takes
    # time to compile, and saves less than 0.1 ms for a small x on two CPU cores.
    is_large = not export.is_symbolic_dim(x.size) and x.size > LARGEST_UNSWAPPED
    is_swapped = is_large and x.shape[-1] > g.shape[-1]
    dw = lax.dot_general(
        *((g, x) if is_swapped else (x, g)),
        ((rows, rows), (batch, batch)),
        precision=product.precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )
    return lax.optimization_barrier(dw).swapaxes(-1, -2) if is_swapped else dw
