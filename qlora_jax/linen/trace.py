"""Learns from one abstract trace of a model what its kernels contract."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from .._jax.pytree import is_tree_leaf, register, split_arrays
from ..adapters.config import QLoRAConfig
from ..adapters.lora import AdaptedKernel
from ..matmul.einsum import parse_equation
from ..trees.paths import leaves_by_path, map_by_path, unbox
from .box import no_dropout, wrong_axis
from .dense import QLoRADense
from .rules import call_of, convolution_kinds


class _Tagged(meta.AxisMetadata):
    """A parameter that no other trace has, nor another module: both are static.

    So `nn.jit` traces each module anew, and the interceptor sees it.
    """

    def __init__(self, value: Any, path: str, stacked: "_Stacked"):
        self.value = value
        self.path = path
        self.stacked = stacked

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return _Tagged(val, self.path, self.stacked)

    def add_axis(self, index: int, params: dict) -> "_Tagged":
        return self

    def remove_axis(self, index: int, params: dict) -> "_Tagged":
        if index != 0:
            self.stacked.wrongly[self.path] = index
        return self


class _Stacked:
    """The parameters of one trace that are stacked along another axis than 0."""

    def __init__(self):
        self.wrongly: dict[str, int] = {}


register(_Tagged, ("value",), ("path", "stacked"))


def trace_kinds(
    module: nn.Module,
    params: Any,
    config: QLoRAConfig,
    args: tuple,
    kwargs: dict,
    other_variables: Mapping,
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the kinds of the targeted kernels' axes, by path, where modules tell.

    And, by path, why targets cannot be served: they belong to no module that the call
    runs, their module has them with one axis, does not contract them or does so in two
    ways, they are stacked along another axis than 0, or there is dropout and their
    module reads them itself.
    """
    leaves = {p: _in_float(unbox(x)) for p, x in leaves_by_path(params).items()}
    kinds: dict[str, set[str]] = {p: set() for p in leaves if config.is_target(p)}
    owned: set[str] = set()
    self_read: set[str] = set()
    unfit: dict[str, str] = {}

    def record(next_fun, call_args, call_kwargs, context):
        module = context.module
        if module.scope is not None and context.method_name != "setup":
            path = "/".join(module.path)
            if isinstance(module, QLoRADense):
                raise ValueError(
                    "`model` must hold no QLoRADense, which has an adapter of its own. "
                    f"Got one at {path!r}. Use qlora_jax.init."
                )
            call = call_of(module, context.method_name, call_args, call_kwargs)
            for name, param in module.variables.get("params", {}).items():
                target = f"{path}/{name}" if path else name
                if target in kinds:
                    owned.add(target)
                    try:
                        _record_kinds(target, module, name, nn.meta.unbox(param), call)
                    except ValueError as error:
                        unfit[target] = str(error)
        return next_fun(*call_args, **call_kwargs)

    def _record_kinds(target, module, name, kernel, call):
        if kernel.ndim < 2:  # in a stack it has more axes than in its module
            raise ValueError(
                "weights must have at least 2 axes in their module. Got shape "
                f"{kernel.shape}."
            )
        if call is not None and call.kernel == name:
            x_ndim = jax.numpy.ndim(call.x)
            equation = parse_equation(call.equation, x_ndim, kernel.ndim)
            kinds[target].add(equation.kinds)
            if not call.is_whole:
                self_read.add(target)
            return
        self_read.add(target)
        if conv := convolution_kinds(module, kernel.ndim):
            kinds[target].add(conv)

    stacked = _Stacked()

    def box(path, x):
        return _Tagged(leaves[path], path, stacked) if path in kinds else _in_float(x)

    variables = {**other_variables, "params": map_by_path(box, params)}
    arrays, rebuild = split_arrays((variables, args, kwargs))

    def abstract_call(arrays):
        variables, args, kwargs = rebuild(arrays)
        with nn.intercept_methods(record):
            return module.apply(variables, *args, **kwargs)

    jax.eval_shape(abstract_call, [_unsharded(x) for x in arrays])
    problems = unfit | _problems(config, kinds, owned, self_read, stacked.wrongly)
    return {path: k.pop() for path, k in kinds.items() if k}, problems


def _in_float(leaf):
    """The shape of the float array that a kernel stands for; others as they are."""
    leaf = leaf.base if isinstance(leaf, AdaptedKernel) else leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_tree_leaf(leaf) else leaf


def _unsharded(x):
    """The shape and dtype of an array without how it lies.

    A float model cannot contract an axis that is split in Explicit mode; ours can.
    """
    weak_type = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak_type)


def _problems(config, kinds, owned, self_read, stacked):
    """Says, by path, what the trace found that cannot be served."""
    problems = {}
    for target, found in kinds.items():
        if target not in owned:
            problems[target] = (
                "no module that ran owns it. Exclude it, or trace a call that uses it."
            )
        elif len(found) > 1:
            problems[target] = (
                f"it must be contracted in one way. Got several: {sorted(found)}."
            )
        elif target in stacked:
            problems[target] = wrong_axis(stacked[target])
        elif config.dropout and target in self_read:
            problems[target] = no_dropout(config.dropout)
    return problems
