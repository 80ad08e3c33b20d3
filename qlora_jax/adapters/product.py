"""The product of an adapted kernel, and the kernel with the adapter merged in.

LoRA (Hu et al. 2021, section 4.1): `y = x W + scaling * (x A) B`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from .._jax.modes import (
    explicit_mesh,
    in_auto_mode,
    is_local,
    split_as,
    varying_with,
)
from .._jax.specs import fitting_spec, spec_of
from ..matmul.backends.reference import accumulator_dtype, dot
from ..matmul.choose import with_one_axis_of_rows
from ..matmul.product import matmul
from ..matmul.sharded import constrain_factors
from ..quant.kernel import Kernel, PackedInput
from ..quant.placement import Placement
from .lora import LoRA, SlicedLoRA

# Elements of x up to which the gradient of A is not computed transposed.
LARGEST_UNSWAPPED = 2**16


def _dot(x: Array, w: Array, precision: Any) -> Any:
    """`x @ w` in float32, with gradients from operands in the dtype of `x`.

    Autodiff would multiply the float32 cotangent by bfloat16 operands: a float32
    product, several times slower where bfloat16 has matrix units.
    """
    mesh = explicit_mesh(x, w)
    if mesh is None:
        return _narrow_dot(varying_with(x, w), varying_with(w, x), precision)
    # Both may be split along what is contracted, which plain products refuse.
    batch = w.ndim - 2
    own = [b or a for a, b in zip(spec_of(x)[:batch], spec_of(w)[:batch], strict=True)]
    spec = (*own, *spec_of(x)[batch:-1], spec_of(w)[-1])
    spec = fitting_spec(mesh, spec, (*x.shape[:-1], w.shape[-1]))
    run = functools.partial(_narrow_dot, precision=precision)
    return in_auto_mode(run, mesh, spec)(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_dot(x: Array, w: Array, precision: Any) -> Any:
    return dot(x, w, transpose=False, precision=precision)


def _dot_fwd(x: Array, w: Array, precision: Any) -> tuple[Array, tuple]:
    return _narrow_dot(x, w, precision), (x, w)


def _dot_bwd(precision: Any, residuals: tuple, g: Array) -> tuple[Array, Array]:
    x, w = residuals
    g = g.astype(x.dtype)
    dx = dot(g, w, transpose=True, precision=precision).astype(x.dtype)
    batch_axes = w.ndim - 2
    if is_local():
        # XLA copies operands to sum over several axes of rows. Elsewhere they stay
        # apart: each may be split over a mesh axis of its own.
        x = with_one_axis_of_rows(x, batch_axes)
        g = with_one_axis_of_rows(g, batch_axes)
    batch = tuple(range(batch_axes))
    rows = tuple(range(batch_axes, x.ndim - 1))
    # XLA transposes the left operand in memory, so that is the narrow one, of the rank.
    # Unless a barrier hides the transposition behind the product, XLA swaps them back.
    # Both take time to compile. For a small x they gain less than 0.1 ms on two cores.
    is_swapped = w.shape[-2] > w.shape[-1] and x.size > LARGEST_UNSWAPPED
    dw = lax.dot_general(
        *((g, x) if is_swapped else (x, g)),
        ((rows, rows), (batch, batch)),
        precision=precision,
        preferred_element_type=accumulator_dtype(x.dtype),
    )
    dw = lax.optimization_barrier(dw).swapaxes(-1, -2) if is_swapped else dw
    return dx, dw.astype(w.dtype)


_narrow_dot.defvjp(_dot_fwd, _dot_bwd)


def lora_product(
    x: Float[Array, "..."],
    lora: LoRA,
    dropout_key: Any = None,
    precision: Any = None,
    placement: Placement | None = None,
) -> Float32[Array, "..."]:
    """Returns `scaling * (x A) B` in float32 for x `[*batch, ..., K]`.

    Both products are computed in the dtype of `x` with float32 sums. `placement` is
    that of the kernel. `x A` has the name "lora_product" for `jax.checkpoint` policies.
    """
    if dropout_key is not None and lora.dropout > 0:
        x = _drop(x, lora, dropout_key)
    a, b = _cast(lora.a, x.dtype), _cast(lora.b, x.dtype)
    a, b = constrain_factors(placement, a, b)
    h = checkpoint_name(_dot(x, a, precision).astype(x.dtype), "lora_product")
    return _scaled(_dot(h, b, precision), lora)


def _scaled(y: Array, lora: LoRA) -> Array:
    """Returns `scaling * y` for y `[*batch, ...]`."""
    scaling = SlicedLoRA.of(lora).scaling
    if isinstance(scaling, int | float):
        # A product with 1, the default, would only take time to compile.
        return y if scaling == 1 else y * scaling
    return y * scaling.reshape(*scaling.shape, *(1,) * (y.ndim - scaling.ndim))


def _cast(w: Array, dtype: Any) -> Array:
    """Returns `w.astype(dtype)`, bit for bit, in a form that stays inside loops.

    XLA moves a cast of each layer's A and B out of a scan and keeps the copies of all
    layers in memory: 0.34 GB for an 8B model at rank 64. It does not move a reduction
    of precision. Only where the dtypes share an exponent range, as float32 and bfloat16
    do: float16 has subnormal numbers, which `reduce_precision` flushes to zero.
    """
    have, want = jnp.finfo(w.dtype), jnp.finfo(dtype)
    if have.nexp == want.nexp and have.nmant > want.nmant:
        w = lax.reduce_precision(w, int(want.nexp), int(want.nmant))
    return w.astype(dtype)


def _drop(x: Array, lora: LoRA, key: Array) -> Array:
    """Inverted dropout; a batch of keys, one for each matrix, is folded into one."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(key)
    if key.ndim:
        key = key.reshape(-1)[0]
    keep = jax.random.bernoulli(key, 1 - lora.dropout, x.shape)
    return jnp.where(keep, x / (1 - lora.dropout), jnp.zeros_like(x))


