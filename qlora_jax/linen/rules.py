"""What each module class computes with its kernel: an einsum."""

import string
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp


class Call(NamedTuple):
    """One product of an input with a module's kernel.

    Attributes:
        kernel: Name of the kernel's parameter.
        equation: The einsum.
        x: The input.
        is_whole: Whether that is all that the module asks for. If not, it must compute
            its product itself.
    """

    kernel: str
    equation: str
    x: Any
    is_whole: bool = True


def _dense(module, inputs):
    return Call("kernel", "...k,kn->...n", inputs)


def _dense_general(module, inputs):
    as_tuple = lambda v: (v,) if isinstance(v, int) else tuple(v)
    axes = sorted(a % inputs.ndim for a in as_tuple(module.axis))
    batch = sorted(a % inputs.ndim for a in as_tuple(module.batch_dims))
    letters = string.ascii_letters
    x = letters[: inputs.ndim]
    features = letters[inputs.ndim :][: len(as_tuple(module.features))]
    batch_labels = "".join(x[a] for a in batch)
    kernel = batch_labels + "".join(x[a] for a in axes) + features
    rest = "".join(c for a, c in enumerate(x) if a not in axes + batch)
    return Call("kernel", f"{x},{kernel}->{batch_labels}{rest}{features}", inputs)


def _einsum(module, inputs, einsum_str=None):
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    # The packed product rounds its sums to the dtype of x.
    is_whole = module.preferred_element_type is None
    return Call("kernel", equation, inputs, is_whole)


# Served by this library's own product. Keyed by the method, so that a subclass that
# overrides `__call__` is not taken for its parent.
NATIVE: dict[Any, Callable[..., Call]] = {
    nn.Dense.__call__: _dense,
    nn.DenseGeneral.__call__: _dense_general,
    nn.Einsum.__call__: _einsum,
}

_REGISTERED: dict[type, Callable[..., Call]] = {}
_registrations = 0


def registrations() -> int:
    """Number of calls of `register` so far: what `nn.jit` traced before is stale."""
    return _registrations


def register(
    cls: type,
    *,
    kernel: str | Callable[[Any], str],
    einsum: str | Callable[..., Any],
) -> None:
    """Tells what a module class that reads its kernel itself computes with it.

    Without this, the class is served by giving it the float weights for the time of
    its call. With it, `__call__` is replaced by the packed product.

    Args:
        cls: The module class; its `__call__` must be the einsum and nothing else. Its
            subclasses too, as long as they inherit `__call__`.
        kernel: Name of the kernel's parameter, or a function of the module that
            returns it.
        einsum: The equation, the input being the only argument; or a function of
            `(module, *args, **kwargs)` that returns `(equation, x)`.

    Raises:
        TypeError: If `cls` is not a linen module class.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, qlora_jax as ql
        >>> class Project(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         w = self.param("w", nn.initializers.normal(), (64, 4, 16))
        ...         return jnp.einsum("btd,dnh->btnh", x, w)
        >>> ql.linen.register(Project, kernel="w", einsum="btd,dnh->btnh")
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"`cls` must be a linen module class. Got {cls!r}.")

    def call(module, *args, **kwargs):
        name = kernel if isinstance(kernel, str) else kernel(module)
        if isinstance(einsum, str):
            (x,) = (*args, *kwargs.values())
            return Call(name, einsum, x)
        return Call(name, *einsum(module, *args, **kwargs))

    global _registrations
    _registrations += 1
    _REGISTERED[cls] = call


def rule_of(cls: type) -> Callable[..., Call] | None:
    """Returns what tells the call of a class, or None where that is not known."""
    for base in cls.__mro__:
        if base in _REGISTERED:
            return _REGISTERED[base] if cls.__call__ is base.__call__ else None
    return NATIVE.get(cls.__call__)


def call_of(module: nn.Module, method: str, args: tuple, kwargs: dict) -> Call | None:
    """Returns what a module's method computes, or None where that is not known."""
    rule = rule_of(type(module)) if method == "__call__" else None
    return rule(module, *args, **kwargs) if rule else None


def convolution_kinds(module: nn.Module, ndim: int) -> str | None:
    """The kinds of a convolution's kernel axes (all but the last are contracted)."""
    is_conv = isinstance(module, nn.Conv | nn.ConvTranspose)
    return "k" * (ndim - 1) + "n" if is_conv else None


def promote(module: nn.Module, x: Any, dtype: Any, bias: Any) -> tuple[Any, Any]:
    """Promotes input and bias as the module would with a kernel of `dtype`."""
    if not hasattr(module, "promote_dtype"):  # registered: an einsum, nothing else
        return x.astype(jnp.promote_types(x.dtype, dtype)), bias
    kernel = jnp.zeros((), dtype)
    x, _, bias = module.promote_dtype(x, kernel, bias, dtype=module.dtype)
    return x, bias
