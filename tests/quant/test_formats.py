"""A format is one record in `FORMATS`: formats that only this module knows do what the
others do, with schemes of scales that the package does not have."""

import re
from typing import NamedTuple, get_args

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import fast_and_slow, relative_error
from jax import lax

import qlora_jax as ql
from qlora_jax.cli.configs import Fmt
from qlora_jax.quant.formats import FORMATS, Format
from qlora_jax.quant.schemes import DOUBLE, FLOAT32, ScaleScheme, StoredScales

E4M3 = jnp.float8_e4m3fn


def like(dtype):
    return lambda shape: StoredScales(jax.ShapeDtypeStruct(shape, dtype))


def two_levels(scales):
    whole = jnp.max(scales, axis=(-1, -2), initial=0.0)[..., None] / np.float32(448)
    return StoredScales((scales / whole[..., None]).astype(E4M3), whole)


def power_of_two(scales):
    """The next power of two, by the bits of the exponent."""
    bits = lax.bitcast_convert_type(scales, jnp.uint32) + np.uint32(0x7FFFFF)
    return lax.bitcast_convert_type(bits & np.uint32(0x7F800000), jnp.float32)


def exponents(scales):
    bits = lax.bitcast_convert_type(scales, jnp.uint32)
    return StoredScales((bits >> np.uint32(23)).astype(jnp.uint8))


def from_exponents(stored):
    bits = stored.scales.astype(jnp.uint32) << np.uint32(23)
    return lax.bitcast_convert_type(bits, jnp.float32)


HALF = ScaleScheme(
    "float16",
    encode=lambda scales: StoredScales(scales.astype(jnp.float16)),
    decode=lambda stored: stored.scales.astype(jnp.float32),
    arrays=like(jnp.float16),
    round=lambda scales: scales.astype(jnp.float16).astype(jnp.float32),
    limit=lambda count: 65504.0,
    overflow="smaller for scales in float16.",
)
EXPONENTS = ScaleScheme(
    "e8m0", exponents, from_exponents, arrays=like(jnp.uint8), round=power_of_two
)
TWO_LEVELS = ScaleScheme(
    "e4m3 with a float32",
    two_levels,
    decode=lambda s: s.scales.astype(jnp.float32) * s.scale_scales[..., None],
    arrays=lambda shape: StoredScales(
        jax.ShapeDtypeStruct(shape, E4M3),
        jax.ShapeDtypeStruct((*shape[:-2], 1), jnp.float32),
    ),
)


class Throwaway(NamedTuple):
    """A format, and NumPy's version of how its scales are rounded and stored."""

    format: Format
    rounded: object = lambda s: s
    stored: object = lambda s: s


