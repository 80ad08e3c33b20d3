"""Codes, scales and values against files made by bitsandbytes, adapters against PEFT.

tests/data/bitsandbytes/make.py and tests/data/peft/make.py explain the arrays.
bitsandbytes stores a weight as [N, K] and this library as [K, N], so all of its arrays
appear here transposed. helpers.py decodes them in NumPy.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantize, scales_of, slow_but_every
from tolerances import assert_close

import qlora_jax as ql

DATA = pathlib.Path(__file__).parents[1] / "data"
BNB = np.load(DATA / "bitsandbytes" / "golden.npz")
BNB_HEAD = json.loads((DATA / "bitsandbytes" / "golden.json").read_text())
PEFT = np.load(DATA / "peft" / "golden.npz")
PEFT_HEAD = json.loads((DATA / "peft" / "golden.json").read_text())
TINY = 1.2e-38  # below the smallest normal float32, which XLA may flush to zero

CASES = {case["name"]: case for case in BNB_HEAD["cases"]}
# bitsandbytes also packs rows that end in a part of a block. For extremes, see
# test_quant.py.
ORDINARY = [
    name
    for name, case in CASES.items()
    if "extremes" not in name and case["shape"][1] % case["block_size"] == 0
]
BOTH = [False, True]
LEAVES = ("codes", "absmax", "nested_codes", "nested_absmax", "offset")


def digest(x):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def bits(x):
    """Returns the bit patterns, so that -0.0 and 0.0 differ."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def weight_of(case):
    """Returns the weight [N, K] that bitsandbytes quantized, in its dtype."""
    if "array" in case:
        w = BNB[case["array"]]
    else:
        rng = np.random.default_rng(case["seed"])
        w = rng.standard_normal(case["shape"], dtype=np.float32)
    w = w.astype(jnp.dtype(case["dtype"]))
    assert digest(w) == case["input_sha256"]
    return w


def stored_of(case):
    return {leaf: BNB[f"{case['name']}/{leaf}"] for leaf in LEAVES}


def packed(case, w, *, double_quant):
    fmt, block_size = case["fmt"], case["block_size"]
    return ql.quantize(w, fmt, block_size=block_size, double_quant=double_quant)


def with_stored(case, stored, *, double_quant):
    """Returns a QTensor that holds what bitsandbytes stored."""
    names = ("nested_codes", "nested_absmax", "offset") if double_quant else ("absmax",)
    scales, *nested = (stored[name] for name in names)
    settings = {key: case[key] for key in ("fmt", "block_size", "dtype")}
    parts = stored["codes"].T, scales.T, *nested
    return ql.QTensor.from_parts(*parts, shape=case["shape"][::-1], **settings)


@pytest.mark.parametrize("name", slow_but_every(16, ORDINARY))
def test_codes_and_scales_equal_bitsandbytes(name):
    case = CASES[name]
    stored = stored_of(case)
    n, k = case["shape"]

    # Compile both in one program, since they differ in the scales only.
    def pack_both(w):
        return [packed(case, w, double_quant=d) for d in BOTH]

    plain, nested = jax.jit(pack_both)(jnp.asarray(weight_of(case).T))
    assert plain.shape == (k, n) and plain.dtype == jnp.dtype(case["dtype"])
    theirs = stored["codes"].T
    for q in (plain, nested):
        np.testing.assert_array_equal(q.codes, theirs)
    absmax = flushed(stored["absmax"])
    assert plain.scales.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(plain.scales).T, absmax)
    check_double_quantization(nested, stored)


def flushed(values):
    """Returns the values, with 0 instead of those that XLA may flush to zero."""
    return np.where(np.abs(values) < TINY, np.float32(0), values)


def check_double_quantization(q, stored):
    assert q.scales.dtype == jnp.uint8 and q.scale_scales.dtype == jnp.float32
    # The mean is summed in another order. Its rounding affects every difference.
    mean = TINY + abs(float(np.squeeze(stored["offset"])))
    rounding = TINY + 1e-6 * mean
    offset, nested = map(flushed, (stored["offset"], stored["nested_absmax"]))
    assert_close(q.scale_offset, offset, terms=64, magnitude=mean)
    magnitude = mean + float(np.abs(nested).mean())
    assert_close(q.scale_scales, nested, terms=64, magnitude=magnitude)
    # The CPU build of bitsandbytes looks codes up by the first 16 bits of a value, so
    # some codes are off by one. For a scale that equals the mean, as in the two
    # bfloat16 weights with blocks of 2048, it stores 131 (2e-5) instead of 127 (0). In
    # a group of equal scales every code decodes to the offset.
    ours, theirs = np.asarray(q.scales).T, stored["nested_codes"]
    steps = np.repeat(stored["nested_absmax"], 256)[: ours.size].reshape(ours.shape)
    apart = np.abs(ours.astype(int) - theirs)
    is_mean = stored["absmax"] == stored["offset"]
    assert np.all((apart <= 1) | is_mean | (steps <= rounding))
    assert np.all(ours[is_mean & (steps > rounding)] == 127)
    if np.sum(steps > rounding) > 200:
        assert np.mean(apart != 0) < 0.02


