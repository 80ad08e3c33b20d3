"""The TPU kernel in interpret mode against NumPy. tests/tpu compiles it."""

import contextlib
import dataclasses
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import TABLES, unpack
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tolerances import assert_close

from qlora_jax.product.backends.pallas_tpu import decode, fused
from qlora_jax.product.backends.pallas_tpu import visits as ragged_kernel
from qlora_jax.product.backends.pallas_tpu.tiling import Chip, Tiling, plan, vmem_bytes
from qlora_jax.product.spec import ProductSpec, Unsupported

pytestmark = pytest.mark.slow

BF16, F32 = ml_dtypes.bfloat16, np.float32
FORMS = ("shuffle", "sublane", "select")


def make_weight(fmt, rows, cols, block_size, lead=(), seed=0):
    """Returns random codes and scales, and the float32 weight that they encode."""
    rng = np.random.default_rng(seed)
    scales = (0.5 + rng.random((*lead, rows // block_size, cols))).astype(F32)
    stored = rows if fmt == "int8" else rows // 2
    codes = rng.integers(fmt == "int8", 256, (*lead, stored, cols), dtype=np.uint8)
    values = TABLES[fmt][unpack(codes, fmt, rows)]
    return codes, scales, values * np.repeat(scales, block_size, axis=-2)


def make_left(shape, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def expected(x, weight, transpose):
    """The product in float64 with the weight rounded once to the dtype of x."""
    weight = weight.astype(x.dtype).astype(np.float64)
    if transpose:
        weight = np.swapaxes(weight, -1, -2)
    return x.astype(np.float64) @ weight


def product_spec(fmt, block_size, rows, dtype, transpose=False):
    """Returns the spec of a product of x in `dtype` with float32 weights."""
    settings = fmt, block_size, jnp.dtype("float32"), rows, 0, jnp.dtype(dtype)
    return ProductSpec(*settings, transpose=transpose)


def check(actual, x, weight, transpose):
    want = expected(x, weight, transpose)
    assert (actual.dtype, actual.shape) == (x.dtype, want.shape)
    assert_close(actual, want)


class Product(NamedTuple):
    m: int
    rows: int
    cols: int
    block_size: int
    fmt: str
    form: str
    dtype: Any
    transpose: bool
    vmem_mib: int = 48
    layer: int | None = None

    @property
    def spec(self):
        settings = self.fmt, self.block_size, self.rows, self.dtype, self.transpose
        return product_spec(*settings)

    @property
    def plan(self):
        n = self.cols
        return plan(self.spec, self.m, n, jnp.dtype(self.dtype), self.chip)

    @property
    def chip(self):
        return Chip(self.form, self.vmem_mib)


def check_case(case, interpret=True):
    layer = case.layer
    lead = () if layer is None else (layer + 1,)
    stored = case.fmt, case.rows, case.cols, case.block_size
    codes, scales, weight = make_weight(*stored, lead)
    if layer is not None:
        scales, weight, layer = scales[layer], weight[layer], jnp.int32(layer)
    x = make_left((case.m, case.cols if case.transpose else case.rows), case.dtype)
    operands = jnp.asarray(x), codes, scales, layer
    got = fused.product(case.spec, *operands, chip=case.chip, interpret=interpret)
    check(got, x, weight, case.transpose)


# m, rows, columns and block size.
ONE_BLOCK = 5, 256, 128, 64
PADDED = 3, 192, 200, 32  # lanes and rows are padded, two scales in a slab
KEPT_STRIPE = 70, 1152, 136, 128  # many rows keep the stripe
FEW_ROWS = 9, 320, 640, 64
MANY_ROWS = 70, 768, 130, 256
PRODUCTS = [
    # For either shape, each form appears with either dtype, one of them transposed.
    *(
        (*shape, "nf4", form, dtype, (i + j + k) % 2 == 1)
        for i, shape in enumerate([ONE_BLOCK, PADDED])
        for j, form in enumerate(FORMS)
        for k, dtype in enumerate([BF16, F32])
    ),
    (*KEPT_STRIPE, "nf4", "shuffle", BF16, False),
    (*KEPT_STRIPE, "nf4", "shuffle", BF16, True),
    (*KEPT_STRIPE, "nf4", "sublane", BF16, True),
    (*KEPT_STRIPE, "nf4", "select", BF16, False),
    (*KEPT_STRIPE, "nf4", "sublane", F32, True),
    # Each format once in each direction, with few rows in one and many in the other.
    (*FEW_ROWS, "fp4", "shuffle", BF16, False),
    (*MANY_ROWS, "fp4", "shuffle", BF16, True),
    (*MANY_ROWS, "int4", "shuffle", BF16, False),
    (*FEW_ROWS, "int4", "shuffle", BF16, True),
    (*FEW_ROWS, "int8", "shuffle", BF16, False),
    (*MANY_ROWS, "int8", "shuffle", BF16, True),
    # Short and odd axes. 2304 rows in blocks of 256 have 9 scales, one more than a
    # single load of eight.
    *(
        (4, rows, 130, block_size, "nf4", "sublane", BF16, transpose)
        for rows, block_size in [(64, 64), (96, 32), (2304, 256)]
        for transpose in (False, True)
    ),
    # Each format, form and dtype in either direction.
    (5, 256, 136, 32, "mxfp4", "sublane", BF16, False),
    (5, 256, 136, 128, "int4", "sublane", BF16, True),
    (5, 256, 136, 32, "int8", "sublane", BF16, False),
    (5, 256, 136, 256, "int4", "select", BF16, True),
    (5, 256, 136, 64, "int4", "shuffle", F32, False),
    (5, 256, 136, 256, "fp4", "sublane", F32, True),
    (5, 256, 136, 128, "fp4", "select", F32, False),
    (5, 256, 136, 128, "int8", "shuffle", F32, True),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_are_those_of_numpy(case):
    check_case(Product(*case))


@pytest.mark.parametrize(("form", "transpose"), [("shuffle", False), ("sublane", True)])
def test_many_columns_of_few_rows_have_wide_stripes(form, transpose):
    rows, cols = (8192, 128) if transpose else (128, 8200)
    case = Product(3, rows, cols, 64, "nf4", form, BF16, transpose)
    assert isinstance(case.plan, Tiling) and case.plan.tile == 1024
    check_case(case)


def test_the_emulation_packs_as_the_tpu_does():
    """The first operand is in the low bits, as JAX tests for `pltpu.pack_elementwise`.

    That test compares with a cast to bfloat16: round to nearest, ties to even.
    """
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 4096, np.uint32)
    words[:1024] = words[:1024] & 0xFFFF0000 | 0x8000  # halfway
    words[1024:1030] = 0, 0x80000000, 1, 0x8001, 0x7F7FFFFF, 0x7F800000
    words = np.where(
        (words & 0x7F800000 == 0x7F800000) & (words & 0x7FFFFF > 0), 0, words
    )
    low, high = words.reshape(2, 16, 128).view(F32)

    def round_to_bfloat16(values):
        bits = values.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    actual = np.asarray(decode.pack_emulated(jnp.asarray(low), jnp.asarray(high)))
    want = round_to_bfloat16(low) | round_to_bfloat16(high) << 16
    np.testing.assert_array_equal(actual.view(np.uint32), want)


@pytest.mark.parametrize(
    "case",
    [
        Product(150, 640, 600, 32, "nf4", "sublane", BF16, False, 1),
        Product(150, 640, 600, 16, "nvfp4", "shuffle", BF16, True, 1),
        Product(150, 640, 600, 128, "int4", "select", BF16, False, 1),
        Product(300, 1280, 600, 256, "int8", "select", BF16, True, 3),
    ],
    ids=str,
)
def test_no_axis_is_a_multiple_of_its_tile(case):
    tiling = case.plan
    assert isinstance(tiling, Tiling) and tiling.keep and case.m % tiling.tile_m
    sizes = (case.rows, case.cols) if case.transpose else (case.cols, case.rows)
    assert sizes[0] % tiling.tile and sizes[1] % tiling.chunk
    check_case(case)


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
    spec = product_spec("nf4", 64, k, dtype, transpose)
    tiling = plan(spec, 2048, n, jnp.dtype(dtype), Chip("sublane", 10**4))
    assert isinstance(tiling, Tiling)
    tiling = dataclasses.replace(tiling, tile_m=block[0], tile=block[1])
    assert 0 <= vmem_bytes(tiling, jnp.dtype(dtype).itemsize) / 2**20 - mib < 1


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("transpose", [False, True])
def test_plans_fit_the_memory_of_the_chip(transpose, dtype):
    """Spilling a block of x takes three times its bytes in bfloat16, six in float32."""
    copies = 3 if dtype is BF16 else 6
    itemsize = np.dtype(dtype).itemsize
    for chip, contracted, m in itertools.product(
        (Chip("sublane", 96), Chip("shuffle", 48)),
        (2048, 8192, 13312, 16384, 28672, 53248),
        (16, 64, 128, 512, 2048, 8192),
    ):
        k, n = (8192, contracted) if transpose else (contracted, 8192)
        spec = product_spec("nf4", 64, k, dtype, transpose)
        try:
            tiling = plan(spec, m, n, jnp.dtype(dtype), chip)
        except Unsupported:
            assert contracted == 53248 or (dtype is F32 and contracted == 28672)
            continue
        rows = copies * tiling.tile_m + tiling.tile if tiling.keep else 2 * m
        size = itemsize * contracted * rows
        size += 2 * contracted * tiling.tile // 2  # codes
        assert size <= chip.vmem_mib * 2**20 * 5 // 4, (chip, contracted, m)


def racing(params):
    """A kernel with a race: two steps of a parallel axis write the same block."""

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
    """Yields interpreter parameters that detect races, and raises if there is any.

    JAX 0.10 only prints races. A single core runs a parallel axis step by step, so
    there would be nothing to detect.
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


# Few and many rows, with a kernel and with a stack, in both directions. The other
# forms are tested in one direction.
@pytest.mark.parametrize(
    "case",
    [
        *((*case, transpose, layer) for *case, layer in RACES for transpose in (0, 1)),
        (3, 192, 200, 64, "nf4", "select", BF16, True, None),
        (130, 192, 200, 32, "fp4", "sublane", BF16, False, None),
        (130, 256, 136, 64, "int8", "select", F32, True, None),
    ],
    ids=str,
)
def test_no_races(case, capfd):
    *case, transpose, layer = case
    # With little memory there are several small blocks.
    with no_races(capfd) as params:
        check_case(Product(*case, bool(transpose), 1, layer), params)


@pytest.mark.without_noise  # sums of one product are exact
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("fmt", "block_size"), [("nvfp4", 16), ("int4_f16", 32), ("int8", 32)]
)
def test_weights_are_rounded_once(fmt, block_size, dtype, form):
    codes, scales, weight = make_weight(fmt, 128, 128, block_size)
    operands, options = (jnp.eye(128, dtype=dtype), codes, scales), {"interpret": True}
    for transpose in (False, True):
        spec = product_spec(fmt, block_size, 128, dtype, transpose)
        got = fused.product(spec, *operands, chip=Chip(form, 48), **options)
        want = weight.astype(dtype)
        np.testing.assert_array_equal(got, want.T if transpose else want)


def stack_product(*operands, transpose=False):
    spec = product_spec("nf4", 64, 128, operands[0].dtype, transpose)
    return fused.product(spec, *operands, chip=Chip("shuffle", 48), interpret=True)


@pytest.mark.parametrize("transpose", [False, True])
def test_experts_and_a_stack_of_them(transpose):
    codes, scales, weight = make_weight("nf4", 128, 256, 64, lead=(2, 3))
    x = make_left((3, 5, 256 if transpose else 128), BF16)
    for operands in ((codes[1], scales[1]), (codes, scales[1], jnp.int32(1))):
        out = stack_product(jnp.asarray(x), *operands, transpose=transpose)
        check(out, x, weight[1], transpose)


def test_no_rows():
    codes, scales, _ = make_weight("nf4", 128, 256, 64)
    assert stack_product(jnp.zeros((0, 128)), codes, scales).shape == (0, 256)


@pytest.mark.parametrize(
    ("rows", "dtype", "fmt", "block_size", "reason"),
    [
        (96, "bfloat16", "int8", 16, "`block_size` must be at least 32"),
        (64, "float16", "nf4", 64, "x must be bfloat16 or float32. Got float"),
        (2**24, "bfloat16", "nf4", 64, "VMEM is too small"),
    ],
)
def test_what_it_refuses(rows, dtype, fmt, block_size, reason):
    product = Product(4, rows, 128, block_size, fmt, "select", dtype, False)
    with pytest.raises(Unsupported, match=re.escape(reason)):
        _ = product.plan


def test_refusal_is_not_implemented():
    codes, scales, _ = make_weight("int8", 96, 128, 16)
    operands = product_spec("int8", 16, 96, F32), jnp.zeros((1, 96)), codes, scales
    with pytest.raises(NotImplementedError, match="must be at least 32 in 8 bits"):
        fused.product(*operands, chip=Chip("select", 48))


def test_shapes_that_contradict():
    codes, scales, _ = make_weight("nf4", 128, 256, 64)
    with pytest.raises(ValueError, match="`scales` must have a row for every 64"):
        stack_product(jnp.zeros((4, 128)), codes, scales[:1])


def ragged(
    m, dtype, form, transpose, offsets, fmt="nf4", block_size=64, layer=None, race=None
):
    """Compares the ragged kernel with NumPy's product of each expert's rows."""
    experts, rows, cols = len(offsets) - 1, 192, 320
    lead = (experts,) if layer is None else (2, experts)
    codes, scales, weight = make_weight(fmt, rows, cols, block_size, lead)
    if layer is not None:
        scales, weight = scales[layer], weight[layer]
    x = make_left((m, cols if transpose else rows), dtype)
    spec = product_spec(fmt, block_size, rows, dtype, transpose)
    layer = None if layer is None else jnp.int32(layer)
    y = ragged_kernel.product(
        *(spec, x, codes, scales, jnp.array(offsets), layer),
        chip=Chip(form, 1 if race else 48),  # little memory makes several stripes
        interpret=race or True,
    )
    want = np.zeros((m, rows if transpose else cols))
    for e, (first, end) in enumerate(itertools.pairwise(offsets)):
        want[first:end] = expected(x[first:end], weight[e], transpose)
    assert (y.dtype, y.shape) == (x.dtype, want.shape)
    assert_close(y, want)
    outside = [*range(offsets[0]), *range(offsets[-1], m)]
    assert not np.any(np.asarray(y, F32)[outside])


FEW = [0, 3, 3, 10, 30, 30, 38]  # of 40 rows
MANY = [0, 0, 1, 150, 150, 160, 300, 450]  # blocks of one expert, of two and of four
PART = [140, 200, 200, 210, 290]  # of experts on other devices: whole blocks of zeros


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("m", "offsets"),
    [
        (40, FEW),
        (450, MANY),
        (520, PART),
        (450, [7] * 5),
        (40, [0] * 5),
        (1, [0, 0, 1]),
    ],
)
def test_ragged_products_are_those_of_numpy(m, offsets, transpose):
    ragged(m, BF16, "shuffle", transpose, offsets)
    ragged(m, F32, "sublane", transpose, offsets, layer=1)


@pytest.mark.parametrize("m", [40, 450])
def test_no_races_of_ragged_products(m, capfd):
    with no_races(capfd) as params:
        offsets = FEW if m == 40 else MANY
        ragged(m, BF16, "shuffle", m == 450, offsets, race=params)


@pytest.mark.parametrize(
    ("form", "fmt", "block_size"),
    [("shuffle", "nvfp4", 16), ("sublane", "int8", 64), ("select", "mxfp4", 32)],
)
def test_ragged_products_of_other_formats(form, fmt, block_size):
    ragged(450, BF16, form, False, MANY, fmt, block_size)
    ragged(40, BF16, form, True, FEW, fmt, block_size)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_visits_are_all_blocks_and_each_expert_in_them(size):
    rng, rows, experts = np.random.default_rng(0), 61, 6
    visit = jax.jit(lambda offsets: ragged_kernel.find_visits(offsets, rows, size))
    for _ in range(30):
        offsets = np.sort(rng.integers(0, rows + 1, experts + 1)).astype(np.int32)
        block, expert, first, end, is_new, decodes = map(np.asarray, visit(offsets))
        pairs = [
            (b, e)
            for e, (start, stop) in enumerate(itertools.pairwise(offsets))
            for b in range(start // size, -(-stop // size))
            if start < stop
        ]
        active = first < end
        assert [*zip(block[active], expert[active], strict=True)] == pairs
        np.testing.assert_array_equal(first[active], offsets[expert[active]])
        np.testing.assert_array_equal(end[active], offsets[expert[active] + 1])
        # All visits of a block are consecutive, so it stays in VMEM.
        runs = [key for key, _ in itertools.groupby(block)]
        assert runs == [*range(-(-rows // size))] and is_new.sum() == len(runs)
        assert [*expert[decodes == 1]] == [
            e for e, _ in itertools.groupby(e for _, e in pairs)
        ]
        assert not decodes[~active].any()
