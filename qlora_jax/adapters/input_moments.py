"""An adapter that changes nothing, and whose gradient measures the inputs of a kernel.

The gradients of its arrays are defined as the sum of the squares of each input, and the
number of rows. JAX then adds up these sums over everything that uses the kernel: the
steps of a scan, mapped axes, microbatches and the devices of a mesh.
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
    """Measures the inputs of one kernel, in its gradient. All arrays are zero."""

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
        """Returns the adapter of a kernel.

        Args:
            kernel: The frozen kernel.
        """
        *batch, k, _ = kernel.matrix_shape
        arrays = jnp.zeros((*batch, k), jnp.float32), jnp.zeros(batch, jnp.float32)
        return cls(*arrays, kernel.geometry)

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        # The gradient of x is zero instead of a product with the kernel, which saves
        # the time of that product. Earlier layers only need that there is a gradient.
        y = lax.stop_gradient(call.multiply(x, kernel))
        return _with_moments(y, x, self, call.offsets)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        return kernel.dequantize()


register(InputMoments, (*InputMoments.roles,), InputMoments.settings)


# Returns y. The gradient of the adapter is that of no function: it holds the moments.
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
    # A one for each row, which depends on x: inside a vmap, JAX would not add up the
    # counts of all mapped rows if they were constants.
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
    gradient = InputMoments(
        split_as(squares, moments.squares),
        split_as(count, moments.count),
        moments.geometry,
    )
    return jnp.zeros_like(dy), jnp.zeros_like(x), gradient, None


_with_moments.defvjp(_with_moments_fwd, _with_moments_bwd)
