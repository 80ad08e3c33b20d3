"""`x @ QTensor`, and its gradient."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from .._jax.arguments import as_array, as_int32, known_values
from .._jax.modes import for_product
from ..quant.qtensor import QTensor
from ..quant.stack import product_arrays
from .choose import checked_backend, refusals
from .sharded import sharded_product
from .spec import Operands, ProductSpec


def matmul(
    x: Float[Array, "*rows k"],
    q: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    backend: str | Sequence[str] | None = None,
    precision: Any = None,
) -> Float[Array, "*rows n"]:
    """Returns `x @ dequantize(q)`, `[*batch, ..., N]`, decoding the weights as it goes.

    Weights are rounded to `q.dtype`, cast to `x.dtype` and multiplied with sums in
    float32. Differentiable in `x`.

    Args:
        x: Floating-point `[..., K]`; for a kernel with batch axes, `[*batch, ..., K]`.
            K runs over all contracted axes of the kernel, N over all output axes
            (`einsum` keeps them apart).
        q: The quantized kernel.
        layer: An integer scalar: `q` is a stack `[L, *batch, K, N]`, and x is
            multiplied by kernel `layer` of it. In a `lax.scan` over layers, closing
            over the stack and scanning over `jnp.arange(L)` lets a TPU kernel read the
            layer inside the stack; scanning over `q` copies each slice first.
        backend: "reference" and "tiled" run anywhere; "rounding" is "reference" for
            large results in bfloat16 on GPUs; "pallas_tpu" is the TPU kernel
            for this process's chip, "pallas_tpu_v5e", "pallas_tpu_v5p",
            "pallas_tpu_v6e" and "pallas_tpu_7x" that for a chip by name. Several are
            tried in order. By default the first of the platform's that supports the
            product.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point or `q` is not a QTensor.
        ValueError: If the shapes do not fit, the back end is unknown, the layer is no
            integer scalar or, outside jit, is not in the stack.
        NotImplementedError: If no back end that was asked for supports the product;
            the text says why, for each.

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
    x = as_float(x)
    *batch, k, _ = q.matrix_shape
    if layer is not None:
        layer = checked_layer(layer, batch)
        batch = batch[1:]
    if (
        x.ndim < len(batch) + 1
        or x.shape[-1] != k
        or x.shape[: len(batch)] != (*batch,)
    ):
        wanted = ", ".join(map(str, [*batch, "...", k]))
        raise ValueError(f"`x` must have shape [{wanted}]. Got {x.shape}.")
    mesh, x, q, layer = for_product(x, q, layer)
    spec = replace(
        product_spec(q),
        batch=len(batch),
        backend=checked_backend(backend),
        precision=precision,
        mesh=mesh,
    )
    with reverse_mode():
        return packed_product(spec, x, q, layer)


def explain_backend(
    x: Any, q: QTensor, *, transpose: bool = False
) -> dict[str, str | None]:
    """Returns the back ends that are tried for a product on this process's devices.

    Args:
        x: Of `matmul` for a kernel without batch axes, `[M, K]`: an array or its shape.
        q: The quantized kernel.
        transpose: Whether the product is that of the gradient, `x @ W^T` for
            x `[M, N]`.

    Returns:
        Why each does not compute it, in the order in which they are tried; None for the
        last, which does.

    Raises:
        TypeError: If `q` is not a QTensor, or `x` has no shape and dtype.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.explain_backend(jnp.ones((1, 64)), ql.quantize(jnp.eye(64)))
        {'tiled': None}
    """
    check_packed(q)
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        kind = type(x).__name__
        raise TypeError(f"`x` must be an array or a ShapeDtypeStruct. Got {kind}.")
    spec = replace(product_spec(q), transpose=transpose)
    platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    return refusals(platform, spec, x.shape, x.dtype, q.codes.shape[-1])


def check_packed(q: Any) -> None:
    """Raises TypeError unless `q` is a QTensor."""
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor. Got {type(q).__name__}.")


def as_float(x: Any) -> Array:
    """Returns an array; raises TypeError unless it is floating-point."""
    x = as_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {x.dtype}.")
    return x


@contextlib.contextmanager
def reverse_mode() -> Iterator[None]:
    """A context in which JAX's refusal of forward mode says what to use."""
    # JAX's own text remains where a caller's `jit` is differentiated.
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "products with packed kernels and adapters must be differentiated in "
            "reverse mode: jax.grad, jax.vjp or jax.jacrev. Got forward mode (jax.jvp, "
            "jax.jacfwd or jax.hessian)."
        ) from error


def product_spec(q: QTensor) -> ProductSpec:
    """Returns the static facts of products with a kernel, as they are by default."""
    *batch, k, _ = q.matrix_shape
    packing = replace(q.packing, double_quant=False)
    return ProductSpec(packing, q.dtype_name, k, len(batch), placement=q.placement)


def checked_layer(layer: Any, batch: Sequence[int]) -> Array:
    """Returns the layer's index, or raises ValueError if it is not in the stack."""
    value, layer = known_values(layer), as_array("layer", layer)
    if not batch:
        raise ValueError("`layer` needs a stack of kernels. Got a single one.")
    if layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(
            f"`layer` must be an integer scalar. Got {layer.dtype}{[*layer.shape]}."
        )
    if value is not None and not 0 <= value < batch[0]:
        raise ValueError(
            f"`layer` must be from 0 to {batch[0] - 1}, of {batch[0]} kernels. Got "
            f"{value}."
        )
    return as_int32(layer)


# y = x W is linear in x, so dx = g W^T: a product too, of the same packed weights. They
# are frozen, so codes and scales get no gradient. The backward pass decodes them again:
# a stack of layers never holds its float weights (QLoRA, Dettmers et al. 2023,
# section 3).
@jax.custom_vjp
def _packed_product(
    spec: ProductSpec,
    x: Array,
    q: QTensor,
    layer: Array | None,
    offsets: Array | None = None,
) -> Array:
    """Returns `x @ W` or `x @ W^T`, or a ragged product."""
    # Here, and not in front of the product: the backward pass moves codes that are in
    # host memory again.
    return sharded_product(spec, Operands(x, *product_arrays(q, layer), offsets))


# Jitted so that products of one shape are traced once. Not the other way round: in
# Hessian-vector products through a scan, JAX takes the constants of a jitted function
# with a custom gradient, such as the table of quantized scales, for its arguments.
packed_product = jax.jit(_packed_product)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Type:
    """The dtype of an input, and the sharding that its gradient must have."""

    dtype: Any
    sharding: Any


def _product_fwd(
    spec: ProductSpec,
    x: Array,
    q: QTensor,
    layer: Array | None,
    offsets: Array | None,
) -> tuple[Array, tuple]:
    kind = _Type(x.dtype, None if spec.mesh is None else jax.typeof(x).sharding)
    y = packed_product(spec, x, q, layer, offsets)
    return y, (spec, q, layer, offsets, kind)


def _product_bwd(residuals: tuple, g: Array) -> tuple[None, Array, None, None, None]:
    spec, q, layer, offsets, kind = residuals
    spec, g = replace(spec, result=None), g.astype(kind.dtype)
    dx = packed_product(
        replace(spec, transpose=not spec.transpose), g, q, layer, offsets
    )
    if kind.sharding is not None and not kind.sharding.mesh.empty:
        dx = reshard(dx, kind.sharding)
    return None, dx, None, None, None


_packed_product.defvjp(_product_fwd, _product_bwd)
