"""Classes of wrapped modules: subclasses of the original classes."""

import contextlib
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from .._jax.pytree import on_arrays, split_arrays
from ..adapters.call import adapted_call
from ..adapters.packed_calls import call_with_experts, is_experts
from ..product.einsum import split_equation
from ..trees.merge import merge
from ..trees.paths import Tree
from .rules import RULES, Rule
from .variables import adapted_names, adapter_of, base_of, float_variable

Method = Callable[..., Any]
_static = inspect.getattr_static


# Subclasses are cached for the life of the process, so that graph definitions of equal
# modules compare equal. A class is pickled as `recipe`, a function and its arguments.
def subclass(
    cls: type, methods: dict[str, Method], recipe: tuple, rule: Rule | None = None
) -> type:
    """Returns a subclass with these methods."""
    body = {
        **methods,
        "__module__": cls.__module__,
        "qlora_original": cls,
        "qlora_recipe": recipe,
        "qlora_rule": rule,
    }
    # A subclass is a pytree if its base is one, which Flax does not infer.
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    metaclass: Any = _picklable(type(cls))
    return metaclass(f"Wrapped{cls.__name__}", (cls,), body, pytree=is_pytree)


@functools.cache
def _picklable(metaclass: type) -> type:
    # `copyreg` looks up the metaclass, since a class is pickled as an instance of it.
    picklable = type(f"Picklable{metaclass.__name__}", (metaclass,), {})
    copyreg.pickle(picklable, _reduce)
    return picklable


def _reduce(cls: Any) -> str | tuple[Any, ...]:
    # A user's subclass of such a class has no recipe, and is found by name.
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
    return subclass(cls, {"__call__": packed_call}, (packed, (cls,)), rule)


def packed_call(self: Any, *args: object, **kwargs: object) -> Array:
    """Computes the call of the original class, with packed kernel and adapter."""
    call = self.qlora_rule.call(self, *args, **kwargs)
    base, adapter = base_of(self, call.kernel), adapter_of(self, call.kernel)
    labels = split_equation(call.equation).kernel
    # A scan slices `nnx.Param`, but leaves a `Packed` whole unless its filters name it.
    if len(base.shape) > len(labels):
        raise ValueError(
            f"the kernel must have the axes {labels!r} of its equation. Got shape "
            f"{base.shape}. In a stack run by nnx.scan or nnx.vmap, the filters must "
            "name `ql.nnx.Packed` wherever they name `nnx.Param`."
        )
    key = adapter.dropout_key()
    return adapted_call(call, base, adapter.sliced, key, path=adapter.path)


def methods_reading(cls: type, name: str) -> list[str]:
    """Returns the methods and properties that read `name`, or a property that does."""
    # `__init__` mentions every kernel, but has run already.
    candidates = [m for m in dir(cls) if m == "__call__" or not m.startswith("__")]
    names = {
        method: set().union(
            *(_mentioned_names(vars(c).get(method)) for c in cls.__mro__)
        )
        for method in candidates
    }
    properties = [m for m in candidates if isinstance(_static(cls, m), property)]
    sources = {name}
    for _ in properties:  # a property may read another one
        sources |= {m for m in properties if names[m] & sources}
    return [method for method in candidates if names[method] & sources]


def _mentioned_names(attribute: object) -> set[str]:
    """Returns the names and strings in the code of a method or a property."""
    function = attribute.fget if isinstance(attribute, property) else attribute
    if not callable(function) or isinstance(function, type | staticmethod):
        return set()
    # Look into nested functions too, whose code is among the constants.
    code, names = getattr(inspect.unwrap(function), "__code__", None), set()
    pending = [code] if code is not None else []
    while pending:
        code = pending.pop()
        names |= {*code.co_names, *(x for x in code.co_consts if isinstance(x, str))}
        pending += [const for const in code.co_consts if inspect.iscode(const)]
    return names


@functools.cache
def materializing(cls: type, names: tuple[str, ...], has_rule: bool) -> type:
    """Returns a subclass of `cls` that reads the kernels `names` as floats.

    If it has a rule, the rule describes `__call__`.
    """
    # Each method that reads a packed kernel runs under `nnx.remat` with a float
    # `nnx.Param` in its place. Methods that read none run as they are.
    reading = sorted({m for name in names for m in methods_reading(cls, name)})
    methods: dict[str, Any] = {}
    for name in reading:
        method = _static(cls, name)
        if isinstance(method, property):
            getter = _with_float_kernels(cast("Method", method.fget))
            methods[name] = property(getter, method.fset, method.fdel)
        else:
            methods[name] = _with_float_kernels(getattr(cls, name))
    rule = RULES.find(cls) if has_rule else None
    # Look-ups use the packed table, and `attend` reads it in float.
    if rule is not None:
        methods["__call__"] = packed_call
    return subclass(cls, methods, (materializing, (cls, names, has_rule)), rule)


