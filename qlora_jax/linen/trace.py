"""Learns from one abstract trace of a model what its kernels contract."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ..lora.config import QLoRAConfig
from ..matmul.einsum import parse_equation
from ..transform.tree import leaves_by_path, unbox
from .equations import call_of, convolution_kinds


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
        ValueError: If a target belongs to no module that the call runs, or its module
            uses it in two ways: all of those are named.
    """
    leaves = {p: unbox(x) for p, x in leaves_by_path(params).items()}
    targets = [path for path in leaves if config.is_target(path)]
    kinds: dict[str, set[str]] = {path: set() for path in targets}
    owners: set[str] = set()

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
        elif conv := convolution_kinds(module, leaves[target].ndim):
            found.add(conv)

    def run(variables, args, kwargs):
        with nn.intercept_methods(record):
            return module.apply(variables, *args, **kwargs)

    variables = {**other_variables, "params": params}
    static = {k: v for k, v in kwargs.items() if not _is_arrays(v)}
    arrays = {k: v for k, v in kwargs.items() if k not in static}
    jax.eval_shape(
        lambda variables, args, arrays: run(variables, args, {**static, **arrays}),
        variables,
        tuple(args),
        arrays,
    )
    unseen = [t for t in targets if t.rpartition("/")[0] not in owners]
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
    return {path: k.pop() for path, k in kinds.items() if k}


def _is_arrays(value):
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(x, "shape") for x in leaves)
