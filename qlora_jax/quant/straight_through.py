"""A float kernel that is trained through its own quantization."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._jax.pytree import register
from .formats import Packing
from .geometry import Geometry
from .kernel import ArrayKernel
from .pack import quantize_kernel
from .qtensor import QTensor


@dataclass(frozen=True, eq=False)
class StraightThrough(ArrayKernel):
    """A float kernel that the forward pass sees quantized, and that is trained.

    The gradient passes the quantizer as if it were the identity (the straight-through
    estimator, Bengio et al. 2013), so `to_qtensor` returns exactly the weights that the
    forward pass saw. `init` makes one for each target if `freeze_base=False`. Like a
    QTensor, it is not an array.

    Attributes:
        kernel: The float kernel, in its own shape and dtype: the only leaf.
        packing: How the forward pass quantizes it: `packing.fmt`, `packing.block_size`
            and `packing.double_quant`.
        geometry: How the kernel's axes map to `[*batch, K, N]`, as in `QTensor`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=2, freeze_base=False)
        >>> params = {"kernel": jnp.ones((64, 4))}
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> base["kernel"].to_qtensor()
        QTensor(nf4, float32[64,4], block_size=64, double_quant, 4.375 bits)
        >>> jax.grad(lambda k: k.dequantize().sum())(base["kernel"]).kernel[0, 0]
        Array(1., dtype=float32)
    """

    kernel: Array
    packing: Packing
    geometry: Geometry
    is_trained = True

    def stacked(self) -> "StraightThrough":
        """Returns the kernel with a bool for its array: whether it is a stack."""
        ndim, kinds = jnp.ndim(self.kernel), self.geometry.kinds
        return replace(self, kernel=ndim > len(kinds) or kinds[0] == "b")

    @property
    def label(self) -> str:
        """Its name in `summary`, such as "float32 through nf4"."""
        return f"{self.dtype.name} through {self.packing.fmt}"

    @property
    def value(self) -> Array:
        """The float kernel."""
        return self.kernel

    def to_qtensor(self) -> QTensor:
        """Returns the QTensor that `quantize` returns for the kernel.

        Raises:
            ValueError: Outside jit, as `quantize`: if a weight is not finite, or so
                large that the sum of the scales overflows in double quantization.
        """
        return quantize_kernel(self.kernel, self.packing, self.geometry)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Returns the weights that the forward pass sees.

        Gradients pass to `kernel` unchanged.

        Args:
            dtype: Dtype of the result; by default the kernel's own. Weights are rounded
                to the kernel's own dtype first.

        Raises:
            ValueError: Outside jit, as `to_qtensor`.
        """
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        return _round_trip(self.packing, self.geometry, dtype, self.kernel)


register(
    StraightThrough, ("kernel",), ("packing", "geometry"), "qlora_jax.StraightThrough"
)


# y = dequantize(quantize(w)) is a step function of w, whose derivative is 0 almost
# everywhere. The straight-through estimator takes dy/dw = 1, so dw = dy.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _round_trip(
    packing: Packing, geometry: Geometry, dtype: np.dtype, kernel: Array
) -> Array:
    return quantize_kernel(kernel, packing, geometry).dequantize(dtype)


def _round_trip_fwd(
    packing: Packing, geometry: Geometry, dtype: np.dtype, kernel: Array
) -> tuple[Array, Array]:
    # An empty array carries the dtype of the kernel, which its gradient must have.
    return _round_trip(packing, geometry, dtype, kernel), jnp.zeros((0,), kernel.dtype)


def _round_trip_bwd(
    packing: Packing, geometry: Geometry, dtype: np.dtype, like: Array, dy: Array
) -> tuple[Array]:
    return (dy.astype(like.dtype),)


_round_trip.defvjp(_round_trip_fwd, _round_trip_bwd)
