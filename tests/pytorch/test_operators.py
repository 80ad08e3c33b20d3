"""Operators have the values and gradients of PyTorch for all kinds of inputs.

The inputs are large, small and zero, and those at which functions have a kink. PyTorch
computes in float32 and in float64, and the results must be close to one of the two.
Points where PyTorch itself has NaN are not compared.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from tolerances import assert_close
from torchax.decompositions import DECOMPOSITIONS
from torchax.ops.ops_registry import all_aten_ops

import qlora_jax as ql

aten = torch.ops.aten
SIZES = [0.0, 1e-30, 1e-10, 1e-3, 0.1, 0.5, 1, 1.5, 2, 3, 5, 6, 10, 20, 20.5, 50, 87]
SIZES += [89, 100, 200, 1e3, 1e4, 1e6, 1e10, 1e20, 1e30, math.inf]
UNARY = np.array(SIZES + [-x for x in SIZES if x], np.float32)
FEW = [0.0, 1e-20, 0.5, 1, 2, 3, 20, 89, 200, 1e6, 1e20]
BINARY = np.array(FEW + [-x for x in FEW if x], np.float32)
POSITIVE = np.array(SIZES, np.float32)
PROBABILITIES = np.array([0, 1e-30, 1e-12, 0.1, 0.5, 0.9, 1 - 1e-6, 1], np.float32)
# The inputs of operators that are defined for a part of all numbers, or whose values
# PyTorch and XLA compute differently far from zero.
DOMAINS = {
    # At negative integers, PyTorch has finite numbers instead of poles.
    **dict.fromkeys(["digamma", "lgamma", "mvlgamma", "polygamma"], POSITIVE),
    # At -1e6, PyTorch's derivative is 0.
    "special_log_ndtr": UNARY[UNARY > -1e5],
    # The periods of these numbers are below the resolution of float32.
    **dict.fromkeys(["sin", "cos", "tan", "sinc"], UNARY[np.abs(UNARY) <= 1e4]),
    # XLA's remainder of a quotient above 2^24 is not exact.
    **dict.fromkeys(
        ["fmod", "remainder"], BINARY[(np.abs(BINARY) >= 0.5) & (np.abs(BINARY) < 1e6)]
    ),
}
# Arguments after the tensors. An operator has a test for each of its tuples.
ARGUMENTS: dict[str, list[tuple]] = {
    "celu": [(), (2.0,)],
    "clamp": [(-1.0, 1.0), (None, 1.0), (1.0, None), (2.0, 1.0)],
    "clamp_max": [(1.0,)],
    "clamp_min": [(1.0,)],
    "elu": [(), (2.0,), (1.5, 1.1, 0.5)],
    "hardtanh": [(), (0.0, 6.0)],
    "leaky_relu": [(), (-0.2,)],
    "logit": [(), (0.1,)],
    "mvlgamma": [(2,)],
    "nan_to_num": [(), (1.0, 2.0, 3.0)],
    "pow": [(p,) for p in (0, 1, 2, 3, -1, -2, 0.5, 1.5, -0.5, 0.0, 2.0)],
    "softplus": [(), (2.0, 5.0)],
    "threshold": [(1.0, -2.0), (0.0, 0.0)],
}
UNARY_NAMES = (
    "abs acos acosh asin asinh atan atanh ceil celu clamp clamp_max clamp_min cos cosh "
    "deg2rad digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink "
    "hardsigmoid hardswish hardtanh i0 leaky_relu lgamma log log10 log1p log2 logit "
    "mish mvlgamma nan_to_num neg positive pow rad2deg reciprocal relu round rsqrt "
    "sigmoid silu sin sinc sinh softplus softshrink special_entr special_erfcx "
    "special_i0e special_i1 special_i1e special_log_ndtr special_ndtri sqrt tan tanh "
    "threshold trunc"
).split()
BINARY_NAMES = (
    "add atan2 clamp clamp_max clamp_min copysign div fmax fmin fmod hypot logaddexp "
    "logaddexp2 maximum minimum mul pow remainder special_xlog1py sub true_divide xlogy"
).split()
# Operators by element that have a test of their own below, or no derivative in PyTorch,
# or integers as inputs.
OTHER_NAMES = (
    "_conj_physical addcdiv addcmul angle bitwise_and bitwise_left_shift bitwise_not "
    "bitwise_or bitwise_right_shift bitwise_xor clone conj_physical eq equal "
    "floor_divide frexp gcd ge glu gt heaviside igamma igammac isfinite isinf isnan "
    "isneginf isposinf lcm le lerp "
    "logical_and logical_not logical_or logical_xor lt masked_fill max min "
    "native_dropout ne nextafter polygamma rsub sgn sign signbit where special_zeta "
    "special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 "
    "special_chebyshev_polynomial_t special_chebyshev_polynomial_u "
    "special_hermite_polynomial_h special_hermite_polynomial_he "
    "special_laguerre_polynomial_l special_modified_bessel_i0 "
    "special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1"
).split()


class Module(torch.nn.Module):
    """A module without parameters that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def results_in_pytorch(function, arrays, dtype):
    """Returns the outputs and the gradients of their sum, as float32."""
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in arrays]
    output = function(*tensors)
    gradients = torch.autograd.grad(output.sum(), tensors, materialize_grads=True)
    with np.errstate(over="ignore"):
        results = [x.detach().numpy() for x in (output, *gradients)]
        return [np.asarray(x, np.float32) for x in results]


