"""Packed bases in the layouts of inference servers. tests/interop loads them there."""

import json

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qlora_jax as ql

K, N = 256, 16
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
NAMES = ql.io.Names(
    {f"layers/{m}/kernel": f"model.layers.{{layer}}.{m}.weight" for m in MODULES}
    | {"layers/norm/scale": "model.layers.{layer}.norm.weight"}
)
LIKE = {f"{m}/kernel": jax.ShapeDtypeStruct((2, K, N), jnp.bfloat16) for m in MODULES}
LIKE = {"layers": LIKE | {"norm/scale": jax.ShapeDtypeStruct((2, K), jnp.bfloat16)}}


def floats():
    """A checkpoint whose projections are of different sizes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    tensors = {f"model.layers.{i}.norm.weight": draw(K) for i in range(2)}
    for i, module in np.ndindex(2, 3):
        name = f"model.layers.{i}.{MODULES[module]}.weight"
        tensors[name] = draw(N, K) * ml_dtypes.bfloat16(1 + module)
    return tensors


def read(fmt, size=None):
    config = ql.QLoRAConfig(fmt=fmt, block_size=size, targets=".*_proj/kernel")
    return ql.io.load(floats(), NAMES, LIKE, config, progress=False)


def write(folder, base, layout, config=()):
    """Saves a packed base; returns the written tensors and config."""
    config = {"dtype": "bfloat16", "torch_dtype": "bfloat16", **dict(config)}
    ql.io.save_packed(folder, base, NAMES, config, layout, progress=False)
    tensors = ql.io.open_safetensors(folder)
    return tensors, json.loads((folder / "config.json").read_text())


# What vLLM's loaders require for a weight [N, K] in groups of G (November 2026:
# quantization/auto_awq.py and compressed_tensors/schemes/compressed_tensors_{wNa16,
# w4a16_mxfp4,w4a16_nvfp4}.py): names, dtypes and shapes. vLLM casts the scales of int4
# to the model's dtype. Scales of q4_0 are eighths of weights, so bfloat16 holds them.
WORDS = {"weight_packed": ("int32", "N, K // 8"), "weight_shape": ("int64", "2,")}
VLLM = {
    "awq": {
        "qweight": ("int32", "K, N // 8"),
        "qzeros": ("int32", "K // G, N // 8"),
        "scales": ("float16", "K // G, N"),
    },
    "pack-quantized": WORDS | {"weight_scale": ("float16", "N, K // G")},
    "mxfp4-pack-quantized": {
        "weight_packed": ("uint8", "N, K // 2"),
        "weight_scale": ("uint8", "N, K // 32"),
    },
    "nvfp4-pack-quantized": {
        "weight_packed": ("uint8", "N, K // 2"),
        "weight_scale": ("float8_e4m3fn", "N, K // 16"),
        "weight_global_scale": ("float32", "1,"),
    },
}
# The config by which vLLM recognizes weight-only quantization, and the model dtypes
# that each method supports.
SCHEMES = {
    "pack-quantized": dict(num_bits=4, type="int", strategy="group"),
    "mxfp4-pack-quantized": dict(num_bits=4, type="float", strategy="group"),
    "nvfp4-pack-quantized": dict(num_bits=4, type="float", strategy="tensor_group"),
}
CASES = [("int4_f16", 128, "awq"), ("int4_f16", 32, "awq")]
CASES += [("int4_f16", 64, "pack-quantized"), ("q4_0", 32, "pack-quantized")]
CASES += [("mxfp4", 32, "mxfp4-pack-quantized"), ("nvfp4", 16, "nvfp4-pack-quantized")]


@pytest.mark.parametrize(("fmt", "size", "kind"), CASES)
def test_folders_are_what_vllm_asks_for(fmt, size, kind, tmp_path):
    base = read(fmt, size)
    layout = "awq" if kind == "awq" else "compressed-tensors"
    tensors, config = write(tmp_path / "one", base, layout)
    parts, of_int4 = VLLM[kind], "bfloat16" if fmt == "q4_0" else "float16"
    for i, module in np.ndindex(2, 3):
        module = f"model.layers.{i}.{MODULES[module]}"
        for part, (dtype, shape) in parts.items():
            tensor = tensors[f"{module}.{part}"]
            dtype = {"float16": of_int4}.get(dtype, dtype)
            expected_shape = eval(shape, {"N": N, "K": K, "G": size})  # noqa: S307
            assert (str(tensor.dtype), tensor.shape) == (dtype, expected_shape), part
    assert len(tensors) == 6 * len(parts) + 2
    norm = tensors["model.layers.1.norm.weight"]
    assert norm.dtype == "bfloat16"
    assert config["dtype"] == ("bfloat16" if "fp4" in fmt else of_int4)
    assert "torch_dtype" not in config
    quantization = config["quantization_config"]
    if kind == "awq":
        expected = dict(quant_method="awq", bits=4, group_size=size, zero_point=True)
        expected |= dict(version="gemm", modules_to_not_convert=["lm_head"])
        assert quantization == expected
    else:
        check_scheme(quantization, kind, size)
    # Loading restores the same bits, and saving them again writes the same files.
    again = ql.io.load(tmp_path / "one", NAMES, LIKE, progress=False)
    helpers.assert_same_bits(*map(jax.tree.leaves, (again, base)))
    ql.io.save_packed(tmp_path / "two", again, NAMES, tmp_path / "one", layout)
    for file in ("model.safetensors", "config.json"):
        first, second = (tmp_path / folder / file for folder in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def check_scheme(quantization, kind, size):
    """Checks that the config describes weight-only quantization in this scheme."""
    assert (quantization["quant_method"], quantization["format"]) == (
        "compressed-tensors",
        kind,
    )
    assert quantization["ignore"] == ["lm_head"]
    (group,) = quantization["config_groups"].values()
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)
    expected = SCHEMES[kind] | dict(group_size=size, symmetric=True, dynamic=False)
    assert expected.items() <= group["weights"].items()


def test_the_dtype_holds_the_scales(tmp_path):
    base = read("int4_f16", 128)
    config = {"model_type": "gemma3_text"}  # which overflows in float16
    *_, written_config = write(tmp_path / "gemma", base, "awq", config)
    assert written_config["dtype"] == written_config["torch_dtype"] == "bfloat16"

    # Scales of a bfloat16 checkpoint stay in bfloat16.
    def halve(x):
        return x.astype(jnp.bfloat16).astype(jnp.float16)

    base = jax.tree.map(lambda x: halve(x) if x.dtype == "float16" else x, base)
    tensors, written_config = write(tmp_path / "held", base, "compressed-tensors")
    assert tensors["model.layers.1.mlp.up_proj.weight_scale"].dtype == "bfloat16"
    assert written_config["dtype"] == "bfloat16"
    again = ql.io.load(tensors, NAMES, LIKE, progress=False)
    helpers.assert_same_bits(*map(jax.tree.leaves, (again, base)))


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    names = ql.io.Names({f"{x}/kernel": f"{x}.weight" for x in "ab"})

    def pack(fmt, n=N, size=None):
        def quantize(w):
            return ql.quantize(w, fmt, block_size=size)

        return jax.eval_shape(quantize, jnp.ones((K, n)))

    def check_refused(match, layout, a, b):
        base = {"a": {"kernel": a}, "b": {"kernel": b}}
        with pytest.raises(ValueError, match=match):
            ql.io.save_packed(tmp_path / "x", base, names, {}, layout)
        assert not (tmp_path / "x").exists()

    both = "AWQ cannot store these kernels:\n  a/kernel: .* int4_f16 or q4_0. Got nf4\n"
    both += "  b/kernel: its outputs must be a multiple of 8. Got 12"
    check_refused(both, "awq", pack("nf4"), pack("int4_f16", 12))
    check_refused("Got int8", "compressed-tensors", pack("int8"), pack("mxfp4"))
    check_refused("same settings", "compressed-tensors", pack("mxfp4"), pack("nvfp4"))
    check_refused("same settings", "awq", pack("int4_f16"), pack("int4_f16", N, 32))
    check_refused("same settings", "awq", jnp.ones((K, N)), jnp.ones((K, N)))
    check_refused("`layout` must be one of .*'awq'", "gptq", pack("nf4"), pack("nf4"))


def test_nvfp4_has_one_float32_for_what_vllm_keeps_as_one(tmp_path):
    """vLLM multiplies q, k and v, or gate and up, by the largest of their factors."""
    base, tensors = read("nvfp4"), floats()
    q, k, up = (base["layers"][f"{module}/kernel"] for module in MODULES)
    for i in range(2):  # as if they were one weight, by the rule of llm-compressor
        names = [f"model.layers.{i}.{module}.weight" for module in MODULES]
        w = np.concatenate([tensors[name] for name in names[:2]])
        both, alone = (ql.quantize(x.T, "nvfp4") for x in (w, tensors[names[2]]))
        for part in ("codes", "scales"):
            ours = [np.asarray(getattr(x, part)[i]) for x in (q, k)]
            helpers.assert_same_bits(np.concatenate(ours, 1), getattr(both, part))
        for x, expected in ((q, both), (k, both), (up, alone)):
            helpers.assert_same_bits(x.scale_scales[i], expected.scale_scales)
    # Packing a tree shares the factor. Kernels packed separately are refused.
    config = ql.QLoRAConfig(rank=4, fmt="nvfp4", targets=".*_proj/kernel")
    wide = ql.io.load(tensors, NAMES, LIKE, progress=False)

    def pack(tree):
        return ql.init(jax.random.key(0), tree, config)[0]

    for packed in (ql.quantize(wide, config), pack(wide), jax.jit(pack)(wide)):
        helpers.assert_same_bits(*map(jax.tree.leaves, (packed, base)))
    alone = ql.quantize(wide["layers"]["self_attn.q_proj/kernel"], "nvfp4")
    base["layers"]["self_attn.q_proj/kernel"] = alone
    message = r"theirs differ.*\n.*0.self_attn.k_proj.weight, .*0.self_attn.q_proj"
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x", base, "compressed-tensors")


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_a_packed_head_is_not_listed_as_a_float_module(layout, tmp_path):
    names = ql.io.Names({"lm_head/kernel": "lm_head.weight"})
    kernel = jax.random.normal(jax.random.key(0), (K, N), jnp.bfloat16)
    base = {"lm_head": {"kernel": ql.quantize(kernel, "int4_f16", block_size=128)}}
    ql.io.save_packed(tmp_path / layout, base, names, {}, layout, progress=False)
    config = json.loads((tmp_path / layout / "config.json").read_text())
    quantization = config["quantization_config"]
    floats = quantization.get("modules_to_not_convert") or quantization.get("ignore")
    assert not floats
    assert any(
        name.startswith("lm_head.")
        for name in ql.io.open_safetensors(tmp_path / layout)
    )


def test_experts_in_float_are_stacked(tmp_path):
    """As in `save_merged`: the checkpoint has one tensor for all experts of a layer."""
    names = {"up/kernel": "up.weight", "experts/kernel": "experts.gate_up.{expert}"}
    experts = np.arange(3 * K * N, dtype=np.float32).reshape(3, K, N)
    base = {"up": {"kernel": ql.quantize(jnp.ones((K, N)), "nf4")}}
    base["experts"] = {"kernel": jnp.asarray(experts)}
    arguments = tmp_path / "new", base, ql.io.Names(names), {"model_type": "mine"}
    ql.io.save_bitsandbytes(*arguments, progress=False)
    tensors = ql.io.open_safetensors(tmp_path / "new")
    assert not any(name.startswith("experts.gate_up.") for name in tensors)
    np.testing.assert_array_equal(tensors["experts.gate_up"], experts)
