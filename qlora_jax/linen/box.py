"""How a packed kernel travels through a linen model's `params` collection."""

from typing import Any

from flax.core import meta

from .._jax.pytree import register
from ..adapters.lora import AdaptedKernel
from ..adapters.product import effective_kernel
from ..quant.kernel import as_kernel
from .stacks import StackIndex


class Note(str):
    """A text in a tree's structure that is equal to any other.

    So `nn.jit` takes one trace for modules that are alike but for their paths.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


class KernelBox(meta.AxisMetadata):
    """A kernel where a model expects a float array.

    Flax takes parameters out of such a box when `self.param` reads them, so a module
    that reads its kernel itself gets the float weights, adapter included.
    """

    def __init__(self, kernel: Any, version: Any, path: str):
        self.kernel = kernel
        # Static: `nn.jit` must not take a trace made under other settings.
        self.version = version
        self.path = Note(path)

    def unbox(self) -> Any:
        """Returns the float weights."""
        base, lora, _ = self.split()
        if isinstance(base, StackIndex):
            base = base.layer()
        return effective_kernel(as_kernel(base, lora and lora.geometry), lora)

    def replace_boxed(self, val: Any) -> Any:
        """Returns `val`: what replaces a packed kernel is a plain array."""
        return val

    def add_axis(self, index: int, params: dict) -> "KernelBox":
        """Keeps the box: stacked axes are read from the arrays."""
        return self._on_axis(index)

    def remove_axis(self, index: int, params: dict) -> "KernelBox":
        """Keeps the box: stacked axes are read from the arrays."""
        return self._on_axis(index)

    def _on_axis(self, index: int) -> "KernelBox":
        if index != 0:
            raise ValueError(f"{self.path}: {wrong_axis(index)}")
        return self

    def split(self) -> tuple[Any, Any, Any]:
        """Returns the kernel, its adapter or None, and its dropout key or None."""
        if isinstance(self.kernel, AdaptedKernel):
            return self.kernel.base, self.kernel.lora, self.kernel.dropout_key
        return self.kernel, None, None

    @property
    def dropout(self) -> float:
        """The rate of dropout that is on."""
        _, lora, key = self.split()
        return 0.0 if key is None else lora.dropout


register(KernelBox, ("kernel",), ("version", "path"))


def wrong_axis(index: int) -> str:
    """Says why a kernel that is stacked along another axis than 0 is refused."""
    return (
        "packed kernels must be stacked along axis 0 (nn.scan or nn.vmap with "
        f"variable_axes={{'params': 0}}). Got axis {index}."
    )


def no_dropout(rate: float) -> str:
    """Says why dropout on a kernel that its module reads itself is refused."""
    return (
        "its module reads it itself, so that no dropout can act on the adapter's "
        f"input. Got dropout={rate}. Use ql.linen.register, or dropout=0."
    )
