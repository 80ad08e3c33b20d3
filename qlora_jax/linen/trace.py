"""Learns from one abstract trace of a model what its kernels contract."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from ..lora.config import QLoRAConfig
from ..matmul.einsum import parse_equation
from ..quant.pytree import register, split_arrays
from ..transform.tree import leaves_by_path, map_by_path, unbox
from .equations import call_of, convolution_kinds


class _Tagged(meta.AxisMetadata):
    """A parameter that no other trace has: its tag is static."""

    def __init__(self, value: Any, tag: object):
        self.value = value
        self.tag = tag

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return _Tagged(val, self.tag)

    def add_axis(self, index: int, params: dict) -> "_Tagged":
        return self

    def remove_axis(self, index: int, params: dict) -> "_Tagged":
        return self


register(_Tagged, ("value",), ("tag",))


def trace_kinds(
    module: nn.Module,
    params: Any,
    config: QLoRAConfig,
    args: tuple,
    kwargs: dict,
    other_variables: Mapping,
) -> dict[str, str]:
    """Returns the kinds of the targeted kernels' axes, by path, where modules tell.

    Raises:
        ValueError: If a target belongs to no module that the call runs, its module uses
            it in two ways, or there is dropout and its module reads it itself: all of
            those are named.
    """
    leaves = {p: unbox(x) for p, x in leaves_by_path(params).items()}
    targets = [path for path in leaves if config.is_target(path)]
    kinds: dict[str, set[str]] = {path: set() for path in targets}
    owners: set[str] = set()
    self_read: set[str] = set()

    def record(next_fun, call_args, call_kwargs, context):
        module = context.module
        path = "/".join(module.path)
        if context.method_name != "setup":
            owners.add(path)
            call = call_of(module, context.method_name, call_args, call_kwargs)
            own = [t for t in targets if t.rpartition("/")[0] == path]
            for target in own:
                _record_kinds(kinds[target], module, target, call)
        return next_fun(*call_args, **call_kwargs)

    def _record_kinds(found, module, target, call):
        name = target.rpartition("/")[2]
        if call is not None and call.kernel == name:
            kernel = nn.meta.unbox(module.variables["params"][name])
            x_ndim = jax.numpy.ndim(call.x)
            found.add(parse_equation(call.equation, x_ndim, kernel.ndim).kinds)
            return
        self_read.add(target)
        if conv := convolution_kinds(module, leaves[target].ndim):
            found.add(conv)

    # nn.jit must not find an earlier trace: the interceptor would not run.
    tag = object()
    box = lambda path, x: _Tagged(unbox(x), tag) if path in kinds else x
    variables = {**other_variables, "params": map_by_path(box, params)}
    arrays, rebuild = split_arrays((args, kwargs))

    def abstract_call(variables, arrays):
        args, kwargs = rebuild(arrays)
        with nn.intercept_methods(record):
            return module.apply(variables, *args, **kwargs)

    jax.eval_shape(abstract_call, variables, arrays)
    _check(config, kinds, owners, self_read)
    return {path: k.pop() for path, k in kinds.items() if k}


def _check(config, kinds, owners, self_read):
    """Refuses what the trace found that cannot be served."""
    unseen = [t for t in kinds if t.rpartition("/")[0] not in owners]
    if unseen:
        raise ValueError(
            "every target must belong to a module that the traced call runs. Got "
            f"{unseen}, which no module that ran owns: exclude them, or trace a call "
            "that uses them."
        )
    ambiguous = {t: sorted(k) for t, k in kinds.items() if len(k) > 1}
    if ambiguous:
        raise ValueError(
            f"a kernel must be contracted in one way. Got several for {ambiguous}."
        )
    if config.dropout and self_read:
        raise ValueError(
            "`dropout` must be 0 for kernels a module reads itself: their adapters "
            f"have no input to drop. Got {config.dropout} for {sorted(self_read)}: "
            "register the class, or exclude them."
        )
