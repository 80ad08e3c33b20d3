"""Weights that other tools packed are read exactly.

The tests write files code by code, in the layouts of AutoAWQ
(`WQLinear_GEMM.from_linear`) and gpt-oss, and compute the expected weights by their
formulas in float32. tests/data has the bits of compressed-tensors. tests/interop runs
the tools that can be installed.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import E2M1_MAGNITUDES, GOLDEN, assert_same_bits
from jax.sharding import AxisType, PartitionSpec
from stored import tensors_of

import qlora_jax as ql

K, N, SIZE = 128, 16, 32
NAMES = ql.io.Names({"up/kernel": "up.weight"})
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 16, (K, N))
SCALES = RNG.uniform(0.001, 0.1, (K // SIZE, N)).astype(np.float16)
EIGHTS = np.full(SCALES.shape, 8)
BLOCK = np.arange(K) // SIZE  # of each input
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def load(source, *args, shape=(K, N), **kwargs):
    like = {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    loaded = ql.io.load(source, NAMES, like, *args, progress=False, **kwargs)
    return loaded["up"]["kernel"]


def words(codes, order=range(8)):
    """Packs codes `[R, C]` into int32 `[R, C / 8]`; `order` permutes each eight."""
    packed = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for row, eight in np.ndindex(*packed.shape):
        for slot, column in enumerate(order):
            code = int(codes[row, 8 * eight + column])
            packed[row, eight] |= np.uint32(code << 4 * slot)
    return packed.view(np.int32)


def awq(codes=CODES, zeros=EIGHTS, scales=SCALES, order=AWQ_ORDER):
    return {
        "up.qweight": words(codes, order),
        "up.qzeros": words(zeros, order),
        "up.scales": scales,
    }


def folder_of(path, tensors, **settings):
    path.mkdir(exist_ok=True)
    ql.io.write_safetensors(path / "model.safetensors", tensors)
    config = {"model_type": "llama", "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


def values(codes=CODES, zeros=EIGHTS, scales=SCALES, block=BLOCK):
    """(q - z) s, exact in float32."""
    return (codes - zeros[block]).astype(np.float32) * scales[block].astype(np.float32)


def pairs(codes):
    """Packs codes `[..., K]` two to a byte, the first in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


E2M1 = np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])
COMPRESSED = np.load(GOLDEN.parents[1] / "compressed_tensors" / "golden.npz")
SCHEMES = sorted({key.rpartition(" ")[0] for key in COMPRESSED} - {""})


def compressed(name, **changes):
    """Weights [8, 256] in a scheme of compressed-tensors, with parts changed."""
    parts = {part: COMPRESSED[f"{name} {part}"] for part in ("packed", "scale")}
    if name.startswith("int4"):
        parts["shape"] = np.array([8, 256])
    if name.startswith("nvfp4"):
        parts["scale"] = parts["scale"].view(ml_dtypes.float8_e4m3fn)
        parts["global_scale"] = COMPRESSED[f"{name} global_scale"]
    return changed({f"up.weight_{part}": x for part, x in parts.items()}, **changes)


def changed(tensors, **parts):
    """Returns the tensors with parts changed; None removes a part."""
    prefix = "up.weight_" if "up.weight_packed" in tensors else "up."
    parts = {prefix + part: x for part, x in parts.items()}
    return {k: x for k, x in (tensors | parts).items() if x is not None}


def of_compressed(name):
    tensors, fmt = compressed(name), name.split()[0]
    dtype = "float16" if fmt == "int4_f16" else "bfloat16"
    scales = tensors["up.weight_scale"].T
    return tensors, None, fmt, dtype, scales, COMPRESSED[f"{name} values"].T


BNB = {"quant_method": "bitsandbytes"}
INT4 = "int4_f16", "float16", SCALES, values()
FILES = {name: of_compressed(name) for name in SCHEMES} | {
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "version": "gemm"}, *INT4),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_those_of_the_file(name, tmp_path):
    tensors, settings, fmt, dtype, stored, want = FILES[name]
    tensors = changed(tensors)
    path = folder_of(tmp_path / "model", tensors, **settings or {})
    if settings is not None:
        assert ql.io.read_quantization(path)["fmt"] == fmt
    q, size = load(path, shape=want.shape), len(want) // len(stored)
    assert (q.fmt, q.block_size, q.dtype) == (fmt, size, dtype)
    assert_same_bits(np.asarray(q.scales), stored)
    assert_same_bits(np.asarray(q.dequantize()), want.astype(dtype))
    wide = load(path, dtype="float32", shape=want.shape)
    assert_same_bits(np.asarray(wide.dequantize()), want)
    tensor = ql.io.packed_tensors(ql.io.open_safetensors(path))["up.weight"]
    for rows in (slice(0, want.shape[1]), slice(3, 7)):
        assert_same_bits(tensor.decode(rows), want.T[rows])
    # The part that a device reads may begin inside a word.
    codes, scales = tensor.codes_and_scales()
    assert_same_bits(codes[3:7, 9:35], np.asarray(q.codes).T[3:7, 9:35])
    assert_same_bits(scales[3:7, 1:3], stored.T[3:7, 1:3])


