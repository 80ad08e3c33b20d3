"""Float kernels for modules that read their kernels themselves.

Each method that reads a packed kernel runs under `nnx.remat` with a float `nnx.Param`
in its place. The policy saves products but no kernel: the backward pass decodes again.
The product of an adapter's factors, as large as the kernel, has a gradient of its own,
into which policies do not look.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from .._jax.pytree import on_arrays, split_arrays
from ..adapters.packed_calls import call_with_experts, is_experts
from ..trees.merge import merge
from .rules import RULES
from .subclass import packed_call, subclass
from .variables import adapted_names, adapter_of, base_of, unpack


def reads(cls: type, name: str) -> list[str]:
    """Returns the methods of `cls` whose code mentions the attribute `name`."""
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
    """Returns a subclass of `cls` that reads the kernels `names` as floats."""
    reading = sorted({method for name in names for method in reads(cls, name)})
    methods = {m: _with_float_kernels(getattr(cls, m)) for m in reading}
    rule = RULES.find(cls)
    if rule is not None and rule.is_partial:
        methods["__call__"] = packed_call
    return subclass(cls, methods, (materializing, (cls, names)), rule)


def _with_float_kernels(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [n for n in adapted_names(self) if adapter_of(self, n).frozen is None]
        parts = [(base_of(self, n), adapter_of(self, n).sliced) for n in names]
        weights: list[Any] = []  # those of a trace with experts

        def run(self: Any, inputs: tuple) -> Any:
            args, kwargs = inputs
            with _float_kernels(self, names, weights):
                return method(self, *args, **kwargs)

        if any(is_experts(*part) for part in parts):
            traced = functools.partial(_with_experts, parts, weights)
            return on_arrays(traced, run, (args, kwargs), self, split=_split_arrays)
        # Modules from an outer trace are read-only; only variables that the method
        # changes are written.
        variables = [v for _, v in nnx.iter_graph(self) if isinstance(v, nnx.Variable)]
        remat = nnx.remat(
            policy=jax.checkpoint_policies.dots_saveable,
            graph=True,
            graph_updates=all(getattr(v, "_can_update", True) for v in variables),
        )
        return on_arrays(remat, run, (args, kwargs), self, split=_split_arrays)

    return call


def _with_experts(parts: list, weights: list[Array], run: Callable) -> Callable:
    """Returns a function of modules that runs with packed experts (`weights`)."""

    def call(*operands: Any) -> Any:
        graph, state = nnx.split(operands)
        value = lambda v: v.get_value() if isinstance(v, nnx.Variable) else v
        old = {path: value(v) for path, v in nnx.to_flat_state(state)}

        def traced(given: list[Array]) -> tuple:
            weights[:] = given
            inner = nnx.merge(graph, state, copy=True)
            outputs = run(*inner)
            # Variables that did not change may be those of an outer trace.
            new = nnx.to_flat_state(nnx.state(inner))
            changed = {path: v for path, v in new if value(v) is not old.get(path)}
            return outputs, nnx.from_flat_state(changed)

        outputs, changed = call_with_experts(traced, parts)
        nnx.update(operands, changed)
        return outputs

    return call


@contextlib.contextmanager
def _float_kernels(
    module: nnx.Module, names: list[str], weights: list[Array]
) -> Iterator[None]:
    """Unwraps a module for a while, in which its methods call each other directly."""
    cls: Any = type(module)
    kernels = {name: getattr(module, name) for name in names}
    for i, (name, variable) in enumerate(kernels.items()):
        if weights:
            value = weights[i]
        else:
            value = merge(base_of(module, name), adapter_of(module, name).sliced)
        setattr(module, name, unpack(variable, value))
    object.__setattr__(module, "__class__", cls.qlora_original)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)
        for name, variable in kernels.items():
            setattr(module, name, variable)


def _split_arrays(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """As `split_arrays`, where modules and variables are leaves."""
    is_traced = lambda x: isinstance(
        x, jax.Array | np.ndarray | nnx.Pytree | nnx.Variable
    )
    is_leaf = lambda x: isinstance(x, nnx.Pytree | nnx.Variable)
    return split_arrays(tree, is_traced, is_leaf)
