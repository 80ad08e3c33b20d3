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

from .._jax.modes import explicit_mesh, in_auto_mode, split_as
from .._jax.specs import fitting_spec
from ..matmul.floats import float_product
from ..matmul.quantized import matmul
from ..matmul.sharded import constrain_factors
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, PackedInput
from ..quant.placement import Placement
from .lora import LoRA, SlicedLoRA


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
    h = float_product(x, a, precision, w_moves=True).astype(x.dtype)
    h = checkpoint_name(h, "lora_product")
    return _scaled(float_product(h, b, precision, w_moves=True), lora)


def _scaled(y: Array, lora: LoRA) -> Array:
    """Returns `scaling * y` for y `[*batch, ...]`."""
    scaling = SlicedLoRA.of(lora).scaling
    if isinstance(scaling, int | float):
        # A product with 1, the default, would only take time to compile.
        return y if scaling == 1 else y * scaling
    scaling = scaling.reshape(*scaling.shape, *(1,) * (y.ndim - scaling.ndim))
    return y * split_as(scaling, y)


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
    return float_product(x, w, precision).astype(x.dtype)


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
    delta = float_product(a, b, lax.Precision.HIGHEST, w_moves=True)
    return _scaled(delta, lora)


def effective_kernel(kernel: Kernel, lora: LoRA | None) -> Float[Array, "..."]:
    """Returns `W + scaling * A B` in the kernel's own shape and dtype.

    Differentiable in A and B, and in a kernel that is trained.
    """
    if lora is None:
        return kernel.dequantize()
    delta = lora_delta(lora)
    mesh = explicit_mesh(kernel, delta)
    if mesh is None:
        return _add(kernel, lora.geometry, delta)
    spec = fitting_spec(mesh, kernel.spec, kernel.shape)
    run = lambda kernel, delta: _add(kernel, lora.geometry, delta)
    return in_auto_mode(run, mesh, spec)(kernel, delta)


def _add(kernel: Kernel, geometry: Geometry, delta: Array) -> Array:
    w = kernel.dequantize_matrix(jnp.float32) + delta
    return geometry.from_matrix(w.astype(kernel.dtype))
