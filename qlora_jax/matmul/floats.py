"""Products of float matrices whose gradients multiply in the dtype of the input."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from .._jax.modes import (
    explicit_axes,
    for_product,
    is_local,
    split_by,
    varying_with,
    with_mapped_axis,
)
from .._jax.specs import Axes, make_spec, spec_of, typed_axes, unused
from .backends.reference import accumulator_dtype, dot
from .collectives import sum_over

# Elements of x up to which the gradient of w is not computed transposed.
LARGEST_UNSWAPPED = 2**16


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Product:
    """One of the products among x `[*batch, *rows, K]`, w `[*batch, K, N]` and y."""

    of: Literal["x", "w", "y"]  # the result
    batch: int  # number of batch axes
    precision: Any
    k: Axes = ()  # mesh axes of K in a product, but for those of batch and rows
    n: Axes = ()  # the same for N
    mesh: Any = None  # with Explicit axes, from the types of operands

    @property
    def operands(self) -> tuple[str, str]:
        """The left and the right operand."""
        return {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}[self.of]


def float_product(
    x: Array, w: Array, precision: Any = None, *, w_moves: bool = False
) -> Array:
    """Returns `x @ w` for x `[*batch, *rows, K]`, in float32."""
    # On a mesh, x moves to the parts of w along K; with `w_moves`, w to those of x.
    mesh, x, w = for_product(x, varying_with(w, x))
    product = _Product("y", w.ndim - 2, precision)
    if mesh is not None:
        (*_, x_k), (*_, k, n) = typed_axes(x), typed_axes(w)
        k = x_k if w_moves else k or x_k
        product = replace(product, k=k, n=n, mesh=mesh)
    return _multiply(product, x, w)


# y = x w, so dx = g w^T and dw = x^T g, summed over rows: each is a product of two of
# x, w and y. Autodiff would multiply the float32 g by bfloat16 operands: a float32
# product, several times slower where bfloat16 has matrix units. So g is cast first.
def _compute(product: _Product, left: Array, right: Array) -> Array:
    """The product on a mesh, of one device's arrays, or of arrays that XLA splits."""
    if product.mesh is not None:
        return _on_mesh(product, left, right)
    if product.of == "w":
        return _w_gradient(product, left, right)
    is_transposed = product.of == "x"
    return dot(left, right, transpose=is_transposed, precision=product.precision)


_multiply = jax.custom_vjp(_compute, nondiff_argnums=(0,))


def _multiply_fwd(
    product: _Product, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(product, left, right), (left, right)


def _multiply_bwd(
    product: _Product, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    known = dict(zip(product.operands, residuals, strict=True))
    known[product.of] = g.astype(residuals[0].dtype)
    mesh = product.mesh
    run: Any = _compute if mesh is None else _multiply

    def gradient(of: Any) -> Array:
        one = replace(product, of=of)
        d = run(one, *(known[name] for name in one.operands)).astype(known[of].dtype)
        return d if mesh is None else split_by(d, mesh, spec_of(known[of]))

    left, right = product.operands
    return gradient(left), gradient(right)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


@custom_vmap
def _on_mesh(product: _Product, left: Array, right: Array) -> Array:
    """Each device multiplies its own parts of operands with Explicit mesh axes."""
    # XLA's partitioner computes some of these products wrong
    # (docs/development/traps.md).
    mesh = product.mesh
    names = explicit_axes(mesh)
    batch, rows = product.batch, left.ndim - 1
    axes, others = typed_axes(left), typed_axes(right)
    wanted = [b or a for a, b in zip(axes[:batch], others[:batch], strict=True)]
    used = {*mesh.axis_names} - names

    def take(axes: Axes) -> Axes:
        """Returns the axes that no earlier array axis uses."""
        found = unused(axes, used)
        used.update(found)
        return found

    lead = [take(axes) for axes in (*wanted, *axes[batch:rows])]
    k, n = take(product.k), take(product.n)
    specs = {
        "x": make_spec(*lead, k),
        "w": make_spec(*lead[:batch], k, n),
        "y": make_spec(*lead, n),
    }
    summed = {"y": k, "x": n, "w": sum(lead[batch:], ())}[product.of]

    def on_one_device(left: Array, right: Array) -> Array:
        part = _compute(replace(product, mesh=None), left, right)
        return sum_over(part, summed, part.dtype)

    in_specs = tuple(specs[name] for name in product.operands)
    left, right = split_by(left, mesh, in_specs[0]), split_by(right, mesh, in_specs[1])
    if not names:
        return on_one_device(left, right)
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=specs[product.of],
        axis_names={*names},
        check_vma=False,
    )(left, right)


@_on_mesh.def_vmap
def _batched(
    size: int, batched: list, product: _Product, left: Array, right: Array
) -> tuple[Array, bool]:
    """One more row axis where w is not batched; else one more batch axis."""
    _, left_batched, right_batched = batched
    if product.of != "w" and not right_batched:
        y = _on_mesh(product, jnp.moveaxis(left, 0, product.batch), right)
        return jnp.moveaxis(y, product.batch, 0), True
    left = with_mapped_axis(size, left, left_batched)
    right = with_mapped_axis(size, right, right_batched)
    return _on_mesh(replace(product, batch=product.batch + 1), left, right), True


def _w_gradient(product: _Product, x: Array, g: Array) -> Array:
    batch_axes = product.batch
    if is_local():
        # XLA copies operands to sum over several axes of rows. Elsewhere they stay
        # apart: each may be split over a mesh axis of its own.
        shape = *x.shape[:batch_axes], math.prod(x.shape[batch_axes:-1])
        x, g = (a.reshape(*shape, a.shape[-1]) for a in (x, g))
    batch = tuple(range(batch_axes))
    rows = tuple(range(batch_axes, x.ndim - 1))
    # XLA transposes the left operand in memory, so that is the narrow one, of the rank.
    # Unless a barrier hides the transposition behind the product, XLA swaps them back.
    # Both take time to compile. For a small x they gain less than 0.1 ms on two cores.
    is_large = not export.is_symbolic_dim(x.size) and x.size > LARGEST_UNSWAPPED
    is_swapped = is_large and x.shape[-1] > g.shape[-1]
    dw = lax.dot_general(
        *((g, x) if is_swapped else (x, g)),
        ((rows, rows), (batch, batch)),
        precision=product.precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )
    return lax.optimization_barrier(dw).swapaxes(-1, -2) if is_swapped else dw