def test_devices_read_their_parts():
    """A part has four outputs, which is half a word of AWQ, or half the inputs."""
    axes = dict(axis_types=(AxisType.Auto,) * 2)
    mesh = jax.make_mesh((2, 4), ("k", "n"), **axes)
    rules = {"up/kernel": PartitionSpec("k", "n")}

    def place(tree):
        return ql.sharding.place(tree, {}, mesh, rules)[0]

    tensors = changed(awq())
    q, want = load(tensors, place=place), load(tensors)
    assert len(q.codes.sharding.device_set) == 8

    def parts(q):
        return [np.asarray(x) for x in jax.tree.leaves(q)]

    assert_same_bits(parts(q), parts(want))


def test_a_merged_folder_is_in_float(tmp_path):
    path = folder_of(tmp_path / "model", awq(), quant_method="awq")
    assert ql.io.read_quantization(path)["quant_method"] == "awq"
    ql.io.save_merged(tmp_path / "merged", path, {}, NAMES, progress=False)
    assert ql.io.read_quantization(tmp_path / "merged") == {}
    assert_same_bits(np.asarray(load(tmp_path / "merged")), values().astype(np.float16))


SHORT_BLOCKS = {"up_blocks": np.ones((2, 3, 4, 8), "u1")}
SHORT_BLOCKS |= {"up_scales": np.ones((2, 3, 4), "u1")}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_are_packed_and_written_alike(name, tmp_path):
    q, values = load(compressed(name), shape=(256, 8)), FILES[name][-1]
    fmt, size = name.split()
    w = jnp.asarray(COMPRESSED["weights"].T)
    ours = ql.quantize(w, fmt, block_size=int(size))
    assert_same_bits(jax.tree.leaves(q), jax.tree.leaves(ours))
    base = {"up": {"kernel": q}}
    ql.io.save_packed(tmp_path, base, NAMES, {}, "compressed-tensors", progress=False)
    assert_same_bits(tensors_of(tmp_path), compressed(name))
    # Packing again with other settings starts from these weights.
    settings = dict(block_size=32, double_quant=False)
    config = ql.QLoRAConfig(fmt="int4", **settings)
    with pytest.raises(ValueError, match="recode=True packs it again"):
        load(tmp_path, config, shape=(256, 8))
    again = ql.quantize(jnp.asarray(values.astype(q.dtype)), "int4", **settings)
    assert_same_bits(load(tmp_path, config, recode=True, shape=(256, 8)), again)


def test_scales_of_a_bfloat16_model_are_read_where_float16_holds_them():
    scale = COMPRESSED["int4_f16 64 scale"].astype(ml_dtypes.bfloat16)
    q = load(compressed("int4_f16 64", scale=scale), shape=(256, 8))
    assert q.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(q.scales), scale.T.astype(np.float16))
    scale[0, 0] = 1e-20
    with pytest.raises(ql.io.CheckpointError, match="must be finite and exact in f"):
        load(compressed("int4_f16 64", scale=scale), shape=(256, 8))


