"""Sizes of axes, which `jax.export` may leave open."""

from typing import Any

from jax import export


def is_known(size: Any) -> bool:
    """Whether a size is a number: in an exported function it may be a symbol."""
    return not export.is_symbolic_dim(size)
