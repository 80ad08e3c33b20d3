"""Bounds catch the errors that they should, and rounding noise is as documented."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding_noise
from helpers import make_mesh, spread
from jax.sharding import PartitionSpec as P
from tolerances import assert_close, assert_equal_but_for_rounding

pytestmark = pytest.mark.without_noise  # tests that need it start it

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(2, 64, 64)).astype(np.float32)
EXACT = X.astype(np.float64) @ W


@pytest.fixture
def start():
    yield rounding_noise.start
    rounding_noise.stop()


def bits(x):
    return np.asarray(x).view(np.int32).astype(int)


@pytest.mark.parametrize("seed", [1, 2])
def test_products_are_off_by_up_to_two_units(start, seed):
    plain, product = bits(X @ jnp.asarray(W)), jax.jit(jnp.matmul)
    start(seed)
    noisy = product(X, W)
    counts = np.bincount(np.ravel(bits(noisy) - plain) + 2)
    assert len(counts) == 5 and 0.15 < counts.min() / X.size
    assert_close(noisy, EXACT, terms=64)
    # Equal sums get equal noise, and exact results get none.
    np.testing.assert_array_equal(noisy, X @ jnp.asarray(W))
    integers = np.arange(64.0).reshape(8, 8).astype(np.float32)
    np.testing.assert_array_equal(jnp.asarray(integers) @ integers, integers @ integers)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sums_over_devices_have_noise_of_their_own(start, kind):
    mesh = make_mesh(kind)
    specs = {"in_specs": P("a", None), "out_specs": (P(), P("a", None))}

    def sum_over_devices(x):
        return jax.lax.psum(x, "a"), jax.lax.psum_scatter(x, "a", tiled=True)

    def run():
        return jax.jit(jax.shard_map(sum_over_devices, mesh=mesh, **specs))(x)

    x = spread(X, mesh, "a")
    plain = run()
    start(1)
    for noisy, want in zip(run(), plain, strict=True):
        off = np.abs(bits(noisy) - bits(want))
        assert off.max() == 2 and 0.7 < np.mean(off != 0) < 0.9
    rounding_noise.stop()
    np.testing.assert_array_equal(run()[0], plain[0])


def test_gradients_and_other_platforms_are_as_before(start):
    loss = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(X @ w)))

    def lower():
        return jax.jit(loss).trace(W).lower(lowering_platforms=("tpu",)).as_text()

    want, jaxpr = lower(), str(jax.make_jaxpr(loss)(W))
    start(1)
    assert lower() == want and str(jax.make_jaxpr(loss)(W)) == jaxpr


# Small errors that a product may have.
WRONG = {
    "a term is left out": lambda: X[:, 1:].astype(float) @ W[1:],
    "a term of 4096 is left out": lambda: EXACT - EXACT / 4096,
    "TF32": lambda: rounded(X, 10) @ rounded(W, 10),
    "bfloat16": lambda: rounded(X, 7) @ rounded(W, 7),
    "one entry is wrong": lambda: EXACT + 0.1 * (EXACT == EXACT[3, 3]),
    "NaN": lambda: np.where(EXACT == EXACT[3, 3], np.nan, EXACT),
}


def rounded(x, bits):
    mantissa, exponent = np.frexp(x.astype(float))
    return np.ldexp(np.rint(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_products_are_out_of_bounds(name):
    wrong = WRONG[name]().astype(np.float32)
    with pytest.raises(AssertionError):
        assert_close(wrong, EXACT)
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(wrong, lambda x, w: np.asarray(x @ w), X, W)
    assert_equal_but_for_rounding(X @ W, lambda x, w: np.asarray(x @ w), X, W)


def test_bounds_follow_magnitudes_dtypes_and_leaves():
    # If large terms cancel in a sum, the terms give the magnitude.
    terms = np.array([1e4, -1e4, 1.0])
    got = np.float32(terms.sum() + 2e-4)
    with pytest.raises(AssertionError, match="and roundings explain"):
        assert_close(got, terms.sum(), terms=3)
    assert_close(got, terms.sum(), terms=3, magnitude=float(np.abs(terms).sum()))
    # A leaf that is zero except for rounding, such as the gradient of a key's bias.
    assert_close({"w": X, "b": X * 0 + 1e-9}, {"w": X, "b": X * 0})
    low = X.astype(jnp.bfloat16)
    assert_close(low, X.astype(np.float64))
    for got, want in [
        (X, low),  # another dtype
        (X, W[0]),  # another shape
        ({"w": X}, [X]),  # another tree
        (np.arange(3), np.arange(1, 4)),
        (low, X * 1.01),
    ]:
        with pytest.raises(AssertionError):
            assert_close(got, want)


TESTS = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
COMPARISONS = {"assert_allclose", "assert_trees_all_close", "isclose", "allclose"}
# Smaller tolerances are for rounding errors; larger ones for errors of a method.
SMALL = 1e-3


def chosen_tolerances(tree):
    """Returns the lines that compare floats by a hand-chosen tolerance."""
    negated = [x.operand for x in ast.walk(tree) if isinstance(x, ast.UnaryOp)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in negated:
            name = ast.unparse(node.func).rpartition(".")[2]
            numbers = [k.value for k in node.keywords if k.arg in ("rel", "abs")]
            if name in COMPARISONS or name == "approx" and any(map(is_small, numbers)):
                yield node.lineno
        elif isinstance(node, ast.Compare):
            upper = isinstance(node.ops[-1], (ast.Lt, ast.LtE))
            if upper and is_small(node.comparators[-1]):
                yield node.lineno


def is_small(node):
    numbers = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
    return any(isinstance(x, float) and 0 < x < SMALL for x in numbers)


def test_no_test_chooses_a_tolerance():
    chosen = []
    for path in TESTS:
        lines = chosen_tolerances(ast.parse(path.read_text("utf-8")))
        chosen += [f"{path.name}:{line}" for line in lines]
    assert chosen == []
