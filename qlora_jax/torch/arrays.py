"""The parameters and buffers of a PyTorch module as JAX arrays."""

from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import torch


class Wrapped(Protocol):
    """An object that holds a PyTorch module: a `WrappedModule` or a `LanguageModel`.

    It is a protocol, because the modules that define these classes import this one.
    """

    @property
    def module(self) -> torch.nn.Module:
        """The module."""
        ...


Model = torch.nn.Module | Wrapped


def module_of(model: object) -> torch.nn.Module:
    """Returns the PyTorch module of a model, which may be a wrapped module.

    Raises TypeError if `model` is neither a module nor a wrapped module.
    """
    if isinstance(model, torch.nn.Module):
        return model
    module = getattr(model, "module", None)  # of a `WrappedModule`
    if isinstance(module, torch.nn.Module):
        return module
    raise TypeError(f"`model` must be a torch.nn.Module. Got {type(model).__name__}.")


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by name. A tied weight has only its first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def params(model: Model) -> dict[str, jax.Array]:
    """Returns copies of a module's parameters and buffers as JAX arrays, by name.

    Names are those of PyTorch, such as `"model.layers.0.mlp.up_proj.weight"`. A tied
    weight is listed once, under its first name in `module.named_parameters()`. The
    buffers include those that are not in the `state_dict`.

    Args:
        model: The module, wrapped or not.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If tensors are on the meta device. The error lists all of them.

    Example:
        >>> import qlora_jax as ql, torch
        >>> params = ql.torch.params(torch.nn.Linear(64, 8))
        >>> {name: x.shape for name, x in params.items()}
        {'weight': (8, 64), 'bias': (8,)}
    """
    tensors = named_tensors(module_of(model))
    if on_meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(
            "`model` must have values. Read those of tensors on the meta device from "
            f"files. Got a model without values for {on_meta}."
        )
    return {name: to_jax(tensor) for name, tensor in tensors.items()}


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """Returns a copy of a tensor as a JAX array."""
    tensor = tensor.detach().cpu()
    # PyTorch cannot convert bfloat16 to NumPy, so the bits are passed as integers.
    if tensor.dtype == torch.bfloat16:
        return jnp.array(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return jnp.array(tensor.numpy())
