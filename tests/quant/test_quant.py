"""Packed numbers against the NumPy oracle in helpers.py. test_golden.py has the golden
files of bitsandbytes."""

import dataclasses
import functools
import itertools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ANY_BLOCK,
    CASES,
    HALF_GAP,
    PEAK,
    TABLES,
    Case,
    dequantize,
    rounding,
    scales_of,
    slow_but_every,
    weights,
)

import qlora_jax as ql
from qlora_jax._jax.memory import largest_magnitude
from qlora_jax.quant.formats import FORMATS
from qlora_jax.quant.geometry import Geometry
from qlora_jax.quant.schemes import DYNAMIC_MAP


def pack(case, w=None):
    w = weights(case) if w is None else w
    return ql.quantize(
        w, case.fmt, block_size=case.block_size, double_quant=case.double_quant
    )


@pytest.mark.parametrize("fmt", ANY_BLOCK)
def test_what_no_normal_float32_holds_is_zero(fmt):
    """Subnormal numbers become zeros, although bitsandbytes keeps them."""
    tiny = np.finfo(np.float32).tiny

    def flush_subnormals(x):
        return np.where(np.abs(x) < tiny, np.float32(0), x)

    w = np.random.default_rng(0).uniform(-1, 1, (64, 5))
    w[7] = 1
    largest = np.array([0.5, 1.5, 3, 200, 1e6]) * float(PEAK[fmt]) * tiny
    w = (w * largest).astype(np.float32)
    got = ql.dequantize(ql.quantize(w, fmt, double_quant=False))
    codes, scales = helpers.quantize(flush_subnormals(w[:, 1:]), fmt, 64)
    np.testing.assert_array_equal(got[:, 0], np.zeros(64))
    np.testing.assert_array_equal(
        got[:, 1:], flush_subnormals(TABLES[fmt][codes] * scales)
    )
    assert (got[7, 1:] != 0).all()


def test_tables_are_the_published_ones():
    for fmt, table in TABLES.items():
        np.testing.assert_array_equal(FORMATS[fmt].table, table, err_msg=fmt)
    np.testing.assert_array_equal(DYNAMIC_MAP, helpers.DYNAMIC_MAP)


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_stored_and_decoded_as_defined(name):
    case = CASES[name]
    w = weights(case)
    q = pack(case, w)
    check_properties(case, q)
    floats = np.asarray(ql.dequantize(q))
    np.testing.assert_array_equal(floats, dequantize(q))
    # Errors are at most half the widest gap. Packed scales are off by at most half a
    # step of the dynamic map (1/128 of a group's largest) times the largest code.
    peak = PEAK[case.fmt]
    scales = np.repeat(scales_of(q), case.block_size, axis=-2)[..., : w.shape[-2], :]
    slack = 0 if not case.double_quant else np.max(q.scale_scales) / 64 * peak
    bound = HALF_GAP[case.fmt] * np.abs(scales) * peak * (1 + 1e-6) + slack
    assert (np.abs(floats - w) <= bound).all()
    # Rebuilding from parts gives the same, whichever container holds the parts.
    parts = [q.codes, q.scales, q.scale_scales, q.scale_offset]
    as_numpy = [None if part is None else np.asarray(part) for part in parts]
    settings = dict(shape=case.shape, fmt=case.fmt, block_size=case.block_size)
    for held_parts in (parts, jax.eval_shape(lambda parts: parts, parts), as_numpy):
        built = ql.QTensor.from_parts(*held_parts, **settings, dtype="float32")
        assert jax.tree.structure(built) == jax.tree.structure(q)
        assert built.shape == q.shape
    np.testing.assert_array_equal(ql.dequantize(built), floats)


