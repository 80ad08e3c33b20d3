"""The product `x @ q` with a QTensor, and the checks of its arguments."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import Array, Float, Int, Int32

from .._jax.arguments import as_array, as_int32, known_values
from ..quant.qtensor import QTensor
from ..quant.views import LayerOfStack
from .choose import as_backends
from .multiply import multiply


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
    check_float(array.dtype)
    return array


def check_float(dtype: np.dtype) -> None:
    """Raises TypeError unless the dtype of `x` is floating-point."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {dtype}.")


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
