"""Merged models: what transformers computes with them is what we compute unmerged."""

import json

import numpy as np
import pytest

pytest.importorskip("bitsandbytes")

import jax
import jax.numpy as jnp
import llama

import qlora_jax as ql
from qlora_jax import cli
from qlora_jax.io import load, save_merged
from qlora_jax.models import checkpoint
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.tiny import save_tiny
from qlora_jax.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float checkpoint, its packed base, and an adapter that changes the logits."""
    source = tmp_path_factory.mktemp("merged") / "float"
    config = llama.save_float(source)
    (source / "tokenizer.json").write_text("{}")
    settings = ql.QLoRAConfig(rank=4, alpha=8, targets=r"layers/.*_proj/kernel")
    packed = load(source, llama.NAMES, llama.shapes(config), settings, progress=False)
    base, lora = ql.init(jax.random.key(0), packed, settings)
    key = jax.random.key(1)
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), lora)
    return source, config, base, lora


@pytest.mark.parametrize("onto", ["packed", "float"])
def test_merged_logits(trained, tmp_path, onto):
    source, config, base, lora = trained
    if onto == "float":
        base = load(source, llama.NAMES, llama.shapes(config), progress=False)
        args = source, lora, llama.NAMES
    else:
        args = base, lora, llama.NAMES, source
    out = tmp_path / "out"
    save_merged(out, *args, max_shard_bytes=200_000, progress=False)
    assert (out / "tokenizer.json").exists() and (
        out / "model.safetensors.index.json"
    ).exists()
    theirs = llama.their_logits(out)
    np.testing.assert_allclose(llama.our_logits(config, base, lora), theirs, atol=1e-4)
    assert np.abs(llama.our_logits(config, base) - theirs).max() > 0.1
    merged = load(out, llama.NAMES, llama.shapes(config), progress=False)
    for a, b in zip(*map(jax.tree.leaves, (merged, ql.merge(base, lora))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_merged_onto_a_4bit_folder(trained, tmp_path):
    source, config, base, lora = trained
    ql.io.save_bitsandbytes(
        tmp_path / "4bit", base, llama.NAMES, source, progress=False
    )
    save_merged(tmp_path / "a", tmp_path / "4bit", lora, llama.NAMES, progress=False)
    save_merged(tmp_path / "b", base, lora, llama.NAMES, source, progress=False)
    assert "quantization_config" not in json.loads(
        (tmp_path / "a" / "config.json").read_text()
    )
    a, b = (ql.io.open_safetensors(tmp_path / x) for x in "ab")
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])


def test_dtype(trained, tmp_path):
    source, config, base, lora = trained
    out = tmp_path / "out"
    save_merged(out, source, lora, llama.NAMES, dtype=jnp.bfloat16, progress=False)
    tensors = ql.io.open_safetensors(out)
    assert {x.dtype for x in tensors.values()} == {jnp.dtype("bfloat16")}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert np.isfinite(llama.their_logits(out)).all()


def test_wrong_adapters_are_refused(trained, tmp_path):
    source, config, base, lora = trained
    lora = {"layers": {"mlp": {**lora["layers"]["mlp"]}}}
    up = lora["layers"]["mlp"]["up_proj"]["kernel"]
    lora["layers"]["mlp"]["down_proj"] = {"kernel": up}
    lora["layers"]["other"] = {"kernel": up}
    with pytest.raises(ValueError) as error:
        save_merged(tmp_path / "out", source, lora, llama.NAMES, progress=False)
    text = str(error.value)
    assert "down_proj.weight must be (256, 128)" in text and "layers/other" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "SmolLM3", "Phi3"]
)
def test_a_gguf_file_becomes_a_folder(tmp_path, kind):
    from transformers import AutoTokenizer

    changes = {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"]}
    if kind.startswith("Gemma"):
        changes |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4}
        changes |= {"query_pre_attn_scalar": 16}
    if kind == "Gemma3":
        changes |= {"model_type": "gemma3_text", "num_hidden_layers": 7}
    if kind == "Phi3":
        factors = {"short_factor": [1.5] * 4, "long_factor": [2.0] * 4}
        changes |= {"partial_rotary_factor": 0.5, "pad_token_id": 0}
        changes |= {"rope_scaling": {"type": "longrope"} | factors}
        changes |= {"original_max_position_embeddings": 20}
    folder = save_tiny(tmp_path / "base", head_dim=16, rope_theta=5e4, **changes)
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named}
    settings |= {"eos_token": "<|im_end|>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    file, out = str(tmp_path / "model.gguf"), str(tmp_path / "out")
    cli.export(cli.ExportConfig(folder, "gguf", file))
    cli.export(cli.ExportConfig(file, "merged", out))
    config, params = checkpoint.load(file, progress=False)
    tokens = np.arange(24).reshape(2, 12)
    ours = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    theirs = llama.their_logits(out, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    theirs, text = AutoTokenizer.from_pretrained(out), "Pay 23 <|im_end|>\n"
    assert theirs(text).input_ids == load_tokenizer(folder).encode(text).ids
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.chat_template == templates