def base_product(
    x: Float[Array, "..."],
    kernel: Kernel,
    *,
    backend: str | tuple[str, ...] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Returns `x W` for x `[*batch, ..., K]`, in the dtype of `x`."""
    w = kernel.product_input(x.dtype)
    if isinstance(w, PackedInput):
        return matmul(x, w.q, layer=w.layer, backend=backend, precision=precision)
    return _dot(x, w, precision).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("backend", "precision"))
def product(
    x: Float[Array, "..."],
    kernel: Kernel,
    lora: LoRA | None,
    *,
    dropout_key: Any = None,
    backend: str | tuple[str, ...] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Returns `x W + scaling * (x A) B` in matrix form, in the dtype of `x`.

    For one layer of a stack, A and B are that layer's own. Jitted so that layers of one
    shape are traced once: in a model that unrolls its layers, tracing is half of what
    adapters cost.
    """
    y = base_product(x, kernel, backend=backend, precision=precision)
    if lora is None:
        return y
    added = lora_product(x, lora, dropout_key, precision, kernel.placement)
    return y + split_as(added.astype(y.dtype), y)


def lora_delta(lora: LoRA) -> Float32[Array, "*batch k n"]:
    """Returns `scaling * A B` in float32, in matrix form."""
    a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
    return _scaled(dot(a, b, transpose=False, precision=lax.Precision.HIGHEST), lora)


def effective_kernel(kernel: Kernel, lora: LoRA | None) -> Float[Array, "..."]:
    """Returns `W + scaling * A B` in the kernel's own shape and dtype.

    Differentiable in A and B, and in a kernel that is trained.
    """
    mesh = explicit_mesh(kernel, lora)
    if mesh is None:
        return _effective_kernel(kernel, lora)
    spec = fitting_spec(mesh, kernel.spec, kernel.shape)
    return in_auto_mode(_effective_kernel, mesh, spec)(kernel, lora)


def _effective_kernel(kernel: Kernel, lora: LoRA | None) -> Array:
    if lora is None:
        return kernel.dequantize()
    w = kernel.dequantize_matrix(jnp.float32) + lora_delta(lora)
    return lora.geometry.from_matrix(w.astype(kernel.dtype))
