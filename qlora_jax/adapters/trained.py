"""Leaves that are trained in full: a trained array beside the frozen one."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..quant.geometry import Geometry
from ..quant.kernel import FloatKernel, Kernel
from .base import Adapter, Multiply, register_adapter

# Of a leaf that is no kernel: all of its axes are batch axes.
WHOLE = Geometry("", ())


@dataclass(frozen=True, eq=False)
class Trained(Adapter):
    """An array that is trained in the place of a frozen leaf: a bias, a norm, a head.

    `init` makes one for each leaf that `trainable` of the config matches. It is in the
    lora tree like any adapter, so that optimizers and files need no more; the base
    keeps the leaf as it was.

    Attributes:
        value: The trained array, in the leaf's shape; at first the leaf. Its dtype is
            at least the config's `lora_dtype`. The model sees it in the leaf's dtype.
        scaling: Of no effect: an adapter has one.
        dropout: Likewise.
        geometry: Likewise.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> config = ql.QLoRAConfig(rank=4, trainable="bias")
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["bias"].value.shape, ql.merge(base, lora)["bias"].shape
        ((8,), (8,))
    """

    value: Any
    scaling: Any = 1.0
    dropout: float = 0.0
    geometry: Geometry = WHOLE

    roles = {"value": ""}
    label = "trained"

    def product(  # noqa: D102
        self, x: Array, kernel: Kernel, multiply: Multiply, key: Any, precision: Any
    ) -> Array:
        return multiply(x, FloatKernel(self.merged(kernel), kernel.geometry))

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        return self.value.astype(kernel.dtype)


register_adapter(Trained)


def new_trained(leaf: Any, dtype: Any) -> Trained:
    """Returns a copy of a leaf to train, whose dtype is at least `dtype`."""
    # A copy: training may donate the lora tree.
    return Trained(jnp.array(leaf, jnp.promote_types(leaf.dtype, dtype), copy=True))
