"""Operators of language models whose derivatives in torchax differ from PyTorch's.

torchax leaves derivatives to JAX. They differ from PyTorch's at kinks, and are NaN if a
branch that is not taken overflows. The derivatives here are those of PyTorch's files
`tools/autograd/derivatives.yaml` and `torch/csrc/autograd/FunctionsManual.cpp`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax
import torchax.ops.jaten  # fills `all_aten_ops`
from jax.custom_derivatives import SymbolicZero
from jax.nn import sigmoid
from jax.numpy import isnan, where
from torchax.decompositions import DECOMPOSITIONS
from torchax.ops.mappings import t2j_dtype
from torchax.ops.op_base import InplaceOp
from torchax.ops.ops_registry import all_aten_ops

aten: Any = torch.ops.aten


def _original(op: Any) -> Callable:
    """Returns what torchax computes for an operator, as a function of arrays."""
    overloads = [op, *(getattr(op, name) for name in op.overloads())]
    for overload in overloads:
        if overload in all_aten_ops:
            return all_aten_ops[overload].func
    function = next(DECOMPOSITIONS[x] for x in overloads if x in DECOMPOSITIONS)
    env = torchax.default_env()

    def compute(*args: Any) -> Any:
        with env:  # JAX may differentiate after the call of the module
            return env.t2j_iso(function(*env.j2t_iso(args)))

    return compute


def _rule(value: Callable, *derivatives: Callable | None) -> Callable:
    """Returns `value` with derivatives for its first arguments.

    All functions take the same arguments. Only arrays have derivatives, because that of
    a number may be NaN, such as that of an exponent.
    """

    def compute(*args: Any) -> Any:
        if any(jnp.iscomplexobj(x) for x in args):
            return value(*args)
        heads = args[: len(derivatives)]
        indices = [i for i, x in enumerate(heads) if isinstance(x, jax.Array)]

        def call(function: Callable, arrays: tuple) -> Any:
            values = dict(enumerate(args)) | dict(zip(indices, arrays, strict=True))
            return function(*values.values())

        run = jax.custom_jvp(lambda *arrays: call(value, arrays))

        @functools.partial(run.defjvp, symbolic_zeros=True)
        def _(arrays: tuple, tangents: tuple) -> tuple:
            output, total = run(*arrays), 0.0
            for i, tangent in zip(indices, tangents, strict=True):
                derivative = derivatives[i]
                if derivative and not isinstance(tangent, SymbolicZero):
                    total += call(derivative, arrays) * tangent
            return output, jnp.broadcast_to(total, output.shape).astype(output.dtype)

        return run(*(args[i] for i in indices))

    return compute


def _inside(x: Any, low: Any, high: Any) -> Any:
    is_inside = ~isnan(x) if low is None else x >= low
    return is_inside if high is None else is_inside & (x <= high)


def _elu(x: Any, alpha: float = 1, scale: float = 1, factor: float = 1) -> Any:
    return scale * where(x > 0, 1, alpha * factor * jnp.exp(jnp.minimum(x, 0) * factor))


# The derivatives of operators whose values are right.
DERIVATIVES: dict[Any, tuple] = {
    aten.abs: (jnp.sign,),
    aten.clamp: (
        lambda x, low=None, high=None: _inside(x, low, high),
        lambda x, low, high=None: (x < low) & (high is None or low < high),
        lambda x, low, high: (x > high) | (low is not None and high < low),
    ),
    aten.clamp_max: (lambda x, high: x <= high, jnp.greater),
    aten.clamp_min: (lambda x, low: x >= low, jnp.less),
    aten.elu: (_elu,),
    aten.log_sigmoid: (lambda x: sigmoid(-x),),
    aten.logaddexp: (lambda x, y: sigmoid(x - y), lambda x, y: sigmoid(y - x)),
    aten.pow: (
        lambda x, p: where(p == 0, 0, p * jnp.power(x, p - 1.0)),
        lambda x, p: where((x == 0) & (p >= 0), 0, jnp.power(x, p) * jnp.log(x)),
    ),
    aten.softplus: (
        lambda x, beta=1, threshold=20: where(
            x * beta > threshold, 1, sigmoid(x * beta)
        ),
    ),
    # The square of a divisor may overflow.
    aten.true_divide: (lambda x, y: jnp.divide(1.0, y), lambda x, y: -(x / y) / y),
}
RULES = {op: _rule(_original(op), *rules) for op, rules in DERIVATIVES.items()}
# The derivative at 0 is 0 for every exponent, as for the norm of a vector of zeros.
_power = _rule(jnp.power, lambda x, p: where(x == 0, 0, p * jnp.power(x, p - 1)))


def _divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return RULES[aten.true_divide](x, y)
    return _original(aten.div)(x, y, rounding_mode)


def _vector_norm(
    x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Any:
    x = x if dtype is None else x.astype(t2j_dtype(dtype))
    axes = dim if isinstance(dim, int) else tuple(dim or range(x.ndim))
    sizes, options = RULES[aten.abs](x), {"axis": axes, "keepdims": keepdim}
    if ord == 0:
        return jnp.sum(x != 0, **options).astype(sizes.dtype)
    if math.isinf(ord):
        return (jnp.max if ord > 0 else jnp.min)(sizes, **options)
    return _power(jnp.sum(_power(sizes, float(ord)), **options), 1 / ord)


def _std(x: Any, dim: Any = None, **options: Any) -> Any:
    return _power(all_aten_ops[aten.var.correction].func(x, dim, **options), 0.5)


def _select(op: Any, x: Any, dim: int, keepdim: bool = False) -> tuple:
    # The gradient belongs to one index, also if several values are equal.
    values, indices = _original(op)(x, dim, True)
    if x.ndim:
        values = jnp.take_along_axis(x, indices, dim)
    is_dropped = x.ndim and not keepdim
    return tuple(y.squeeze(dim) if is_dropped else y for y in (values, indices))


RULES |= {
    aten.div: _divide,
    aten.linalg_vector_norm: _vector_norm,
    aten.log_sigmoid_forward: lambda x: (RULES[aten.log_sigmoid](x), x[:0]),
    aten.max.dim: functools.partial(_select, aten.max),
    aten.min.dim: functools.partial(_select, aten.min),
    aten.std.correction: _std,
}


def register() -> None:
    """Replaces the operators in torchax's default environment."""
    env = torchax.default_env()

    def override(op: Any, function: Callable) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = env.t2j_iso((args, kwargs))
            return env.j2t_iso(function(*args, **kwargs))

        env.override_op_definition(op, call)

    for op, function in RULES.items():
        override(op, function)
        for name in op.overloads() if hasattr(op, "overloads") else ():
            if "out" not in name:
                override(getattr(op, name), function)
            in_place = getattr(getattr(aten, f"{op.__name__}_", None), name, None)
            if in_place is not None:
                env.override_op_definition(in_place, InplaceOp(op), is_view_op=True)
