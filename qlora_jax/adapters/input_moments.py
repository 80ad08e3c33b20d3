"""An adapter that changes nothing, and whose gradient measures the inputs of a kernel.

It has two arrays. A custom backward pass returns, as the gradient of the first, the sum
of the squares of each input of the kernel, and as the gradient of the second, the
number of rows of x. JAX adds up gradients over everything that uses the kernel: the
steps of a scan, mapped axes, microbatches and the devices of a mesh. So it adds up
these measurements, too.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from .._jax.modes import split_as
from .._jax.pytree import register
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from .base import Adapter, ProductCall


@dataclass(frozen=True, eq=False)
class InputMoments(Adapter):
    """Measures the inputs of one kernel; its gradient holds the measurements.

    The values of the arrays are not used, and are zero.
    """

    squares: Float32[Array, "*batch k"]
    count: Float32[Array, "*batch"]
    geometry: Geometry

    roles = {"squares": "k", "count": ""}
    settings = ("geometry",)
    label = "input moments"
    can_be_ragged = True
    dropout = 0.0

    @classmethod
    def of(cls, kernel: Kernel) -> "InputMoments":
        """Returns the adapter of a frozen kernel."""
        *batch, k, _ = kernel.matrix_shape
        arrays = jnp.zeros((*batch, k), jnp.float32), jnp.zeros(batch, jnp.float32)
        return cls(*arrays, kernel.geometry)

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        # The gradient of x is defined as zero, which saves the time of a product with
        # the kernel. The backward pass of earlier layers must run, but the gradients
        # that it gets do not matter.
        y = lax.stop_gradient(call.multiply(x, kernel))
        return _with_moments(y, x, self, call.offsets)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        return kernel.dequantize()


register(InputMoments, (*InputMoments.roles,), InputMoments.settings)


# Returns y. What the backward pass returns for `moments` is not a derivative: it holds
# the measurements.
@jax.custom_vjp
def _with_moments(
    y: Array, x: Array, moments: InputMoments, offsets: Array | None
) -> Array:
    return y


def _with_moments_fwd(
    y: Array, x: Array, moments: InputMoments, offsets: Array | None
) -> tuple[Array, tuple]:
    return y, (x, moments, offsets)


def _with_moments_bwd(residuals: tuple, dy: Array) -> tuple:
    x, moments, offsets = residuals
    squares = jnp.square(x.astype(jnp.float32))
    # A 1 for each row. The array must depend on x. If it were a constant, JAX would not
    # map it inside a vmap, and would count only the rows of one mapped example.
    rows = jnp.where(x[..., 0] == 0, jnp.float32(1), jnp.float32(1))
    if offsets is None:
        row_axes = tuple(range(len(moments.batch_shape), x.ndim - 1))
        squares, count = jnp.sum(squares, row_axes), jnp.sum(rows, row_axes)
    else:
        # Rows are sorted by expert; those beyond the last offset belong to none.
        num_experts = len(offsets) - 1
        row_ids = jnp.arange(x.shape[0], dtype=offsets.dtype)
        experts = jnp.searchsorted(offsets[1:], row_ids, side="right")
        squares = jax.ops.segment_sum(squares, experts, num_experts)
        count = jax.ops.segment_sum(rows, experts, num_experts)
    arrays = split_as(squares, moments.squares), split_as(count, moments.count)
    gradient = InputMoments(*arrays, moments.geometry)
    return jnp.zeros_like(dy), jnp.zeros_like(x), gradient, None


_with_moments.defvjp(_with_moments_fwd, _with_moments_bwd)
