"""Describes the call of each module class as an einsum and a bias."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array

from ..adapters.call import (
    DENSE,
    Lookup,
    ModuleCall,
    RegisteredEinsum,
    Registry,
    general_equation,
    is_plain,
    promote_to_kernel,
)
from ..product.einsum import parse_equation
from ..trees.paths import Tree


def _module_call(module: nn.Module, kernel: str, equation: str, x: Array) -> ModuleCall:
    """Describes the call of a module as a ModuleCall."""
    # Registered classes may lack the bias, `promote_dtype` and `precision`.
    has_bias = getattr(module, "use_bias", True)
    bias = module.variables.get("params", {}).get("bias") if has_bias else None
    # A registered class promotes its input as `jnp.einsum` does.
    promote = promote_to_kernel
    if hasattr(module, "promote_dtype"):
        promote = functools.partial(module.promote_dtype, dtype=module.dtype)
    return ModuleCall(
        kernel,
        equation,
        x,
        bias=nn.meta.unbox(bias),
        promote=promote,
        precision=getattr(module, "precision", None),
    )


def _dense(module: nn.Dense, inputs: Array) -> ModuleCall:
    return _module_call(module, "kernel", DENSE, inputs)


def _dense_general(module: nn.DenseGeneral, inputs: Array) -> ModuleCall:
    # `axis`, `batch_dims` and `features` are integers or sequences of integers.
    axes, batch = (np.ravel(x).tolist() for x in (module.axis, module.batch_dims))
    num_outputs = np.size(module.features)
    equation = general_equation(inputs.ndim, axes, batch, num_outputs)
    return _module_call(module, "kernel", equation, inputs)


def _einsum(
    module: nn.Einsum, inputs: Array, einsum_str: str | None = None
) -> ModuleCall:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    call = _module_call(module, "kernel", equation, inputs)
    try:
        parse_equation(equation, jnp.ndim(inputs), len(module.shape))
    except ValueError:  # such as "btd,df->bf", which also sums over x alone
        return replace(call, is_complete=False)
    return call


def _embed(module: nn.Embed, inputs: Array) -> Lookup:
    # Flax returns the only row of a table for any id, even one that is out of range.
    if module.num_embeddings == 1:
        inputs = jnp.zeros_like(inputs)
    cast = functools.partial(module.promote_dtype, dtype=module.dtype, inexact=False)
    return Lookup("embedding", inputs, lambda rows: cast(rows)[0])


# Rules are functions of `(module, *args, **kwargs)` that return a ModuleCall or a
# Lookup. `register` adds rules; no other state is global in the linen integration.
RULES = Registry(
    {
        nn.Dense: _dense,
        nn.DenseGeneral: _dense_general,
        nn.Einsum: _einsum,
        nn.Embed: _embed,
    }
)


def register(
    cls: type[nn.Module],
    *,
    kernel: str | Callable[[Any], str] = "kernel",
    einsum: str | Callable[[Any], str],
) -> None:
    """Registers the einsum that a custom module class computes with its kernel.

    The packed product replaces the `__call__` of the class, and its adapter may have
    dropout. Classes that are not registered get float weights during their call. The
    rule applies to the whole process; registering a class again replaces it.

    Args:
        cls: The module class. Its `__call__` computes only the einsum of one input, and
            may add a parameter named `bias`. Subclasses that override nothing on which
            the product may depend are included.
        kernel: Name of the kernel's parameter, or a function that returns the name for
            a module.
        einsum: The explicit equation of input and kernel, the name of the attribute or
            `__call__` argument with the equation, or a function that returns the
            equation for a module.

    Raises:
        TypeError: If `cls` is not a linen module class with a `__call__` of one input,
            or if `kernel` or `einsum` is neither a string nor a function.
        ValueError: If the form of the equation `einsum` is not supported or, in a
            call, if `cls` computes more than the einsum and the bias.

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

    # `operands` uses the signature of `__call__` to find the input.
    def rule(module: nn.Module, *args: Any, **kwargs: Any) -> ModuleCall:
        equation, x = registered.operands(module, args, kwargs)
        call = _module_call(module, registered.kernel_of(module), equation, x)
        if RULES.is_overridden(type(module)):
            return call  # it runs on float weights
        variables, key = module.variables, jax.random.key(0)

        def plain_call(new_x: Array, params: Tree) -> Tree:
            inputs = [new_x if arg is x else arg for arg in args]
            options: dict[str, Any] = {
                k: new_x if arg is x else arg for k, arg in kwargs.items()
            }
            plain, collections = (
                module.clone(parent=None),
                {**variables, "params": params},
            )
            return plain.apply(collections, *inputs, **options, rngs=key)

        # Boxes of packed kernels have the shape of the float weights.
        params = jax.eval_shape(nn.meta.unbox, variables["params"])
        registered.check_call(call, plain_call, params)
        return call

    RULES.add(cls, rule)


def call_of(
    module: nn.Module, method: str, args: tuple, kwargs: dict
) -> ModuleCall | Lookup | None:
    """Returns what a module's method computes, or None if no rule describes it."""
    # Only `__call__` is known: other methods, such as `attend`, compute something else.
    cls = type(module)
    rule: Callable | None = RULES.find(cls) if method == "__call__" else None
    if rule is None:
        return None
    call = rule(module, *args, **kwargs)
    if is_plain(module, promote_dtype) and not RULES.is_overridden(cls):
        return call
    return replace(call, is_complete=False)


def no_dropout(path: str, dropout: float, module: nn.Module | None = None) -> str:
    """Returns why an adapter cannot have dropout: its kernel is read in float."""
    # Dropout acts on the input of A. With merged weights, A has no input of its own.
    names = path.split("/")
    pattern = ".*" + "/".join(names[-2:]) if len(names) > 1 else path
    advice = f'Use dropout=0, or exclude=r"{pattern}"'
    # `register` does not help convolutions and other modules of Flax.
    if module is not None and not type(module).__module__.startswith("flax."):
        params = {*module.variables.get("params", {})} - {"bias"}
        if len(params) == 1 and RULES.find(type(module)) is None:
            advice += ", or ql.linen.register if the module only computes an einsum"
    return (
        "its module reads it itself, so that no dropout can act on the adapter's input."
        f" Got dropout={dropout}. {advice}."
    )
