"""Apply one adapted dense layer."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..quant.kernel import as_kernel
from .product import product


def apply(
    base: Any,
    lora: Any,
    x: jax.Array,
    *,
    dropout_key: Any = None,
    backend: str | None = None,
    precision: Any = None,
) -> jax.Array:
    """Applies one dense layer: `x W + scaling * (x A) B`, plus its bias, if any.

    Args:
        base: A kernel (QTensor, StraightThrough or float array), or a dict with a
            `"kernel"` and perhaps a `"bias"`: `[*outputs]`, or `[*batch, *outputs]`.
        lora: The LoRA, or a dict with it at `"kernel"`; None or an empty dict for none.
        x: `[..., K]`; for a kernel with several contracted axes those stand at the end
            of `x`, for one with batch axes they stand in front.
        dropout_key: PRNG key of the adapter's dropout; none means no dropout.
        backend: As in `matmul`, for a packed kernel.
        precision: As in `jax.lax.dot_general`.

    Returns:
        `[..., *outputs]` in the dtype of `x`.

    Raises:
        TypeError: If `x` is not floating-point.
        ValueError: If a layer has other parts than kernel and bias, `lora` others than
            a kernel, or shapes do not fit.
        NotImplementedError: As `matmul`, if a back end is asked for.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"layer": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> ql.apply(base["layer"], lora["layer"], jnp.ones((2, 64))).shape
        (2, 8)
    """
    bias = None
    if isinstance(base, Mapping):
        if not {"kernel"} <= set(base) <= {"kernel", "bias"}:
            raise ValueError(
                "a layer must have a 'kernel' and at most a 'bias' beside it. Got "
                f"{sorted(base)}."
            )
        base, bias = base["kernel"], base.get("bias")
    if isinstance(lora, Mapping):
        if not set(lora) <= {"kernel"}:
            raise ValueError(
                "`lora` must be one layer's, with at most a 'kernel'. Got "
                f"{sorted(lora)}."
            )
        lora = lora.get("kernel")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {x.dtype}.")
    kernel = as_kernel(base, lora.geometry if lora is not None else None)
    geometry, shape = kernel.geometry, kernel.shape
    batch_ndim = geometry.batch_ndim(len(shape))
    contracted = tuple(shape[a] for a in geometry.axes("k", len(shape)))
    outputs = tuple(shape[a] for a in geometry.axes("n", len(shape)))
    split = x.ndim - len(contracted)
    if split < batch_ndim or x.shape[split:] != contracted:
        raise ValueError(f"`x` must end in axes {contracted}. Got shape {x.shape}.")
    y = product(
        x.reshape(*x.shape[:split], math.prod(contracted)),
        kernel,
        lora,
        dropout_key=dropout_key,
        backend=backend,
        precision=precision,
    )
    y = y.reshape(*x.shape[:split], *outputs)
    if bias is None:
        return y
    # A stack may have a bias for each of its kernels: [*batch, *outputs].
    batch = bias.shape[: bias.ndim - len(outputs)]
    rows = (1,) * (y.ndim - bias.ndim)
    return y + bias.astype(y.dtype).reshape(*batch, *rows, *outputs)
