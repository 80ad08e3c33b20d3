"""Operators whose values or derivatives in torchax differ from PyTorch's.

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
import jax.scipy.special as special
import torch
import torchax
import torchax.ops.jaten  # fills `all_aten_ops`
from jax.custom_derivatives import SymbolicZero
from jax.nn import sigmoid
from jax.numpy import hypot, isnan, where
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


def _divide_safely(x: Any, y: Any) -> Any:
    return where(y == 0, 0, x / y)


def _polygamma(n: int, x: Any) -> Any:
    # JAX has NaN at 0, and for n > 0 at infinity.
    y = where((x == jnp.inf) & (n > 0), 0, special.polygamma(n, x))
    return where(x == 0, (-1) ** (n + 1) * jnp.inf, y)


def _elu(x: Any, alpha: float = 1, scale: float = 1, factor: float = 1) -> Any:
    return scale * where(x > 0, 1, alpha * factor * jnp.exp(jnp.minimum(x, 0) * factor))


def _mish(x: Any) -> Any:
    y = jnp.tanh(jnp.logaddexp(x, 0))
    return y + x * sigmoid(x) * (1 - y**2)


def _sinc(x: Any) -> Any:
    angle = math.pi * x
    series = -math.pi * angle / 3 * (1 - angle**2 / 10)
    return where(
        jnp.abs(angle) < 0.1, series, _divide_safely(jnp.cos(angle) - jnp.sinc(x), x)
    )


def _erfcx(x: Any) -> Any:
    # exp(x^2) overflows for large x, where this series converges.
    large, u = jnp.maximum(x, 8), 0.5 / jnp.maximum(x, 8) ** 2
    series = (1 - u * (1 - 3 * u * (1 - 5 * u))) / large / math.sqrt(math.pi)
    return where(x > 8, series, jnp.exp(jnp.minimum(x, 8) ** 2) * special.erfc(x))


# The derivatives of operators whose values are right.
DERIVATIVES: dict[Any, tuple] = {
    aten.abs: (jnp.sign,),
    aten.atan2: (
        lambda y, x: _divide_safely(_divide_safely(x, hypot(x, y)), hypot(x, y)),
        lambda y, x: -_divide_safely(_divide_safely(y, hypot(x, y)), hypot(x, y)),
    ),
    aten.celu: (lambda x, alpha=1.0: _elu(x, alpha, 1, 1 / alpha),),
    aten.clamp: (
        lambda x, low=None, high=None: _inside(x, low, high),
        lambda x, low, high=None: (x < low) & (high is None or low < high),
        lambda x, low, high: (x > high) | (low is not None and high < low),
    ),
    aten.clamp_max: (lambda x, high: x <= high, jnp.greater),
    aten.clamp_min: (lambda x, low: x >= low, jnp.less),
    aten.copysign: (lambda x, y: jnp.sign(x) * jnp.copysign(1.0, y), None),
    aten.digamma: (lambda x: _polygamma(1, x),),
    aten.elu: (_elu,),
    aten.fmax: (lambda x, y: (x >= y) | isnan(y), lambda x, y: (x < y) | isnan(x)),
    aten.fmin: (lambda x, y: (x <= y) | isnan(y), lambda x, y: (x > y) | isnan(x)),
    aten.hardsigmoid: (lambda x: where(jnp.abs(x) < 3, 1 / 6, 0),),
    aten.hardswish: (lambda x: where(jnp.abs(x) < 3, x / 3 + 0.5, x > 0),),
    aten.hardtanh: (lambda x, low=-1.0, high=1.0: (x > low) & (x < high),),
    aten.hypot: (
        lambda x, y: _divide_safely(x, hypot(x, y)),
        lambda x, y: _divide_safely(y, hypot(x, y)),
    ),
    aten.i0: (special.i1,),
    aten.leaky_relu: (lambda x, slope=0.01: where(x > 0, 1, slope),),
    aten.lgamma: (lambda x: _polygamma(0, x),),
    aten.log_sigmoid: (lambda x: sigmoid(-x),),
    aten.logaddexp: (lambda x, y: sigmoid(x - y), lambda x, y: sigmoid(y - x)),
    aten.logaddexp2: (
        lambda x, y: sigmoid((x - y) * math.log(2)),
        lambda x, y: sigmoid((y - x) * math.log(2)),
    ),
    aten.logit: (
        lambda x, eps=None: where(
            _inside(x, eps, eps and 1 - eps), 1 / jnp.abs(x * (1 - x)), 0
        ),
    ),
    aten.mish: (_mish,),
    aten.pow: (
        lambda x, p: where(p == 0, 0, p * jnp.power(x, p - 1.0)),
        lambda x, p: where((x == 0) & (p >= 0), 0, jnp.power(x, p) * jnp.log(x)),
    ),
    aten.sinc: (_sinc,),
    aten.softplus: (
        lambda x, beta=1, threshold=20: where(
            x * beta > threshold, 1, sigmoid(x * beta)
        ),
    ),
    aten.special_entr: (lambda x: -1 - jnp.log(x),),
    aten.special_ndtri: (
        lambda x: math.sqrt(2 * math.pi) * jnp.exp(special.ndtri(x) ** 2 / 2),
    ),
    aten.special_xlog1py: (
        lambda x, y: where((x == 0) & (y <= -1), 0, jnp.log1p(y)),
        lambda x, y: x / (1 + y),
    ),
    # The square of a divisor may overflow.
    aten.true_divide: (lambda x, y: jnp.divide(1.0, y), lambda x, y: -(x / y) / y),
    aten.xlogy: (
        lambda x, y: where((x == 0) & (y <= 0), 0, jnp.log(y)),
        lambda x, y: x / y,
    ),
}
RULES = {op: _rule(_original(op), *rules) for op, rules in DERIVATIVES.items()}
# The derivative at 0 is 0 for every exponent, as for the norm of a vector of zeros.
_power = _rule(jnp.power, lambda x, p: where(x == 0, 0, p * jnp.power(x, p - 1)))
_losses = _rule(
    # PyTorch limits the logarithms to -100.
    lambda x, y: (
        (y - 1) * jnp.maximum(jnp.log1p(-x), -100) - y * jnp.maximum(jnp.log(x), -100)
    ),
    lambda x, y: (x - y) / jnp.maximum(x * (1 - x), 1e-12),
    lambda x, y: jnp.log1p(-x) - jnp.log(x),
)


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


def _binary_cross_entropy(
    x: Any, target: Any, weight: Any = None, reduction: int = 1
) -> Any:
    losses = _losses(x, target) * (1 if weight is None else weight)
    return (lambda y: y, jnp.mean, jnp.sum)[reduction](losses)


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
    aten.angle: _rule(jnp.angle, jnp.zeros_like),
    aten.binary_cross_entropy: _binary_cross_entropy,
    aten.dist: lambda x, y, p=2: _vector_norm(x - y, p),
    aten.div: _divide,
    aten.linalg_vector_norm: _vector_norm,
    aten.log_sigmoid_forward: lambda x: (RULES[aten.log_sigmoid](x), x[:0]),
    aten.max.dim: functools.partial(_select, aten.max),
    aten.min.dim: functools.partial(_select, aten.min),
    aten.mvlgamma: lambda x, p: (
        sum(RULES[aten.lgamma](x - i / 2) for i in range(p))
        + p * (p - 1) / 4 * math.log(math.pi)
    ),
    aten.polygamma: _rule(_polygamma, None, lambda n, x: _polygamma(n + 1, x)),
    aten.special_erfcx: _rule(
        _erfcx, lambda x: 2 * x * _erfcx(x) - 2 / math.sqrt(math.pi)
    ),
    aten.special_log_ndtr: _rule(
        special.log_ndtr,
        lambda x: math.sqrt(2 / math.pi) / _erfcx(-x / math.sqrt(2)),
    ),
    aten.special_modified_bessel_i1: special.i1,
    aten.std.correction: _std,
    aten.std_mean.correction: lambda x, dim=None, **options: (
        _std(x, dim, **options),
        jnp.mean(x, dim and tuple(dim), keepdims=options.get("keepdim", False)),
    ),
    torch.angle: _rule(jnp.angle, jnp.zeros_like),
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
