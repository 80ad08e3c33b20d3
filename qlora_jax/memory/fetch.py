"""Fetches kernels once for a loop over tiles of tokens.

In a loop, each tile's product would move and gather the kernel again.
"""

from typing import Any

from jaxtyping import Array, Float

from ..adapters.base import AdaptedKernel, constrained, parts_of
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
    if (found := find_gather(q, x)) is not None:
        q = gathered(q, found)
    return q if lora is None else AdaptedKernel(q, constrained(lora, q.placement), key)