def check_properties(case, q):
    *batch, k, n = case.shape
    blocks = -(-k // case.block_size)
    rows = k if case.fmt == "int8" else -(-k // 2)
    assert q.codes.shape == (*batch, rows, n) and q.codes.dtype == np.uint8
    assert q.scales.shape == (*batch, blocks, n)
    assert q.shape == case.shape and q.ndim == len(case.shape)
    assert q.dtype == np.float32
    assert (q.fmt, q.block_size) == (case.fmt, case.block_size)
    assert q.double_quant == case.double_quant
    if case.double_quant:
        assert q.scales.dtype == np.uint8
        assert q.scale_scales.shape == (*batch, -(-n * blocks // 256))
        assert q.scale_offset.shape == (*batch,)
    assert q.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(q))
    assert q.bits_per_param == 8 * q.nbytes / np.prod(case.shape)
    assert case.fmt in repr(q) and len(repr(q)) < 120


@pytest.mark.parametrize("block_size", slow_but_every(3, [16 * 2**i for i in range(9)]))
@pytest.mark.parametrize("fmt", ANY_BLOCK)
def test_codes_and_scales_are_the_oracles(fmt, block_size):
    for shape in [(block_size, 5), (2, 3 * block_size, 3)]:
        w = weights(Case(shape), seed=block_size)
        codes, scales = helpers.quantize(w, fmt, block_size)
        q = ql.quantize(w, fmt, block_size=block_size, double_quant=False)
        got = helpers.unpack(np.asarray(q.codes), fmt, shape[-2])
        np.testing.assert_array_equal(got, codes)
        np.testing.assert_array_equal(q.scales, scales)


@pytest.mark.parametrize("shape", [(1, 2), (3, 85), (5, 103), (2, 4, 200)])
def test_scales_take_the_nearest_value_of_the_map(shape):
    *batch, blocks, n = shape
    w = np.abs(weights(Case(shape))) + np.float32(0.1)
    q = ql.quantize(np.repeat(w, 16, axis=-2), "fp4", block_size=16)
    offset = np.asarray(q.scale_offset)[..., None]
    centred = np.swapaxes(w, -1, -2).reshape(*batch, -1) - offset
    group = np.arange(n * blocks) // 256
    normalized = centred * (np.float32(1) / np.asarray(q.scale_scales))[..., group]
    midpoints = (helpers.DYNAMIC_MAP[1:] + helpers.DYNAMIC_MAP[:-1]) / np.float32(2)
    want = np.searchsorted(midpoints, normalized, side="left")
    got = np.swapaxes(np.asarray(q.scales), -1, -2).reshape(*batch, -1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.without_noise  # sums of one product are exact
@pytest.mark.parametrize("fmt", TABLES)
def test_every_code_is_decoded(fmt):
    """Including codes that `quantize` never produces, such as -8 in int4."""
    rows = 64 if fmt == "int8" else 128
    q = ql.quantize(weights(Case((rows, 4))), fmt)
    codes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    q = dataclasses.replace(q, codes=jnp.asarray(codes))
    want = dequantize(q)
    np.testing.assert_array_equal(ql.dequantize(q), want)
    for backend in ("reference", "tiled"):
        got = ql.matmul(jnp.eye(rows), q, backend=backend)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fmt", ANY_BLOCK)
def test_codes_are_those_of_the_nearest_value_the_lower_at_a_tie(fmt):
    """Every midpoint and its float32 neighbours, in blocks whose largest value is the
    format's peak, so that normalizing changes nothing."""
    table = np.sort(np.unique(TABLES[fmt]))
    peak = PEAK[fmt]
    table = table[np.abs(table) <= peak]
    midpoints = ((table[1:] + table[:-1]) / np.float32(2)).astype(np.float32)
    up, down = (
        np.nextafter(midpoints, np.float32(9e9)),
        np.nextafter(midpoints, np.float32(-9e9)),
    )
    probes = np.concatenate([midpoints, up, down]).astype(np.float32)
    want = np.concatenate([table[:-1], table[1:], table[:-1]])
    w = np.full((16, len(probes)), peak, np.float32)
    w[3] = probes
    got = ql.dequantize(ql.quantize(w, fmt, block_size=16, double_quant=False))
    np.testing.assert_array_equal(np.asarray(got)[3], want)


def test_quantizing_what_was_quantized_changes_nothing():
    def requantize(w):
        return ql.dequantize(ql.quantize(w, double_quant=False))

    first_weights = requantize(weights(CASES["plain"]))
    np.testing.assert_array_equal(first_weights, requantize(first_weights))


def test_nf4_with_double_quantization_takes_at_most_4_13_bits():
    q = ql.quantize(np.ones((4096, 1024), np.float32))
    stored = sum(np.asarray(x).nbytes for x in jax.tree.leaves(q))
    assert 8 * stored / (4096 * 1024) <= 4.13


def test_error_of_int4_on_normal_weights_is_torchaos():
    """Compares with torchao's symmetric grid in blocks of 64."""
    w = np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32)
    error = np.asarray(ql.dequantize(ql.quantize(w, "int4", double_quant=False))) - w
    assert np.abs(error).mean() == pytest.approx(0.0913, rel=3e-3)
    assert np.square(error).mean() == pytest.approx(0.01159, rel=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logical_dtypes(dtype):
    w = jnp.asarray(weights(CASES["plain"]), dtype)
    q = ql.quantize(w, double_quant=False)
    assert q.dtype == jnp.dtype(dtype) and ql.dequantize(q).dtype == jnp.dtype(dtype)
    want = dequantize(ql.quantize(np.asarray(w, np.float32), double_quant=False))
    np.testing.assert_array_equal(ql.dequantize(q), jnp.asarray(want).astype(dtype))
    # A wider result is rounded to the logical dtype first.
    wide = jax.jit(lambda q: ql.dequantize(q, jnp.float32))(q)
    np.testing.assert_array_equal(wide, ql.dequantize(q).astype(jnp.float32))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("fmt", ANY_BLOCK)
def test_zero_blocks_stay_zero(fmt, double_quant):
    w = np.zeros((64, 3), np.float32)
    q = ql.quantize(w, fmt, double_quant=double_quant)
    np.testing.assert_array_equal(ql.dequantize(q), w)


EMPTY = [(0, 4), (64, 0), (0, 0), (2, 0, 4), (0, 64, 4)]
EMPTY_HEADS = [((64, 4, 0), -3), ((64, 0, 4), -3), ((64, 0, 8), (-3, -2))]
EMPTY_HEADS += [((0, 64, 8), (-3, -2))]


@pytest.mark.parametrize(
    ("shape", "contract"), [*((shape, -2) for shape in EMPTY), *EMPTY_HEADS]
)
@pytest.mark.parametrize(("double_quant", "fmt"), [(False, "int8"), (True, "nf4")])
def test_empty_kernels(shape, contract, double_quant, fmt):
    w, settings = np.zeros(shape, np.float32), {"double_quant": double_quant}
    q = ql.quantize(w, fmt, contract=contract, **settings)
    assert q.shape == shape and ql.dequantize(q).shape == shape
    assert q.bits_per_param == 0 and f"float32[{','.join(map(str, shape))}]" in repr(q)
    assert np.isfinite(np.asarray(jax.tree.leaves(q)[-1], np.float32)).all()


@pytest.mark.parametrize(
    ("shape", "contract", "matrix"),
    [
        ((3, 64, 24), -2, (3, 64, 24)),
        ((64, 4, 6), -3, (64, 24)),
        ((4, 16, 24), (-3, -2), (64, 24)),
        ((2, 4, 16, 24), (-3, -2), (2, 64, 24)),
    ],
)
def test_blocks_run_along_the_contracted_axes(shape, contract, matrix):
    w = weights(Case(shape))
    settings = {"block_size": 16, "double_quant": False}
    q = ql.quantize(w, contract=contract, **settings)
    want = ql.quantize(w.reshape(matrix), **settings)
    assert q.shape == shape
    np.testing.assert_array_equal(q.codes, want.codes)
    np.testing.assert_array_equal(q.scales, want.scales)
    np.testing.assert_array_equal(
        ql.dequantize(q), np.asarray(ql.dequantize(want)).reshape(shape)
    )


@pytest.mark.parametrize("kinds", ["nk", "nkn", "nnkn", "nkb", "kbn", "bkkn", "k"])
def test_any_geometry_is_inverted(kinds):
    shape = (5, *range(2, 2 + len(kinds)))
    w = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    geometry = Geometry.of(kinds, shape)
    matrix = geometry.to_matrix(w)
    assert geometry.kernel_shape(matrix.shape) == shape
    np.testing.assert_array_equal(geometry.from_matrix(matrix), w)
    sizes = dict(zip("bkn", (1, 1, 1), strict=True))
    for kind, size in zip(kinds, shape[1:], strict=True):
        sizes[kind] *= size
    assert matrix.shape[-2:] == (sizes["k"], sizes["n"])
    if kinds == "nk":
        np.testing.assert_array_equal(matrix, np.swapaxes(w, 1, 2))


ONES = np.ones((64, 4), np.float32)


def infinite(value):
    return jnp.ones((2, 64, 3), jnp.bfloat16).at[1, 63, 2].set(value)


BLOCKS = "power of two from 16 to 4096"


def quantize(*args, **options):
    return functools.partial(ql.quantize, *args, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (quantize(ONES, "nf3"), ValueError, r"`fmt` must be one of .* Got 'nf3'"),
        (quantize(ONES, block_size=63), ValueError, "from 16 to 4096. Got 63."),
        (quantize(ONES, block_size=48), ValueError, BLOCKS),
        (quantize(ONES, block_size=8), ValueError, BLOCKS),
        (quantize(ONES, block_size=8192), ValueError, BLOCKS),
        (quantize(ONES, block_size=True), ValueError, "to 4096. Got True"),
        (quantize(ONES, double_quant="no"), ValueError, "True or False. Got 'no'"),
        (quantize(ONES, double_quant=np.ones(2)), ValueError, "True or False. Got arr"),
        (quantize(ONES.astype(int)), TypeError, "floating-point array: .* Got int"),
        (quantize([1.0, 2.0]), TypeError, "floating-point array: .* Got list"),
        (quantize(np.ones(4, np.float32)), ValueError, "at least 2 axes. Got shape"),
        (quantize(np.full((64, 2), np.nan)), ValueError, "must be finite"),
        (lambda: ql.quantize(infinite(np.inf)), ValueError, "must be finite"),
        (lambda: ql.quantize(infinite(-np.inf)), ValueError, "must be finite"),
        (quantize(np.full((1024, 4), 1e37, np.float32)), ValueError,
         "sum of the scales overflows. Use double_quant=False"),
        (quantize(ONES, contract=0), ValueError, "must be negative integers"),
        (quantize(ONES, contract=()), ValueError, r"leading axes\). Got \(\)"),
        (quantize(ONES, contract=-3), ValueError, "must have at least 3 axes"),
        (lambda: Geometry.of("nn", (4, 8)), ValueError, "axis. Got kinds='nn'"),
        (lambda: Geometry.of("", (4, 8)), ValueError,
         "must have a contracted axis. Got kinds=''"),
        (lambda: Geometry.of("knn", (4, 8)), ValueError,
         r"at least 3 axes. Got shape \(4, 8\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [8, 64, 300])
def test_nan_under_jit_stays_in_its_block(n, dtype):
    """XLA's maximum on CPUs drops NaN for some shapes."""
    run = jax.jit(lambda w: ql.dequantize(ql.quantize(w, "nf4", double_quant=False)))

    def run_in_float32(w):
        return run(jnp.asarray(w, dtype)).astype(jnp.float32)

    plain = np.random.default_rng(0).standard_normal((128, n)).astype(np.float32)
    want = np.array(run_in_float32(plain))
    for row in (0, 63, 64, 101):
        w, block = plain.copy(), slice(row // 64 * 64, row // 64 * 64 + 64)
        w[row, n // 2] = np.nan
        got = np.array(run_in_float32(w))
        assert np.isnan(got[block, n // 2]).all()
        got[block, n // 2] = want[block, n // 2]
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ANY_BLOCK)
@pytest.mark.parametrize("largest", [3e38, np.finfo(np.float32).max])
def test_the_largest_weights_stay_finite(fmt, largest):
    w = np.random.default_rng(0).uniform(-1, 1, (256, 64)) * largest
    w[::64] = largest
    q = ql.quantize(w.astype(np.float32), fmt, double_quant=False)
    error = np.abs(np.asarray(ql.dequantize(q), np.float64) - w).max()
    assert error < HALF_GAP[fmt] * largest * (1 + rounding(64))
    with pytest.raises(ValueError, match="the sum of the scales overflows"):
        ql.quantize(w.astype(np.float32), fmt)
    single_block = np.zeros_like(w, np.float32)
    single_block[:64, 0] = w[:64, 0] / 8
    error = np.abs(
        np.asarray(ql.dequantize(ql.quantize(single_block, fmt)), np.float64)
        - single_block
    )
    assert error.max() < HALF_GAP[fmt] * largest / 8 * 1.05


def test_float64_becomes_jaxs_float():
    w = weights(CASES["plain"])
    q = ql.quantize(w.astype(np.float64))
    assert q.dtype == np.float32
    np.testing.assert_array_equal(q.codes, ql.quantize(w).codes)


USES = {
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "x @ q": lambda q: jnp.ones((2, 128)) @ q,
    "x @ q in NumPy": lambda q: np.ones((2, 128)) @ q,
    "q @ x": lambda q: q @ jnp.ones((24, 2)),
    "sum": lambda q: q + 1,
    "product": lambda q: 2 * q,
    "power": lambda q: q**2,
    "remainder": lambda q: q % 2,
    "abs": abs,
    "comparison": lambda q: jnp.ones((128, 24)) < q,
    "float": float,
    "T": lambda q: q.T,
    "dot": lambda q: q.dot(jnp.ones((24, 2))),
    "astype": lambda q: q.astype(jnp.float32),
    "index": lambda q: q[0],
    "len": len,
    "iter": list,
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("freeze_base", [True, False])
def test_a_kernel_is_no_array(name, freeze_base):
    config = ql.QLoRAConfig(freeze_base=freeze_base)
    kernel = ql.quantize({"kernel": weights(CASES["plain"])}, config)["kernel"]
    with pytest.raises(TypeError, match="is not an array.* ql.matmul.* ql.dequantize"):
        USES[name](kernel)
    assert kernel and not hasattr(kernel, "T")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kernel.nothing
    for dtype in ("int32", "complex64"):
        with pytest.raises(TypeError, match=f"`dtype` must be .* Got {dtype}"):
            kernel.dequantize(dtype)


def test_what_is_no_array_is_no_operand_of_jax():
    for product in (jnp.matmul, jax.lax.dot):
        with pytest.raises(TypeError, match="QTensor"):
            product(jnp.ones((2, 128)), pack(CASES["plain"]))


@pytest.mark.parametrize(
    ("shape", "contract"), [((4, 16, 24), (-3, -2)), ((24, 64), "nk"), ((0, 4), -2)]
)
def test_a_qtensor_from_the_parts_of_any_geometry(shape, contract):
    q = ql.quantize(np.zeros(shape, np.float32), contract=contract)
    settings = {"shape": shape, "fmt": "nf4", "contract": contract}
    for block_size in (64, None):  # None is the default of nf4, which is 64
        settings["block_size"] = block_size
        built = ql.QTensor.from_parts(*jax.tree.leaves(q), **settings, dtype="float32")
        assert jax.tree.structure(built) == jax.tree.structure(q)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": np.zeros((64, 4), np.int8)}, TypeError, "`codes` must be uint8"),
        ({"codes": [1]}, TypeError, "`codes` must be an array. Got list"),
        ({"codes": np.zeros((63, 4), np.uint8)}, ValueError,
         r"`codes` must have shape \(64, 4\). Got \(63, 4\)"),
        ({"scales": np.ones((2, 4), np.float32)}, TypeError, "`scales` must be uint8"),
        ({"scales": np.ones((1, 4), np.uint8)}, ValueError, r"`scales` .* \(2, 4\)"),
        ({"scale_scales": np.full(1, np.nan, np.float32)}, ValueError,
         "`scale_scales` must be finite"),
        ({"scale_offset": None}, ValueError, "must be given together"),
        ({"fmt": "nf5"}, ValueError, "`fmt` must be one of"),
        ({"block_size": 60}, ValueError, BLOCKS),
        ({"dtype": "int8"}, TypeError, "must be a floating dtype: .* Got int8"),
        ({"shape": (128,)}, ValueError, "at least 2 axes"),
        ({"shape": 128}, TypeError, "`shape` must be a sequence of integers. Got 128"),
        ({"shape": (128.0, 4)}, TypeError, r"`shape` must .* Got \(128.0, 4\)"),
        ({"fmt": "q4_0", "block_size": 32}, ValueError,
         "`scale_scales` must be None for 'q4_0', whose scales are float16. Got an ar"),
        ({"contract": 1}, ValueError, "negative integers"),
        ({"scales": np.ones((2, 4), np.float32), "codes": None}, TypeError,
         "(?s)parts of a kernel of shape .*`codes` must be an array.*`scales` must"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(change, error, words):
    q = ql.quantize(np.ones((128, 4), np.float32))
    parts = {name: getattr(q, name) for name in ("codes", "scales", "scale_scales")}
    parts |= {"scale_offset": q.scale_offset, "shape": (128, 4), "fmt": "nf4"}
    parts |= {"block_size": 64, "dtype": "float32", **change}
    with pytest.raises(error, match=words):
        ql.QTensor.from_parts(**parts)


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_kernels_get_no_gradient(double_quant):
    q = ql.quantize(weights(CASES["plain"]), double_quant=double_quant)
    grads = jax.grad(lambda q: jnp.sum(jnp.sin(ql.dequantize(q))), allow_int=True)(q)
    floats = [x for x in jax.tree.leaves(grads) if x.dtype == jnp.float32]
    assert floats and not any(np.asarray(x).any() for x in floats)


def test_packed_kernels_behave_as_pytrees():
    q = pack(CASES["stack"])
    leaves, treedef = jax.tree.flatten(q)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    for filler in (None, True, jax.sharding.PartitionSpec()):
        jax.tree.unflatten(treedef, [filler] * len(leaves))
    labels = jax.tree.map(lambda _: "label", q)
    assert repr(labels) == "QTensor(nf4, codes='label', scales='label')"
    layer = jax.tree.map(lambda x: x[1], q)
    assert layer.shape == (128, 24)
    np.testing.assert_array_equal(ql.dequantize(layer), ql.dequantize(q)[1])
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)
    ]
    assert paths == [".codes", ".scales", ".scale_scales", ".scale_offset"]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), layer, layer)
    assert stacked.shape == (2, 128, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "double_quant", "shape"),
    [
        *itertools.product(ANY_BLOCK, [False, True], [(2, 128, 24)]),
        *((fmt, False, (2, 128, 24)) for fmt in TABLES if fmt not in ANY_BLOCK),
        ("nf4", True, (2, 192, 5)),
        ("int8", False, (2, 64, 7)),
    ],
)
def test_eager_jit_and_vmap_agree_to_the_bit(fmt, double_quant, shape):
    w = jnp.asarray(weights(Case(shape)))

    def run(w):
        return ql.quantize(w, fmt, double_quant=double_quant)

    eager = run(w)
    chex.assert_trees_all_equal(eager, jax.vmap(run)(w), jax.jit(run)(w))
    scanned = jax.lax.scan(lambda _, q: (None, ql.dequantize(q)), None, eager)[1]
    mapped, jitted = jax.vmap(ql.dequantize)(eager), jax.jit(ql.dequantize)(eager)
    chex.assert_trees_all_equal(ql.dequantize(eager), jitted, mapped, scanned)


def test_donating_deletes_the_float_array():
    w = jnp.asarray(weights(CASES["plain"]))
    want = ql.quantize(np.asarray(w))
    q = ql.quantize(w, donate=True)
    assert w.is_deleted()
    np.testing.assert_array_equal(q.codes, want.codes)


# Until 0.12, XLA on CPUs takes a maximum of bfloat16 in float32, and keeps that copy.
BFLOAT16_PART = 1 / 4 if jax.__version_info__ >= (0, 12) else 2.04


@pytest.mark.without_noise  # noise takes memory
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "fmt", "contract", "part"),
    [
        ((2048, 2048), "float32", "nf4", -2, 1 / 4),
        ((8, 512, 512), "bfloat16", "nf4", -2, BFLOAT16_PART),
        ((1024, 1024), "bfloat16", "int8", -2, BFLOAT16_PART),
        ((1984, 2048), "float32", "nf4", -2, 1 / 4),  # an odd number of blocks
        ((512, 16, 64), "float32", "nf4", -3, 1 / 4),
        ((16, 512, 64), "float32", "nf4", (-3, -1), 2.1),  # transposed slices
    ],
)
def test_quantizing_allocates_little_beyond_its_result(
    shape, dtype, fmt, contract, part
):
    w = jax.ShapeDtypeStruct(shape, dtype)
    run = jax.jit(lambda w: ql.quantize(w, fmt, contract=contract))
    memory = run.lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < part * w.size * w.dtype.itemsize


# JAX logs the shape only in the first transfer, so no other test has these shapes.
@pytest.mark.parametrize(("fmt", "n"), [("nf4", 46), ("nvfp4", 47)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_numpy_kernel_goes_to_the_device_once(dtype, fmt, n, capfd):
    w = weights(Case((64, n)), dtype=jnp.dtype(dtype))
    with jax.transfer_guard_host_to_device("log"):
        ql.init(jax.random.key(0), {"kernel": w}, ql.QLoRAConfig(rank=2, fmt=fmt))
    logged = capfd.readouterr().err
    assert logged.count(f"aval=ShapedArray({dtype}[64,{n}])") == 1, logged


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("sign", [-1, 1, 0])
def test_the_largest_magnitude_of_a_numpy_array(dtype, sign):
    w = np.random.default_rng(0).normal(size=(5, 4, 3))
    w = (w if sign == 0 else sign * np.abs(w)).astype(dtype)
    for axis in (None, (1, 2), (0, 1)):
        got = largest_magnitude(w.swapaxes(0, 1), axis)
        assert got.dtype == w.dtype
        want = np.abs(w.astype(np.float64)).swapaxes(0, 1).max(axis)
        np.testing.assert_array_equal(got.astype(np.float64), want)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        w[1, 2, 1] = value
        got = largest_magnitude(w).astype(np.float64)
        np.testing.assert_array_equal(got, np.abs(value))
    assert largest_magnitude(w[:0]) == 0
