"""Detects Flax's lifted transforms."""

import inspect
import re
from typing import Any

import flax.linen as nn
import jax

# Modules that transform the parameters of the module inside them.
NORMS = (nn.WeightNorm, nn.SpectralNorm)

MAPPED = (
    "nn.map_variables transforms it, which would change its codes. Exclude it from the "
    "targets."
)
FORWARD_MODE = (
    "nn.jvp differentiates its product in forward mode, which packed kernels do not "
    "support. Use nn.vjp, or exclude it from the targets."
)
WRONG_AXIS = (
    "packed kernels must be stacked along axis 0 (nn.scan or nn.vmap with "
    "variable_axes={{'params': 0}}). Got axis {}."
)
NO_DROPOUT = (
    "its module reads it itself, so that no dropout can act on the adapter's input. "
    "Got dropout={}. Use ql.linen.register, or dropout=0."
)


def method_of(context: Any) -> str | None:
    """Returns the name of the called method; None for a function of a module."""
    # Lifted transforms call functions, as in `nn.vjp(lambda m, x: m(x), m, x)`, as if
    # they were methods of the module.
    function = inspect.unwrap(context.orig_method.func)
    for cls in type(context.module).__mro__:
        for name in (context.method_name, *vars(cls)):
            value = vars(cls).get(name)
            if callable(value) and inspect.unwrap(value) is function:
                return name
    return None


def is_mapped(module: nn.Module, leaf: Any, original: Any) -> bool:
    """Whether `nn.map_variables` may have transformed `leaf`, once `original`."""
    if not any("map_variables(" in name for name in _transforms(module)):
        return False
    # Where it maps other collections alone, it passes on the same arrays.
    arrays, originals = jax.tree.leaves(leaf), jax.tree.leaves(original)
    return [id(a) for a in arrays] != [id(a) for a in originals]


def is_in_forward_mode(module: nn.Module) -> bool:
    """Whether a module runs under `nn.jvp`."""
    return any(re.search(r"(^|\()jvp\(", name) for name in _transforms(module))


def _transforms(module: nn.Module) -> tuple[str, ...]:
    """Returns the module's path with its transforms: ("vmap(layers)",)."""
    return () if module.scope is None else tuple(module.scope.debug_path)
