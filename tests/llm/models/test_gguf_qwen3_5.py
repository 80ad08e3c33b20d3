"""GGUF files of Qwen3.5: the order of the heads of values, in float and in blocks."""

import gguf
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.llm.gguf.save import save_gguf, save_gguf_lora
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.tiny import save_tiny

SIZES = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}
SIZES |= {"num_hidden_layers": 4, "head_dim": 16, "linear_conv_kernel_dim": 3}
SIZES |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
ORDER = [0, 2, 1, 3]  # heads 0 and 1 share the first head of keys


def write(folder, fmt, size):
    sizes = {"linear_key_head_dim": size, "linear_value_head_dim": size}
    save_tiny(folder / "model", **SIZES, **sizes)
    _, params = load(folder / "model", progress=False)
    path = folder / "model.gguf"
    options = {"fmt": fmt, "tokenizer": False, "progress": False}
    save_gguf(path, folder / "model", params, **options)
    tensors = ql.io.open_safetensors(folder / "model")
    prefix = "model.layers.1.linear_attn."
    theirs = {
        name.removeprefix(prefix): np.asarray(x)
        for name, x in tensors.items()
        if name.startswith(prefix)
    }
    stored = {x.name: x for x in gguf.GGUFReader(path).tensors}
    return theirs, lambda name: stored[f"blk.1.{name}"].data


def test_heads_of_values_are_in_llama_cpps_order(tmp_path):
    theirs, stored = write(tmp_path, "F16", 8)
    decay = -np.exp(theirs["A_log"][ORDER])
    np.testing.assert_array_equal(stored("ssm_a"), decay)
    np.testing.assert_array_equal(stored("ssm_dt.bias"), theirs["dt_bias"][ORDER])
    convolution = theirs["conv1d.weight"][:, 0]  # of 16 queries, 16 keys and 32 values
    values = convolution[32:].reshape(4, 8, 3)[ORDER].reshape(32, 3)
    expected = np.concatenate([convolution[:32], values])
    np.testing.assert_array_equal(stored("ssm_conv1d.weight"), expected)
    gate = theirs["in_proj_z.weight"].reshape(4, 8, 64)[ORDER].reshape(32, 64)
    expected = gate.astype(np.float16)
    np.testing.assert_array_equal(stored("attn_gate.weight"), expected)


@pytest.mark.newest
def test_blocks_of_q4_0_change_places_with_their_heads(tmp_path):
    theirs, stored = write(tmp_path, "Q4_0", 32)
    weight = theirs["out_proj.weight"].reshape(64, 4, 32)[:, ORDER].reshape(64, 128)
    expected = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(stored("ssm_out.weight"), expected)


def test_heads_that_divide_a_block_are_refused_for_q4_0(tmp_path):
    with pytest.raises(ValueError, match="`value_dim` must be a multiple of 32"):
        write(tmp_path, "Q4_0", 16)
    assert not (tmp_path / "model.gguf").exists()


def test_adapters_are_in_llama_cpps_order(tmp_path):
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    folder = save_tiny(tmp_path / "model", **SIZES, **sizes)
    rng = np.random.default_rng(0)
    # For 4 heads of 8 values, a hidden size of 64 and rank 2.
    out_a, gate_b = (rng.normal(size=n).astype(np.float32) for n in ((2, 32), (32, 2)))
    out_b, gate_a = (rng.normal(size=n).astype(np.float32) for n in ((64, 2), (2, 64)))
    factors = {
        f"model.layers.1.linear_attn.{name}": {"a": a, "b": b}
        for name, a, b in (("out_proj", out_a, out_b), ("in_proj_z", gate_a, gate_b))
    }
    path = tmp_path / "lora.gguf"
    save_gguf_lora(path, folder, ql.io.PlainLoRA(4.0, factors))
    # llama.cpp multiplies A by values in its own order, and B gives such values.
    expected = {
        "ssm_out.weight.lora_a": out_a.reshape(2, 4, 8)[:, ORDER].reshape(2, 32),
        "ssm_out.weight.lora_b": out_b,
        "attn_gate.weight.lora_a": gate_a,
        "attn_gate.weight.lora_b": gate_b.reshape(4, 8, 2)[ORDER].reshape(32, 2),
    }
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert stored.keys() == {f"blk.1.{name}" for name in expected}
    for name, x in expected.items():
        np.testing.assert_array_equal(stored[f"blk.1.{name}"], x)