def numpy_two_levels(s):
    whole = s.max() / np.float32(448)
    return (s / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole


FOUR = tuple(float(np.float32(i / 8) ** 3) for i in range(-8, 8))
EIGHT = tuple(float(np.float32(i / 128) ** 3) for i in range(-128, 128))
half = lambda s: s.astype(np.float16).astype(np.float32)
next_power = lambda s: np.exp2(np.ceil(np.log2(s))).astype(np.float32)
OURS = {
    "cubes": Throwaway(Format("cubes", 4, FOUR, 1.0)),
    "half": Throwaway(Format("half", 4, FOUR, 1.0, HALF, None), half),
    "mx": Throwaway(Format("mx", 4, FOUR, 1.0, EXPONENTS, None), next_power),
    "nv": Throwaway(
        Format("nv", 4, FOUR, 1.0, TWO_LEVELS, None), stored=numpy_two_levels
    ),
    "cubes of 8 bits": Throwaway(Format("cubes of 8 bits", 8, EIGHT, 1.0)),
}
K, N, BLOCK = 96, 8, 32


@pytest.fixture(
    params=fast_and_slow(["nv", "cubes of 8 bits"], ["cubes", "half", "mx"])
)
def ours(request, monkeypatch):
    monkeypatch.setitem(FORMATS, request.param, OURS[request.param].format)
    return OURS[request.param]


def weights(seed=0):
    return np.random.default_rng(seed).normal(size=(K, N)).astype(np.float32)


def oracle(ours, w):
    """Codes `[K, N]` and weights, by the definition."""
    table = np.asarray(ours.format.values, np.float32)
    blocks = w.reshape(K // BLOCK, BLOCK, N)
    scales = ours.rounded(np.abs(blocks).max(1))
    up = blocks * (np.float32(1) / scales)[:, None]
    codes = np.searchsorted((table[1:] + table[:-1]) / np.float32(2), up, side="left")
    values = table[codes] * ours.stored(scales)[:, None]
    return codes.reshape(K, N).astype(np.uint8), values.reshape(K, N)


def pack(ours, w, **options):
    options = {"block_size": BLOCK, "double_quant": False, **options}
    return ql.quantize(w, ours.format.name, **options)


def test_codes_scales_products_and_trained_kernels(ours):
    w = weights()
    codes, want = oracle(ours, w)
    q = pack(ours, w)
    stored = np.asarray(q.codes)
    np.testing.assert_array_equal(
        stored if ours.format.bits == 8 else helpers.unpack(stored, "nf4", K), codes
    )
    np.testing.assert_array_equal(q.dequantize(), want)
    assert not q.double_quant and q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)
    g = np.random.default_rng(2).normal(size=(3, N)).astype(np.float32)
    for backend in ("reference", "tiled"):
        run = lambda x, backend=backend: ql.matmul(x, q, backend=backend)
        y, pull = jax.vjp(run, jnp.asarray(x))
        assert relative_error(y, x @ want) < 1e-6
        assert relative_error(pull(jnp.asarray(g))[0], g @ want.T) < 1e-6
    config = ql.QLoRAConfig(
        rank=2, fmt=ours.format.name, block_size=BLOCK, double_quant=False,
        freeze_base=False,
    )  # fmt: skip
    base, _ = ql.init(jax.random.key(0), {"kernel": w}, config)
    np.testing.assert_array_equal(base["kernel"].dequantize(), want)


def test_trees_files_and_meshes(ours, tmp_path):
    w = weights()
    _, want = oracle(ours, w)
    config = ql.QLoRAConfig(
        rank=2, fmt=ours.format.name, block_size=BLOCK, double_quant=False
    )
    base, lora = ql.init(jax.random.key(0), {"up": {"kernel": w}}, config)
    lora = helpers.randomized(lora)
    a, b = lora["up"]["kernel"].a, lora["up"]["kernel"].b
    sum_of = want + np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    merged = ql.merge(base, lora)["up"]["kernel"]
    assert relative_error(merged, sum_of) < 1e-6
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
    loaded = ql.io.load({"up.weight": w.T}, names, shapes, config, progress=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, base)
    mesh = helpers.make_mesh("Auto")
    rules = {"up/kernel": jax.sharding.PartitionSpec(None, "b")}
    placed, _ = ql.sharding.place(base, {}, mesh, rules)
    x = jnp.ones((2, K))
    y = jax.jit(ql.matmul)(x, placed["up"]["kernel"])
    assert relative_error(y, np.ones((2, K)) @ want) < 1e-6


def test_users_read_of_all_formats():
    """In the docstring of `quantize`, where others refer to, and in the commands."""
    said = re.search("number format, one of (.*?);", ql.quantize.__doc__, re.DOTALL)
    assert set(re.findall(r'"(\w+)"', said[1])) == {*FORMATS}
    assert {*get_args(Fmt)} == {*FORMATS, "none"}


def test_what_a_format_does_not_have_is_refused(monkeypatch):
    monkeypatch.setitem(FORMATS, "half", OURS["half"].format)
    with pytest.raises(ValueError, match="must be False for 'half', whose scales"):
        ql.quantize(weights(), "half")
    with pytest.raises(ValueError, match="must be smaller for scales in float16"):
        pack(OURS["half"], weights() * 1e6)
    monkeypatch.setitem(FORMATS, "cubes", OURS["cubes of 8 bits"].format)
    q = ql.quantize(weights(), "cubes", block_size=BLOCK)
    assert q.double_quant  # a format that says nothing has both schemes
    assert (q.packing.scheme, OURS["cubes"].format.scales) == (DOUBLE, FLOAT32)
    with pytest.raises(NotImplementedError, match="no table of 256 values"):
        ql.matmul(jnp.ones((8, K)), q, backend="pallas_tpu_v6e")
