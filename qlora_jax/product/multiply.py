"""Multiplies an input by packed weights. `floats` has the products with float weights.

`multiply` describes the product by a `ProductSpec`, which includes its mesh. The
gradient of x is a product of the same kind. `sharded.compute` runs each of them on the
devices.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .._jax import modes
from ..quant.kernel import declared_mesh
from ..quant.views import product_arrays
from .sharded import compute
from .spec import Operands, PackedKernel, ProductSpec, product_spec


def multiply(
    x: Float[Array, "..."],
    kernel: PackedKernel,
    offsets: Int32[Array, " experts_and_1"] | None = None,
    *,
    backend: tuple[str, ...] | None = None,
    precision: PrecisionLike = None,
    result_dtype: DTypeLike | None = None,
) -> Array:
    """Returns `x @ w` for a packed kernel, in `result_dtype`, or the dtype of `x`.

    x is `[*batch, *rows, K]`. With `offsets`, x is `[M, K]`, and its rows `offsets[e]`
    to `offsets[e + 1]` are multiplied by expert e of the kernel.
    """
    is_ragged = offsets is not None
    *batch, k, _ = kernel.matrix_shape
    batch = batch[: len(batch) - is_ragged]  # without the axis of experts
    check_shape(x.shape, batch, k)
    # The mesh is read from the types of the operands, or from the placement.
    x = modes.varying_with(x, kernel, offsets)
    mesh = modes.explicit_mesh(x, kernel, offsets)
    if mesh is not None:
        x, kernel, offsets = modes.without_mapped_axes(mesh, x, kernel, offsets)
    spec = product_spec(
        kernel,
        result_dtype or x.dtype,
        batch=len(batch),
        backend=backend,
        precision=precision,
        mesh=mesh or declared_mesh(kernel.placement),
        is_ragged=is_ragged,
    )
    return _product(spec, x, kernel, offsets)


def check_shape(shape: tuple[int, ...], batch: list[int], contracted: int) -> None:
    """Raises ValueError unless the shape of `x` is `[*batch, ..., contracted]`."""
    has_batch = len(shape) > len(batch) and shape[: len(batch)] == (*batch,)
    if not has_batch or shape[-1] != contracted:
        expected = ", ".join(map(str, [*batch, "...", contracted]))
        raise ValueError(f"`x` must have shape [{expected}]. Got {shape}.")


# y = x W, so dx = g W^T. First, g is cast to the dtype of x: autodiff would multiply
# float32 by bfloat16 operands, which is several times slower on devices with bfloat16
# matrix units. The weights are frozen and get no gradient. They are decoded again in
# the backward pass, so that the float weights of all layers are never in memory at once
# (QLoRA, Dettmers et al. 2023, section 3).
@jax.custom_vjp
def _packed_product(
    spec: ProductSpec, x: Array, kernel: PackedKernel, offsets: Array | None
) -> Array:
    # `product_arrays` moves codes from host memory. It is called here, so that the
    # backward pass moves them again instead of keeping them.
    return compute(spec, Operands(x, *product_arrays(kernel), offsets))


# Jitted so that products of the same shape are traced once. The custom gradient is
# inside `jit`. With `jit` inside the custom gradient, JAX would mistake constants, such
# as the table of quantized scales, for arguments of the jitted function (in
# Hessian-vector products through a scan).
_product = jax.jit(_packed_product)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _ArrayType:
    """The dtype of x, and the sharding that its gradient must have."""

    dtype: np.dtype
    sharding: NamedSharding | None


def _product_fwd(
    spec: ProductSpec, x: Array, kernel: PackedKernel, offsets: Array | None
) -> tuple[Array, tuple]:
    sharding = jax.typeof(x).sharding
    has_sharding = spec.is_explicit and not sharding.mesh.empty
    x_type = _ArrayType(x.dtype, sharding if has_sharding else None)
    return _product(spec, x, kernel, offsets), (spec, x_type, kernel, offsets)


def _product_bwd(residuals: tuple, g: Array) -> tuple:
    spec, x_type, kernel, offsets = residuals
    spec = replace(spec, transpose=not spec.transpose, result_dtype=x_type.dtype)
    dx = _product(spec, g.astype(x_type.dtype), kernel, offsets)
    dx = dx if x_type.sharding is None else reshard(dx, x_type.sharding)
    return None, dx, None, None


_packed_product.defvjp(_product_fwd, _product_bwd)
