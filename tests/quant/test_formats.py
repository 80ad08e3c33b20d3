"""A format is a record in `FORMATS`, so formats defined here work like all others. The
formats of inference servers equal their references to the bit."""

import dataclasses
import functools
import re
from typing import get_args

import gguf
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, fast_and_slow
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.io import device_shards
from qlora_jax.llm.app.configs import Fmt
from qlora_jax.quant.formats import FORMATS, Format
from qlora_jax.quant.schemes import DOUBLE, FLOAT32

FOUR = tuple(float(np.float32(i / 8) ** 3) for i in range(-8, 8))
EIGHT = tuple(float(np.float32(i / 128) ** 3) for i in range(-128, 128))
OURS = {
    "cubes": Format("cubes", 4, FOUR, 1.0),
    "cubes of 8 bits": Format("cubes of 8 bits", 8, EIGHT, 1.0),
}
K, N = 128, 8


SIZES = {"cubes": 32, "cubes of 8 bits": 32}
SIZES |= {"nvfp4": 16, "int4_f16": 64, "q4_0": 32, "mxfp4": 32}


@pytest.fixture(
    params=fast_and_slow(
        ["nvfp4", "cubes of 8 bits"], ["cubes", "int4_f16", "q4_0", "mxfp4"]
    )
)
def ours(request, monkeypatch):
    for name, fmt in OURS.items():
        monkeypatch.setitem(FORMATS, name, fmt)
    return Case((K, N), request.param, SIZES[request.param])


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(K, N)).astype(np.float32)


def oracle(ours, w):
    """Returns codes `[K, N]` and weights by definition."""
    _, fmt, size, _ = ours
    if fmt in OURS:
        table = np.asarray(OURS[fmt].values, np.float32)
        blocks = w.reshape(-1, size, N)
        scales = np.abs(blocks).max(1)
        up = blocks * (np.float32(1) / scales)[:, None]
        middle = (table[1:] + table[:-1]) / np.float32(2)
        codes = np.searchsorted(middle, up, side="left").reshape(K, N)
    else:
        table = helpers.TABLES[fmt]
        codes, scales = helpers.quantize_for_servers(w, fmt, size)
    codes = codes.astype(np.uint8)
    return codes, table[codes] * np.repeat(scales, size, axis=0)


def config_of(ours):
    return ql.QLoRAConfig(2, None, ours.fmt, ours.block_size, double_quant=False)


def pack(ours, w):
    return ql.quantize(w, ours.fmt, block_size=ours.block_size, double_quant=False)


def test_codes_scales_products_and_trained_kernels(ours):
    w = weights()
    codes, want = oracle(ours, w)
    q = pack(ours, w)
    stored = np.asarray(q.codes)
    np.testing.assert_array_equal(
        stored if FORMATS[ours.fmt].bits == 8 else helpers.unpack(stored, "nf4", K),
        codes,
    )
    np.testing.assert_array_equal(q.dequantize(), want)
    assert not q.double_quant and q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)
    g = np.random.default_rng(2).normal(size=(3, N)).astype(np.float32)
    for backend in ("reference", "tiled"):

        def run(x, backend=backend):
            return ql.matmul(x, q, backend=backend)

        y, pull = jax.vjp(run, jnp.asarray(x))
        assert_close(y, x @ want, terms=64)
        assert_close(pull(jnp.asarray(g))[0], g @ want.T, terms=64)
    config = dataclasses.replace(config_of(ours), freeze_base=False)
    base, _ = ql.init(jax.random.key(0), {"kernel": w}, config)
    np.testing.assert_array_equal(base["kernel"].dequantize(), want)


