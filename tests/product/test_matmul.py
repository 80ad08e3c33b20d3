"""Every backend against products with the oracle's dequantized weights."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    Case,
    dequantize,
    fast_and_slow,
    normal,
    refusal,
    slow_but_every,
    weights,
)
from jax.test_util import check_grads
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.product import choose
from qlora_jax.product.backends import reference
from qlora_jax.product.backends.pallas_tpu import fused
from qlora_jax.product.floats import float_product
from qlora_jax.quant.formats import Packing
from qlora_jax.quant.geometry import Geometry
from qlora_jax.quant.pack import quantize_kernel

BACKENDS = ["reference", "tiled"]
DTYPES = ["float32", "bfloat16"]


def pack(case, dtype="float32"):
    settings = {"block_size": case.block_size, "double_quant": case.double_quant}
    return ql.quantize(jnp.asarray(weights(case), dtype), case.fmt, **settings)


def inputs(case, rows=5, dtype="float32"):
    *batch, k, _ = case.shape
    return normal(1, (*batch, rows, k), dtype)


def expected(x, q):
    w = dequantize(q).astype(x.dtype).astype(np.float64)
    return np.asarray(x, np.float64) @ w


@functools.partial(jax.jit, static_argnames="backend")
def product_and_gradient(x, q, g, backend=None, layer=None):
    y, pull = jax.vjp(lambda x: ql.matmul(x, q, backend=backend, layer=layer), x)
    return y, pull(y if g is None else g)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", slow_but_every(3, CASES))
def test_product_and_input_gradient(name, dtype, backend):
    case = CASES[name]
    q, x = pack(case), inputs(case, dtype=dtype)
    shape = (*x.shape[:-1], case.shape[-1])
    g = normal(2, shape, dtype)
    y, dx = product_and_gradient(x, q, g, backend)
    assert y.dtype == x.dtype and y.shape == shape
    assert_close(y, expected(x, q))
    w = np.swapaxes(dequantize(q).astype(dtype).astype(np.float64), -1, -2)
    assert dx.dtype == x.dtype
    assert_close(dx, np.asarray(g, np.float64) @ w)


ROW_CASES = CASES | {"tiles": Case((1152, 1100), double_quant=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", slow_but_every(4, ROW_CASES))
@pytest.mark.without_noise  # sums of one product are exact
def test_one_row_takes_weights_out_and_sums_them(name, dtype):
    *batch, k, n = ROW_CASES[name].shape
    q = pack(ROW_CASES[name])
    chosen = np.linspace(0, k - 1, 9).astype(int)
    x = np.random.default_rng(1).normal(size=(10, *batch, 1, k))
    is_chosen = np.arange(k) == chosen[:, None]
    x[:9] = is_chosen.reshape(9, *[1] * len(batch), 1, k)
    x = jnp.asarray(x, dtype)
    y = jax.lax.map(lambda row: ql.matmul(row, q, backend="tiled"), x)
    assert y.dtype == x.dtype and y.shape == (10, *batch, 1, n)
    w = np.moveaxis(dequantize(q)[..., chosen, :], -2, 0)[..., None, :]
    np.testing.assert_array_equal(y[:9], w.astype(dtype))
    assert_close(y[9], expected(x[9], q))


ROWS = [("plain", rows, None) for rows in [(), (4,), (2, 3), (0,)]]
STACK_ROWS = [("stack", rows, name) for rows in [(), (2, 5)] for name in BACKENDS]


@pytest.mark.parametrize(("name", "rows", "backend"), fast_and_slow(ROWS, STACK_ROWS))
def test_any_number_of_row_axes(name, rows, backend):
    q = pack(CASES[name])
    *lead, k, _ = CASES[name].shape
    x, w = normal(0, (*lead, *rows, k)), dequantize(q)
    y, dx = product_and_gradient(x, q, None, backend)
    b = "b" if lead else ""
    want = np.einsum(f"{b}...k,{b}kn->{b}...n", x, w)
    back = np.einsum(f"{b}...n,{b}kn->{b}...k", want, w)
    for got, expected_array in ((y, want), (dx, back)):
        assert got.shape == expected_array.shape
        assert_close(got, expected_array.astype(np.float64))


@pytest.mark.parametrize("backend", fast_and_slow(["tiled"], ["reference"]))
@pytest.mark.parametrize("shape", [(0, 4), (64, 0), (0, 0), (2, 0, 4), (2, 64, 0)])
def test_empty_kernels(shape, backend):
    """A sum over no inputs is zero; without outputs, the result is empty."""
    *batch, k, n = shape
    q, x = ql.quantize(np.zeros(shape, np.float32)), jnp.ones((*batch, 3, k))
    y, pull = jax.vjp(lambda x: ql.matmul(x, q, backend=backend), x)
    np.testing.assert_array_equal(y, np.zeros((*batch, 3, n)))
    np.testing.assert_array_equal(pull(y + 1)[0], np.zeros(x.shape))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "fmt"), [("reference", "int8"), ("tiled", "nf4")])
def test_batch_axes(backend, fmt):
    q, x = (
        f(CASES["odd N"]._replace(shape=(2, 3, 96, 5), fmt=fmt)) for f in (pack, inputs)
    )
    y, dx = product_and_gradient(x, q, None, backend)
    w = dequantize(q)
    assert_close(y, expected(x, q))
    assert_close(dx, np.asarray(y) @ np.swapaxes(w, -1, -2))
    product = ql.matmul(x[1, 1], jax.tree.map(lambda a: a[:, 1], q), layer=1)
    assert_close(product, expected(x, q)[1, 1])


# Every pair of a format and dtypes, with the two shapes taking turns.
NAMES = {"32": "float32", "16": "bfloat16", "half": "float16"}
TILED = [
    ("tiled", Case([(1152, 1100), (2, 1152, 700)][(i + j) % 2], *stored, True), dtypes)
    for i, stored in enumerate([("nf4", 64), ("fp4", 128), ("nf4", 32)])
    for j, dtypes in enumerate(["32 16", "16 16", "16 32", "half half", "16 half"])
]
# These sizes are not multiples of tiles.
UNEVEN = [
    Case((1088, 1100), "int4", 64, double_quant=True),
    Case((1104, 1100), "int8", 16),
    Case((1088, 1101), "nf4", 64, double_quant=True),
]
TILED += [(backend, case, "32 32") for backend in BACKENDS for case in UNEVEN]


@pytest.mark.without_noise  # sums of one product are exact
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "case", "dtypes"), TILED, ids=str)
def test_weights_of_tiles_are_exact(backend, case, dtypes):
    """Multiplying by the identity returns the weights of kernels of several tiles."""
    logical, dtype = (jnp.dtype(NAMES[name]) for name in dtypes.split())
    q = pack(case, logical)
    want = dequantize(q).astype(dtype)
    y, y_back = products_with_identity(q, dtype, backend)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(y_back, np.swapaxes(want, -1, -2))


def products_with_identity(q, dtype, backend="tiled"):
    """Returns W and its transpose, by the product and by its gradient."""
    *batch, k, n = q.shape
    rows = max(k, n)

    def eye(size):
        return jnp.tile(jnp.eye(rows, size, dtype=dtype), (*batch, 1, 1))

    y, back = product_and_gradient(eye(k), q, eye(n), backend)
    return y[..., :k, :], back[..., :n, :]


@pytest.mark.slow
def test_weights_of_any_size_round_to_nearest_bfloat16():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(1024, 1040)).astype(np.float32)
    w *= np.float32(2.0) ** rng.integers(-90, 120, size=(1, 1040))
    w[:, :8] = 0
    q = ql.quantize(w, "int4", double_quant=False)
    y, y_back = products_with_identity(q, jnp.bfloat16)
    want = dequantize(q).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(y_back, want.T)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_float32_for_bfloat16_inputs(backend, rows):
    """4,096 ones times 1/16: a bfloat16 sum would stall near 16."""

    def product(x, q):
        return ql.matmul(x, q, backend=backend)

    long = ql.quantize(np.full((4096, 2), 1 / 16, np.float32))
    y = product(jnp.ones((rows, 4096), jnp.bfloat16), long)
    np.testing.assert_array_equal(np.asarray(y, np.float32), 256)
    wide = ql.quantize(np.full((64, 4096), 1 / 16, np.float32))
    x = jnp.ones((rows, 64), jnp.bfloat16)
    (dx,) = jax.vjp(lambda x: product(x, wide), x)[1](jnp.ones((rows, 4096), x.dtype))
    np.testing.assert_array_equal(np.asarray(dx, np.float32), 256)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_finite_differences(backend):
    q, x = pack(CASES["odd N"]), inputs(CASES["odd N"], 2)

    def run(x):
        return ql.matmul(x, q, backend=backend)

    check_grads(run, (x,), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_packed_weights_get_no_gradient():
    q, x = pack(CASES["plain"]), inputs(CASES["plain"])

    def loss(q):
        return jnp.sum(ql.matmul(x, q))

    grads = jax.grad(loss, allow_int=True)(q)
    assert grads.codes.dtype == jax.dtypes.float0
    assert not np.asarray(grads.scales).any()


@pytest.mark.parametrize("backend", BACKENDS)
class TestTransformations:
    @pytest.mark.slow
    @pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
    def test_vmap_over_x_over_weights_over_both(self, axes, backend):
        def pick(a, axis):
            return a if axis == 0 else jax.tree.map(lambda a: a[0], a)

        x, q = map(pick, (inputs(CASES["stack"]), pack(CASES["stack"])), axes)

        def run(x, q):
            return product_and_gradient(x, q, None, backend)

        y, dx = jax.vmap(run, axes)(x, q)
        w, wide = dequantize(q), np.asarray(x, np.float64)
        assert_close(y, wide @ w)
        assert_close(dx, wide @ w @ np.swapaxes(w, -1, -2))

    @pytest.mark.slow
    def test_a_donated_input_holds_the_result(self, backend):
        """The input has the shape of the result, and of its own gradient."""
        case = CASES["plain"]._replace(shape=(64, 64))
        q, x = pack(case), inputs(case)
        y, w = expected(x, q), dequantize(q)

        def product(x, q):
            return ql.matmul(x, q, backend=backend)

        def grad(x, q):
            return jax.grad(lambda x: jnp.sum(product(x, q) ** 2))(x)

        for run, want in ((product, y), (grad, 2 * y @ w.T)):
            donated = jnp.array(x)
            got = jax.jit(run, donate_argnums=0)(donated, q)
            assert donated.is_deleted()
            assert_close(got, want)


@pytest.mark.without_noise
class TestMemory:
    def temporaries(self, run, layers, dtype="float32"):
        """Temporary bytes of the value and gradient of products with a packed stack."""
        w = jax.ShapeDtypeStruct((layers, 256, 256), dtype)
        q = jax.eval_shape(ql.quantize, w)
        x = jax.ShapeDtypeStruct((8, 256), dtype)
        compiled = jax.jit(jax.value_and_grad(run)).lower(x, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    @pytest.mark.parametrize("dtype", fast_and_slow(["bfloat16"], ["float32"]))
    @pytest.mark.parametrize("remat", fast_and_slow([True], [False]))
    def test_a_scanned_stack_is_never_held_in_float(self, dtype, remat):
        """Other libraries hold it: 2.3 MB of temporaries here. Ours take 0.7 MB."""

        def layer(x, q):
            return jnp.tanh(ql.matmul(x, q))

        layer = jax.checkpoint(layer) if remat else layer

        def run(x, q):
            return jnp.sum(jax.lax.scan(lambda x, q: (layer(x, q), None), x, q)[0])

        assert self.temporaries(run, 16, dtype) < 4 * 16 * 256 * 256 / 6

    @pytest.mark.slow
    def test_scan_over_the_index_keeps_one_stack(self):
        """Neither forward nor backward pass holds a second copy of the codes."""

        def run(x, q):
            def step(x, i):
                return (jnp.tanh(ql.matmul(x, q, layer=i)), None)

            return jnp.sum(jax.lax.scan(step, x, jnp.arange(64))[0])

        assert self.temporaries(run, 64) < 64 * 256 * 256 / 2  # the codes' bytes

    @pytest.mark.slow
    @pytest.mark.parametrize("work", ["forward", "gradient"])
    def test_tiles_keep_a_wide_product_small(self, work):
        q = jax.eval_shape(ql.quantize, jax.ShapeDtypeStruct((512, 8192), jnp.float32))
        x = jax.ShapeDtypeStruct((16, 512), jnp.float32)

        def temporary_size(backend):
            def product(x, q):
                return ql.matmul(x, q, backend=backend)

            gradient = jax.grad(lambda x, q: product(x, q).sum())
            run = {"forward": product, "gradient": gradient}[work]
            analysis = jax.jit(run).lower(x, q).compile().memory_analysis()
            return analysis.temp_size_in_bytes

        assert temporary_size("reference") >= 4 * 512 * 8192
        assert (
            temporary_size("tiled") < 6 * 2**20
        )  # a tile of 4 MiB, inputs and outputs
        assert temporary_size(None) == temporary_size("tiled")  # the default on CPUs

    @pytest.mark.parametrize("fmt", fast_and_slow(["nf4", "int8"], ["fp4", "int4"]))
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_residuals_are_codes_and_scales(self, fmt, double_quant):
        case = CASES["plain"]._replace(fmt=fmt, double_quant=double_quant)
        q = pack(case)
        _, pull = jax.vjp(lambda x: ql.matmul(x, q), inputs(case))
        assert sum(a.nbytes for a in jax.tree.leaves(pull)) <= q.nbytes


EQUATIONS = {
    "DenseGeneral out of heads": ("BTNH,NHD->BTD", (2, 3, 4, 16), "kkn", (4, 16, 24)),
    "heads": ("BTD,DNH->BTNH", (2, 3, 64), "knn", (64, 4, 6)),
    "heads first": ("BTD,NDH->BTNH", (2, 3, 64), "nkn", (4, 64, 6)),
    "keys and values": ("BTD,SNDH->SBTNH", (2, 3, 64), "nnkn", (2, 4, 64, 6)),
    "experts": ("EBD,EDF->EBF", (2, 5, 64), "bkn", (2, 64, 6)),
    "experts last": ("BED,EDF->BEF", (5, 2, 64), "bkn", (2, 64, 6)),
    "batch in the middle": ("EBD,DEF->EBF", (2, 5, 64), "kbn", (64, 2, 6)),
    "stored as batch": ("BTD,NDH->BTNH", (2, 3, 64), "bkn", (4, 64, 6)),
    "ellipsis": ("...D,DF->...F", (2, 3, 64), "kn", (64, 6)),
    "transposed result": ("BD,DF->FB", (5, 64), "kn", (64, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUATIONS)
def test_einsum(name):
    equation, x_shape, kinds, shape = EQUATIONS[name]
    w, x = normal(0, shape), normal(1, x_shape)
    q = quantize_kernel(w, Packing(block_size=16), Geometry.of(kinds, shape))
    w = np.asarray(ql.dequantize(q))
    want = np.einsum(equation, np.asarray(x, np.float64), w)

    def run(product):
        y, pull = jax.vjp(lambda x: product(equation, x), x)
        return y, pull(y)[0]

    got, dx = jax.jit(lambda: run(lambda *args: ql.einsum(*args, q)))()
    assert_close(got, want)
    expected_dx = jax.jit(lambda: run(lambda *args: jnp.einsum(*args, w))[1])()
    assert_close(dx, expected_dx)


@pytest.mark.parametrize(
    ("equation", "words"),
    [
        ("BD,DF", "must be an explicit equation of two"),
        ("BD,DF,FG->BG", "must be an explicit equation of two"),
        ("BDD,DF->BF", "must have one label for each axis"),
        ("BD,...F->BF", "with no ellipsis in the kernel"),
        ("BD,DF->B", "must not sum over a label of only one operand"),
        ("BD,EF->BDEF", "must contract the kernel with x"),
        ("BD,FD->BF", "kernel is stored with axes 'kn'.*needs 'nk'"),
    ],
)
def test_bad_equations_are_refused(equation, words):
    with pytest.raises(ValueError, match=words):
        ql.einsum(equation, jnp.ones((5, 64)), ql.quantize(jnp.ones((64, 64))))


X, KERNEL, STACK = np.ones((2, 64), np.float32), (64, 8), (3, 64, 8)
UNSUPPORTED = NotImplementedError
# x, the shape of the kernel, options of the product, and the error.
BAD = [
    (X.astype(int), KERNEL, {}, TypeError, "`x` must be floating-point. Got int"),
    (X[:, :8], KERNEL, {}, ValueError, r"`x` must have shape \[..., 64\]. Got"),
    (X, STACK, {}, ValueError, r"shape \[3, ..., 64\]. Got \(2, 64\)"),
    (X, KERNEL, {"backend": "cuda"}, ValueError,
     "`backend` must be one of .* Got 'cuda'"),
    (X, KERNEL, {"backend": []}, ValueError, "`backend` must be one of"),
    (X, KERNEL, {"backend": ["tiled", "none"]}, ValueError, "`backend` must be one of"),
    (X, KERNEL, {"layer": 0}, ValueError, "`layer` needs a stack of kernels"),
    (X, STACK, {"layer": np.arange(2)}, ValueError, "must be an integer scalar. Got"),
    (X, STACK, {"layer": 0.0}, ValueError, "`layer` must be an integer scalar. Got"),
    (X, STACK, {"layer": -1}, ValueError, "0 to 2 for a stack of 3 kernels"),
    (X, STACK, {"layer": 3}, ValueError, "0 to 2 for a stack of 3 kernels"),
    (X, STACK, {"layer": np.int32(3)}, ValueError, "0 to 2 for a stack of 3 kernels"),
    (X, KERNEL, {"backend": "pallas_tpu", "fmt": "int8", "block_size": 16}, UNSUPPORTED,
     "not support this product. `block_size` must be at least 32"),
    (X, KERNEL, {"backend": "pallas_tpu_v5e", "precision": "highest"}, UNSUPPORTED,
     "It does not support `precision`. Got 'highest'"),
    (X, KERNEL, {"backend": "pallas_tpu", "dtype": "bfloat16"}, UNSUPPORTED,
     "It rounds weights once, so .* Got bfloat16 weights and float32 inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "shape", "options", "error", "words"), BAD)
def test_bad_operands_are_refused(x, shape, options, error, words):
    options = {"dtype": "float32", "fmt": "nf4", "block_size": 64, **options}
    w = jnp.ones(shape, options.pop("dtype"))
    q = ql.quantize(w, options.pop("fmt"), block_size=options.pop("block_size"))
    with pytest.raises(error, match=words):
        ql.matmul(jnp.asarray(x), q, **options)


def test_floats_are_no_packed_kernel():
    with pytest.raises(TypeError, match="`q` must be a QTensor. Got ndarray"):
        ql.matmul(X, np.ones(KERNEL))
    with pytest.raises(TypeError, match="`q` must be a QTensor"):
        ql.einsum("ab,bc->ac", X, np.ones(KERNEL))


@pytest.mark.slow
def test_vmap_over_layers_over_x_over_stacks():
    q, x = pack(CASES["stack"]), inputs(CASES["stack"])
    w, layers = dequantize(q), jnp.array([2, 0])
    over_layers = jax.vmap(lambda i: ql.matmul(x[0], q, layer=i))(layers)
    assert_close(over_layers, np.asarray(x[0]) @ w[[2, 0]])
    over_x = jax.vmap(lambda x: ql.matmul(x, q, layer=1))(x)
    assert_close(over_x, np.asarray(x) @ w[1])
    two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), q)
    over_stacks = jax.vmap(lambda q: ql.matmul(x[0], q, layer=0))(two)
    assert_close(over_stacks, np.asarray(x[0]) @ w[[0, 2]])
    both = jax.vmap(lambda q, i: ql.matmul(x[0], q, layer=i))(two, layers)
    assert_close(both, np.asarray(x[0]) @ w[[2, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_tpu_v5e", "pallas_tpu_v6e"])
def test_the_tpu_kernel_under_vmap_scan_and_remat(backend, monkeypatch):
    """Per-example gradients through a scan over layers with remat.

    remat refuses the callbacks of the TPU interpreter; the plain interpreter has none.
    """
    product = functools.partial(fused.product, interpret=True)
    monkeypatch.setattr(fused, "product", product)
    q = pack(Case((2, 128, 128), double_quant=True))
    w = jnp.asarray(dequantize(q)) / 8
    x = normal(1, (3, 4, 128))

    def loss(product, x):
        step = jax.checkpoint(lambda x, i: (jnp.tanh(product(x, i)), None))
        return jnp.sum(jax.lax.scan(step, x, jnp.arange(2))[0] ** 2)

    def exact_product(x, i):
        return jnp.matmul(x, w[i], precision="highest")

    def packed_product(x, i):
        return ql.matmul(x, q, layer=i, backend=backend) / 8

    def run(product):
        return jax.vmap(jax.grad(functools.partial(loss, product)))(x)

    def multiply_by_kernel(q):
        return ql.matmul(x[0], q, backend=backend)

    got = jax.jit(lambda: run(packed_product))()
    products = jax.vmap(multiply_by_kernel)(q)
    assert_close(got, run(exact_product))
    assert_close(products, np.asarray(x[0]) @ (np.asarray(w) * 8))


def test_the_docstring_names_every_back_end():
    named = set(re.findall(r'"(\w+)"', ql.matmul.__doc__)) - {"nf4"}
    preferred = {name for names in choose.PREFERRED.values() for name in names}
    assert named == set(choose.BACKENDS) >= preferred


@pytest.mark.parametrize("backend", [5, ["tiled", 5], [["tiled"]], []])
def test_names_of_back_ends_are_strings(backend):
    q = pack(Case((64, 64)))
    message = "`backend` must be one of"
    refusal(lambda: ql.matmul(jnp.ones((2, 64)), q, backend=backend), message)


@pytest.mark.parametrize("transpose", [False, True])
def test_gpus_round_large_results_as_they_multiply(transpose, monkeypatch):
    """Where XLA may partition, partial sums are added before they are rounded."""
    k = 4096
    q = jax.eval_shape(ql.quantize, jax.ShapeDtypeStruct((k, k), jnp.bfloat16))

    def run(x, q):
        y, pull = jax.vjp(lambda x: ql.matmul(x, q), x)
        return pull(x)[0] if transpose else y

    def results(platform, rows=k, dtype="bfloat16"):
        traced = jax.jit(run).trace(jax.ShapeDtypeStruct((rows, k), dtype), q)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return {*re.findall(r"dot_general.*-> tensor<.*x(\w+)>", text)}

    assert results("cuda", k + 1) == {"f32"}  # may be split over test devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert results("cuda") == {"bf16"}
    assert results("cpu") == {"f32"}
    assert results("cuda", k - 1) == results("cuda", dtype="float32") == {"f32"}


@pytest.mark.without_noise  # half a unit of bfloat16 is the bound
def test_rounding_as_it_multiplies_rounds_once(monkeypatch):
    case = CASES["plain"]
    q, x = pack(case, "bfloat16"), inputs(case, dtype="bfloat16")
    monkeypatch.setattr(reference, "SMALLEST_ROUNDED", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    y, dx = product_and_gradient(x, q, None, "reference")
    w = dequantize(q).astype(x.dtype).astype(np.float64)
    for got, left, right in ((y, x, w), (dx, y, w.T)):
        left = np.asarray(left, np.float64)
        want = left @ right
        summed = 2**-24 * len(right) * (np.abs(left) @ np.abs(right))
        assert np.all(np.abs(got - want) <= 2**-8 * np.abs(want) + summed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["double", "odd N"])
def test_export_for_every_platform(name):
    """One exported program, which chooses a backend on the platform that runs it."""
    q, x = pack(CASES[name]), inputs(CASES[name])
    leaves, treedef = jax.tree.flatten(q)

    def product(x, *leaves):
        return ql.matmul(x, jax.tree.unflatten(treedef, leaves))

    gradient = jax.grad(lambda *args: jnp.sum(product(*args)))
    run, want = product, expected(x, q)
    if name == "odd N":
        run, want = gradient, np.broadcast_to(dequantize(q).sum(-1), x.shape)
    platforms = "cpu", "cuda", "tpu"
    exported = jax.export.export(jax.jit(run), platforms=platforms)(x, *leaves)
    assert exported.platforms == platforms
    assert_close(exported.call(x, *leaves), want)


def test_the_program_of_an_unrolled_model_is_traced_once_for_a_shape():
    """32 layers of one shape call one traced function 32 times, in either pass."""
    q = jax.eval_shape(ql.quantize, jax.ShapeDtypeStruct((64, 64), jnp.float32))

    def run(x, layers):
        for q in layers:
            x = jnp.tanh(ql.matmul(x, q))
        return jnp.sum(x)

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def lowered_text(n):
        return jax.jit(jax.grad(run)).lower(x, [q] * n).as_text()

    def count_dots(n):
        return lowered_text(n).count("stablehlo.dot_general")

    assert count_dots(32) == count_dots(1) > 0


@pytest.mark.slow
def test_a_list_of_back_ends():
    """Runs the first backend that supports the product, or gives all reasons."""
    q, x = ql.quantize(jnp.ones((64, 128)), "int8", block_size=16), jnp.ones((2, 64))
    y = ql.matmul(x, q, backend=["pallas_tpu", "tiled"])
    assert_close(y, np.full((2, 128), 64.0), terms=64)
    names = ["pallas_tpu_v5e", "pallas_tpu_v6e"]
    with pytest.raises(NotImplementedError) as error:
        ql.matmul(x, q, backend=names)
    for name in names:
        assert f"`{name}` does not support this product." in str(error.value)


def test_the_gradient_of_wider_float_weights_is_rounded_once():
    x, w, g = (
        normal(0, (64, 32), jnp.bfloat16),
        normal(1, (32, 16)),
        normal(2, (64, 16)),
    )
    _, pull = jax.vjp(lambda w: float_product(x, w), w)
    exact = np.asarray(x, float).T @ np.asarray(g.astype(jnp.bfloat16), float)
    assert_close(pull(g)[0], exact, terms=64)
