"""Describes the call of each module class as an einsum and a bias."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from ..adapters.call import (
    DENSE,
    Lookup,
    ModuleCall,
    RegisteredEinsum,
    Registry,
    general_equation,
    promote_to_kernel,
)
from .dense import QLoRADense


def _call(
    module: nn.Module, kernel: str, equation: str, x: Any, is_complete: bool = True
) -> ModuleCall:
    """Describes a call with the bias and the options that the module has."""
    bias = module.variables.get("params", {}).get("bias")
    promote = promote_to_kernel  # as `jnp.einsum` in a registered class
    if hasattr(module, "promote_dtype"):
        promote = functools.partial(module.promote_dtype, dtype=module.dtype)
    return ModuleCall(
        kernel,
        equation,
        x,
        bias=nn.meta.unbox(bias),
        promote=promote,
        precision=getattr(module, "precision", None),
        is_complete=is_complete,
    )


def _dense(module: nn.Dense | QLoRADense, inputs: Any) -> ModuleCall:
    return _call(module, "kernel", DENSE, inputs)


def _dense_general(module: nn.DenseGeneral, inputs: Any) -> ModuleCall:
    axes, batch, features = map(
        _as_tuple, (module.axis, module.batch_dims, module.features)
    )
    equation = general_equation(inputs.ndim, axes, batch, len(features))
    return _call(module, "kernel", equation, inputs)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _einsum(
    module: nn.Einsum, inputs: Any, einsum_str: str | None = None
) -> ModuleCall:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    # The packed product rounds its sums to the dtype of x.
    is_complete = module.preferred_element_type is None
    return _call(module, "kernel", equation, inputs, is_complete)


def _embed(module: nn.Embed, inputs: Any) -> Lookup | None:
    if module.num_embeddings == 1:  # which takes any input
        return None
    cast = functools.partial(module.promote_dtype, dtype=module.dtype, inexact=False)
    return Lookup("embedding", inputs, lambda rows: cast(rows)[0])


# A rule is a function `(module, *args, **kwargs) -> ModuleCall`. `register` adds to
# this registry: it is the only module-level state of the linen integration.
RULES = Registry(
    {
        nn.Dense: _dense,
        nn.DenseGeneral: _dense_general,
        nn.Einsum: _einsum,
        nn.Embed: _embed,
        QLoRADense: _dense,
    }
)


def register(
    cls: type[nn.Module],
    *,
    kernel: str | Callable[[Any], str] = "kernel",
    einsum: str | Callable[[Any], str],
) -> None:
    """Registers the einsum of a module class that reads its kernel itself.

    The packed product replaces the `__call__` of the class, and its adapter may have
    dropout; other classes get float weights during their call. The rule holds for the
    process; registering a class again replaces it.

    Args:
        cls: The module class. Its `__call__` computes only the einsum of one input,
            and may add a parameter named `bias`. Subclasses that inherit `__call__`
            have the rule too.
        kernel: Name of the kernel's parameter, or a function from the module to it.
        einsum: The explicit equation of input and kernel, the name of the attribute or
            argument of `__call__` that holds it, or a function from the module to it.

    Raises:
        TypeError: If `cls` is not a linen module class.
        ValueError: If `einsum` is an equation of another form.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> class Project(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         w = self.param("w", nn.initializers.normal(), (64, 4, 16))
        ...         return jnp.einsum("btd,dnh->btnh", x, w)
        >>> ql.linen.register(Project, kernel="w", einsum="btd,dnh->btnh")
        >>> model, x = Project(), jnp.ones((1, 3, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> config = ql.QLoRAConfig(rank=4, targets="w", dropout=0.1)
        >>> base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
        >>> model = ql.linen.wrap(model)
        >>> model.apply({"params": base, "lora": lora}, x).shape
        (1, 3, 4, 16)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"`cls` must be a linen module class. Got {cls!r}.")
    registered = RegisteredEinsum(cls, kernel, einsum)

    def rule(module: nn.Module, *args: Any, **kwargs: Any) -> ModuleCall:
        equation, x = registered.operands(module, args, kwargs)
        return _call(module, registered.kernel_of(module), equation, x)

    RULES.add(cls, rule)


def call_of(
    module: nn.Module, method: str, args: tuple, kwargs: dict
) -> ModuleCall | Lookup | None:
    """Returns what a module's method computes, or None where no rule says."""
    rule = RULES.find(type(module)) if method == "__call__" else None
    return rule(module, *args, **kwargs) if rule else None


def convolution_kinds(module: nn.Module, ndim: int) -> str | None:
    """Returns the kinds of a convolution's axes: all contracted but the last."""
    is_conv = isinstance(module, nn.Conv | nn.ConvTranspose)
    return "k" * (ndim - 1) + "n" if is_conv else None
