"""Tensors of torchax, and how they differ from what PyTorch's users expect."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax
from jax.core import Tracer
from torchax.view import View, ViewInfo

from .arrays import to_jax


def as_tensor(array: jax.Array) -> torch.Tensor:
    """Returns a JAX array as a tensor, for code that runs in torchax's environment."""
    return torchax.tensor.Tensor(array, torchax.default_env())


def as_array(tensor: torch.Tensor) -> jax.Array:
    """Returns the JAX array of a tensor of torchax."""
    return torchax.default_env().t2j_iso(tensor)


def is_jax(value: object) -> bool:
    """Whether a value is a tensor of torchax, or a view of one."""
    return isinstance(value, torchax.tensor.Tensor | View)


@jax.custom_jvp
def _with_gradient_of(array: jax.Array, value: jax.Array) -> jax.Array:
    return value


_with_gradient_of.defjvp(lambda x, tangents: (_with_gradient_of(*x), tangents[0]))


class Detached(ViewInfo):
    """A view of a whole tensor that stops gradients, such as `tensor.detach()`."""

    def transform_tensor(self, jax_array: jax.Array) -> jax.Array:
        """Returns the value of the view."""
        return jax.lax.stop_gradient(jax_array)

    def update_tensor(self, new_value: jax.Array, jax_array: jax.Array) -> jax.Array:
        """Returns the tensor after a change of the view, which gradients ignore."""
        return _with_gradient_of(jax_array, new_value)

    def calculate_output_shape(self, source: jax.Array) -> list[int]:
        """Returns the shape of the view."""
        return list(source.shape)


def _detach(self: Any) -> View:
    return View(self, Detached(), self._env)


def _set_data(self: Any, other: torch.Tensor) -> None:
    if isinstance(self, View):
        self.update(as_array(other))
    else:
        self._elem = as_array(other)


def _type_as(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return self.to(other.dtype)


# In torchax, `detach` copies, views are not detached, `data` does not stop gradients,
# and `type_as` changes the dtype in place and does not accept views.
torchax.tensor.Tensor.type_as = _type_as  # type: ignore
for cls in (torchax.tensor.Tensor, View):
    cls.detach = _detach  # type: ignore
    cls.data = property(_detach, _set_data)  # type: ignore


def is_known(tensor: Any) -> bool:
    """Whether a tensor was computed only from numbers in the module's code.

    Its values are known while JAX traces the module, so the code may depend on them.
    """
    while isinstance(tensor, View):
        tensor = tensor.parent
    is_marked = getattr(tensor, "is_known", False)
    return is_marked and not isinstance(tensor._elem, Tracer)


def beside_jax(value: Any) -> Any:
    """Returns a value as an operand beside tensors of JAX."""
    if not isinstance(value, torch.Tensor):
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        # torchax itself converts tensors without axes.
        return as_tensor(to_jax(value)) if value.ndim else value
    if is_jax(value) and value.ndim == 0 and is_known(value):
        # As in PyTorch, a number must not change the dtype of the result.
        with jax.ensure_compile_time_eval():
            return as_tensor(jnp.asarray(as_array(value).item()))
    return value
