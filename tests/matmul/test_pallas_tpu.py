"""The TPU kernel in interpret mode against NumPy; tests/tpu compiles it."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import TABLES
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlora_jax.matmul.backends.pallas_tpu import decode, fused
from qlora_jax.matmul.backends.pallas_tpu.chips import Chip
from qlora_jax.matmul.backends.pallas_tpu.tiling import Tiling, plan, vmem_bytes
from qlora_jax.matmul.spec import ProductSpec
from qlora_jax.quant.settings import Packing

pytestmark = pytest.mark.slow

BF16, F32 = ml_dtypes.bfloat16, np.float32
TOLERANCE = {BF16: 4e-3, F32: 1e-5}
FORMS = ("shuffle", "sublane", "select")


def make_weight(fmt, rows, cols, block_size, lead=(), seed=0):
    """Random codes and scales, and the float32 weight that they encode."""
    rng = np.random.default_rng(seed)
    scales = (0.5 + rng.random((*lead, rows // block_size, cols))).astype(F32)
    if fmt == "int8":
        codes = rng.integers(1, 256, (*lead, rows, cols), dtype=np.uint8)
        values = codes.astype(F32) - F32(128)
    else:
        codes = rng.integers(0, 256, (*lead, rows // 2, cols), dtype=np.uint8)
        nibbles = np.stack([codes >> 4, codes & 15], axis=-2)
        table = TABLES[fmt]
        values = table[nibbles.reshape(*lead, rows, cols)]
    return codes, scales, values * np.repeat(scales, block_size, axis=-2)


def make_left(shape, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def expected(x, weight, transpose):
    """The product in float64 with the weight rounded once to the dtype of x."""
    weight = weight.astype(x.dtype).astype(np.float64)
    if transpose:
        weight = np.swapaxes(weight, -1, -2)
    return x.astype(np.float64) @ weight


def product_spec(fmt, block_size, rows, transpose=False):
    return ProductSpec(Packing(fmt, block_size), "float32", rows, transpose=transpose)


def check(actual, x, weight, transpose):
    want = expected(x, weight, transpose)
    assert actual.dtype == x.dtype
    assert actual.shape == want.shape
    error = np.linalg.norm(np.asarray(actual, np.float64) - want)
    assert error <= TOLERANCE[x.dtype.type] * np.linalg.norm(want)


def check_case(
    m,
    rows,
    cols,
    block_size,
    fmt,
    form,
    dtype,
    transpose,
    *,
    interpret=True,
    vmem_mib=48,
    layer=None,
):
    lead = () if layer is None else (layer + 1,)
    codes, scales, weight = make_weight(fmt, rows, cols, block_size, lead)
    if layer is not None:
        scales, weight = scales[layer], weight[layer]
    x = make_left((m, cols if transpose else rows), dtype)
    actual = fused.product(
        product_spec(fmt, block_size, rows, transpose),
        jnp.asarray(x),
        codes,
        scales,
        None if layer is None else jnp.int32(layer),
        chip=Chip(form, vmem_mib),
        interpret=interpret,
    )
    check(actual, x, weight, transpose)


# m, rows, columns and block size.
ONE_BLOCK = 5, 256, 128, 64
PADDED = 3, 192, 200, 32  # lanes and rows are padded, two scales in a slab
FEW_ROWS = 9, 320, 640, 64
MANY_ROWS = 70, 768, 130, 256


# With either shape, each form has either dtype, one of them transposed.
@pytest.mark.parametrize(
    ("shape", "form", "dtype", "transpose"),
    [
        (shape, form, dtype, (i + j + k) % 2 == 1)
        for i, shape in enumerate([ONE_BLOCK, PADDED])
        for j, form in enumerate(FORMS)
        for k, dtype in enumerate([BF16, F32])
    ],
)
def test_product_matches_numpy(shape, form, dtype, transpose):
    check_case(*shape, "nf4", form, dtype, transpose)


@pytest.mark.parametrize(
    ("form", "dtype", "transpose"),
    [
        ("shuffle", BF16, False),
        ("shuffle", BF16, True),
        ("sublane", BF16, True),
        ("select", BF16, False),
        ("sublane", F32, True),
    ],
)
def test_many_rows_keep_the_stripe(form, dtype, transpose):
    check_case(70, 1152, 136, 128, "nf4", form, dtype, transpose)


# Each format once a direction, few rows for one and many for the other.
@pytest.mark.parametrize(
    ("shape", "fmt", "transpose"),
    [
        (FEW_ROWS, "fp4", False),
        (MANY_ROWS, "fp4", True),
        (MANY_ROWS, "int4", False),
        (FEW_ROWS, "int4", True),
        (FEW_ROWS, "int8", False),
        (MANY_ROWS, "int8", True),
    ],
)
def test_every_format_matches_numpy(shape, fmt, transpose):
    check_case(*shape, fmt, "shuffle", BF16, transpose)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rows", "block_size"), [(64, 64), (96, 32), (2304, 256)])
def test_short_and_odd_axes(rows, block_size, transpose):
    # 2304 rows have 9 scales of 256: one more than a load of eight holds.
    check_case(4, rows, 130, block_size, "nf4", "sublane", BF16, transpose)


# Each format, form and dtype in either direction.
@pytest.mark.parametrize(
    ("fmt", "block_size", "form", "dtype", "transpose"),
    [
        ("mxfp4", 32, "sublane", BF16, False),
        ("int4", 128, "sublane", BF16, True),
        ("int8", 32, "sublane", BF16, False),
        ("int4", 256, "select", BF16, True),
        ("int4", 64, "shuffle", F32, False),
        ("fp4", 256, "sublane", F32, True),
        ("fp4", 128, "select", F32, False),
        ("int8", 128, "shuffle", F32, True),
    ],
)
def test_formats_in_other_forms(fmt, block_size, form, dtype, transpose):
    check_case(5, 256, 136, block_size, fmt, form, dtype, transpose)


@pytest.mark.parametrize(("form", "transpose"), [("shuffle", False), ("sublane", True)])
def test_many_columns_of_few_rows_have_wide_stripes(form, transpose):
    rows, cols = (8192, 128) if transpose else (128, 8200)
    spec = product_spec("nf4", 64, rows, transpose)
    found = plan(spec, 3, cols, jnp.dtype(BF16), Chip(form, 48))
    assert isinstance(found, Tiling) and found.tile == 1024
    check_case(3, rows, cols, 64, "nf4", form, BF16, transpose)


def test_the_emulation_packs_as_the_tpu_does():
    """JAX's own test of `pltpu.pack_elementwise` on TPUs says: the first is low.

    It compares with a cast to bfloat16: to nearest, ties to even.
    """
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 4096, np.uint32)
    words[:1024] = words[:1024] & 0xFFFF0000 | 0x8000  # halfway
    words[1024:1030] = 0, 0x80000000, 1, 0x8001, 0x7F7FFFFF, 0x7F800000
    words = np.where(
        (words & 0x7F800000 == 0x7F800000) & (words & 0x7FFFFF > 0), 0, words
    )
    low, high = words.reshape(2, 16, 128).view(F32)

    def rounded(values):
        bits = values.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    actual = np.asarray(decode.pack_emulated(jnp.asarray(low), jnp.asarray(high)))
    want = rounded(low) | rounded(high) << 16
    np.testing.assert_array_equal(actual.view(np.uint32), want)


@pytest.mark.parametrize(
    ("block_size", "m", "rows", "fmt", "form", "vmem_mib", "transpose"),
    [
        (32, 150, 640, "nf4", "sublane", 1, False),
        (16, 150, 640, "nvfp4", "shuffle", 1, True),
        (128, 150, 640, "int4", "select", 1, False),
        (256, 300, 1280, "int8", "select", 3, True),
    ],
)
def test_no_axis_is_a_multiple_of_its_tile(
    block_size, m, rows, fmt, form, vmem_mib, transpose
):
    cols = 600
    spec = product_spec(fmt, block_size, rows, transpose)
    found = plan(spec, m, cols, jnp.dtype(BF16), Chip(form, vmem_mib))
    assert isinstance(found, Tiling)
    assert found.keep and m % found.tile_m
    assert (rows if transpose else cols) % found.tile
    assert (cols if transpose else rows) % found.chunk
    case = m, rows, cols, block_size, fmt, form, BF16, transpose
    check_case(*case, vmem_mib=vmem_mib)


@pytest.mark.parametrize(
    ("k", "n", "transpose", "dtype", "block", "mib"),
    [
        (16384, 1024, False, BF16, (1024, 512), 123.824),
        (16384, 1024, False, BF16, (256, 512), 49.598),
        (8192, 1024, False, BF16, (1024, 256), 55.688),
        (4096, 4096, True, BF16, (1024, 1024), 41.324),
        (4096, 4096, True, F32, (512, 512), 60.453),
        (1024, 1024, False, F32, (512, 256), 14.473),
    ],
)
def test_bytes_of_a_plan_are_those_of_the_compiler(k, n, transpose, dtype, block, mib):
    """`used_scoped_memory_configs` of programs for v5e (JAX 0.12.0.1), in MiB."""
    spec = product_spec("nf4", 64, k, transpose)
    found = plan(spec, 2048, n, jnp.dtype(dtype), Chip("sublane", 10**4))
    assert isinstance(found, Tiling)
    found = dataclasses.replace(found, tile_m=block[0], tile=block[1])
    assert 0 <= vmem_bytes(found, jnp.dtype(dtype).itemsize) / 2**20 - mib < 1


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("transpose", [False, True])
def test_plans_fit_the_memory_of_the_chip(transpose, dtype):
    """A block of x is spilled: three times its bytes in bfloat16, six in float32."""
    copies = 3 if dtype is BF16 else 6
    itemsize = np.dtype(dtype).itemsize
    for chip, contracted, m in itertools.product(
        (Chip("sublane", 96), Chip("shuffle", 48)),
        (2048, 8192, 13312, 16384, 28672, 53248),
        (16, 64, 128, 512, 2048, 8192),
    ):
        k, n = (8192, contracted) if transpose else (contracted, 8192)
        spec = product_spec("nf4", 64, k, transpose)
        found = plan(spec, m, n, jnp.dtype(dtype), chip)
        if isinstance(found, str):
            assert contracted == 53248 or (dtype is F32 and contracted == 28672)
            continue
        rows = copies * found.tile_m + found.tile if found.keep else 2 * m
        size = itemsize * contracted * rows
        size += 2 * contracted * found.tile // 2  # codes
        assert size <= chip.vmem_mib * 2**20 * 5 // 4, (chip, contracted, m)


def racing(params):
    """Two steps of a parallel axis write one block."""

    def add(x, out):
        out[...] = x[...] + 1

    return pl.pallas_call(
        add,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), F32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=params,
    )(jnp.ones((16, 128)))


@contextlib.contextmanager
def no_races(capfd):
    """Gives parameters that find races; raises where JAX 0.10 only prints them.

    One core takes a parallel axis step by step, and there is nothing to find.
    """
    capfd.readouterr()
    yield pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    printed = "".join(capfd.readouterr())
    if "RACE DETECTED" in printed:
        raise RuntimeError(printed)


def test_a_race_is_found(capfd):
    with pytest.raises(Exception, match="RACE DETECTED"), no_races(capfd) as params:
        jax.block_until_ready(racing(params))
    pltpu.reset_tpu_interpret_mode_state()


RACES = [
    (3, 192, 200, 64, "nf4", "shuffle", BF16, None),
    (130, 192, 200, 64, "nf4", "shuffle", BF16, None),
    (3, 768, 640, 64, "nf4", "shuffle", BF16, 1),  # stripes on both cores
    (70, 768, 640, 32, "int4", "sublane", BF16, 1),
]


# Few and many rows, alone and of a stack, in both directions; the other forms in one.
@pytest.mark.parametrize(
    ("m", "rows", "cols", "block_size", "fmt", "form", "dtype", "layer", "transpose"),
    [
        *((*case, transpose) for case in RACES for transpose in (False, True)),
        (3, 192, 200, 64, "nf4", "select", BF16, None, True),
        (130, 192, 200, 32, "fp4", "sublane", BF16, None, False),
        (130, 256, 136, 64, "int8", "select", F32, None, True),
    ],
)
def test_no_races(m, rows, cols, block_size, fmt, form, dtype, layer, transpose, capfd):
    case = m, rows, cols, block_size, fmt, form, dtype, transpose
    # Little memory makes small blocks, and several.
    with no_races(capfd) as params:
        check_case(*case, interpret=params, vmem_mib=1, layer=layer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("fmt", "block_size"), [("nvfp4", 16), ("int4_f16", 32), ("int8", 32)]
)
def test_weights_are_rounded_once(fmt, block_size, dtype, form):
    codes, scales, weight = make_weight(fmt, 128, 128, block_size)
    for transpose in (False, True):
        actual = fused.product(
            product_spec(fmt, block_size, 128, transpose),
            jnp.eye(128, dtype=dtype),
            codes,
            scales,
            chip=Chip(form, 48),
            interpret=True,
        )
        want = weight.astype(dtype)
        np.testing.assert_array_equal(actual, want.T if transpose else want)


def stack_product(x, codes, scales, layer=None, *, transpose=False):
    return fused.product(
        product_spec("nf4", 64, 128, transpose),
        x,
        codes,
        scales,
        layer,
        chip=Chip("shuffle", 48),
        interpret=True,
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_layer_of_a_stack_inside_scan(transpose):
    codes, scales, weight = make_weight("nf4", 128, 128, 64, lead=(3,))
    x = make_left((4, 128), F32)

    def body(carry, layer):
        own = jnp.asarray(scales)[layer]
        return carry, stack_product(carry, codes, own, layer, transpose=transpose)

    _, out = lax.scan(body, jnp.asarray(x), jnp.arange(3))
    for layer in range(3):
        check(out[layer], x, weight[layer], transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_experts_and_a_stack_of_them(transpose):
    codes, scales, weight = make_weight("nf4", 128, 256, 64, lead=(2, 3))
    x = make_left((3, 5, 256 if transpose else 128), BF16)
    out = stack_product(jnp.asarray(x), codes[1], scales[1], transpose=transpose)
    check(out, x, weight[1], transpose)
    out = stack_product(
        jnp.asarray(x), codes, scales[1], jnp.int32(1), transpose=transpose
    )
    check(out, x, weight[1], transpose)


@pytest.mark.parametrize("m", [4, 70])
def test_vmap_over_either_and_both(m):
    codes, scales, weight = make_weight("nf4", 128, 128, 64, lead=(2,))
    x = make_left((2, m, 128), BF16)
    both = jax.vmap(stack_product)(jnp.asarray(x), codes, scales)
    check(both, x, weight, False)
    left = jax.vmap(lambda x: stack_product(x, codes[1], scales[1]))(jnp.asarray(x))
    check(left, x, weight[1], False)
    weights = jax.vmap(lambda c, s: stack_product(jnp.asarray(x[0]), c, s))(
        codes, scales
    )
    check(weights, x[0], weight, False)


def test_vmap_over_the_layer():
    codes, scales, weight = make_weight("nf4", 128, 128, 64, lead=(3,))
    x = make_left((4, 128), BF16)
    layers = jnp.array([2, 0])
    own = jnp.asarray(scales)[layers]
    one = lambda i, scales: stack_product(jnp.asarray(x), codes, scales, i)
    out = jax.vmap(one)(layers, own)
    check(out, x, weight[np.array([2, 0])], False)


def test_no_rows():
    codes, scales, _ = make_weight("nf4", 128, 256, 64)
    assert stack_product(jnp.zeros((0, 128)), codes, scales).shape == (0, 256)


@pytest.mark.parametrize(
    ("rows", "dtype", "fmt", "block_size", "form", "reason"),
    [
        (96, "bfloat16", "int8", 16, "select", "`block_size` must be at least 32"),
        (96, "bfloat16", "nf4", 64, "select", "`block_size` must divide the rows"),
        (
            64,
            "float16",
            "nf4",
            64,
            "select",
            "x must be bfloat16 or float32. Got float",
        ),
        (2**24, "bfloat16", "nf4", 64, "select", "overflows VMEM"),
    ],
)
def test_what_it_refuses(rows, dtype, fmt, block_size, form, reason):
    spec = product_spec(fmt, block_size, rows)
    says = plan(spec, 4, 128, jnp.dtype(dtype), Chip(form, 48))
    assert isinstance(says, str)
    assert reason in says


def test_refusal_is_not_implemented():
    codes, scales, _ = make_weight("int8", 96, 128, 16)
    with pytest.raises(NotImplementedError, match="must be at least 32 in 8 bits"):
        fused.product(
            product_spec("int8", 16, 96),
            jnp.zeros((1, 96)),
            codes,
            scales,
            chip=Chip("select", 48),
        )


def test_shapes_that_contradict():
    codes, scales, _ = make_weight("nf4", 128, 256, 64)
    with pytest.raises(ValueError, match="`scales` must be"):
        stack_product(jnp.zeros((4, 128)), codes, scales[:1])
