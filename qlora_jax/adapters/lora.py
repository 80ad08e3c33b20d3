"""The LoRA pytree, and a kernel with its adapter as one leaf.

LoRA (Hu et al. 2021, section 4.1): `y = x W + scaling * (x A) B`, A and B trained.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .._jax.pytree import TreeLeaf, register
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel


@dataclass(frozen=True, eq=False)
class LoRA(TreeLeaf):
    """A low-rank adapter of one kernel: its two leaves are all that is trained.

    It adds `scaling * (x A) B` to the product of its kernel (LoRA, Hu et al. 2021,
    section 4.1). `init` makes adapters; `apply` and the integrations compute with them.

    Attributes:
        a: A, `[*batch, K, r]` in the config's `lora_dtype`: K runs over the kernel's
            contracted axes.
        b: B, `[*batch, r, N]` in the same dtype, zero at first: N runs over the
            kernel's output axes.
        scaling: Multiplier of the product: `alpha / rank`, or `alpha / sqrt(rank)` if
            it is rank-stabilized. A stack whose matrices have scalings of their own, as
            `ql.io.load_peft` makes it, has a tuple of them, in the order of its batch
            axes.
        dropout: Rate of dropout on the adapter's input, in [0, 1).
        geometry: How the kernel's axes map to `[*batch, K, N]`; `geometry.kinds` has a
            letter for each trailing axis: b (batch), k (contracted) or n (output).

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, alpha=8)
        >>> _, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scaling
        ((64, 4), (4, 8), 2.0)
    """

    a: Any
    b: Any
    scaling: Any
    dropout: float
    geometry: Geometry

    @property
    def rank(self) -> int:
        """The rank r, the size of A's last axis."""
        return self.a.shape[-1]

    def scaling_at(self, index: tuple[int, ...]) -> float:
        """Returns the scaling of one matrix of a stack.

        Args:
            index: Index of its batch axes.

        Returns:
            The number that its product is multiplied by.

        Example:
            >>> import jax, jax.numpy as jnp, qlora_jax as ql
            >>> params = {"kernel": jnp.ones((3, 64, 8))}
            >>> _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
            >>> lora["kernel"].scaling_at((2,))
            1.0
        """
        if not isinstance(self.scaling, tuple):
            return self.scaling
        place = 0
        for i, size in zip(index, self.a.shape[:-2], strict=True):
            place = place * size + i
        return self.scaling[place]

    def why_not(self, leaf: Any) -> str | None:
        """Returns why it cannot be the adapter of a kernel, or None if it can.

        Args:
            leaf: A kernel or a float array; placeholders without a shape pass.

        Returns:
            The reason, a sentence to put into an error; None if axes and shapes fit.

        Example:
            >>> import jax, jax.numpy as jnp, qlora_jax as ql
            >>> params = {"kernel": jnp.ones((64, 8))}
            >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
            >>> lora["kernel"].why_not(base["kernel"]) is None
            True
            >>> lora["kernel"].why_not(jnp.ones((32, 8)))
            "A must be [32, 'r'] and B ['r', 8]. Got [64, 4] and [4, 8]."
        """
        leaves = (leaf, self.a, self.b)
        if not all(isinstance(getattr(x, "shape", None), tuple) for x in leaves):
            return None
        shape = tuple(leaf.shape)
        own = self.geometry.roles(len(shape))
        kernel = as_kernel(leaf, self.geometry).geometry.roles(len(shape))
        if own != kernel:
            return (
                f"its kernel has axes {kernel!r} (b batch, k contracted, n output); it "
                f"was made for {own!r}."
            )
        *batch, k, n = self.geometry.matrix_shape(shape)
        *a, rank = self.a.shape
        if a == [*batch, k] and self.b.shape == (*batch, rank, n):
            return self._why_not_scaled(batch)
        a_shape, b_shape = [*batch, k, "r"], [*batch, "r", n]
        return (
            f"A must be {a_shape} and B {b_shape}. Got {[*self.a.shape]} and "
            f"{[*self.b.shape]}."
        )

    def _why_not_scaled(self, batch: list[int]) -> str | None:
        if not isinstance(self.scaling, tuple) or len(self.scaling) == math.prod(batch):
            return None
        return (
            "it has a scaling for each matrix of a stack: apply the whole stack, or "
            f"scan it in a wrapped model. Got batch axes {batch} for "
            f"{len(self.scaling)} scalings."
        )


register(LoRA, ("a", "b"), ("scaling", "dropout", "geometry"), "qlora_jax.LoRA")


@dataclass(frozen=True, eq=False)
class SlicedLoRA(LoRA):
    """An adapter during a call: `scaling` is an array `[*batch]`, sliced as A and B."""

    @classmethod
    def of(cls, lora: LoRA) -> LoRA:
        """Returns the adapter with its scalings as an array, if it has several."""
        if not isinstance(lora.scaling, tuple):
            return lora
        scaling = jnp.asarray(lora.scaling, jnp.float32).reshape(lora.a.shape[:-2])
        return cls(lora.a, lora.b, scaling, lora.dropout, lora.geometry)


register(SlicedLoRA, ("a", "b", "scaling"), ("dropout", "geometry"))


@dataclass(frozen=True, eq=False)
class AdaptedKernel(TreeLeaf):
    """A kernel with its adapter: one leaf of a combined tree, which `combine` makes.

    Attributes:
        base: The kernel: a QTensor, a StraightThrough or a float array.
        lora: Its adapter, a LoRA.
        dropout_key: PRNG key of the adapter's dropout (one for each matrix of a
            stack), or None, which means no dropout.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> type(tree["kernel"]).__name__, tree["bias"].shape
        ('AdaptedKernel', (8,))
    """

    base: Any
    lora: LoRA
    dropout_key: Any = None


register(AdaptedKernel, ("base", "lora", "dropout_key"), (), "qlora_jax.AdaptedKernel")
