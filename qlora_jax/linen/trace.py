"""Finds the contracted axes of kernels by one abstract trace."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from .._jax.pytree import is_tree_leaf, register, split_arrays
from ..adapters.base import parts_of
from ..adapters.call import Lookup, ModuleCall
from ..adapters.config import QLoRAConfig, is_table
from ..matmul.einsum import parse_equation
from ..trees.paths import Tree, leaves_by_path, map_by_path
from .boxes import NORMS, WRONG_AXIS, boxes_of, run_in_float
from .calls import call_of, convolution_kinds
from .dense import QLoRADense
from .interceptor import (
    FORWARD_MODE,
    MAPPED,
    NO_DROPOUT,
    is_in_forward_mode,
    is_mapped,
    method_of,
)


class _Target(meta.AxisMetadata):
    """A targeted parameter during the trace."""

    def __init__(self, value: Any, path: str, recorder: "_Recorder"):
        self.value = value
        self.path = path
        self.recorder = recorder

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return _Target(val, self.path, self.recorder)

    def add_axis(self, index: int, params: dict) -> "_Target":
        return self

    def remove_axis(self, index: int, params: dict) -> "_Target":
        if index != 0:
            self.recorder.stacked[self.path] = index
        return self


# Path and recorder are static and compare equal to no others. So `nn.jit` traces each
# module again, and the recorder sees it.
register(_Target, ("value",), ("path", "recorder"))


class _Recorder:
    """Interceptor that records the targets of every module that runs in one trace.

    Compared by identity.
    """

    def __init__(self, paths: list[str]):
        # Kinds of axes (see `Geometry`), one for each different call.
        self.kinds: dict[str, set[str]] = {path: set() for path in paths}
        self.values: dict[str, Any] = {}
        self.owned: set[str] = set()
        self.self_read: set[str] = set()
        self.unfit: dict[str, str] = {}
        self.stacked: dict[str, int] = {}  # axes other than 0
        # Modules in a call that a rule describes: the packed product replaces the call,
        # so the methods that it calls read nothing.
        self.described: list[tuple] = []

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: Any
    ) -> Any:
        module = context.module
        if module.scope is None or module.path in self.described:
            return next_fun(*args, **kwargs)
        boxes = boxes_of(module, _Target)
        method = method_of(context)
        if method in (None, "setup"):
            return next_fun(*args, **kwargs)
        if isinstance(module, QLoRADense):
            raise ValueError(
                "`model` must not hold a QLoRADense, which has an adapter already. Got "
                f"one at {'/'.join(module.path)!r}. Use qlora_jax.init."
            )
        call = call_of(module, method, args, kwargs)
        for target in boxes.values():
            target.recorder.record(target, module, call)
        if boxes and isinstance(module, NORMS):
            return run_in_float(module, method, args, kwargs, _Target)
        if call is None or not call.is_complete:
            return next_fun(*args, **kwargs)
        self.described.append(module.path)
        try:
            return next_fun(*args, **kwargs)
        finally:
            self.described.pop()

    def record(
        self, target: "_Target", module: nn.Module, call: ModuleCall | Lookup | None
    ) -> None:
        self.owned.add(target.path)
        try:
            if is_mapped(module, target, self.values[target.path]):
                raise ValueError(MAPPED)
            self._record_kinds(target, module, call)
        except ValueError as error:
            self.unfit[target.path] = str(error)

    def _record_kinds(
        self, target: "_Target", module: nn.Module, call: ModuleCall | Lookup | None
    ) -> None:
        ndim = target.value.ndim
        if ndim < 2:  # in a stack it has more axes than in its module
            raise ValueError(
                "weights must have at least 2 axes in their module. Got shape "
                f"{target.value.shape}."
            )
        if call is not None and call.kernel != target.name:
            raise ValueError(
                f"it is the {target.name} of its module, {type(module).__name__}: "
                "nothing is contracted with it."
            )
        if isinstance(call, Lookup):  # of a table whose axes `contract` may name
            return
        if call is not None:
            equation = parse_equation(call.equation, jax.numpy.ndim(call.x), ndim)
            self.kinds[target.path].add(equation.kinds)
            if not call.is_complete:
                self.self_read.add(target.path)
            elif is_in_forward_mode(module):
                raise ValueError(FORWARD_MODE)
            return
        self.self_read.add(target.path)
        if conv := convolution_kinds(module, ndim):
            self.kinds[target.path].add(conv)

    def problems(self, config: QLoRAConfig) -> dict[str, str]:
        problems = {}
        for path, found in self.kinds.items():
            if path not in self.owned:
                problems[path] = (
                    "no module that ran owns it. Exclude it, or trace a call that uses "
                    "it."
                )
            elif len(found) > 1:
                problems[path] = (
                    f"it must be contracted in one way. Got several: {sorted(found)}."
                )
            elif path in self.stacked:
                problems[path] = WRONG_AXIS.format(self.stacked[path])
            elif config.dropout and path in self.self_read and not is_table(path):
                problems[path] = NO_DROPOUT.format(config.dropout)
        return self.unfit | problems


def trace_kinds(
    module: nn.Module,
    params: Tree,
    config: QLoRAConfig,
    args: tuple,
    kwargs: dict,
    other_variables: Mapping,
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the targets' kinds of axes, and why targets are unfit, by path."""
    shapes = {p: _in_float(x) for p, x in leaves_by_path(params).items()}
    recorder = _Recorder([path for path in shapes if config.is_target(path)])

    def box(path: str, leaf: Any) -> Any:
        if path in recorder.kinds:
            return _Target(shapes[path], path, recorder)
        return _in_float(leaf)

    variables = {**other_variables, "params": map_by_path(box, params)}
    arrays, rebuild = split_arrays((variables, args, kwargs))

    def abstract_call(arrays: list) -> Any:
        variables, args, kwargs = rebuild(arrays)
        values = leaves_by_path(variables["params"])
        recorder.values.update({path: values[path] for path in recorder.kinds})
        with nn.intercept_methods(recorder):
            return module.apply(variables, *args, **kwargs)

    jax.eval_shape(abstract_call, [_unsharded(x) for x in arrays])
    kinds = {path: next(iter(found)) for path, found in recorder.kinds.items() if found}
    return kinds, recorder.problems(config)


def _in_float(leaf: Any) -> Any:
    """Returns the shape of a kernel's float array; other leaves unchanged."""
    leaf, *_ = parts_of(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_tree_leaf(leaf) else leaf


def _unsharded(x: Any) -> jax.ShapeDtypeStruct:
    # Float models cannot contract an axis that is split in Explicit mode. Packed can.
    weak_type = getattr(x, "weak_type", False)
    # NumPy's 64-bit ids become 32-bit ones, as in any call; JAX 0.12 would warn of it.
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(x.shape, dtype, weak_type=weak_type)
