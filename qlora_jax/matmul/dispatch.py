"""`x @ QTensor`: which back end computes it, and its gradient.

The gradient (a custom VJP) is that of `x` alone: neither codes nor scales receive one.
Only the packed weights are kept for the backward pass, which decodes them again, so
that a stack of layers never holds its float weights (QLoRA, Dettmers et al. 2023,
section 3).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ..quant.explicit import explicit_mesh, fitting_spec, in_auto_mode, spec_of
from ..quant.qtensor import QTensor, float_scales
from . import reference, tiled

BACKENDS = {"reference": reference.product, "tiled": tiled.product}


def choose_backend(platform: str) -> str:
    """Returns the name of the back end for a platform."""
    # On a GPU, decoding in one fused pass and calling the vendor's GEMM is what
    # bitsandbytes does for training; on CPUs the decoded weights should stay in cache.
    return "tiled" if platform == "cpu" else "reference"


@dataclass(frozen=True)
class _How:
    """The static side of a product: hashable, so that it can ride in a custom VJP.

    `mesh` and the two specs are None unless an operand has Explicit axes.
    """

    backend: str
    precision: Any
    transpose: bool = False
    mesh: Any = None
    x_spec: PartitionSpec | None = None
    y_spec: PartitionSpec | None = None

    def transposed(self) -> "_How":
        """For the product of a cotangent with the transposed weights."""
        return dataclasses.replace(
            self, transpose=not self.transpose, x_spec=self.y_spec, y_spec=self.x_spec
        )


def matmul(
    x: Float[Array, "*rows k"],
    q: QTensor,
    *,
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
        backend: `"reference"` or `"tiled"`; chosen by platform where not given.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point or `q` is not a QTensor.
        ValueError: If the shapes do not fit, or the back end is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.eye(64), "nf4")
        >>> ql.matmul(jnp.arange(64.0)[None], q).shape
        (1, 64)
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"`q` must be a QTensor. Got {type(q).__name__}.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point. Got {x.dtype}.")
    *batch, k, _ = q.matrix_shape
    if (
        x.ndim < len(batch) + 1
        or x.shape[-1] != k
        or x.shape[: len(batch)] != (*batch,)
    ):
        wanted = ", ".join(map(str, [*batch, "...", k]))
        raise ValueError(f"`x` must have shape [{wanted}]. Got {x.shape}.")
    if backend is None:
        backend = choose_backend(jax.default_backend())
    elif backend not in BACKENDS:
        raise ValueError(
            f"`backend` must be one of {sorted(BACKENDS)}. Got {backend!r}."
        )
    return _product(_how(x, q, backend, precision), x, q)


def _how(x, q, backend, precision):
    mesh = explicit_mesh(x, q)
    if mesh is None:
        return _How(backend, precision)
    x_spec, n = spec_of(x), q.matrix_shape[-1]
    y_spec = (*x_spec[:-1], spec_of(q.codes)[-1])
    y_spec = fitting_spec(mesh, y_spec, (*x.shape[:-1], n))
    return _How(backend, precision, False, mesh, PartitionSpec(*x_spec), y_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how, x, q):
    def compute(x, q):
        # The weights do not depend on x: unless tied to it, XLA decodes those of every
        # layer of a Python loop before the first product.
        x, q = lax.optimization_barrier((x, q))
        *batch, k, n = q.matrix_shape
        rows = math.prod(x.shape[len(batch) : -1])
        y = BACKENDS[how.backend](
            x.reshape(*batch, rows, x.shape[-1]),
            q.codes,
            float_scales(q),
            reference.Weights(q.fmt, q.block_size, k, q.dtype_name),
            transpose=how.transpose,
            precision=how.precision,
        )
        return y.reshape(*x.shape[:-1], k if how.transpose else n)

    if how.mesh is not None:
        compute = in_auto_mode(compute, how.mesh, how.y_spec)
    return compute(x, q)


def _product_fwd(how, x, q):
    return _product(how, x, q), q


def _product_bwd(how, q, g):
    return _product(how.transposed(), g, q), None


_product.defvjp(_product_fwd, _product_bwd)
