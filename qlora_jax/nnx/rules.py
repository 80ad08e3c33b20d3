"""Rules that describe the calls of module classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from ..adapters.call import (
    DENSE,
    Lookup,
    ModuleCall,
    RegisteredEinsum,
    Registry,
    general_equation,
)
from ..matmul.einsum import kernel_kinds


@dataclass(frozen=True)
class Rule:
    """Describes the product of a module class with its kernel."""

    kernel: Callable[[Any], str]  # name of the kernel's attribute
    kinds: Callable[[Any], str | None]  # None if only calls say them
    call: Callable[..., ModuleCall | Lookup]  # of `(module, *args, **kwargs)`
    # Whether the call is all that a module computes.
    supports: Callable[[Any], bool] = lambda module: True
    is_partial: bool = False  # whether other methods read the kernel in float


def _flax_call(
    module: Any, equation: str, inputs: Any, out_sharding: Any
) -> ModuleCall:
    """Returns a call with the promotion, bias and precision of a Flax layer."""
    return ModuleCall(
        "kernel",
        equation,
        inputs,
        bias=None if module.bias is None else module.bias[...],
        promote=lambda *arrays: module.promote_dtype(arrays, dtype=module.dtype),
        precision=module.precision,
        out_sharding=out_sharding,
    )


def _linear(module: nnx.Linear, inputs: Any, out_sharding: Any = None) -> ModuleCall:
    return _flax_call(module, DENSE, inputs, out_sharding)


def _linear_general(
    module: nnx.LinearGeneral, inputs: Any, out_sharding: Any = None
) -> ModuleCall:
    axes, batch = module.axis, module.batch_axis
    outputs = len(module.out_features)
    equation = general_equation(jnp.ndim(inputs), axes, batch, outputs)
    return _flax_call(module, equation, inputs, out_sharding)


def _einsum(
    module: nnx.Einsum,
    inputs: Any,
    einsum_str: str | None = None,
    out_sharding: Any = None,
) -> ModuleCall:
    equation = einsum_str or module.einsum_str
    return _flax_call(module, equation, inputs, out_sharding)


def _embed(module: nnx.Embed, inputs: Any, out_sharding: Any = None) -> Lookup:
    def cast(rows: Any) -> Any:
        return module.promote_dtype((rows,), dtype=module.dtype, inexact=False)[0]

    if module.num_embeddings == 1:  # which takes any input
        inputs = jnp.zeros_like(inputs)
    return Lookup("embedding", inputs, cast, out_sharding)


def _general_kinds(module: nnx.LinearGeneral) -> str:
    batch, outputs = len(module.batch_axis), len(module.out_features)
    return "b" * batch + "k" * len(module.axis) + "n" * outputs


def _is_plain(module: Any) -> bool:
    """Whether a Flax layer multiplies by no function or dtype of its user's."""
    names = "dot_general", "dot_general_cls", "einsum_op", "preferred_element_type"
    found = [getattr(module, name, None) for name in names]
    return all(any(f is x for x in (None, lax.dot_general, jnp.einsum)) for f in found)


EMBED = Rule(
    lambda module: "embedding",
    lambda module: None,
    _embed,
    lambda module: module.num_embeddings > 1,
    is_partial=True,
)


def _rule(kinds: Callable, call: Callable) -> Rule:
    return Rule(lambda module: "kernel", kinds, call, _is_plain)


RULES = Registry(
    {
        nnx.Linear: _rule(lambda module: "kn", _linear),
        nnx.LinearGeneral: _rule(_general_kinds, _linear_general),
        nnx.Embed: EMBED,
        nnx.Einsum: _rule(lambda module: kernel_kinds(module.einsum_str), _einsum),
    }
)


def register(
    cls: type[nnx.Module],
    *,
    kernel: str | Callable[[Any], str] = "kernel",
    einsum: str | Callable[[Any], str],
) -> None:
    """Registers the einsum of a module class that reads its kernel itself.

    The class multiplies by the packed kernel, and its adapter may have dropout; other
    classes get their float kernel during each call. The rule holds for the process;
    registering a class again replaces it.

    Args:
        cls: The module class. Its `__call__` computes only the einsum of one input and
            the kernel. Subclasses that inherit `__call__` have the rule too.
        kernel: As in `qlora_jax.linen.register`.
        einsum: As in `qlora_jax.linen.register`. If it names an argument of `__call__`,
            `config.contract` says the roles of the kernel's axes.

    Raises:
        TypeError: If `cls` is not an `nnx.Module` class.
        ValueError: If `einsum` is an equation of another form.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> class Heads(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.w = nnx.Param(rngs.params.normal((2, 64, 8)))
        ...
        ...     def __call__(self, x):
        ...         return jnp.einsum("BTD,NDH->BTNH", x, self.w[...])
        >>> ql.nnx.register(Heads, kernel="w", einsum="BTD,NDH->BTNH")
        >>> config = ql.QLoRAConfig(rank=4, targets="w")
        >>> model = ql.nnx.wrap(Heads(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
        >>> model(jnp.ones((1, 3, 64))).shape
        (1, 3, 2, 8)
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise TypeError(f"`cls` must be an nnx.Module class. Got {cls!r}.")
    registered = RegisteredEinsum(cls, kernel, einsum)

    def kinds(module: nnx.Module) -> str | None:
        equation = registered.equation_of(module)
        return None if equation is None else kernel_kinds(equation)

    def call(module: nnx.Module, *args: Any, **kwargs: Any) -> ModuleCall:
        equation, x = registered.operands(module, args, kwargs)
        return ModuleCall(registered.kernel_of(module), equation, x)

    RULES.add(cls, Rule(registered.kernel_of, kinds, call))


def kernel_shape(module: nnx.Module, name: str) -> tuple[int, ...] | None:
    """Returns the kernel's shape without stacked axes; None if unknown."""
    match module, name:
        case nnx.Linear(), "kernel":
            return module.in_features, module.out_features
        case nnx.LinearGeneral(), "kernel":
            batch = module.batch_axis.values()
            return (*batch, *module.in_features, *module.out_features)
        case ((nnx.Einsum() | nnx.Conv() | nnx.ConvTranspose()), "kernel"):
            return tuple(module.kernel_shape)
        case nnx.Embed(), "embedding":
            return module.num_embeddings, module.features
        case _, "kernel" if (shapes := _feature_shapes(module)) is not None:
            return (*shapes[0], *shapes[1])
    return None


def _feature_shapes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the contracted and output axes of MaxText's layers."""
    inputs = getattr(module, "in_features_shape", None)
    outputs = getattr(module, "out_features_shape", None)
    if isinstance(inputs, tuple) and isinstance(outputs, tuple):
        return inputs, outputs
    return None


def guess_kinds(module: nnx.Module, name: str, ndim: int) -> str | None:
    """Guesses the axes of a self-read kernel; a wrong guess only hurts blocks."""
    own = kernel_shape(module, name)
    if own is not None and isinstance(module, nnx.LinearGeneral):
        return _general_kinds(module)
    if own is not None and isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return "k" * (len(own) - 1) + "n"
    shapes = _feature_shapes(module) if name == "kernel" else None
    if shapes is not None:
        return "k" * len(shapes[0]) + "n" * len(shapes[1])
    found = set()
    for value in vars(module).values():
        try:
            found.add(kernel_kinds(value) if isinstance(value, str) else "")
        except ValueError:
            continue
    fitting = [kinds for kinds in found if kinds and len(kinds) <= ndim]
    return fitting[0] if len(fitting) == 1 else None
