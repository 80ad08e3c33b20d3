"""Kernels in a linen model's `params`, and modules that read them as float arrays."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.core import meta

from .._jax.pytree import register, split_arrays
from ..adapters.lora import AdaptedKernel, LoRA
from ..adapters.product import effective_kernel
from ..quant.kernel import as_kernel
from .stacks import StackIndex


class Note(str):
    """A text in a tree's structure that is equal to any other.

    So `nn.jit` shares one trace among modules that differ only in their paths.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


class KernelBox(meta.AxisMetadata):
    """A kernel where a model expects a float array.

    Flax takes parameters out of such a box when `self.param` reads them, so a module
    that reads its kernel itself gets the float weights, adapter included.

    Attributes:
        kernel: The kernel, or an `AdaptedKernel`.
        version: What a trace that `nn.jit` caches depends on.
        path: Path of the kernel in the model.
    """

    def __init__(self, kernel: Any, version: Any, path: str):
        self.kernel = kernel
        self.version = version
        self.path = Note(path)

    def unbox(self) -> Any:
        """Returns the float weights."""
        kernel, lora, _ = self.parts()
        return effective_kernel(as_kernel(kernel, lora and lora.geometry), lora)

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

    def parts(self) -> tuple[Any, LoRA | None, Any]:
        """Returns the kernel, its adapter or None, and its dropout key or None."""
        kernel, lora, key = self.kernel, None, None
        if isinstance(kernel, AdaptedKernel):
            kernel, lora, key = kernel.base, kernel.lora, kernel.dropout_key
        if isinstance(kernel, StackIndex):
            kernel = kernel.layer()
        return kernel, lora, key

    @property
    def dropout(self) -> float:
        """The rate of the adapter's dropout if it is on, else 0."""
        kernel = self.kernel
        is_on = isinstance(kernel, AdaptedKernel) and kernel.dropout_key is not None
        return kernel.lora.dropout if is_on else 0.0


register(KernelBox, ("kernel",), ("version", "path"))


class FloatCalls:
    """The calls of modules that read their kernels themselves, during one `apply`."""

    def __init__(self):
        self._paths: list[tuple] = []

    def __contains__(self, module: nn.Module) -> bool:
        """Whether the module is running in such a call."""
        return module.path in self._paths

    def run(self, module: nn.Module, method: str, args: tuple, kwargs: dict) -> Any:
        """Runs a method that reads its module's kernels as float arrays.

        The float weights exist only during the call: `jax.checkpoint` computes the
        method again, from the packed kernels, for the backward pass. A policy that
        saves products would save A B, which is as large as the kernel.
        """
        arrays, rebuild = split_arrays((args, kwargs))
        rebuild_output: list[Callable[[list], Any]] = []

        def compute(module: nn.Module, arrays: list) -> list:
            args, kwargs = rebuild(arrays)
            output = getattr(module, method)(*args, **kwargs)
            outputs, to_output = split_arrays(output)
            rebuild_output.append(to_output)
            return outputs

        self._paths.append(module.path)
        try:
            outputs = nn.remat(compute)(module, arrays)
        finally:
            self._paths.pop()
        return rebuild_output[-1](outputs)


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
