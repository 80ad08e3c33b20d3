"""Merged models in transformers compute the same as unmerged models here."""

import json

import jax.numpy as jnp
import llama
import numpy as np
import pytest
from configs import SIZES, random_model
from helpers import assert_same_bits, trees_of
from stored import tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.io import save_merged
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.jax_engine import LAYERS


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