@pytest.mark.parametrize("double_quant", BOTH)
@pytest.mark.parametrize("name", slow_but_every(32, ORDINARY))
def test_stored_values_decode_bit_for_bit(name, double_quant):
    case = CASES[name]
    q = with_stored(case, stored_of(case), double_quant=double_quant)
    with np.errstate(all="ignore"):
        values = dequantize(q)
    key = "nested_values_sha256" if double_quant else "values_sha256"
    assert digest(values.T) == case[key]  # torch has the same values
    ours = ql.dequantize(q)
    assert ours.dtype == values.dtype
    if np.max(np.abs(scales_of(q))) < TINY:
        assert np.all(np.abs(np.asarray(ours, np.float32)) < TINY)
    else:
        np.testing.assert_array_equal(bits(np.asarray(ours)), bits(values))
    if case["block_size"] == 32:
        compiled = np.asarray(jax.jit(ql.dequantize)(q))
        np.testing.assert_array_equal(bits(compiled), bits(np.asarray(ours)))


@pytest.mark.parametrize("row", slow_but_every(4, BNB_HEAD["quality"]), ids=str)
def test_error_on_normal_weights_equals_bitsandbytes(row):
    w = np.random.default_rng(2024).standard_normal((1024, 1024), dtype=np.float32)
    q = ql.quantize(w.T, row["fmt"], double_quant=row["double_quant"])
    error = np.asarray(ql.dequantize(q)).T.astype(np.float64) - w
    assert_close(np.abs(error).mean(), row["mean_abs"], terms=error.size)
    assert_close(np.square(error).mean(), row["mean_squared"], terms=error.size)


def peft_case(case, dtype):
    """Returns x, base tree, lora tree, and PEFT's arrays in our orientation."""
    size = PEFT_HEAD["shape"]
    k, n, rank = size["k"], size["n"], case["rank"]
    rng = np.random.default_rng(case["seed"])
    shapes = ((size["rows"], k), (n, k), (rank, k), (n, rank))
    x, w, a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    base = {"proj": {"kernel": jnp.asarray(w.T, dtype)}}
    settings = {"alpha": case["alpha"], "rank_stabilized": case["rslora"]}
    # PEFT's base is in float.
    config = ql.QLoRAConfig(rank=rank, fmt=None, **settings)
    leaf = ql.init(jax.random.key(0), base, config)[1]["proj"]["kernel"]
    leaf = dataclasses.replace(leaf, a=jnp.asarray(a.T), b=jnp.asarray(b.T))
    keys = ("y", "grad_x", "grad_a", "grad_b", "merged")
    want = {key: PEFT[f"{case['name']}/{dtype}/{key}"] for key in keys}
    return jnp.asarray(x, dtype), base, {"proj": {"kernel": leaf}}, want


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PEFT_HEAD["cases"], ids=lambda c: c["name"])
def test_lora_and_its_merged_kernel_equal_peft(case, dtype):
    x, base, lora, want = peft_case(case, dtype)
    assert_close(lora["proj"]["kernel"].scaling, case["scaling"], terms=1)

    def loss(lora, x):
        y = ql.apply(base["proj"], lora["proj"], x)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, grad_x), y = grad(lora, x)
    merged = ql.merge(base, lora)["proj"]["kernel"]
    assert y.dtype == merged.dtype == x.dtype
    leaf = grads["proj"]["kernel"]
    results = {"y": y, "grad_x": grad_x, "grad_a": leaf.a.T, "grad_b": leaf.b.T}
    for key, got in {**results, "merged": merged.T}.items():
        # The products with W, A and B are rounded, and so is their sum.
        assert_close(got, want[key], dtype=dtype, roundings=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "want", PEFT_HEAD["initial"], ids=lambda w: f"rank-{w['rank']}"
)
def test_initial_adapter_is_distributed_as_peft(want):
    params = {"proj": {"kernel": jnp.zeros((want["k"], want["n"]), jnp.bfloat16)}}
    config = ql.QLoRAConfig(rank=want["rank"])
    _, lora = ql.init(jax.random.key(1), params, config)
    leaf = lora["proj"]["kernel"]
    assert leaf.a.shape == (want["k"], want["rank"]) and leaf.a.dtype == jnp.float32
    assert leaf.b.shape == (want["rank"], want["n"]) and leaf.b.dtype == jnp.float32
    assert leaf.scaling == 1.0
    a = np.asarray(leaf.a, np.float64)
    assert a.std() == pytest.approx(want["a_std"], rel=0.02)
    assert np.abs(a).mean() == pytest.approx(want["a_mean_abs"], rel=0.02)
    assert np.abs(a).max() == pytest.approx(want["a_max_abs"], rel=1e-3)
    assert abs(a.mean()) < 4 * want["a_std"] / np.sqrt(a.size)
    assert want["b_max_abs"] == 0 and not np.any(np.asarray(leaf.b))
