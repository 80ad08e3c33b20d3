"""Products of the float arrays of one device, or of arrays that XLA splits."""

import functools
import math

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array

from ..._jax.modes import is_local
from ..._jax.pytree import take_layer
from ..spec import Operands, ProductSpec
from .grouped import grouped_gradient, grouped_product
from .reference import accumulator_dtype, dot

# If x has at most this many elements, `_weight_gradient` does not swap operands.
LARGEST_UNSWAPPED = 2**16


def multiply_floats(spec: ProductSpec, operands: Operands) -> Array:
    """Returns the product that `spec.output` names, in the dtype of its result."""
    left, right, *_, offsets = operands
    dtype = jnp.dtype(spec.result_dtype or left.dtype)
    if offsets is not None:
        return _ragged_product(spec, left, right, offsets, dtype)
    if spec.output == "w":
        return _weight_gradient(spec, left, right).astype(dtype)
    y = dot(left, right, transpose=spec.transpose, precision=spec.precision)
    return y.astype(dtype)


def _weight_gradient(spec: ProductSpec, x: Array, g: Array) -> Array:
    if is_local():
        # XLA would copy the operands to sum over several row axes, so they are merged.
        # On a mesh they stay separate, because different mesh axes may split them.
        shape = *x.shape[: spec.batch], math.prod(x.shape[spec.batch : -1])
        x, g = (array.reshape(*shape, array.shape[-1]) for array in (x, g))
    # XLA transposes the left operand in memory, so the narrow operand (whose last axis
    # is the LoRA rank) should be on the left. The barrier hides the transposition of
    # the result, because XLA would otherwise swap the operands back. Swapping takes
    # time to compile, and saves less than 0.1 ms for a small x on two CPU cores.
    is_large = not export.is_symbolic_dim(x.size) and x.size > LARGEST_UNSWAPPED
    if is_large and x.shape[-1] > g.shape[-1]:
        dw = _sum_over_rows(spec, g, x)
        return lax.optimization_barrier(dw).swapaxes(-1, -2)
    return _sum_over_rows(spec, x, g)


def _sum_over_rows(spec: ProductSpec, x: Array, g: Array) -> Array:
    batch = tuple(range(spec.batch))
    rows = tuple(range(spec.batch, x.ndim - 1))
    return lax.dot_general(
        x,
        g,
        ((rows, rows), (batch, batch)),
        precision=spec.precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )


def _ragged_product(
    spec: ProductSpec, left: Array, right: Array, offsets: Array, dtype: jnp.dtype
) -> Array:
    if spec.output == "w":
        sum_rows = functools.partial(_sum_over_rows, spec)
        return grouped_gradient(left, right, offsets, sum_rows, dtype)
    multiply = functools.partial(
        dot, transpose=spec.transpose, precision=spec.precision
    )
    outputs = right.shape[-2 if spec.transpose else -1]

    def take_expert(expert: Array) -> Array:
        return take_layer(right, expert).astype(left.dtype)

    return grouped_product(left, offsets, take_expert, multiply, outputs, dtype)
