"""The products of adapted kernels, and `ragged_dot` with adapted experts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from .._jax.arguments import check_key
from ..product.choose import as_backends
from ..product.matmul import as_float, layer_of, offsets_of
from ..quant.kernel import Kernel, as_kernel
from ..quant.qtensor import QTensor
from .base import Adapter, ProductCall, check_adapter, frozen_product, parts_of


# Jitted so that layers of the same shape are traced once: in a model that unrolls its
# layers, tracing is half the cost of adapters.
@functools.partial(jax.jit, static_argnames=("backend", "precision", "result_dtype"))
def product(
    x: Float[Array, "..."],
    kernel: Kernel,
    lora: Adapter | None = None,
    dropout_key: Array | None = None,
    backend: tuple[str, ...] | None = None,
    precision: lax.PrecisionLike = None,
    offsets: Array | None = None,
    result_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns the product of x `[*batch, ..., K]` with a kernel and its adapter.

    The result is in `result_dtype`, or else in the dtype of `x`. If the kernel is one
    layer of a stack, pass the adapter of this layer. With `offsets`, the product is
    ragged, and x is `[M, K]`.
    """
    call = ProductCall(dropout_key, backend, precision, offsets, result_dtype)
    if lora is None:
        return frozen_product(x, kernel, call)
    if offsets is not None:
        _check_ragged(lora)
    return lora.product(x, kernel, call)


def check_real(name: str, w: PyTree) -> None:
    """Raises TypeError for complex weights, whose imaginary parts would be dropped."""
    if jnp.iscomplexobj(w):
        raise TypeError(f"{name} must be real. Got {w.dtype}.")


def _check_ragged(lora: Adapter) -> None:
    if not lora.can_be_ragged:
        raise NotImplementedError(
            "a ragged product supports LoRA and MergeAware adapters, "
            f"and none from a bank. Got {type(lora).__name__}."
        )


def ragged_dot(
    x: Float[Array, "m k"],
    experts: PyTree,
    group_sizes: Int[Array, " experts"],
    lora: Adapter | None = None,
    *,
    layer: Int[Array, ""] | int | None = None,
    dropout_key: Array | None = None,
    backend: str | Sequence[str] | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "m n"]:
    """Returns `jax.lax.ragged_dot` of x with packed experts, in the dtype of `x`.

    The first `group_sizes[0]` rows of x are multiplied by expert 0, the next by expert
    1, and so on; rows beyond the sum of the sizes give zeros. Experts, or tiles of
    them, are decoded one after another, once for all of their rows; experts without
    rows are not decoded. Rounding and sums are those of `matmul`. The result is
    differentiable in `x` and the adapter.

    On a mesh, experts may be split over mesh axes: each device has all rows, multiplies
    those of its experts, and the results are summed. Where the same axes split the rows
    of x (FSDP), each device gathers the experts' codes and scales instead.

    Args:
        x: Floating-point `[M, K]`, rows sorted by expert.
        experts: A QTensor, another kernel or a float array, `[E, K, N]`; or an
            `AdaptedKernel` of one, as in a combined tree.
        group_sizes: The number of rows of each expert, integers `[E]`.
        lora: The LoRA of the experts, with A `[E, K, r]` and B `[E, r, N]`, or None.
        layer: The index of a layer, as in `matmul`, if `experts` is a packed stack
            `[L, E, K, N]`. The adapter is then the adapter of this layer.
        dropout_key: PRNG key of the adapter's dropout; None for no dropout.
        backend: As in `matmul`, for packed experts.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point, `experts` are not one kernel or are
            complex, `lora` is not an adapter, `group_sizes` are not integers, or
            `dropout_key` is not a PRNG key.
        ValueError: If the shapes do not fit, the back end is unknown, the layer is not
            in the stack, or group sizes with known values are negative or add up to
            more than the rows.
        NotImplementedError: As in `matmul`, or for another kind of adapter.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> experts = ql.quantize(jnp.stack([jnp.eye(64), 2 * jnp.eye(64)]))
        >>> x, sizes = jnp.ones((4, 64)), jnp.array([1, 2])
        >>> ql.ragged_dot(x, experts, sizes)[:, 0].tolist()
        [1.0, 2.0, 2.0, 0.0]
    """
    if isinstance(experts, list | tuple):
        kinds = sorted({getattr(w, "fmt", type(w).__name__) for w in experts})
        raise TypeError(
            "`experts` must be one stack [E, K, N] in one format. Got "
            f"{len(experts)} kernels in {kinds}."
        )
    # A leaf of a combined tree brings its own adapter and dropout key.
    experts, leaf_lora, leaf_key = parts_of(experts)
    lora = leaf_lora if lora is None else lora
    dropout_key = leaf_key if dropout_key is None else dropout_key
    if len(getattr(experts, "shape", ())) < 2:
        raise TypeError(
            "`experts` must be a QTensor, another kernel or a float array [E, K, N]. "
            f"Got {getattr(experts, 'shape', type(experts).__name__)}."
        )
    check_real("`experts`", experts)
    if dropout_key is not None:
        check_key("dropout_key", dropout_key)
    # Float experts get their axes from the adapter. Its kind is checked first, because
    # a `Trained` does not know the axes.
    if isinstance(lora, Adapter):
        _check_ragged(lora)
    x, kernel = as_float(x), as_kernel(experts, getattr(lora, "geometry", None))
    if layer is not None:
        if not isinstance(kernel, QTensor):
            kind = type(experts).__name__
            raise ValueError(f"`layer` needs packed experts. Got {kind}.")
        kernel = layer_of(kernel, layer)
    check_adapter(lora, kernel, "experts")
    *batch, k, _ = kernel.matrix_shape
    if len(batch) != 1:
        raise ValueError(
            "`experts` must have one axis in front of those of a kernel, and one more "
            f"with `layer`. Got shape {experts.shape}."
        )
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"`x` must have shape [M, {k}]. Got {x.shape}.")
    offsets = offsets_of(group_sizes, x.shape[0], batch[0])
    backends = as_backends(backend)
    return product(x, kernel, lora, dropout_key, backends, precision, offsets)
