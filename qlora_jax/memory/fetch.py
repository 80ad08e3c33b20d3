"""Fetches kernels once for a loop over tiles of tokens.

In a loop, each tile's product would move and gather the kernel again.
"""

from typing import Any

import jax
from jaxtyping import Array, Float

from .._jax.pytree import is_tree_leaf
from ..adapters.base import AdaptedKernel, parts_of
from ..matmul.gathered import find_gather, gathered
from ..quant.kernel import is_kernel


def needs_fetch(node: Any, x: Float[Array, "*rows D"]) -> bool:
    """Whether products with rows like those of `x` move or gather a kernel."""
    kernel, *_ = parts_of(node)
    if not is_kernel(kernel):
        return False
    return kernel.memory == "host" or find_gather(kernel.take(), x) is not None


def fetch(node: Any, x: Float[Array, "*rows D"]) -> Any:
    """Returns a kernel, and its adapter, on the device and gathered where needed."""
    if not needs_fetch(node, x):
        return node
    kernel, lora, key = parts_of(node)
    q = kernel.take().to_device()
    gather = find_gather(q, x)
    q = q if gather is None else gathered(q, gather)
    return q if lora is None else AdaptedKernel(q, lora.constrained(q.placement), key)


def any_needs_fetch(tree: Any, x: Float[Array, "*rows D"]) -> bool:
    """Whether `fetch` changes a kernel in a pytree."""
    nodes = jax.tree.leaves(tree, is_leaf=is_tree_leaf)
    return any(needs_fetch(node, x) for node in nodes)


def fetch_all(tree: Any, x: Float[Array, "*rows D"]) -> Any:
    """Returns a pytree with `fetch` of each kernel."""
    return jax.tree.map(lambda node: fetch(node, x), tree, is_leaf=is_tree_leaf)
