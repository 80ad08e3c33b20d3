"""Module classes whose product the library computes itself: the fast path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from .layers import adapted_einsum, call_einsum, call_linear, call_linear_general


@dataclass(frozen=True)
class Rule:
    """What the fast path must know of a module class.

    Attributes:
        kernel: Name of the attribute that holds the kernel.
        kinds: Gives the kinds of the kernel's trailing axes (see `Geometry`).
        call: What takes the place of `__call__`.
        can_serve: Whether `call` computes all that this module asks for.
    """

    kernel: str
    kinds: Callable[[Any], str]
    call: Callable[..., Any]
    can_serve: Callable[[Any], bool] = lambda module: True


def kinds_of_equation(equation: str) -> str:
    """The kinds of the kernel's axes in an einsum `x,kernel->result`.

    Raises:
        ValueError: If the equation is not of that form or contracts nothing.
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    x, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel or "." in kernel:
        raise ValueError(
            "`einsum` must be an explicit equation of two operands, the kernel on the "
            f"right. Got {equation!r}."
        )
    kept = {True: "b", False: "n"}
    kinds = "".join(kept[c in x] if c in result else "k" for c in kernel)
    if "k" not in kinds:
        raise ValueError(f"`einsum` must contract the kernel. Got {equation!r}.")
    return kinds


def kinds_of_general(module: nnx.LinearGeneral) -> str:
    """The kinds of the kernel's axes in an `nnx.LinearGeneral`."""
    batch, outputs = len(module.batch_axis), len(module.out_features)
    return "b" * batch + "k" * len(module.axis) + "n" * outputs


def _is_plain_einsum(module: nnx.Einsum) -> bool:
    return module.einsum_op is jnp.einsum and module.preferred_element_type is None


_RULES: dict[type, Rule] = {
    nnx.Linear: Rule(
        "kernel",
        lambda module: "kn",
        call_linear,
        lambda module: (
            module.dot_general is lax.dot_general
            and module.preferred_element_type is None
        ),
    ),
    nnx.LinearGeneral: Rule(
        "kernel",
        kinds_of_general,
        call_linear_general,
        lambda module: (
            module.dot_general is None
            and module.dot_general_cls is None
            and module.preferred_element_type is None
        ),
    ),
    nnx.Einsum: Rule(
        "kernel",
        lambda module: kinds_of_equation(module.einsum_str),
        call_einsum,
        _is_plain_einsum,
    ),
}


def register(
    cls: type[nnx.Module],
    *,
    kernel: str = "kernel",
    einsum: str | Callable[[Any], str],
) -> None:
    """Gives a module class the fast path.

    For a class whose call is `jnp.einsum(equation, x, self.<kernel>)` and nothing else.
    A class that is not registered is served all the same, by making its float kernel
    anew for each call; registered, it never has one, and its adapter may have dropout.

    Args:
        cls: The class; its subclasses too, as long as they inherit `__call__`.
        kernel: Name of the attribute that holds the kernel.
        einsum: The equation `"x,kernel->result"`, or the name of the attribute that
            holds it, or a function of the module that returns it.

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
    equation_of = _equation_getter(einsum)

    def call(self, x: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, getattr(self, kernel).dtype))
        return adapted_einsum(self, kernel, equation_of(self), x)

    _RULES[cls] = Rule(
        kernel, lambda module: kinds_of_equation(equation_of(module)), call
    )


def _equation_getter(einsum: str | Callable[[Any], str]) -> Callable[[Any], str]:
    if callable(einsum):
        return einsum
    if einsum.isidentifier():
        return lambda module: getattr(module, einsum)
    kinds_of_equation(einsum)
    return lambda module: einsum


def kernel_shape(module: nnx.Module, name: str) -> tuple[int, ...] | None:
    """The kernel's shape but for the axes of a stack, where the class is Flax's."""
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
    return None


def guess_kinds(module: nnx.Module, name: str, ndim: int) -> str | None:
    """The kinds of the axes of a kernel that its module reads itself, if that tells.

    The module computes its product itself: a wrong guess could only make worse blocks.
    """
    own = kernel_shape(module, name)
    if own is not None and isinstance(module, nnx.LinearGeneral):
        return kinds_of_general(module)
    if own is not None and isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return "k" * (len(own) - 1) + "n"
    found = set()
    for value in vars(module).values():
        try:
            found.add(kinds_of_equation(value) if isinstance(value, str) else "")
        except ValueError:
            continue
    fitting = [kinds for kinds in found if kinds and len(kinds) <= ndim]
    return fitting[0] if len(fitting) == 1 else None


def rule_of(module: nnx.Module) -> Rule | None:
    """Returns the rule that serves this very module, or None."""
    cls = type(module)
    for base in cls.__mro__:
        rule = _RULES.get(base)
        if rule is not None:
            inherits = cls.__call__ is base.__call__
            return rule if inherits and rule.can_serve(module) else None
    return None