def results_in_jax(function, arrays):
    model = ql.torch.wrap(Module(function))

    @jax.jit
    def compute(*arrays):
        output, vjp = jax.vjp(lambda *xs: model.apply({"params": {}}, *xs), *arrays)
        return output, *vjp(jnp.ones_like(output))

    return [np.asarray(x) for x in compute(*map(jnp.array, arrays))]


# Functions such as `lgamma` are computed by other formulas, which round more often.
ROUNDING = 840 * np.finfo(np.float32).eps


def assert_equal_to_pytorch(function, *arrays):
    got = results_in_jax(function, arrays)
    wants = [results_in_pytorch(function, arrays, torch.float32)]
    wants.append(results_in_pytorch(function, arrays, torch.float64))
    for name, result, *pair in zip(["value", *"xyz"], got, *wants, strict=False):
        assert result.shape == pair[0].shape
        is_close = np.isnan(pair[0])
        for want in pair:
            with np.errstate(invalid="ignore"):
                is_within = abs(result - want) <= ROUNDING * np.maximum(abs(want), 0.1)
            is_close |= is_within | (result == want)
        if not is_close.all():
            points = [x[~is_close] for x in arrays if x.shape == result.shape]
            pytest.fail(
                f"{name} at {points}: {result[~is_close]} for {pair[0][~is_close]}"
            )


def pairs(values):
    return [x.ravel() for x in np.meshgrid(values, values)]


def test_the_tables_have_all_operators_that_torchax_computes_by_element():
    torchax.default_env()  # fills the tables of torchax
    names = set()
    for op in (*all_aten_ops, *DECOMPOSITIONS):
        overloads = [op] if hasattr(op, "tags") else []
        if hasattr(op, "overloads"):
            overloads = [getattr(op, name) for name in op.overloads()]
        if any(torch.Tag.pointwise in overload.tags for overload in overloads):
            names.add(overloads[0].overloadpacket.__name__)
    is_special = re.compile(r".*(_|_backward)$")  # also `__and__`
    names = {name for name in names if not is_special.match(name)}
    assert names <= {*UNARY_NAMES, *BINARY_NAMES, *OTHER_NAMES}


@pytest.mark.parametrize("name", UNARY_NAMES)
def test_operators_of_one_tensor(name):
    for arguments in ARGUMENTS.get(name, [()]):
        op = getattr(aten, name)
        inputs = DOMAINS.get(name, UNARY)
        assert_equal_to_pytorch(lambda x, op=op, args=arguments: op(x, *args), inputs)


@pytest.mark.parametrize("name", BINARY_NAMES)
def test_operators_of_two_tensors(name):
    assert_equal_to_pytorch(getattr(aten, name), *pairs(DOMAINS.get(name, BINARY)))


