"""Classes of wrapped modules: subclasses of the original classes.

They are cached for the life of the process, so that graph definitions of like models
compare equal. A class pickles as the call of the function that makes it.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import jax

from ..adapters.call import adapted_call
from ..matmul.einsum import split_equation
from .rules import RULES, Rule
from .variables import adapter_of, base_of


def subclass(
    cls: type,
    methods: dict[str, Callable[..., Any]],
    recipe: tuple,
    rule: Rule | None = None,
) -> type:
    """Returns a subclass with other methods, pickled as the call `recipe`."""
    body = {
        **methods,
        "__module__": cls.__module__,
        "qlora_original": cls,
        "qlora_recipe": recipe,
        "qlora_rule": rule,
    }
    # A subclass is a pytree or not as its base is; Flax asks for that explicitly.
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    metaclass: Any = _picklable(type(cls))
    return metaclass(f"Wrapped{cls.__name__}", (cls,), body, pytree=is_pytree)


@functools.cache
def _picklable(metaclass: type) -> type:
    """Returns a metaclass whose classes pickle by their recipe."""
    made = type(f"Picklable{metaclass.__name__}", (metaclass,), {})
    copyreg.pickle(made, _reduce)
    return made


def _reduce(cls: Any) -> Any:
    # Subclasses that users define are found by name, as any class is.
    return vars(cls).get("qlora_recipe", cls.__qualname__)


def packed(cls: type) -> type:
    """Returns the subclass of `cls` that multiplies by its packed kernel."""
    rule = RULES.find(cls)
    if rule is None:  # registered only in the process that pickled it
        raise TypeError(
            f"`{cls.__name__}` must be registered before it is unpickled. Call "
            "ql.nnx.register as the process that pickled it did."
        )
    return _packed(cls, rule)


@functools.cache
def _packed(cls: type, rule: Rule) -> type:
    methods = {"__call__": packed_call}
    return subclass(cls, methods, (packed, (cls,)), rule)


def packed_call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """Computes the call of the original class, with packed kernel and adapter."""
    call = self.qlora_rule.call(self, *args, **kwargs)
    base, adapter = base_of(self, call.kernel), adapter_of(self, call.kernel)
    labels = split_equation(call.equation).kernel
    if len(base.shape) > len(labels):
        raise ValueError(
            f"the kernel must have the axes {labels!r} of its equation. Got shape "
            f"{base.shape}. In a stack run by nnx.scan or nnx.vmap, the filters must "
            "name `ql.nnx.Packed` wherever they name `nnx.Param`."
        )
    key = adapter.dropout_key()
    return adapted_call(call, base, adapter.sliced, key, path=adapter.path)
