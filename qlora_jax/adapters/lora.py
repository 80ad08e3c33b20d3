"""The LoRA pytree, and a kernel with its adapter as one leaf.

LoRA (Hu et al. 2021, section 4.1): `y = x W + scaling * (x A) B`, A and B trained.
"""

from dataclasses import dataclass
from typing import Any

from .._jax.pytree import TreeLeaf, register
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel


@dataclass(frozen=True, eq=False)
class LoRA(TreeLeaf):
    """A low-rank adapter of one kernel: its two leaves are all that is trained.

    Attributes:
        a: `[*batch, K, r]`.
        b: `[*batch, r, N]`, zero at first.
        scaling: Multiplier of the product, `alpha / rank`.
        dropout: Rate of dropout on the adapter's input.
        geometry: How the kernel's axes map to `[*batch, K, N]`.

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
    scaling: float
    dropout: float
    geometry: Geometry

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[-1]

    def why_not(self, leaf: Any) -> str | None:
        """Returns why it cannot be the adapter of a kernel, or None.

        Args:
            leaf: A kernel or a float array; placeholders without a shape pass.
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
            return None
        a_shape, b_shape = [*batch, k, "r"], [*batch, "r", n]
        return (
            f"A must be {a_shape} and B {b_shape}. Got {[*self.a.shape]} and "
            f"{[*self.b.shape]}."
        )


register(LoRA, ("a", "b"), ("scaling", "dropout", "geometry"))


@dataclass(frozen=True, eq=False)
class AdaptedKernel(TreeLeaf):
    """A frozen kernel with its adapter: one leaf of a combined tree.

    Attributes:
        base: The frozen kernel: a QTensor, a StraightThrough or a float array.
        lora: Its adapter.
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


register(AdaptedKernel, ("base", "lora", "dropout_key"), ())