def test_experts_of_gpt_oss_are_stacks(tmp_path):
    layers, experts = 2, 3
    codes = RNG.integers(0, 16, (layers, experts, N, K))
    powers = RNG.integers(110, 130, (layers, experts, N, K // 32)).astype(np.uint8)
    names = "model.layers.{layer}.mlp.experts.gate_up_proj"
    tensors = {}
    for layer in range(layers):
        name = names.format(layer=layer)
        tensors[f"{name}_blocks"] = pairs(codes[layer]).reshape(experts, N, -1, 16)
        tensors[f"{name}_scales"] = powers[layer]
    table = ql.io.Names({"experts/kernel": names + ".{expert}"})
    like = {"experts": {"kernel": jax.ShapeDtypeStruct((2, 3, K, N), "float32")}}
    loaded = ql.io.load(tensors, table, like, progress=False)["experts"]["kernel"]
    assert (loaded.fmt, loaded.dtype) == ("mxfp4", "bfloat16")
    scales = np.repeat(np.exp2(powers.astype(np.float32) - 127), 32, axis=-1)
    want = (E2M1[codes].astype(np.float32) * scales).swapaxes(-1, -2)
    want = want.astype(jnp.bfloat16)
    assert_same_bits(np.asarray(loaded.dequantize()), want)
    # In float checkpoints, too, one tensor [E, K, N] has all experts of a layer.
    base = {"experts": {"kernel": loaded}}
    ql.io.save_merged(tmp_path, base, {}, table, {}, progress=False)
    written = ql.io.open_safetensors(tmp_path)
    assert sorted(written) == [names.format(layer=layer) for layer in range(layers)]
    assert_same_bits(written[names.format(layer=1)][...], want[1])
    config = ql.QLoRAConfig(fmt="nf4", targets="experts/kernel")
    again = ql.io.load(tmp_path, table, like, config, progress=False)
    assert_same_bits(again["experts"]["kernel"], ql.quantize(jnp.asarray(want), "nf4"))


def test_layers_of_several_kinds_are_read_in_float():
    names = ql.io.Names({"up/kernel": "{layer}.weight"})
    like = {"up": {"kernel": jax.ShapeDtypeStruct((2, K, N), jnp.float32)}}
    tensors = {key.replace("up", "0"): x for key, x in awq().items()}
    decoded = values().astype(np.float16)
    tensors["1.weight"] = decoded.T
    with pytest.raises(
        ql.io.CheckpointError, match="of different kinds: .*Use recode=True"
    ):
        ql.io.load(tensors, names, like, progress=False)
    with pytest.warns(UserWarning, match="are read in float, .*: up/kernel. To pack"):
        loaded = ql.io.load(tensors, names, like, recode=True, progress=False)
    assert_same_bits(np.asarray(loaded["up"]["kernel"]), np.stack([decoded] * 2))
    config = ql.QLoRAConfig(targets="up/kernel", block_size=16)
    with warnings.catch_warnings(action="error"):
        loaded = ql.io.load(tensors, names, like, config, recode=True, progress=False)
    assert ql.is_packed(loaded["up"]["kernel"])


def test_embeddings_are_read_in_float():
    names = ql.io.Names({"embed": ql.io.Entry("up.weight", "")})
    like = {"embed": jax.ShapeDtypeStruct((N, K), jnp.float32)}
    loaded = ql.io.load(awq(), names, like, progress=False)["embed"]
    assert_same_bits(np.asarray(loaded), values().T.astype(loaded.dtype))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(awq(), scales=None), "up: `scales` must be given"),
        (changed(awq(), qzeros=None), "up: `qzeros` must be given"),
        (changed(awq(), scales=SCALES.astype("f4")), "must have dtype float16 or b"),
        (changed(awq(), scales=np.ones((3, N), "f2")), r"`qzeros` must be \[3, 2\]"),
        (awq(zeros=EIGHTS[:3], scales=SCALES[:3]), "where K is 128"),
        (awq(zeros=EIGHTS[:1], scales=SCALES[:1]), None),
        (awq(zeros=EIGHTS.repeat(2, 0), scales=SCALES.repeat(2, 0)), "32 or 64 or 128"),
        (awq(scales=np.full_like(SCALES, np.nan)), "must be finite and exact"),
        (changed(awq(), qweight=CODES.astype("i2")), "`qweight` must have dtype int32"),
        (changed(awq(), qweight=np.ones((K, 5), "i4")), r"must be \[K, 16 / 8\]"),
        (awq(zeros=EIGHTS - 1), "zero points must be 8"),
        ({"up.weight_blocks": CODES.astype("u1")}, "`blocks` must have dtype uint8"),
        (SHORT_BLOCKS, "`blocks` have 16 bytes each"),
        (compressed("int4_f16 32", zero_point=np.zeros((1, 8), "i4")), "`weight_zero_"),
        (compressed("int4_f16 32", g_idx=np.zeros(256, "i4")), "`weight_g_idx` is not"),
        (compressed("int4_f16 32", scale=None), "`weight_scale` must be given"),
        (compressed("int4_f16 32", scale=np.ones((8, 3), "f2")), "where K is 256"),
        (compressed("int4_f16 32", scale=np.ones((4, 8), "f2")), "where K is 256"),
        (compressed("int4_f16 32", scale=np.ones((8, 16), "f2")), "32 or 64 or 128"),
        (
            compressed("int4_f16 32", scale=np.full((8, 8), np.nan, "f2")),
            "exact in flo",
        ),
        (compressed("int4_f16 32", shape=np.array([8, 128])), "4 bits. Got 8 bits"),
        (changed(awq(), SCB=np.ones(N, "f4")), "up.SCB: 8-bit weights of bitsandbytes"),
        (compressed("int4_f16 32", shape=None), "for 4 bits. Got None"),
        (compressed("int4_f16 32", packed=np.ones((8, 128), "u1")), "must have dtypes"),
        (compressed("int4_f16 32", global_scale=np.ones(1, "f4")), "must be left out"),
        (compressed("mxfp4 32", scale=np.full((8, 8), 255, "u1")), "exact in uint8"),
        (compressed("nvfp4 16", global_scale=None), "must be one number"),
        (compressed("nvfp4 16", global_scale=np.zeros(1, "f4")), "must be positive"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tensors, message):
    if message is None:
        assert load(tensors).block_size == K
        return
    shape = (256, 8) if any("weight_packed" in name for name in tensors) else (K, N)
    with pytest.raises(ql.io.CheckpointError, match=message):
        load(tensors, shape=shape)


@pytest.mark.parametrize("recode", [False, True])
@pytest.mark.parametrize("kind", ["compressed-tensors", "awq"])
def test_a_scale_for_each_channel(kind, recode):
    """Every block of a channel gets the channel's scale."""
    scales = RNG.uniform(0.001, 0.1, (1, N)).astype(np.float16)
    tensors = {
        "awq": lambda: awq(zeros=EIGHTS[:1], scales=scales),
        "compressed-tensors": lambda: {
            "up.weight_packed": words(CODES.T),
            "up.weight_scale": scales.T,
            "up.weight_shape": np.array([N, K]),
        },
    }[kind]()
    q = load(tensors, recode=recode)
    assert (q.fmt, q.block_size, q.dtype) == ("int4_f16", 128, np.float16)
    want = (CODES.astype(np.float32) - 8) * scales.astype(np.float32)
    wide = load(tensors, recode=recode, dtype="float32")
    assert_same_bits(np.asarray(wide.dequantize()), want)
    # 192 inputs are three blocks of 64.
    tensors = {
        "up.weight_packed": words(np.concatenate([CODES, CODES[:64]]).T),
        "up.weight_scale": scales.T,
        "up.weight_shape": np.array([N, 192]),
    }
    q = load(tensors, recode=recode, dtype="float32", shape=(192, N))
    assert q.block_size == 64
    assert_same_bits(np.asarray(q.dequantize())[:K], want)


INT8_GROUP = {
    "quant_method": "compressed-tensors",
    "config_groups": {"g": {"weights": {"num_bits": 8}}},
    "kv_cache_scheme": {"num_bits": 8},
}


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (
            awq(),
            {"quant_method": "awq", "bits": 8},
            "awq must have 4 bits. Got `bits` is 8",
        ),
        (awq(), {"quant_method": "awq", "version": "GEMV"}, "must be gemm. Got 'gemv'"),
        (awq(), {"quant_method": "awq", "format": "gemv_fast"}, "Got 'gemv_fast'"),
        (awq(), {"quant_method": "awq", "backend": "llm-awq"}, "Got 'llm-awq'"),
        ({}, {"group_size": SIZE, "bits": 4}, "must be one of .* Got 'mlx'"),
        (awq(), {"quant_method": "awq", "up": {"bits": 8}}, "4 bits. Got `up.bits` is"),
        (compressed("int4_f16 32"), INT8_GROUP, "`config_groups.g.weights.num_bits` i"),
        ({}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "`load_in_8bit`"),
        ({}, BNB | {"bnb_4bit_quant_type": "int4"}, "must be fp4 or nf4. Got 'int4'"),
        (awq(), {"quant_method": ["awq"]}, "`quant_method` must be one of"),
        (awq(), {"quant_method": "gptq"}, "Got 'gptq'. Start from the float model"),
    ],
)
def test_another_layout_in_the_config_is_refused(tensors, settings, message, tmp_path):
    with pytest.raises(ql.io.CheckpointError, match=message):
        load(folder_of(tmp_path / "model", tensors, **settings))


def test_modelopt_keeps_its_settings_in_a_file_of_its_own(tmp_path):
    path = folder_of(tmp_path / "model", awq())
    settings = {"quantization": {"quant_algo": "NVFP4"}}
    (path / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(ql.io.CheckpointError, match="Got 'modelopt'. Start from"):
        load(path)
