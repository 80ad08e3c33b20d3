"""Computes subclasses of `torch.autograd.Function` in JAX.

Such a function has a backward pass of its own, which may differ from the derivative of
its forward pass. PyTorch's own `apply` would only run the forward pass, which JAX would
then differentiate.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import torch
import torchax
from torch.autograd import Function
from torchax.view import View

from .weights import KernelFunctions, KernelTensor, as_array, as_tensor


class Context:
    """The `ctx` of a function: what its forward pass saves for its backward pass."""

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Saves tensors for the backward pass."""
        self.saved_tensors = tensors

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        """Raises an error, because arrays of JAX cannot be changed."""
        raise NotImplementedError(
            "a torch.autograd.Function must not change its inputs. Got mark_dirty."
        )

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Does nothing: the backward pass gets zeros for these outputs."""

    def set_materialize_grads(self, value: bool) -> None:
        """Does nothing: the gradients of all outputs are arrays."""


@contextlib.contextmanager
def in_jax(kernel_functions: KernelFunctions) -> Iterator[None]:
    """Computes functions in JAX, with their own backward passes, while it is active."""

    def apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
        return _apply(kernel_functions, function, args, kwargs)

    original_apply = Function.__dict__["apply"]
    Function.apply = classmethod(apply)  # type: ignore
    try:
        yield
    finally:
        Function.apply = original_apply  # type: ignore


@contextlib.contextmanager
def _environment(kernel_functions: KernelFunctions) -> Iterator[None]:
    # JAX may run a forward or backward pass after the call of the module has ended.
    with torchax.default_env(), jax.numpy_rank_promotion("allow"), kernel_functions:
        yield


def _apply(
    kernel_functions: KernelFunctions,
    function: type[Function],
    args: tuple,
    kwargs: Any,
) -> Any:
    has_setup = function.setup_context is not Function.setup_context
    if has_setup:  # then PyTorch accepts arguments by name
        bound = inspect.signature(function.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
    args = tuple(map(_plain, args))
    tensor_indices = [i for i, x in enumerate(args) if torch.is_tensor(x)]
    is_float = tuple(torch.is_tensor(x) and x.is_floating_point() for x in args)

    def run(*arrays: jax.Array) -> tuple[Any, Context]:
        values, context = list(args), Context(is_float)
        for index, array in zip(tensor_indices, arrays, strict=True):
            values[index] = as_tensor(array)
        if has_setup:
            output = function.forward(*values)
            function.setup_context(context, tuple(values), output)
        else:
            output = function.forward(context, *values)
        return jax.tree.map(lambda x: as_array(_plain(x)), output), context

    # Between the passes, JAX carries only arrays. `run_and_save` leaves the rest of the
    # context here, which is known when JAX traces it, and `run_backward` reads it.
    static: list[Any] = []  # the pytree of the context, and its leaves except tensors

    def run_and_save(*arrays: jax.Array) -> tuple[Any, dict[int, jax.Array]]:
        with _environment(kernel_functions):
            output, context = run(*arrays)
        leaves, structure = jax.tree.flatten(vars(context))
        saved = {
            i: as_array(_plain(leaf))
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
        }
        static[:] = structure, [None if i in saved else x for i, x in enumerate(leaves)]
        return output, saved

    def run_backward(saved: dict[int, jax.Array], gradients: Any) -> tuple:
        structure, leaves = static
        leaves = [
            as_tensor(saved[i]) if i in saved else x for i, x in enumerate(leaves)
        ]
        context = Context(is_float)
        vars(context).update(jax.tree.unflatten(structure, leaves))
        with _environment(kernel_functions):
            inputs = map(as_tensor, jax.tree.leaves(gradients))
            results = function.backward(context, *inputs)
        results = results if isinstance(results, tuple) else (results,)
        arrays = [results[i] if is_float[i] else None for i in tensor_indices]
        return tuple(x if x is None else as_array(_plain(x)) for x in arrays)

    compute = jax.custom_vjp(lambda *arrays: run(*arrays)[0])
    compute.defvjp(run_and_save, run_backward)
    output = compute(*[as_array(args[i]) for i in tensor_indices])
    return jax.tree.map(as_tensor, output)


def _plain(value: Any) -> Any:
    """Returns a tensor that is neither packed nor a view of another one."""
    if isinstance(value, KernelTensor):
        return value.decoded()
    return value.torch() if isinstance(value, View) else value
