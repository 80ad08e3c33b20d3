"""Serving a module that reads its kernel itself: floats for the time of a call.

Such a module gets a subclass of its own class. Each method that reads a packed kernel
runs with a float `nnx.Param` in the kernel's place, made from the packed weights and
the adapter, under `nnx.remat` with a policy that saves the results of matrix products
but no kernel, so that the backward pass makes the float kernel again.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import primitives

from ..trees.merge import merge
from .variables import adapted_names, adapter_of, base_of, unpack


def reads(cls: type, name: str) -> list[str]:
    """Names of the methods of `cls` whose code mentions the attribute `name`."""
    found = []
    for method in dir(cls):
        if method.startswith("__") and method != "__call__":
            continue
        defined = (vars(c)[method] for c in cls.__mro__ if method in vars(c))
        if any(_mentions(function, name) for function in defined):
            found.append(method)
    return found


def _mentions(function: Any, name: str) -> bool:
    if not callable(function) or isinstance(
        function, type | staticmethod | classmethod
    ):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    pending = [code] if code is not None else []
    while pending:
        code = pending.pop()
        if name in code.co_names or name in code.co_consts:
            return True
        pending += [c for c in code.co_consts if inspect.iscode(c)]
    return False


@functools.cache
def materializing(cls: type, names: tuple[str, ...]) -> type:
    """Returns the subclass of `cls` that reads the packed kernels `names` as floats."""
    methods = sorted({method for name in names for method in reads(cls, name)})
    return subclass(cls, {m: _with_float_kernels(getattr(cls, m)) for m in methods})


def subclass(cls: type, methods: dict[str, Callable[..., Any]]) -> type:
    """Returns a subclass of the module class `cls` that differs in `methods` alone."""
    body = {**methods, "__module__": cls.__module__, "qlora_original": cls}
    # A subclass is a pytree or not as its base is; flax asks for that in the open.
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    return type(cls)(f"Wrapped{cls.__name__}", (cls,), body, pytree=is_pytree)


def _with_float_kernels(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        names = adapted_names(self)
        arrays, rebuild = _split_arrays((args, kwargs))
        rebuild_output: list[Callable[..., Any]] = []

        def run(self, arrays):
            args, kwargs = rebuild(arrays)
            with _float_kernels(self, names):
                outputs, to_output = _split_arrays(method(self, *args, **kwargs))
            rebuild_output.append(to_output)
            return outputs

        adapters = [adapter_of(self, name) for name in names]
        factors = [(adapter.a.shape, adapter.b.shape) for adapter in adapters]
        # A module that was merged from a state of an outer trace cannot be written to:
        # then nothing is, but for variables that the method itself changes.
        variables = [v for _, v in nnx.iter_graph(self) if isinstance(v, nnx.Variable)]
        run = nnx.remat(
            run,
            policy=_save_products_except(factors),
            graph=True,
            graph_updates=all(getattr(v, "_can_update", True) for v in variables),
        )
        outputs = run(self, arrays)
        return rebuild_output[-1](outputs)

    return call


@contextlib.contextmanager
def _float_kernels(module: nnx.Module, names: list[str]) -> Iterator[None]:
    """Makes the module what it was before it was wrapped, for a while.

    Its methods then call each other without coming back here.
    """
    cls: Any = type(module)
    kernels = {name: getattr(module, name) for name in names}
    for name, variable in kernels.items():
        value = merge(base_of(module, name), adapter_of(module, name).lora)
        setattr(module, name, unpack(variable, value))
    object.__setattr__(module, "__class__", cls.qlora_original)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)
        for name, variable in kernels.items():
            setattr(module, name, variable)


def _split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns what JAX can trace in `tree`, and how to put it back among the rest."""
    leaves, treedef = jax.tree.flatten(
        tree, is_leaf=lambda x: isinstance(x, nnx.Pytree | nnx.Variable)
    )
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _TRACED)]

    def rebuild(arrays):
        whole = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            whole[i] = array
        return jax.tree.unflatten(treedef, whole)

    return [leaves[i] for i in traced], rebuild


_TRACED = (jax.Array, np.ndarray, nnx.Pytree, nnx.Variable)


def _save_products_except(factors: list[tuple[tuple[int, ...], ...]]) -> Any:
    """A checkpoint policy that saves matrix products, but not that of two `factors`.

    The product of an adapter's factors is as large as the kernel. Nothing else of the
    kernel's size is a product: decoding it is elementwise work.
    """

    def policy(primitive, *avals, **params):
        del params
        if primitive is not primitives.dot_general_p:
            return False
        # Under vmap the operands have more axes than the factors.
        left, right = (Counter(aval.shape) for aval in avals)
        return not any(Counter(a) <= left and Counter(b) <= right for a, b in factors)

    return policy
