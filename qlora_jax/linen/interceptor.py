"""Takes over the calls of modules that own packed kernels."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .._jax.pytree import split_arrays
from ..adapters.product import product
from ..matmul.einsum import parse_equation, through_matrix
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel
from ..trees.paths import refuse_listed
from .box import KernelBox, no_dropout
from .rules import Call, call_of, promote, rule_of
from .stacks import StackIndex


def intercept(
    next_fun: Callable, args: tuple, kwargs: dict, context: Any, *, backend: str | None
) -> Any:
    """An interceptor for `nn.intercept_methods`; see `wrap`."""
    module, method = context.module, context.method_name
    if module.scope is None:
        return next_fun(*args, **kwargs)
    own = module.variables.get("params", {})
    boxes = {name: box for name, box in own.items() if isinstance(box, KernelBox)}
    if not boxes or _is_materializing(module):
        return next_fun(*args, **kwargs)
    if method == "setup":
        if rule_of(type(module)) is None:  # others may read the attribute it makes
            _refuse_dropout(boxes.values())
        return next_fun(*args, **kwargs)
    call = call_of(module, method, args, kwargs)
    if call is not None and call.is_whole and list(boxes) == [call.kernel]:
        return _packed_call(module, call, backend)
    _refuse_dropout(boxes.values())
    return _materialized_call(module, method, args, kwargs)


def _refuse_dropout(boxes):
    refuse_listed(
        "these kernels cannot have dropout",
        [f"{b.path}: {no_dropout(b.dropout)}" for b in boxes if b.dropout],
    )


def _packed_call(module: nn.Module, call: Call, backend: str | None) -> Any:
    """The module's einsum on the packed kernel, plus adapter and bias."""
    params = module.variables["params"]
    base, lora, dropout_key = params[call.kernel].split()
    bias = nn.meta.unbox(params["bias"]) if "bias" in params else None
    if isinstance(base, StackIndex):
        base = base.layer()
    x, bias = promote(module, jnp.asarray(call.x), base.dtype, bias)
    equation = parse_equation(call.equation, x.ndim, len(base.shape))
    geometry = (
        Geometry.of(equation.kinds, base.shape) if lora is None else lora.geometry
    )
    kernel = as_kernel(base, geometry)
    shape = kernel.shape
    y = through_matrix(
        equation,
        kernel.geometry,
        x,
        shape,
        lambda rows: product(
            rows,
            kernel,
            lora,
            dropout_key=dropout_key,
            backend=backend,
            precision=getattr(module, "precision", None),
        ),
    )
    if bias is None:
        return y
    sizes = dict(zip(equation.kernel, shape, strict=True))
    return y + bias.reshape([sizes.get(label, 1) for label in equation.out])


_state = threading.local()


def _is_materializing(module):
    return module.path in getattr(_state, "paths", ())


@contextlib.contextmanager
def _materializing(module):
    before = getattr(_state, "paths", ())
    _state.paths = (*before, module.path)
    try:
        yield
    finally:
        _state.paths = before


def _materialized_call(module, method, args, kwargs):
    """Runs a module that reads its kernel itself, on float weights.

    They live for the call alone: `jax.checkpoint` has the module computed again, from
    the packed kernel, for the backward pass. A policy that keeps results of products
    would keep A B, which is as large as the kernel.
    """
    arrays, rebuild = split_arrays((args, kwargs))
    rebuild_output: list[Callable] = []

    def run(module, arrays):
        args, kwargs = rebuild(arrays)
        output = getattr(module, method)(*args, **kwargs)
        outputs, to_output = split_arrays(output)
        rebuild_output.append(to_output)
        return outputs

    with _materializing(module):
        outputs = nn.remat(run)(module, arrays)
    return rebuild_output[-1](outputs)
