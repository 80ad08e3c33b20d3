"""Stacks of packed kernels that a scan over layers does not slice.

TPU kernels read from HBM, and a scan's slices are copies. So the body closes over the
packed stack, and the scan slices the layers' indices.
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
    """The stacks of one `apply`, by path. Cleared at exit: `nn.jit` caches traces."""

    def __init__(self):
        self.by_path: dict[str, QTensor] = {}

    def __enter__(self) -> "Stacks":
        return self

    def __exit__(self, *error: object) -> None:
        self.by_path.clear()

    def keep(self, path: str, kernel: Any) -> Any:
        """Keeps a kernel that is a packed stack and returns a `StackIndex` for it."""
        base, lora, key = parts_of(kernel)
        if lora is not None:
            return AdaptedKernel(self.keep(path, base), lora, key)
        # In a scan in a scan, the scans slice kernels as any parameter.
        if not is_packed(kernel) or kernel.ndim != 1 + len(kernel.geometry.kinds):
            return kernel
        self.by_path[path] = kernel
        return StackIndex(jnp.arange(kernel.shape[0], dtype=jnp.int32), self, path)


@dataclass(frozen=True, eq=False)
class StackIndex(TreeLeaf):
    """Replaces a packed stack: `index` is `arange(L)`, which a scan slices."""

    index: Any
    stacks: Stacks
    path: str

    def layer(self) -> LayerOfStack:
        """Returns the kernel; raises ValueError if no scan sliced `index`."""
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
