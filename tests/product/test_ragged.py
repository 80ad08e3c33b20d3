"""Ragged products with packed experts, against `lax.ragged_dot` of decoded weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    Case,
    dequantize,
    normal,
    ragged_product,
    weights,
)
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.product.backends import tiled

ROWS, EXPERTS, K, N = 40, 5, 128, 24
SIZES = [
    [8, 0, 13, 1, 18],
    [0, 0, 40, 0, 0],
    [0, 3, 0, 20, 0],
    [0] * 5,
    [9, 7, 2, 2, 1],
]
FORMATS = {case.fmt: case for case in CASES.values()}


def pack(fmt="nf4", block_size=64, double_quant=False, shape=(EXPERTS, K, N), seed=0):
    w = jnp.asarray(weights(Case(shape), seed))
    return ql.quantize(w, fmt, block_size=block_size, double_quant=double_quant)


@functools.partial(jax.jit, static_argnames="backend")
def product_and_gradient(x, q, sizes, g, backend=None, layer=None):
    def product(x):
        return ql.ragged_dot(x, q, sizes, backend=backend, layer=layer)

    y, pull = jax.vjp(product, x)
    return y, pull(g)[0]


def check(q, x, sizes, g, backend=None, layer=None):
    y, dx = product_and_gradient(x, q, jnp.array(sizes), g, backend, layer)
    w = dequantize(q) if layer is None else dequantize(q)[layer]
    w = w.astype(x.dtype)
    assert y.dtype == dx.dtype == x.dtype
    assert_close(y, ragged_product(x, w, sizes))
    assert_close(dx, ragged_product(g, w.swapaxes(-1, -2), sizes))
    return y


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_product_and_input_gradient(fmt, backend):
    double_quant = fmt == "nf4" and backend == "tiled"
    q = pack(fmt, min(FORMATS[fmt].block_size, K), double_quant)
    dtype = jnp.bfloat16 if backend == "reference" else jnp.float32
    x, g = normal(1, (ROWS, K), dtype), normal(2, (ROWS, N), dtype)
    for sizes in SIZES[: 3 if fmt != "nf4" else None]:
        y = check(q, x, sizes, g, backend)
        w = q.dequantize(x.dtype)
        expected = jax.lax.ragged_dot(x, w, jnp.array(sizes, jnp.int32))
        assert_close(y, expected, roundings=2)  # of each


def test_tiles_of_an_expert_and_of_a_gradient(monkeypatch):
    monkeypatch.setattr(tiled, "TILE_BYTES", 2**17)
    q = pack(shape=(3, 320, 1100))
    for dtype in (jnp.float32, jnp.bfloat16):
        x, g = normal(1, (ROWS, 320), dtype), normal(2, (ROWS, 1100), dtype)
        check(q, x, [11, 0, 20], g, "tiled")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows(rows):
    sizes = [0, 0, rows, 0, 0]
    check(pack(), normal(1, (rows, K)), sizes, normal(2, (rows, N)))


def test_layer_of_a_stack():
    q = pack(shape=(3, EXPERTS, K, N), double_quant=True)
    x, g = normal(1, (ROWS, K)), normal(2, (ROWS, N))
    for backend in ("reference", "tiled"):
        check(q, x, SIZES[0], g, backend, layer=jnp.int32(2))


X, Q, S = "x", "q", "sizes"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapped", [{X}, {S}, {X, S}, {Q}, {Q, S}, {X, Q, S}, {"layer"}]
)
def test_vmap_maps_any_operand(mapped):
    size = 3

    def leading_axes(name):
        return (size,) * (name in mapped)

    layers = (2,) * ("layer" in mapped)
    q = pack(shape=(*leading_axes(Q), *layers, EXPERTS, K, N))
    x, g = normal(1, (*leading_axes(X), ROWS, K)), normal(2, (size, ROWS, N))
    sizes = jnp.array(SIZES[:size] if S in mapped else SIZES[0])
    layer = jnp.array([1, 0, 1]) if layers else None
    axes = [0 if name in mapped else None for name in (X, Q, S, "layer")]
    product = jax.vmap(
        lambda x, q, sizes, layer: ql.ragged_dot(x, q, sizes, layer=layer), axes
    )
    y, pull = jax.jit(jax.vjp, static_argnums=0)(
        lambda x: product(x, q, sizes, layer), x
    )
    (dx,) = pull(g)

    def member_of(array, name, i):
        return array[i] if name in mapped else array

    total = np.zeros(dx.shape)
    for i in range(size):
        w = member_of(dequantize(q), Q, i)
        w = w[int(layer[i])] if layers else w
        member_sizes = member_of(np.asarray(sizes), S, i)
        assert_close(y[i], ragged_product(member_of(x, X, i), w, member_sizes))
        part = ragged_product(g[i], w.swapaxes(-1, -2), member_sizes)
        total += part if X not in mapped else np.eye(size)[i][:, None, None] * part
    assert_close(dx, total)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_no_more_floats_than_those_of_an_expert(backend):
    experts, width = 16, 256
    q = pack(shape=(experts, width, width))
    x, sizes = normal(1, (64, width)), jnp.full(experts, 4)
    for run in (
        ql.ragged_dot,
        lambda *a, **b: jax.vjp(lambda x: ql.ragged_dot(x, *a[1:], **b), a[0])[1](a[0]),
    ):
        compiled = jax.jit(functools.partial(run, backend=backend)).lower(x, q, sizes)
        temp = compiled.compile().memory_analysis().temp_size_in_bytes
        assert temp < 3 * 4 * width * width < 4 * q.size / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((EXPERTS, 64, N))}, r"`x` must have shape"),
        ({"x": jnp.ones((ROWS, K), int)}, "`x` must be floating-point. Got int32."),
        ({"x": jnp.ones((ROWS, 64))}, r"`x` must have shape \[M, 128\]. Got"),
        ({"x": jnp.ones((2, ROWS, K))}, r"`x` must have shape \[M, 128\]. Got"),
        ({"q": (2, EXPERTS, K, N)}, "`experts` must have one axis in front"),
        ({"q": (K, N)}, "`experts` must have one axis in front"),
        ({"sizes": [1.0] * EXPERTS}, "`group_sizes` must be integers. Got float32."),
        ({"sizes": [1, 2]}, r"must have shape \[5\], one for each expert. Got \(2,\)"),
        ({"sizes": [20, 0, 20, 0, 1]}, "sum to at most the 40 rows of `x`. Got 41."),
        ({"sizes": [-1, 2, 0, 0, 0]}, "`group_sizes` must not be negative. Got"),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"layer": 0}, "`experts` must have one axis in front"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    if isinstance(changes.get("q"), tuple):
        changes = {"q": pack(shape=changes["q"])}
    arguments = {"x": jnp.ones((ROWS, K)), "q": pack(), "sizes": SIZES[0], **changes}
    x, q, sizes = (arguments.pop(name) for name in (X, Q, S))
    with pytest.raises((TypeError, ValueError), match=message):
        ql.ragged_dot(x, q, jnp.array(sizes), **arguments)
