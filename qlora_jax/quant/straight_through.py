"""A float kernel that is trained through its own quantization."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.pytree import register
from .geometry import Geometry
from .qtensor import QTensor
from .quantize import dequantize_kernel, quantize_kernel


@dataclass(frozen=True, eq=False)
class StraightThrough:
    """A float kernel that the forward pass sees quantized, and that is trained.

    The gradient passes the quantizer as if it were the identity (the straight-through
    estimator, Bengio et al. 2013), so `to_qtensor` afterwards gives exactly the weights
    that the forward pass saw.

    Attributes:
        kernel: The float kernel, in its own shape: the one leaf.
        fmt: Name of the number format.
        block_size: Weights along the contracted axes that share a scale.
        double_quant: Whether the scales are quantized too.
        geometry: How the kernel's axes map to `[*batch, K, N]`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=2, freeze_base=False)
        >>> params = {"kernel": jnp.ones((64, 4))}
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> type(base["kernel"]).__name__, ql.dequantize(base)["kernel"].shape
        ('StraightThrough', (64, 4))
    """

    kernel: Any
    fmt: str
    block_size: int
    double_quant: bool
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        """The kernel's dtype."""
        return jnp.dtype(self.kernel.dtype)

    def to_qtensor(self) -> QTensor:
        """Returns the quantized kernel."""
        return quantize_kernel(
            self.kernel,
            self.fmt,
            block_size=self.block_size,
            double_quant=self.double_quant,
            geometry=self.geometry,
        )

    def quantized_value(self, dtype: Any = None) -> Float[Array, "..."]:
        """The dequantized weights; gradients pass to `kernel` unchanged.

        As in `dequantize`, they are rounded to the kernel's own dtype before `dtype`.
        """
        settings = (self.fmt, self.block_size, self.double_quant, self.geometry)
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        return _round_trip(settings, self.dtype, dtype, self.kernel)


register(
    StraightThrough, ("kernel",), ("fmt", "block_size", "double_quant", "geometry")
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _round_trip(settings, own_dtype, dtype, kernel):
    return dequantize_kernel(StraightThrough(kernel, *settings).to_qtensor(), dtype)


_round_trip.defvjp(
    lambda *args: (_round_trip(*args), None),
    lambda settings, own_dtype, dtype, _, g: (g.astype(own_dtype),),
)
