"""Products of an input with float weights, such as A and B of a LoRA."""

from dataclasses import replace
from typing import Literal

from jax.lax import PrecisionLike
from jaxtyping import Array, Float, Int32

from ..quant.kernel import Placement
from .backends.reference import accumulator_dtype
from .multiply import multiply


def float_product(x: Array, w: Array, precision: PrecisionLike = None) -> Array:
    """Returns `x @ w` in float32, for x `[*batch, *rows, K]`."""
    return multiply(x, w, precision=precision, result_dtype=accumulator_dtype(x.dtype))


def ragged_float_product(
    x: Float[Array, "m k"],
    w: Float[Array, "experts k n"],
    offsets: Int32[Array, " experts_and_1"],
    precision: PrecisionLike,
    placement: Placement | None,
    role: Literal["k", "n"],
) -> Float[Array, "m n"]:
    """Returns the product of each row of x with its expert, in the dtype of `x`.

    `placement` is the placement of the experts' kernel, which is used for Auto mesh
    axes. `role` is the axis that `w` shares with this kernel.
    """
    if placement is not None:
        experts, k, n = placement.matrix_axes(3)
        axes = (experts, k, ()) if role == "k" else (experts, (), n)
        placement = replace(placement, kernel=axes)
    return multiply(x, w, offsets, precision=precision, placement=placement)