def test_mxfp4_is_ocps_but_for_blocks_that_ocp_cuts_off():
    """OCP Microscaling Formats 1.0, section 6.3, rounds the exponent down."""
    w = weights()
    q = ql.quantize(w, "mxfp4")
    largest = np.abs(w.reshape(K // 32, 32, N)).max(1)
    power = np.floor(np.log2(largest))
    is_cut = largest >= 1.75 * 2**power  # above 7, rounded to 6
    assert 0 < is_cut.sum() < is_cut.size
    np.testing.assert_array_equal(q.scales, power - 2 + 127 + is_cut)
    scaled = w / np.repeat(2 ** (power - 2), 32, axis=0)
    magnitudes = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    low, high = (np.searchsorted(middles, np.abs(scaled), s) for s in ("left", "right"))
    codes = np.where(low % 2, high, low) + 8 * np.signbit(w)  # ties to even
    is_same = ~np.repeat(is_cut, 32, axis=0)
    unpacked = helpers.unpack(np.asarray(q.codes), "nf4", K)
    np.testing.assert_array_equal(unpacked[is_same], codes[is_same])


def test_trees_files_and_meshes(ours, tmp_path, monkeypatch):
    w = weights()
    _, want = oracle(ours, w)
    config = config_of(ours)
    base, lora = ql.init(jax.random.key(0), {"up": {"kernel": w}}, config)
    lora = helpers.randomized(lora)
    a, b = lora["up"]["kernel"].a, lora["up"]["kernel"].b
    sum_of = want + np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    merged = ql.merge(base, lora)["up"]["kernel"]
    assert_close(merged, sum_of, terms=64)
    with pytest.warns(UserWarning, match="requantizing moved"):
        again = ql.merge(base, lora, requantize=True)["up"]["kernel"]
    np.testing.assert_array_equal(
        again.dequantize(), oracle(ours, np.asarray(merged))[1]
    )
    ql.io.save(tmp_path / "base.safetensors", base, config)
    restored = ql.io.restore(tmp_path / "base.safetensors").tree
    assert jax.tree.structure(restored) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, restored, base)
    names = ql.io.Names({"up/kernel": "up.weight"})
    shapes = {"up": {"kernel": jax.ShapeDtypeStruct((K, N), jnp.float32)}}
    if ours.fmt == "nvfp4":  # its codes depend on the largest weight of all pieces
        monkeypatch.setattr(device_shards, "PIECE", 3 * K)
    loaded = ql.io.load({"up.weight": w.T}, names, shapes, config, progress=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, base)
    mesh = helpers.make_mesh("Auto")
    rules = {"up/kernel": jax.sharding.PartitionSpec(None, "b")}
    placed, _ = ql.sharding.place(base, {}, mesh, rules)
    x = jnp.ones((2, K))
    y = jax.jit(ql.matmul)(x, placed["up"]["kernel"])
    assert_close(y, np.ones((2, K)) @ want, terms=64)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), base)
    rules = {"up/kernel": jax.sharding.PartitionSpec(None, None, "b")}
    host, _ = ql.sharding.place(stack, {}, mesh, rules, memory="host")
    streamed = jax.jit(functools.partial(ql.matmul, layer=1))(x, host["up"]["kernel"])
    np.testing.assert_array_equal(streamed, y)


def test_users_read_of_all_formats():
    """The docstring of `quantize` and the commands list all formats."""
    listed = re.search("number format, one of (.*?);", ql.quantize.__doc__, re.DOTALL)
    assert set(re.findall(r'"(\w+)"', listed[1])) == {*FORMATS}
    assert {*get_args(Fmt)} == {*FORMATS, "none"}


def test_a_format_that_says_nothing_has_both_schemes(monkeypatch):
    monkeypatch.setitem(FORMATS, "cubes", OURS["cubes of 8 bits"])
    q = ql.quantize(weights(), "cubes", block_size=32)
    assert q.double_quant
    assert (q.packing.scheme, OURS["cubes"].scales) == (DOUBLE, FLOAT32)
    with pytest.raises(NotImplementedError, match="only int8 among 8-bit"):
        ql.matmul(jnp.ones((8, K)), q, backend="pallas_tpu_v6e")


