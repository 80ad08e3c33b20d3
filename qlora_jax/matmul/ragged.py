"""Products of rows that are sorted by expert with packed experts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._jax.memory import is_concrete
from .._jax.modes import for_product
from ..quant.qtensor import QTensor
from .choose import checked_backend
from .quantized import (
    as_float,
    checked_layer,
    packed_product,
    product_spec,
    reverse_mode,
)


def ragged_dot(
    x: Float[Array, "m k"],
    q: QTensor,
    group_sizes: Int[Array, " experts"],
    *,
    layer: Int[Array, ""] | int | None = None,
    backend: str | Sequence[str] | None = None,
    precision: Any = None,
) -> Float[Array, "m n"]:
    """Returns `jax.lax.ragged_dot(x, dequantize(q), group_sizes)` in `x.dtype`.

    The first `group_sizes[0]` rows of x are multiplied by expert 0, the next by expert
    1, and so on; rows beyond their sum give zero. Experts are decoded one after another
    (or a tile of one), each once for all of its rows, and only those that have rows.
    Rounding and sums are those of `matmul`. Differentiable in `x`.

    Args:
        x: Floating-point `[M, K]`, rows sorted by expert.
        q: The quantized experts, `[E, K, N]`.
        group_sizes: The number of rows of each expert, integers `[E]`.
        layer: As in `matmul`: `q` is a stack `[L, E, K, N]`.
        backend: As in `matmul`.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point, `group_sizes` are not integers, or `q`
            is not a QTensor.
        ValueError: If the shapes do not fit, the back end is unknown, the layer is not
            in the stack or, outside jit, group sizes are negative or more than the
            rows.
        NotImplementedError: As in `matmul`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> experts = ql.quantize(jnp.stack([jnp.eye(64), 2 * jnp.eye(64)]))
        >>> x, sizes = jnp.ones((4, 64)), jnp.array([1, 2])
        >>> ql.ragged_dot(x, experts, sizes)[:, 0].tolist()
        [1.0, 2.0, 2.0, 0.0]
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor. Got {type(q).__name__}.")
    x = as_float(x)
    *batch, k, _ = q.matrix_shape
    if layer is not None:
        layer = checked_layer(layer, batch)
        batch = batch[1:]
    if len(batch) != 1:
        raise ValueError(
            "`q` must be a stack of experts, with one axis in front of those of a "
            f"kernel (and one more for `layer`). Got shape {q.shape}."
        )
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"`x` must have shape [M, {k}]. Got {x.shape}.")
    offsets = offsets_of(group_sizes, x.shape[0], batch[0])
    mesh, x, q, layer, offsets = for_product(x, q, layer, offsets)
    spec = replace(
        product_spec(q),
        batch=0,
        is_ragged=True,
        backend=checked_backend(backend),
        precision=precision,
        mesh=mesh,
    )
    with reverse_mode():
        return packed_product(spec, x, q, layer, offsets)


def offsets_of(group_sizes: Any, rows: Any, experts: int) -> Array:
    """Returns where the rows of each expert begin and end, int32 `[E + 1]`."""
    sizes = jnp.asarray(group_sizes)
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers. Got {sizes.dtype}.")
    if sizes.shape != (experts,):
        raise ValueError(
            f"`group_sizes` must have shape [{experts}], one for each expert. Got "
            f"{sizes.shape}."
        )
    if is_concrete(sizes) and sizes.size:
        with jax.ensure_compile_time_eval():
            least, total = int(jnp.min(sizes)), int(jnp.sum(sizes))
        if least < 0:
            raise ValueError(f"`group_sizes` must not be negative. Got {sizes}.")
        if total > rows:
            raise ValueError(
                f"`group_sizes` must sum to at most the {rows} rows of `x`. Got "
                f"{total}."
            )
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
