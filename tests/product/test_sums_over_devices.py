"""Products that sum over devices round the sum once, in 16 bits too.

Another QLORA_JAX_SEED gives other layouts.
"""

import math

import fuzz_layouts
import hlo_collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEED, dequantize, ragged_product, rounding, slow_but_every, spread
from jax.sharding import AxisType, PartitionSpec

import qlora_jax as ql

EXPERTS, ROWS, K, N = 8, 16, 256, 32
SIZES = np.array([1, 2, 3, 4, 0, 2, 1, 3], np.int32)
MESHES = {
    "Explicit": (AxisType.Explicit, AxisType.Explicit),
    "Auto": (AxisType.Auto, AxisType.Auto),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
PRODUCTS = ["packed", "packed experts", "float experts"]
CASES = [
    (mesh, product, dtype)
    for mesh in MESHES
    for product in PRODUCTS
    for dtype in ("bfloat16", "float16")
]


def assert_rounded_once(got, want, magnitudes, dtype):
    """Bounds the error by half a unit in the last place plus that of float32 sums."""
    one_rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(want)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    assert np.all(
        np.abs(np.asarray(got, np.float64) - want)
        <= ((1 + rounding(1)) * one_rounding + rounding(K) * magnitudes + smallest)
    )


@pytest.mark.parametrize("mesh, product, dtype", slow_but_every(4, CASES))
def test_a_sum_is_rounded_once(mesh, product, dtype):
    """Results and gradients are NumPy's, on operands that are split at random."""
    case = CASES.index((mesh, product, dtype))
    rng = np.random.default_rng(SEED * len(CASES) + case)
    has_experts, is_packed = product != "packed", product != "float experts"
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=MESHES[mesh])

    def draw_normal(*shape):
        return rng.normal(size=shape).astype(jnp.dtype(dtype))

    w = draw_normal(*(EXPERTS,) * has_experts, K, N)
    x, g = draw_normal(ROWS, K), draw_normal(ROWS, N)

    # One axis that a product sums over is split; other axes are split at random.
    summed = "a" if case % 2 else "b"
    units = np.array([*w.shape[:-2], K // 16, N])
    spec = [None] * w.ndim
    spec[case // 2 % w.ndim] = summed
    second_axis = "b" if case % 2 else "a"
    free = [i for i, entry in enumerate(spec) if entry is None]
    spec[rng.choice(free)] = second_axis
    assert all(units % [mesh.shape.get(entry, 1) for entry in spec] == 0)
    x_spec, g_spec = (fuzz_layouts.draw_spec(rng, mesh, a.shape) for a in (x, g))
    if is_packed:
        q = ql.quantize(jnp.asarray(w), block_size=16, double_quant=False)
        w = dequantize(q)
        rules = {"w": PartitionSpec(*spec)}
        kernel = ql.sharding.place({"w": q}, {}, mesh, rules, rows=x_spec[:1])[0]["w"]
    else:
        kernel = spread(jnp.asarray(w), mesh, *spec)

    def run(x, kernel, g, sizes):
        def multiply(x):
            return ql.matmul(x, kernel)

        if has_experts:

            def multiply(x):
                return ql.ragged_dot(x, kernel, sizes)

        y, pull = jax.vjp(multiply, x)
        return y, pull(fuzz_layouts.like(g, y))[0]

    operands = spread(x, mesh, *x_spec), kernel, spread(g, mesh, *g_spec)
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(*operands, spread(SIZES, mesh)).compile()
        y, dx = program(*operands, spread(SIZES, mesh))
    assert y.dtype == dx.dtype == dtype

    def to_float64(*arrays):
        return [np.asarray(a, np.float64) for a in arrays]

    x, g, w = to_float64(x, g, w)
    transposed = w.swapaxes(-1, -2)

    def multiply(x, w):
        return ragged_product(x, w, SIZES) if has_experts else np.matmul(x, w)

    for got, left, right in ((y, x, w), (dx, g, transposed)):
        magnitudes = multiply(np.abs(left), np.abs(right))
        assert_rounded_once(got, multiply(left, right), magnitudes, dtype)


@pytest.mark.parametrize("rows", [ROWS, 3])
def test_traffic_of_a_sum_in_16_bits(rows):
    """Sums are scattered in float32 and gathered in 16 bits; few rows are summed."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    q = ql.quantize(jnp.ones((K, N), jnp.float16), block_size=16, double_quant=False)
    (q,) = ql.sharding.place({"q": q}, {}, mesh, {"q": PartitionSpec("a")})[0].values()
    x = spread(jnp.ones((rows, K), jnp.float16), mesh, None, "a")
    with jax.set_mesh(mesh):
        text = jax.jit(ql.matmul).lower(x, q).compile().as_text()
    traffic = {
        (row["operation"], row["dtype"]): row["bytes"]
        for row in hlo_collectives.collectives(text)
    }
    size = math.prod((rows, N))
    if rows == ROWS:
        assert traffic == {
            ("reduce-scatter", "f32"): 4 * size // 8,
            ("all-gather", "f16"): 2 * size,
        }
    else:
        assert traffic == {("all-reduce", "f32"): 4 * size}