# The default block size of server formats, and their bits per weight.
@pytest.mark.parametrize(
    ("fmt", "block_size", "bits", "allowed"),
    [
        ("int4_f16", 128, 4.125, "32 or 64 or 128"),
        ("q4_0", 32, 4.5, "32"),
        ("mxfp4", 32, 4.25, "32"),
        ("nvfp4", 16, 4.5, "16"),
    ],
)
def test_what_a_format_does_not_have_is_refused(fmt, block_size, bits, allowed):
    q = ql.quantize(np.ones((512, 64), np.float32), fmt)
    assert (q.block_size, q.double_quant) == (block_size, False)
    assert q.bits_per_param == pytest.approx(bits, abs=2e-3)
    config = ql.QLoRAConfig(fmt=fmt, targets=".*")
    assert (config.block_size, config.double_quant) == (block_size, False)
    with pytest.raises(ValueError, match=f"must be {allowed} for '{fmt}'. Got 256"):
        ql.quantize(weights(), fmt, block_size=256)
    with pytest.raises(ValueError, match=f"must be False for '{fmt}', whose scales"):
        ql.quantize(weights(), fmt, double_quant=True)
    message = f"`block_size`, which is {block_size} here. Got 200"
    with pytest.raises(ValueError, match=message):
        ql.quantize(np.ones((200, 4), np.float32), fmt)
    with pytest.raises(ValueError, match=f"(?s)up: .*{message}"):
        ql.init(jax.random.key(0), {"up": jnp.ones((200, 64))}, config)
    parts = {"codes": jnp.zeros((100, 4), jnp.uint8), "scales": q.scales[:1, :4]}
    facts = {"fmt": fmt, "block_size": block_size, "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        ql.QTensor.from_parts(**parts, shape=(200, 4), **facts)


@pytest.mark.parametrize("fmt", ["int4_f16", "q4_0"])
def test_scales_that_overflow_float16_are_refused(fmt):
    with pytest.raises(ValueError, match="must be smaller for scales in float16"):
        ql.quantize(weights() * 1e6, fmt)


@pytest.mark.parametrize("missing", ["scales", "scale_scales"])
def test_parts_of_two_levels_are_all_needed(missing):
    q = ql.quantize(weights(), "nvfp4")
    parts = {name: getattr(q, name) for name in ("codes", "scales", "scale_scales")}
    facts = {"fmt": "nvfp4", "block_size": 16, "dtype": "float32"}
    with pytest.raises(TypeError, match=f"`{missing}` must be an array. Got NoneType"):
        ql.QTensor.from_parts(**parts | {missing: None}, shape=(K, N), **facts)


@pytest.mark.parametrize(
    ("fmt", "change"),
    [
        ("mxfp4", {"scales": np.full((1, 4), 255, np.uint8)}),  # NaN in E8M0
        ("nvfp4", {"scale_scales": np.array([1, 0], np.float32)}),
        ("nvfp4", {"scale_scales": np.array([1, -2], np.float32)}),
    ],
)
def test_scales_that_decode_to_no_number_are_refused(fmt, change):
    q = ql.quantize(np.ones((32, 4), np.float32), fmt)
    parts = {name: getattr(q, name) for name in ("codes", *q.packing.array_names[1:])}
    facts = {"fmt": fmt, "block_size": q.block_size, "dtype": "float32"}
    ql.QTensor.from_parts(**parts, shape=(32, 4), **facts)
    with pytest.raises(ValueError, match="must decode to finite numbers"):
        ql.QTensor.from_parts(**parts | change, shape=(32, 4), **facts)


def test_an_array_that_nvfp4_does_not_have_is_named():
    q = ql.quantize(np.ones((32, 4), np.float32), "nvfp4")
    facts = {"fmt": "nvfp4", "block_size": 16, "dtype": "float32", "shape": (32, 4)}
    words = "`scale_offset` must be None for 'nvfp4', .* a float32 factor and divisor"
    with pytest.raises(ValueError, match=words):
        ql.QTensor.from_parts(q.codes, q.scales, q.scale_scales, jnp.ones(()), **facts)


def probes(fmt, block_size):
    """Returns ties and their neighbors at several scales, zeros, and both signs."""
    table = np.unique(helpers.TABLES[fmt]).astype(np.float32)
    middle = (table[1:] + table[:-1]) / np.float32(2)
    up, down = (
        np.nextafter(middle, np.float32(99)),
        np.nextafter(middle, np.float32(-99)),
    )
    w = np.resize(np.concatenate([middle, up, down, table]), (4 * block_size, 12))
    sizes = np.float32(2.0) ** np.arange(-6, 6)
    w = w * sizes
    w[0], w[block_size] = helpers.PEAK[fmt] * sizes, -helpers.PEAK[fmt] * sizes
    w[2 * block_size : 3 * block_size, :6] = 0
    w[3 * block_size :, 6:] *= np.float32(1e-6)
    return w


@pytest.mark.parametrize(("fmt", "block_size"), helpers.SERVED)
def test_codes_and_scales_are_the_makers(fmt, block_size):
    random = helpers.normal(0, (4 * block_size, 40))
    for w in (probes(fmt, block_size), np.asarray(random)):
        codes, scales = helpers.quantize_for_servers(w, fmt, block_size)
        q = ql.quantize(w, fmt, block_size=block_size)
        got = helpers.unpack(np.asarray(q.codes), fmt, len(w))
        np.testing.assert_array_equal(got, codes)
        np.testing.assert_array_equal(helpers.scales_of(q), scales)
        np.testing.assert_array_equal(q.dequantize(), helpers.dequantize(q))


GOLDEN = np.load(helpers.GOLDEN.parents[1] / "compressed_tensors" / "golden.npz")


@pytest.mark.parametrize("name", sorted({k.rpartition(" ")[0] for k in GOLDEN} - {""}))
def test_bits_are_those_of_compressed_tensors(name):
    stored = {k.rpartition(" ")[2]: GOLDEN[k] for k in GOLDEN if k.startswith(name)}
    helpers.check_compressed_tensors(name, GOLDEN["weights"], stored)


def test_q4_0_is_that_of_gguf():
    w = np.concatenate([GOLDEN["weights"].T, probes("q4_0", 64)[:, :8]])
    raw = gguf.quants.quantize(w.T, gguf.GGMLQuantizationType.Q4_0)
    q = ql.quantize(w, "q4_0")
    blocks = raw.reshape(8, -1, 18)
    nibbles = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    codes = helpers.unpack(np.asarray(q.codes), "q4_0", len(w))
    np.testing.assert_array_equal(codes, nibbles.reshape(8, -1).T)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].T
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0).T
    ours = {"scales": np.asarray(q.scales), "values": np.asarray(q.dequantize())}
    helpers.assert_same_bits(ours, {"scales": scales, "values": values})
    # Packing the decoded weights again gives the stored arrays.
    again = ql.quantize(jnp.asarray(values), "q4_0")
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.scales, q.scales)


def test_formats_that_decode_alike_name_each_other():
    pair = ("int4_f16", "q4_0")
    want = {name: pair if name in pair else (name,) for name in FORMATS}
    assert {name: fmt.equivalents for name, fmt in FORMATS.items()} == want
