"""Merged models in transformers compute the same as unmerged models here."""

import json

import jax.numpy as jnp
import llama
import numpy as np
import pytest
import random_configs
from configs import SIZES, random_model
from helpers import assert_same_bits, trees_of
from stored import export, tensors_of
from tolerances import assert_close
from transformers import AutoTokenizer

import qlora_jax as ql
from qlora_jax.io import save_merged
from qlora_jax.llm.app.base_model import LAYERS
from qlora_jax.llm.gguf.values_in import BIAS_TENSORS, FREQUENCIES, config_from_values
from qlora_jax.llm.gguf.values_out import check_gguf_config, divisors_of, values_of
from qlora_jax.llm.models.checkpoint import load, load_tokenizer
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.llm.models.tiny import save_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float checkpoint, its config, its packed base, a nonzero adapter, and names."""
    source = llama.save_float(tmp_path_factory.mktemp("merged") / "float")
    (source / "tokenizer.json").write_text("{}")
    config, params = load(source, progress=False)
    trees = trees_of(params, rank=4, alpha=8, targets=llama.PACKED)
    return source, config, *trees, decoder_names(config)


@pytest.mark.parametrize("onto", ["packed", "float"])
def test_merged_logits(trained, tmp_path, onto):
    source, config, base, lora, names = trained
    args = base, lora, names, source
    if onto == "float":
        _, base = load(source, progress=False)
        args = source, lora, names
    out = tmp_path / "out"
    save_merged(out, *args, max_shard_bytes=200_000, progress=False)
    assert (out / "tokenizer.json").exists()
    assert (out / "model.safetensors.index.json").exists()
    theirs = llama.logits_of(llama.their_model(out))
    assert_close(llama.our_logits(config, base, lora), theirs)
    assert np.abs(llama.our_logits(config, base) - theirs).max() > 0.1
    _, merged = load(out, progress=False)
    assert_close(merged, ql.merge(base, lora), terms=64)


def test_a_merged_mixture_of_experts(tmp_path):
    """transformers computes the same as packed experts with an adapter."""
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    source, tokens = tmp_path / "base", llama.TOKENS % 64
    random_model("qwen3_moe", SIZES | sizes).save_pretrained(source)
    settings = ql.QLoRAConfig(block_size=16, targets=LAYERS)
    config, base = load(source, qlora=settings, progress=False)
    base, lora = trees_of(base, rank=4, targets="layers/self_attn/.*/kernel")
    names = decoder_names(config)
    save_merged(tmp_path / "out", base, lora, names, source, progress=False)
    theirs = llama.logits_of(llama.their_model(tmp_path / "out"), tokens)
    ours = llama.our_logits(config, base, lora, tokens)
    assert_close(ours, theirs)
    assert np.abs(llama.our_logits(config, base, {}, tokens) - theirs).max() > 0.1


def test_merged_onto_a_4bit_folder(trained, tmp_path):
    source, _, base, lora, names = trained
    packed, a, b = (tmp_path / name for name in ("4bit", "a", "b"))
    ql.io.save_bitsandbytes(packed, base, names, source, progress=False)
    save_merged(a, packed, lora, names, progress=False)
    save_merged(b, base, lora, names, source, progress=False)
    assert "quantization_config" not in json.loads((a / "config.json").read_text())
    assert_same_bits(tensors_of(a), tensors_of(b))


def test_dtype(trained, tmp_path):
    source, _, _, lora, names = trained
    out = tmp_path / "out"
    save_merged(out, source, lora, names, dtype=jnp.bfloat16, progress=False)
    assert {x.dtype for x in tensors_of(out).values()} == {jnp.dtype("bfloat16")}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert np.isfinite(llama.logits_of(llama.their_model(out))).all()


def test_wrong_adapters_are_refused(trained, tmp_path):
    source, _, _, lora, names = trained
    mlp = lora["layers"]["mlp"]
    up = mlp["up_proj"]
    lora = {"layers": {"mlp": {**mlp, "down_proj": up}, "other": up}}
    with pytest.raises(ValueError) as error:
        save_merged(tmp_path / "out", source, lora, names, progress=False)
    for message in ("down_proj.weight of shape (128, 256): A must be", "layers/other"):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4}
GEMMA |= {"query_pre_attn_scalar": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 201}  # as in test_clients.py
KINDS = {
    "Llama": {},
    "Qwen2": {"vocab_size": 260},  # its tokenizer has one token more
    "Qwen3": {},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7},
    "SmolLM3": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    | {"tie_word_embeddings": False},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"model_type": "gpt_oss", "rope_theta": 1024.0, "rope_scaling": YARN}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    | {"tie_word_embeddings": False},
    "Phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0, "rope_scaling": LONGROPE}
    | {"original_max_position_embeddings": 20},
}


@pytest.mark.filterwarnings("ignore:llama.cpp rounds the bounds of YaRN")
@pytest.mark.parametrize("kind", random_configs.FAMILY_DRAWS)
def test_a_random_config_survives_gguf(kind):
    """If GGUF supports a config, its metadata give an equivalent `config.json`."""
    for seed in range(20):
        settings = random_configs.draw_settings(kind, seed) | {"model_type": kind}
        try:
            config = config_from_hf(settings)
            architecture = check_gguf_config(config, 128)
        except ValueError:
            continue
        divisors = divisors_of(config, architecture)
        if FREQUENCIES in divisors:
            continue  # the file has no rule that gives these divisors
        values = values_of(config, architecture, 128)
        names = set() if config.tie_embeddings else {"output.weight"}
        names |= {name for bias, name in BIAS_TENSORS.items() if getattr(config, bias)}
        read, raw = config_from_values(architecture, values, names, 64, divisors)
        assert config_from_hf(raw) == read


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_becomes_a_folder(tmp_path, kind):
    changes = {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"]}
    changes |= dict(head_dim=16, rope_theta=5e4) | KINDS[kind]
    folder = save_tiny(tmp_path / "base", **changes)
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named}
    settings |= {"eos_token": "<|im_end|>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    # This file would take precedence over the templates in the settings.
    (tmp_path / "base" / "chat_template.jinja").unlink()
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    export(folder, "gguf", file)
    export(file, "merged", out)
    ours = llama.our_logits(*load(file, progress=False))
    theirs = llama.logits_of(llama.their_model(out).eval())
    assert_close(ours, theirs)
    theirs, text = AutoTokenizer.from_pretrained(out), "Pay 23 <|im_end|>\n"
    assert theirs(text).input_ids == load_tokenizer(folder).encode(text).ids
    assert (theirs.eos_token, theirs.chat_template) == ("<|im_end|>", templates)
