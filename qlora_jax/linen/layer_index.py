"""Stacks of packed kernels that a scan over layers does not slice.

A TPU kernel reads its operands from HBM, and the slices that a scan passes to its body
are copies. So a packed stack stays outside the scan and the body closes over it. The
scan slices the layers' indices instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .._jax.pytree import TreeLeaf, register
from ..adapters.base import AdaptedKernel, parts_of
from ..adapters.patterns import matches
from ..quant.kernel import is_packed
from ..quant.qtensor import QTensor
from ..quant.stack import LayerOfStack
from ..trees.paths import Tree, leaves_by_path


class Stacks:
    """The stacks of one `apply`, by path; compared by identity.

    A context manager: it drops the stacks at its end, so that a trace that `nn.jit`
    caches keeps no arrays.
    """

    def __init__(self):
        self.by_path: dict[str, QTensor] = {}

    def __enter__(self) -> "Stacks":
        return self

    def __exit__(self, *error: object) -> None:
        self.by_path.clear()

    def keep(self, path: str, kernel: Any) -> Any:
        """Keeps a kernel's base if it is a packed stack; returns indices in its place.

        A stack has one axis before the kernel's own. With two (a scan in a scan), the
        scans slice it as they slice any parameter.
        """
        base, lora, key = parts_of(kernel)
        if lora is not None:
            return AdaptedKernel(self.keep(path, base), lora, key)
        if not is_packed(kernel) or kernel.ndim != 1 + len(kernel.geometry.kinds):
            return kernel
        self.by_path[path] = kernel
        return StackIndex(jnp.arange(kernel.shape[0], dtype=jnp.int32), self, path)


@dataclass(frozen=True, eq=False)
class StackIndex(TreeLeaf):
    """Replaces a packed kernel of a stack: what the scan slices.

    Attributes:
        index: `arange(L)` outside the scan, and the index of the layer inside.
        stacks: The stacks of this `apply` (static).
        path: Path of the stack among them (static).
    """

    index: Any
    stacks: Stacks
    path: str

    def layer(self) -> LayerOfStack:
        """Returns the kernel.

        Raises:
            ValueError: If no scan sliced the indices.
        """
        if jnp.ndim(self.index):
            raise ValueError(
                "`scanned` must name modules that run under nn.scan. Got one around "
                f"{self.path!r}, of which {jnp.shape(self.index)[0]} run at once."
            )
        return LayerOfStack(self.stacks.by_path[self.path], self.index)


register(StackIndex, ("index",), ("stacks", "path"))


def is_inside(patterns: Sequence[str], path: str) -> bool:
    """Whether a module around the leaf at `path` has a path that matches."""
    names = path.split("/")
    modules = ["/".join(names[:i]) for i in range(len(names))]
    return any(matches(patterns, module) for module in modules)


def check_scanned(patterns: Sequence[str], params: Tree) -> None:
    """Raises ValueError for patterns that match no module with parameters."""
    paths = list(leaves_by_path(params))
    unknown = [p for p in patterns if not any(is_inside([p], path) for path in paths)]
    if unknown:
        raise ValueError(
            "`scanned` must match paths of modules that have parameters. Got "
            f"{unknown}, which match none."
        )
