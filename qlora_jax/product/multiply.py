"""Multiplies an input by weights, which are packed or float.

`multiply` describes the product by a `ProductSpec`, which includes its mesh. Gradients
are products of the same kind. `sharded.compute` runs each of them on the devices.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PyTree

from ..quant.kernel import Kernel, Placement, as_kernel
from ..quant.views import product_arrays
from .sharded import compute, fit_to_mesh
from .spec import OPERANDS, ArrayName, Operands, ProductSpec, product_spec


def multiply(
    x: Float[Array, "..."],
    weights: Kernel | Array,
    offsets: Int32[Array, " experts_and_1"] | None = None,
    *,
    backend: str | tuple[str, ...] | None = None,
    precision: PrecisionLike = None,
    result_dtype: DTypeLike | None = None,
    placement: Placement | None = None,
    weights_move: bool = True,
) -> Array:
    """Returns `x @ w` in `result_dtype`, or else in the dtype of `x`.

    The weights are a packed kernel, or a float array `[*batch, K, N]`. x is `[*batch,
    *rows, K]`. With `offsets`, x is `[M, K]`, and its rows `offsets[e]` to
    `offsets[e + 1]` are multiplied by expert e of the weights. The product of float
    weights is differentiable in both operands.

    Float experts may have a `placement`, for Auto mesh axes. If x and float weights are
    split differently along K over Explicit mesh axes, the weights are resharded to
    match x. If `weights_move` is False, x is resharded to match the weights.
    """
    kernel = as_kernel(weights)
    *batch, k, _ = kernel.matrix_shape
    if kernel.is_packed:
        spec = product_spec(kernel)
    else:
        spec = ProductSpec(None, x.dtype.name, k, placement=placement)
    is_ragged = offsets is not None
    batch = batch[: len(batch) - is_ragged]  # without the axis of experts
    check_shape(x.shape, batch, k)
    spec = replace(
        spec,
        batch=len(batch),
        backend=backend,
        precision=precision,
        is_ragged=is_ragged,
        result_dtype=None if result_dtype is None else jnp.dtype(result_dtype).name,
    )
    return _product(*fit_to_mesh(spec, x, weights, offsets, weights_move))


def check_shape(shape: tuple[int, ...], batch: list[int], contracted: int) -> None:
    """Raises ValueError unless the shape of `x` is `[*batch, ..., contracted]`."""
    has_batch = len(shape) > len(batch) and shape[: len(batch)] == (*batch,)
    if not has_batch or shape[-1] != contracted:
        expected = ", ".join(map(str, [*batch, "...", contracted]))
        raise ValueError(f"`x` must have shape [{expected}]. Got {shape}.")


# y = x w, so dx = g w^T and dw = x^T g, summed over rows. These are products too, with
# gradients of the same form (`OPERANDS`). First, g is cast to the dtype of x: autodiff
# would multiply float32 by bfloat16 operands, which is several times slower on devices
# with bfloat16 matrix units. Packed weights are frozen and get no gradient. They are
# decoded again in the backward pass, so that the float weights of all layers are never
# in memory at once (QLoRA, Dettmers et al. 2023, section 3).
@jax.custom_vjp
def _differentiable_product(
    spec: ProductSpec, left: Array, right: PyTree, offsets: Array | None
) -> Array:
    if spec.packed_as is None:
        return compute(spec, Operands(left, right, offsets=offsets))
    # `product_arrays` moves codes from host memory. It is called here, so that the
    # backward pass moves them again instead of keeping them.
    return compute(spec, Operands(left, *product_arrays(right), offsets))


# Jitted so that products of the same shape are traced once. The custom gradient is
# inside `jit`. With `jit` inside the custom gradient, JAX would mistake constants, such
# as the table of quantized scales, for arguments of the jitted function (in
# Hessian-vector products through a scan).
_product = jax.jit(_differentiable_product)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _ArrayType:
    """The dtype of an operand, and the sharding that its gradient must have."""

    dtype: np.dtype
    sharding: NamedSharding | None


def _type_of(spec: ProductSpec, x: Array) -> _ArrayType:
    sharding = jax.typeof(x).sharding
    has_sharding = spec.is_explicit and not sharding.mesh.empty
    return _ArrayType(x.dtype, sharding if has_sharding else None)


def _product_fwd(
    spec: ProductSpec, left: Array, right: PyTree, offsets: Array | None
) -> tuple[Array, tuple]:
    y = _product(spec, left, right, offsets)
    # The gradient of x needs only the type of x, and packed weights have no gradient.
    x = left if spec.packed_as is None else None
    return y, (spec, x, _type_of(spec, left), right, offsets)


def _product_bwd(residuals: tuple, g: Array) -> tuple:
    spec, left, left_type, right, offsets = residuals
    left_name, right_name = OPERANDS[spec.output]
    g = g.astype(left_type.dtype)
    arrays = {left_name: left, right_name: right, spec.output: g}

    def gradient(name: ArrayName, array_type: _ArrayType) -> Array:
        operands = [arrays[operand] for operand in OPERANDS[name]]
        # Sums are rounded once, to the dtype of the operand.
        has_dtype = operands[0].dtype == array_type.dtype
        result_dtype = None if has_dtype else array_type.dtype.name
        gradient_spec = replace(spec, output=name, result_dtype=result_dtype)
        d = _product(gradient_spec, *operands, offsets)
        sharding = array_type.sharding
        return d if sharding is None else reshard(d, sharding)

    d_left = gradient(left_name, left_type)
    if spec.packed_as is not None:
        return None, d_left, None, None
    return None, d_left, gradient(right_name, _type_of(spec, right)), None


_differentiable_product.defvjp(_product_fwd, _product_bwd)
