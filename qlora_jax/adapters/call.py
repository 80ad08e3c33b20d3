"""What a Flax module computes with its kernel, and the function that computes it.

Both integrations describe a module's call by a `ModuleCall`; `adapted_call` computes
it with a kernel of any kind and its adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.modes import split_as
from ..matmul.einsum import parse_equation, through_matrix, why_no_fit
from ..matmul.quantized import reverse_mode
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel
from .base import Adapter
from .product import product


def promote_to_kernel(
    x: Array, bias: Array | None, dtype: Any
) -> tuple[Array, Array | None]:
    """Promotes the input as `jnp.einsum` does with a kernel of `dtype`."""
    return x.astype(np.promote_types(x.dtype, dtype)), bias


@dataclass(frozen=True)
class ModuleCall:
    """One product of an input with a module's kernel.

    Attributes:
        kernel: Name of the kernel's parameter.
        equation: The einsum of the input and the kernel, explicit.
        x: The input.
        bias: The bias, or None. Its axes are the kernel's batch and output axes, in the
            order of the result.
        promote: Maps the input, the bias and the kernel's dtype to the input and the
            bias as the module casts them.
        precision: As in `jax.lax.dot_general`.
        out_sharding: Sharding of the product (Explicit axes), or None.
        is_complete: Whether this is all that the module's call computes. If not, the
            module must compute its product itself, on float weights.
    """

    kernel: str
    equation: str
    x: Any
    bias: Any = None
    promote: Callable[[Any, Any, Any], tuple[Any, Any]] = promote_to_kernel
    precision: Any = None
    out_sharding: Any = None
    is_complete: bool = True


def adapted_call(
    call: ModuleCall,
    kernel: Any,
    lora: Adapter | None,
    *,
    path: str,
    dropout_key: Any = None,
    backend: str | tuple[str, ...] | None = None,
) -> Float[Array, "..."]:
    """Computes a module's call: its einsum, plus the adapter's product, plus the bias.

    Args:
        call: The call.
        kernel: The kernel: a `Kernel`, or a float array.
        lora: Its adapter, or None.
        path: What errors call the kernel.
        dropout_key: PRNG key of the adapter's dropout; None for no dropout.
        backend: As in `matmul`.

    Raises:
        ValueError: If the equation does not fit the input or the stored kernel.
    """
    x, bias = call.promote(jnp.asarray(call.x), call.bias, kernel.dtype)
    equation = parse_equation(call.equation, x.ndim, len(kernel.shape))
    if reason := why_no_fit(equation, x.shape, kernel.shape):
        raise ValueError(f"{path}: {reason}")
    if lora is not None:
        kernel = as_kernel(kernel, lora.geometry)
    else:
        kernel = as_kernel(kernel, Geometry.of(equation.kinds, kernel.shape))

    def multiply(rows: Array) -> Array:
        return product(
            rows,
            kernel,
            lora,
            dropout_key=dropout_key,
            backend=backend,
            precision=call.precision,
        )

    with reverse_mode():
        y = through_matrix(equation, kernel.geometry, x, kernel.shape, multiply)
    if call.out_sharding is not None:
        y = jax.sharding.reshard(y, call.out_sharding)
    if bias is None:
        return y
    sizes = dict(zip(equation.kernel, kernel.shape, strict=True))
    return y + split_as(bias.reshape([sizes.get(c, 1) for c in equation.out]), y)


class Registry:
    """Rules by module class: what a class computes with its kernel.

    A rule describes the class that it was given for, and subclasses that inherit that
    class's `__call__`; one that overrides it may compute something else.

    Attributes:
        version: Number of rules that users added. What was traced under another
            version is stale.
    """

    def __init__(self, rules: dict[type, Any]):
        """Takes the rules of the classes that are known from the start."""
        self._rules = dict(rules)
        self.version = 0

    def add(self, cls: type, rule: Any) -> None:
        """Adds a rule, or replaces one."""
        self._rules[cls] = rule
        self.version += 1

    def find(self, cls: type) -> Any:
        """Returns the rule of a class, or None."""
        for base in cls.__mro__:
            if base in self._rules:
                inherits = getattr(cls, "__call__") is getattr(base, "__call__")  # noqa: B009, B004
                return self._rules[base] if inherits else None
        return None