def _with_float_kernels(method: Method) -> Method:
    @functools.wraps(method)
    def call(self: nnx.Module, *args: object, **kwargs: object) -> Tree:
        # Leaves that are trained in full are left out: the module reads their arrays.
        names = [n for n in adapted_names(self) if adapter_of(self, n).frozen is None]
        kernels = [(base_of(self, n), adapter_of(self, n).sliced) for n in names]
        # While `_with_experts` traces `run`, this has the traced weights of `kernels`.
        # It stays empty if no kernel is a stack of experts.
        expert_weights: list[Array] = []

        def run(self: nnx.Module, inputs: tuple) -> Tree:
            args, kwargs = inputs
            with _float_kernels(self, names, expert_weights):
                return method(self, *args, **kwargs)

        if any(is_experts(*kernel) for kernel in kernels):
            transform = functools.partial(_with_experts, kernels, expert_weights)
        else:
            # The policy saves products, but not the kernels, which the backward pass
            # decodes again. It does not save an adapter's A B, which is as large as the
            # kernel, because this product has a custom gradient, and policies do not
            # look into those.
            state = [x for _, x in nnx.iter_graph(self) if isinstance(x, nnx.Variable)]
            transform = nnx.remat(
                policy=jax.checkpoint_policies.dots_saveable,
                graph=True,
                # Graph updates write all variables, but those from an outer trace are
                # read-only. Without graph updates, Flax writes only changed variables.
                graph_updates=all(getattr(x, "_can_update", True) for x in state),
            )
        return on_arrays(transform, run, (args, kwargs), self, split=_split_arrays)

    return call


def _with_experts(
    kernels: list[tuple], expert_weights: list[Array], run: Callable
) -> Callable:
    # `call_with_experts` traces a pure function of the float weights, so modules are
    # split before it and merged inside, and changed variables are results.
    # A copy of a variable has a new `QTensor` around the same arrays, so compare those.
    def array_ids(leaf: object) -> list[int]:
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        return [id(array) for array in jax.tree.leaves(value)]

    def call(*operands: Tree) -> Tree:
        graph, state = nnx.split(operands)
        old = {path: array_ids(x) for path, x in nnx.to_flat_state(state)}

        def call_on_weights(weights: list[Array]) -> tuple:
            expert_weights[:] = weights
            copies = nnx.merge(graph, state, copy=True)
            outputs = run(*copies)
            # Unchanged variables may belong to an outer trace, and are not results.
            new = nnx.to_flat_state(nnx.state(copies))
            changed = {path: x for path, x in new if array_ids(x) != old.get(path)}
            return outputs, nnx.from_flat_state(changed)

        outputs, changed = call_with_experts(call_on_weights, kernels)
        nnx.update(operands, changed)
        return outputs

    return call


@contextlib.contextmanager
def _float_kernels(
    module: nnx.Module, names: list[str], expert_weights: list[Array]
) -> Iterator[None]:
    # The module gets its original class, so that inner calls do not use `remat` again.
    cls: Any = type(module)
    variables = {name: vars(module)[name] for name in names}
    for i, (name, variable) in enumerate(variables.items()):
        # If `_with_experts` traces the method, its traced weights replace the kernels.
        # Otherwise, the kernels are decoded and merged with their adapters.
        if expert_weights:
            value = expert_weights[i]
        else:
            value = merge(base_of(module, name), adapter_of(module, name).sliced)
        setattr(module, name, float_variable(variable, value))
    object.__setattr__(module, "__class__", cls.qlora_original)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", cls)
        for name, variable in variables.items():
            setattr(module, name, variable)


def _split_arrays(tree: Tree) -> tuple[list, Callable[[list], Tree]]:
    # Flax lifts modules and variables as they are, so they count as arrays here.
    lifted = nnx.Pytree | nnx.Variable
    return split_arrays(
        tree,
        is_traced=lambda x: isinstance(x, jax.Array | np.ndarray | lifted),
        is_leaf=lambda x: isinstance(x, lifted),
    )