# Functions that call several operators, or take other arguments.
FUNCTIONS = {
    "addcdiv": (lambda x, y: torch.addcdiv(x, x, y), 2),
    "addcmul": (lambda x, y: torch.addcmul(x, y, y), 2),
    "angle": (torch.angle, 1),
    "celu_": (lambda x: F.celu(x * 1, inplace=True), 1),
    "clamp tensors": (lambda x, y: torch.clamp(x, y, y + 1), 2),
    "clamp tensors in the wrong order": (lambda x, y: torch.clamp(x, y, y - 1), 2),
    "clamp_": (lambda x: (x * 1).clamp_(-1, 1), 1),
    "elu_": (lambda x: F.elu(x * 1, inplace=True), 1),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), 1),
    "glu": (lambda x: F.glu(torch.stack([x, x.flip(0)]), 0), 1),
    "hardsigmoid_": (lambda x: F.hardsigmoid(x * 1, inplace=True), 1),
    "hardswish_": (lambda x: F.hardswish(x * 1, inplace=True), 1),
    "hardtanh_": (lambda x: F.hardtanh(x * 1, inplace=True), 1),
    "hinge_embedding_loss": (
        lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x), reduction="none"),
        1,
    ),
    "huber_loss": (lambda x, y: F.huber_loss(x, y, reduction="none"), 2),
    "kl_div": (lambda x, y: F.kl_div(x, y, reduction="none"), 2),
    "l1_loss": (lambda x, y: F.l1_loss(x, y, reduction="none"), 2),
    "leaky_relu_": (lambda x: F.leaky_relu(x * 1, inplace=True), 1),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), 2),
    "logsigmoid": (F.logsigmoid, 1),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 2.0), 1),
    "margin_ranking_loss": (
        lambda x, y: F.margin_ranking_loss(x, y, torch.ones_like(x), reduction="none"),
        2,
    ),
    "mish_": (lambda x: F.mish(x * 1, inplace=True), 1),
    "mse_loss": (lambda x, y: F.mse_loss(x, y, reduction="none"), 2),
    "number / tensor": (lambda x: 2 / x, 1),
    "number ** tensor": (lambda x: 2**x + 0.0**x, 1),
    "poisson_nll_loss": (lambda x, y: F.poisson_nll_loss(x, y, reduction="none"), 2),
    "prelu": (lambda x: F.prelu(x, x.new_full((1,), 0.25)), 1),
    "relu6": (F.relu6, 1),
    "relu6_": (lambda x: F.relu6(x * 1, inplace=True), 1),
    "selu": (F.selu, 1),
    "selu_": (lambda x: F.selu(x * 1, inplace=True), 1),
    "silu_": (lambda x: F.silu(x * 1, inplace=True), 1),
    "smooth_l1_loss": (lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), 2),
    "softsign": (F.softsign, 1),
    "square": (torch.square, 1),
    "tanhshrink": (F.tanhshrink, 1),
    "tensor / 0": (lambda x: x / 0.0, 1),
    "where": (lambda x, y: torch.where(x > y, x, y), 2),
    "with_logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
        2,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_call_operators(name):
    function, num_inputs = FUNCTIONS[name]
    inputs = [UNARY[np.isfinite(UNARY)]] if num_inputs == 1 else pairs(BINARY)
    assert_equal_to_pytorch(function, *inputs)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_polygamma(n):
    assert_equal_to_pytorch(lambda x: torch.polygamma(n, x), POSITIVE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_binary_cross_entropy(reduction):
    def loss(x, y):
        return F.binary_cross_entropy(x, y, reduction=reduction)

    assert_equal_to_pytorch(loss, *pairs(PROBABILITIES))


# Rows with zeros, with equal numbers, and with both signs.
ROWS = np.array(
    [[0, 0, 0, 0], [2, 2, 2, 2], [1, 0, 2, 0], [0, 0, 1, 2], [-3, 3, -3, 3]], np.float32
)
REDUCTIONS = {
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(1)),
    "cumprod": lambda x: x.cumprod(1),
    "dist": lambda x: torch.dist(x, x.flip(0)),
    "logsumexp": lambda x: x.logsumexp(1),
    "max": lambda x: x.max(1).values,
    "min": lambda x: x.min(1, keepdim=True).values,
    "amax": lambda x: x.amax(1),
    "prod": lambda x: x.prod(1),
    "std": lambda x: x.std(1),
    "std of all": lambda x: x[:2].std(),
    "std_mean": lambda x: sum(torch.std_mean(x, 1, correction=0)),
    **{
        f"norm {p}": lambda x, p=p: torch.linalg.vector_norm(x, p, dim=1)
        for p in (0, 0.5, 1, 1.5, 2, 3, math.inf, -math.inf)
    },
    **{
        f"normalize {p}": lambda x, p=p: F.normalize(x, p)
        for p in (1, 1.5, 2, 3, math.inf)
    },
    "norm of all": lambda x: x[:1].norm() + x.norm(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_zeros_and_equal_numbers(name):
    assert_equal_to_pytorch(REDUCTIONS[name], ROWS)


def test_dtypes_and_second_derivatives():
    """Integers have no derivative, and derivatives have derivatives."""
    model = ql.torch.wrap(Module(lambda x: (x.abs(), x.clamp(0, 2), x / 2)))
    outputs = model.apply({"params": {}}, jnp.arange(-3, 3))
    dtypes = [x.dtype for x in outputs]
    assert dtypes == [jnp.int32, jnp.int32, jnp.float32]
    softplus = ql.torch.wrap(Module(F.softplus))
    half = jnp.ones(2, jnp.bfloat16)
    _, tangent = jax.jvp(lambda x: softplus.apply({"params": {}}, x), [half], [half])
    assert tangent.dtype == jnp.bfloat16
    second = jax.grad(jax.grad(lambda x: softplus.apply({"params": {}}, x)))
    sigmoid = 1 / (1 + math.exp(-1))
    assert_close(second(1.0), sigmoid * (1 - sigmoid))
    assert second(100.0) == 0
