"""Operators have the values and gradients of PyTorch for all kinds of inputs.

The inputs are large, small and zero, and those at which functions have a kink. PyTorch
computes in float32 and in float64, and the results must be close to one of the two.
Points where PyTorch itself has NaN are not compared.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

import qlora_jax as ql

aten = torch.ops.aten
SIZES = [0.0, 1e-30, 1e-10, 1e-3, 0.1, 0.5, 1, 1.5, 2, 3, 5, 6, 10, 20, 20.5, 50, 87]
SIZES += [89, 100, 200, 1e3, 1e4, 1e6, 1e10, 1e20, 1e30, math.inf]
UNARY = np.array(SIZES + [-x for x in SIZES if x], np.float32)
FEW = [0.0, 1e-20, 0.5, 1, 2, 3, 20, 89, 200, 1e6, 1e20]
BINARY = np.array(FEW + [-x for x in FEW if x], np.float32)
# Arguments after the tensors. An operator has a test for each of its tuples.
ARGUMENTS: dict[str, list[tuple]] = {
    "clamp": [(-1.0, 1.0), (None, 1.0), (1.0, None), (2.0, 1.0)],
    "clamp_max": [(1.0,)],
    "clamp_min": [(1.0,)],
    "elu": [(), (1.5, 1.1, 0.5)],
    "pow": [(p,) for p in (0, 1, 2, 3, -1, 0.5, -0.5)],
    "softplus": [(), (2.0, 5.0)],
}
UNARY_NAMES = (
    "abs clamp clamp_max clamp_min elu exp gelu log pow reciprocal relu rsqrt sigmoid "
    "silu softplus sqrt tanh"
).split()
BINARY_NAMES = "clamp clamp_max clamp_min div logaddexp mul pow true_divide".split()


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


# Functions are computed by other formulas, which may round more often.
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


@pytest.mark.parametrize("name", UNARY_NAMES)
def test_operators_of_one_tensor(name):
    for arguments in ARGUMENTS.get(name, [()]):
        op = getattr(aten, name)
        assert_equal_to_pytorch(lambda x, op=op, args=arguments: op(x, *args), UNARY)


@pytest.mark.parametrize("name", BINARY_NAMES)
def test_operators_of_two_tensors(name):
    assert_equal_to_pytorch(getattr(aten, name), *pairs(BINARY))


# Functions that call several operators, or take other arguments.
FUNCTIONS = {
    "clamp tensors": (lambda x, y: torch.clamp(x, y, y + 1), 2),
    "clamp tensors in the wrong order": (lambda x, y: torch.clamp(x, y, y - 1), 2),
    "clamp_": (lambda x: (x * 1).clamp_(-1, 1), 1),
    "elu_": (lambda x: F.elu(x * 1, inplace=True), 1),
    "logsigmoid": (F.logsigmoid, 1),
    "number / tensor": (lambda x: 2 / x, 1),
    "number ** tensor": (lambda x: 2**x + 0.0**x, 1),
    "tensor / 0": (lambda x: x / 0.0, 1),
    "where": (lambda x, y: torch.where(x > y, x, y), 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_call_operators(name):
    function, num_inputs = FUNCTIONS[name]
    inputs = [UNARY[np.isfinite(UNARY)]] if num_inputs == 1 else pairs(BINARY)
    assert_equal_to_pytorch(function, *inputs)


# Rows with zeros, with equal numbers, and with both signs.
ROWS = np.array(
    [[0, 0, 0, 0], [2, 2, 2, 2], [1, 0, 2, 0], [0, 0, 1, 2], [-3, 3, -3, 3]], np.float32
)
REDUCTIONS = {
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(1)),
    "logsumexp": lambda x: x.logsumexp(1),
    "max": lambda x: x.max(1).values,
    "min": lambda x: x.min(1, keepdim=True).values,
    "std": lambda x: x.std(1),
    "std of all": lambda x: x[:2].std(),
    **{
        f"norm {p}": lambda x, p=p: torch.linalg.vector_norm(x, p, dim=1)
        for p in (0, 1, 1.5, 2, math.inf)
    },
    "normalize": F.normalize,
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
