"""The largest and the smallest finite weights: decoded within bounds, or refused."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ANY_BLOCK, HALF_GAP, SERVED, refusal
from tolerances import assert_close

import qlora_jax as ql

FORMATS_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"
PACKINGS = [
    (fmt, 64, double_quant) for fmt in ANY_BLOCK for double_quant in (False, True)
]
PACKINGS += [(fmt, size, False) for fmt, size in SERVED if size != 64]
DTYPES = ["float32", "bfloat16", "float16"]
BLOCKS, N = 4, 3
LARGEST, SMALLEST_NORMAL = 2.0**128, 2.0**-126
# The smallest weight that a format with float16 scales refuses: its scale rounds to
# infinity from 65,520 on.
FLOAT16_SCALES = {"int4_f16": 7.5 * 65520, "q4_0": 8 * 65520}
# A block whose largest weight is below this decodes to zeros on CPUs: its scale would
# be subnormal, or at most half of float16's smallest number, and rounds to zero.
TO_ZERO = {
    "nf4": SMALLEST_NORMAL,
    "fp4": SMALLEST_NORMAL,
    "int4": 7 * SMALLEST_NORMAL,
    "int8": 127 * SMALLEST_NORMAL,
    "int4_f16": 7.5 * 2.0**-25,
    "q4_0": 8 * 2.0**-25,
    "mxfp4": 4 * SMALLEST_NORMAL,
    "nvfp4": 6 * SMALLEST_NORMAL,
}
# The limits as the table in the guide prints them.
IN_DOCS = {
    "nf4": ("none", "1.2e-38"),
    "fp4": ("none", "1.2e-38"),
    "int4": ("none", "8.2e-38"),
    "int8": ("none", "1.5e-36"),
    "int4_f16": ("491,400", "2.2e-7"),
    "q4_0": ("524,160", "2.4e-7"),
    "mxfp4": ("2.98e38", "4.7e-38"),
    "nvfp4": ("none", "7.1e-38"),
}


def refused_from(fmt, dtype, double_quant):
    """The smallest weight that may be refused."""
    if fmt == "mxfp4":  # 4 times the power-of-two scale exceeds the dtype
        return 1.75 * 2.0**15 if dtype == "float16" else 1.75 * 2.0**127
    if fmt == "int4_f16" and dtype == "float16":
        return 61_400.0  # minus eight times its scale may be above 65,504
    if double_quant and dtype == "float16":
        return 65504.0 / 2  # for blocks whose scale is rounded up
    if double_quant:
        return LARGEST / (BLOCKS * N)  # the sum of the scales is above all floats
    return FLOAT16_SCALES.get(fmt, LARGEST)


def kernels(magnitude, block_size, dtype):
    """Kernels whose largest weight has this magnitude, in all blocks or in one."""
    rng = np.random.default_rng(0)
    shape = BLOCKS * block_size, N
    spread = rng.uniform(-1, 1, shape)
    spread[::block_size] = -1
    one_block = spread.copy()
    one_block[block_size:] *= 0.1
    for w in (rng.choice([-1.0, 1.0], shape), spread, -spread, one_block):
        yield (w * magnitude).astype(dtype)


def error_bounds(w, fmt, block_size, double_quant):
    """The largest error of each block."""
    wide = w.astype(np.float64)
    largest = np.abs(wide).reshape(BLOCKS, block_size, N).max(1)
    bounds = HALF_GAP[fmt] * largest
    bounds += 2 * float(jnp.finfo(w.dtype).eps) * largest + SMALLEST_NORMAL
    if double_quant:  # an 8-bit code for the difference from the mean scale
        bounds += 2.0**-6 * largest.max()
    if fmt in FLOAT16_SCALES:  # half of the smallest float16, times the largest code
        bounds += 8 * 2.0**-25
    return bounds


def pack(w, fmt, block_size, double_quant):
    return ql.quantize(w, fmt, block_size=block_size, double_quant=double_quant)


def assert_decoded(w, *packing):
    q = pack(w, *packing)
    decoded = np.asarray(ql.dequantize(q), np.float64)
    error = np.abs(decoded - w.astype(np.float64))
    error = error.reshape(BLOCKS, -1, N).max(1)
    assert np.all(error <= error_bounds(w, *packing)), packing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_large_weights(packing, dtype):
    fmt, block_size, double_quant = packing
    info = jnp.finfo(dtype)
    limit = refused_from(fmt, dtype, double_quant)
    below = min(limit * (1 - 2.0**-7), float(info.max))
    for magnitude in (below, float(info.max)):
        for w in kernels(magnitude, block_size, jnp.dtype(dtype)):
            assert np.isfinite(w.astype(np.float64)).all()
            if magnitude < limit:
                assert_decoded(w, *packing)
                continue
            try:
                assert_decoded(w, *packing)
            except ValueError as error:
                assert str(error).startswith("weights must be smaller for ")
    if fmt in (*FLOAT16_SCALES, "mxfp4") and limit <= float(info.max):
        w = np.full((2 * block_size, N), -limit * (1 + 2.0**-7), jnp.dtype(dtype))
        if fmt == "int4_f16" and dtype == "float16":
            w = np.full_like(w, -61440)  # 7.5 times 8192: its code is -8
        refusal(lambda: pack(w, *packing), "weights must be smaller for ")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_small_weights(packing, dtype):
    fmt, block_size, _ = packing
    info = jnp.finfo(dtype)
    limit = TO_ZERO[fmt]
    magnitudes = [1.01 * limit, 4 * limit, float(info.tiny)]
    magnitudes += [float(info.smallest_subnormal)] * (dtype == "float16")
    for magnitude in magnitudes:
        for w in kernels(max(magnitude, float(info.tiny)), block_size, np.dtype(dtype)):
            largest = np.abs(w.astype(np.float64)).reshape(BLOCKS, -1, N).max(1)
            if np.all(largest >= limit):
                assert_decoded(w, *packing)
    zeros = np.full((2 * block_size, N), 0.4 * limit, jnp.dtype(dtype))
    assert not np.any(np.asarray(ql.dequantize(pack(zeros, *packing)), np.float32))


def test_weights_of_float64_that_float32_cannot_hold_are_refused():
    import jax

    with jax.enable_x64(True):
        w = jnp.full((64, 2), 1e300)
        refusal(lambda: pack(w, "nf4", 64, False), "smaller for scales in float32")


def test_the_guide_has_these_limits():
    text = FORMATS_PAGE.read_text("utf-8")
    section = text.split("## Largest and smallest weights\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if line.startswith("| `") and not line.startswith("| `fmt`"):
            name, refused, to_zero, *_ = (x.strip() for x in line.split("|")[1:])
            rows |= {fmt.strip("` "): (refused, to_zero) for fmt in name.split(",")}
    assert rows == IN_DOCS
    for fmt, (refused, to_zero) in IN_DOCS.items():
        assert float(to_zero) == pytest.approx(TO_ZERO[fmt], rel=0.03)
        limit = refused_from(fmt, "float32", double_quant=False)
        if refused == "none":
            assert limit == LARGEST
        else:
            assert float(refused.replace(",", "")) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_one_huge_block_survives_double_quantization(fmt):
    """The largest scale differs most from the mean, so its 8-bit code is that of 1."""
    w = np.ones((128, 4), np.float32)
    w[0, 0] = 3e38
    q = ql.quantize(w, fmt, double_quant=True)
    assert_close(q.dequantize()[0, 0], w[0, 0])
