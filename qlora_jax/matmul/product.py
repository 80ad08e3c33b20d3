"""`x @ QTensor`, checked, and its gradient; `dispatch.py` says what computes it.

The gradient (a custom VJP) is that of `x` alone: neither codes nor scales receive one.
Only the packed weights are kept for the backward pass, which decodes them again, so
that a stack of layers never holds its float weights (QLoRA, Dettmers et al. 2023,
section 3).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from .._jax.memory import is_concrete
from .._jax.modes import explicit_mesh, varying_with
from .._jax.pytree import take_layer
from ..quant.qtensor import QTensor, float_scales
from .backends.reference import Weights
from .choose import BACKENDS
from .sharded import partitioned_product


class _How(NamedTuple):
    """The static side of a product: hashable, so that it can ride in a custom VJP.

    `x_sharding` is None unless x has Explicit axes; its gradient must lie as x does.
    """

    transpose: bool
    backend: str | None
    precision: Any
    x_sharding: Any


def matmul(
    x: Float[Array, "*rows k"],
    q: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    backend: str | None = None,
    precision: Any = None,
) -> Float[Array, "*rows n"]:
    """Returns `x @ dequantize(q)`, decoding the weights as it goes.

    Weights are rounded to `q.dtype`, cast to `x.dtype` and multiplied with sums in
    float32; the result has the dtype of `x`. Differentiable in `x`.

    Args:
        x: `[..., K]`; for a kernel with batch axes, `[*batch, ..., K]`. K runs over all
            contracted axes of the kernel, N over all output axes (`einsum` keeps them
            apart).
        q: The quantized kernel.
        layer: Takes one kernel of a stack: `q` is `[L, *batch, K, N]` and the product
            is with `q[layer]`, an int32 scalar. In a `lax.scan` over layers, closing
            over the whole stack and scanning over `jnp.arange(L)` lets a TPU kernel
            read the layer where it lies; scanning over `q` copies each slice first.
        backend: "reference" and "tiled" run anywhere; "pallas_tpu" is the TPU kernel
            for the chip at hand, "pallas_tpu_v5e", "pallas_tpu_v5p", "pallas_tpu_v6e"
            and "pallas_tpu_7x" that for a chip by name. By default the first of the
            platform's that can serve.
        precision: As in `jax.lax.dot_general`.

    Returns:
        The product `[*batch, ..., N]` in the dtype of `x`.

    Raises:
        TypeError: If `x` is not floating-point or `q` is not a QTensor.
        ValueError: If the shapes do not fit, the back end is unknown or, outside jit,
            the layer is none of the stack's.
        NotImplementedError: If the back end that was asked for cannot serve; the text
            says why.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.eye(64), "nf4")
        >>> ql.matmul(jnp.arange(64.0)[None], q).shape
        (1, 64)
        >>> stack = jax.tree.map(lambda *a: jnp.stack(a), q, q, q)
        >>> ql.matmul(jnp.arange(64.0)[None], stack, layer=2).shape
        (1, 64)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor. Got {type(q).__name__}.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {x.dtype}.")
    *batch, k, _ = q.matrix_shape
    if layer is not None:
        layer = _checked(layer, batch)
        batch = batch[1:]
    if (
        x.ndim < len(batch) + 1
        or x.shape[-1] != k
        or x.shape[: len(batch)] != (*batch,)
    ):
        wanted = ", ".join(map(str, [*batch, "...", k]))
        raise ValueError(f"`x` must have shape [{wanted}]. Got {x.shape}.")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"`backend` must be one of {sorted(BACKENDS)}. Got {backend!r}."
        )
    x = varying_with(x, q, layer)
    return _product(_How(False, backend, precision, _sharding(x)), x, q, layer)


def _sharding(x):
    return jax.typeof(x).sharding if explicit_mesh(x) is not None else None


def _checked(layer, batch):
    layer = jnp.asarray(layer)
    if not batch:
        raise ValueError("`layer` needs a stack of kernels. Got a single one.")
    if layer.ndim or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(
            f"`layer` must be an integer scalar. Got {layer.dtype}{[*layer.shape]}."
        )
    if is_concrete(layer) and not 0 <= int(layer) < batch[0]:
        raise ValueError(
            f"`layer` must be from 0 to {batch[0] - 1}, of {batch[0]} kernels. Got "
            f"{int(layer)}."
        )
    return layer.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how, x, q, layer):
    return _compute(how, x, q, layer)


@functools.partial(jax.jit, static_argnums=0)
def _compute(how, x, q, layer):
    """Returns `x @ W` or `x @ W^T`; jitted, so that a shape is traced once."""
    scales = q
    if layer is not None:
        # Scales are few: those of one layer are cut out, and then expanded.
        names = "scales", "scale_scales", "scale_offset"
        leaves = take_layer({name: getattr(q, name) for name in names}, layer)
        scales = dataclasses.replace(q, **leaves)
    return partitioned_product(
        x,
        q.codes,
        float_scales(scales),
        layer,
        weights=Weights(q.fmt, q.block_size, q.matrix_shape[-2], q.dtype_name),
        backend=how.backend,
        transpose=how.transpose,
        precision=how.precision,
    )


def _product_fwd(how, x, q, layer):
    return _product(how, x, q, layer), (q, layer)


def _product_bwd(how, residuals, g):
    q, layer = residuals
    back = how._replace(transpose=not how.transpose, x_sharding=_sharding(g))
    dx = _product(back, g, q, layer)
    if how.x_sharding is not None:
        dx = reshard(dx, how.x_sharding)
    return dx, None, None


_product.defvjp(_product_fwd, _product_bwd)
