"""The product `x @ q` with a QTensor, and the checks of its arguments.

`multiply` describes the product by a `ProductSpec`, which includes its mesh. The
gradient of x is a product of the same kind. `sharded.compute` runs each of them on the
devices. `floats` has the products with float weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from .._jax import modes
from .._jax.arguments import as_array, as_int32, known_values
from .._jax.pytree import take_layer
from ..quant.host_codes import on_device
from ..quant.kernel import Kernel, declared_mesh
from ..quant.qtensor import QTensor, float_scales, with_scales
from ..quant.views import LayerOfStack
from .choose import as_backends
from .sharded import compute
from .spec import Operands, PackedKernel, ProductSpec, product_spec


def matmul(
    x: Float[Array, "*rows k"],
    q: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    backend: str | Sequence[str] | None = None,
    precision: PrecisionLike = None,
) -> Float[Array, "*rows n"]:
    """Returns `x @ dequantize(q)`, of shape `[*batch, ..., N]`.

    Weights are rounded to `q.dtype`, cast to `x.dtype` and multiplied with sums in
    float32. The product is differentiable in `x`. The backward pass decodes the weights
    again, so decoded weights are not stored in between.

    Args:
        x: A floating-point array `[..., K]`, or `[*batch, ..., K]` for a kernel with
            batch axes. K is all contracted axes of the kernel, flattened, and N all
            output axes (`einsum` keeps them separate).
        q: The quantized kernel.
        layer: The index of a layer, an integer scalar. `q` is then a stack
            `[L, *batch, K, N]`, and x is multiplied by this layer's kernel. In a
            `lax.scan` over layers, close over the stack and scan over `jnp.arange(L)`,
            so that a TPU kernel can read the layer inside the stack. Scanning over `q`
            copies each slice first.
        backend: "reference" and "tiled" run anywhere. "pallas_tpu" is the TPU kernel
            for the chip of this process, and "pallas_tpu_v5e", "pallas_tpu_v5p",
            "pallas_tpu_v6e" and "pallas_tpu_7x" are the kernels for a named chip. Of a
            sequence of names, the first one that supports the product is used. The
            default depends on the platform.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point or `q` is not a QTensor.
        ValueError: If the shapes do not match, the back end is unknown, the layer is
            not an integer scalar or, outside jit, is not in the stack.
        NotImplementedError: If none of the requested back ends supports the product.
            The message gives the reason for each.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.eye(64), "nf4")
        >>> ql.matmul(jnp.arange(64.0)[None], q).shape
        (1, 64)
        >>> stack = jax.tree.map(lambda *a: jnp.stack(a), q, q, q)
        >>> ql.matmul(jnp.arange(64.0)[None], stack, layer=2).shape
        (1, 64)
    """
    check_packed(q)
    x, backend = as_float(x), as_backends(backend)
    kernel = q if layer is None else layer_of(q, layer)
    return multiply(x, kernel, backend=backend, precision=precision)


def check_packed(q: object) -> None:
    """Raises TypeError unless `q` is a QTensor."""
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor. Got {type(q).__name__}.")


def as_float(x: object) -> Array:
    """Returns `x` as an array. Raises TypeError unless it is floating-point."""
    array = as_array("x", x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {array.dtype}.")
    return array


def layer_of(stack: QTensor, layer: object) -> LayerOfStack:
    """Returns one kernel of a stack. Raises ValueError if the stack lacks it."""
    value, array = known_values("layer", layer), as_array("layer", layer)
    *batch, _, _ = stack.matrix_shape
    if not batch:
        raise ValueError("`layer` needs a stack of kernels. Got a single kernel.")
    if array.ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"`layer` must be an integer scalar. Got {array.dtype}{[*array.shape]}."
        )
    if value is not None and not 0 <= value < batch[0]:
        raise ValueError(
            f"`layer` must be from 0 to {batch[0] - 1} for a stack of {batch[0]} "
            f"kernels. Got {value}."
        )
    return LayerOfStack(stack, as_int32(array))


def offsets_of(
    group_sizes: Int[Array, " experts"], num_rows: int, num_experts: int
) -> Int32[Array, " experts_and_1"]:
    """Returns offsets: rows `offsets[e]` to `offsets[e + 1]` belong to expert e."""
    sizes = as_array("group_sizes", group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers. Got {sizes.dtype}.")
    if sizes.shape != (num_experts,):
        raise ValueError(
            f"`group_sizes` must have shape [{num_experts}], one for each expert. Got "
            f"{sizes.shape}."
        )
    if (values := known_values("group_sizes", group_sizes)) is not None:
        if np.any(values < 0):
            raise ValueError(f"`group_sizes` must not be negative. Got {values}.")
        if values.sum() > num_rows:
            raise ValueError(
                f"`group_sizes` must sum to at most the {num_rows} rows of `x`. Got "
                f"{values.sum()}."
            )
    # Inside a trace, the sum cannot be checked. Ends after the last row are clipped.
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), num_rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


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


def _device_arrays(
    kernel: Kernel,
) -> tuple[Array, Float32[Array, "*batch blocks n"], Array | None]:
    """Returns device codes, float32 scales, and the layer if the codes are a stack."""
    if not isinstance(kernel, LayerOfStack) or kernel.memory == "host":
        # Slice before the copy, so that only one layer is moved to the device.
        q: Any = kernel if isinstance(kernel, QTensor) else kernel.take()
        return on_device(q.codes), float_scales(q), None
    q, layer = kernel.stack, kernel.index
    # There are few scales, so those of the layer are copied, and then decoded.
    scales = float_scales(with_scales(q, take_layer(q.stored_scales, layer)))
    return q.codes, scales, layer


# y = x W, so dx = g W^T. First, g is cast to the dtype of x: autodiff would multiply
# float32 by bfloat16 operands, which is several times slower on devices with bfloat16
# matrix units. The weights are frozen and get no gradient. They are decoded again in
# the backward pass, so that the float weights of all layers are never in memory at once
# (QLoRA, Dettmers et al. 2023, section 3).
@jax.custom_vjp
def _packed_product(
    spec: ProductSpec, x: Array, kernel: PackedKernel, offsets: Array | None
) -> Array:
    # `_device_arrays` moves codes from host memory. It is called here, so that the
    # backward pass moves them again instead of keeping them.
    return compute(spec, Operands(x, *_device_arrays(kernel), offsets))


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
