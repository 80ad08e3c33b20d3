"""The text halves of models with a vision part, against transformers and PEFT."""

import dataclasses
import json
from functools import partial

import chex
import gguf
import llama
import numpy as np
import peft
import pytest
import torch
import transformers
from configs import DELTA, SIZES, THETA, random_model, randomize
from helpers import trees_of
from stored import export
from tolerances import assert_close, assert_within_rounding

import qlora_jax as ql
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.families import config_from_hf
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = SIZES | {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8}
TEXT |= {"query_pre_attn_scalar": 16}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOKENS = np.random.default_rng(0).integers(3, 60, (2, 20))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model, and its folder."""
    settings = {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}
    settings |= {"image_token_index": 61, "boi_token_index": 62, "eoi_token_index": 63}
    model = random_model("gemma3", settings)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return model, folder


def logits_of(model):
    return llama.logits_of(model, TOKENS)


def assert_text_half_equals(theirs, folder):
    """Saves a model, loads its text half and compares the logits."""
    theirs.save_pretrained(folder)
    message = r"has a vision part. Its \d+ tensors are ignored"
    with pytest.warns(UserWarning, match=message):
        config, params = load(folder, progress=False)
    assert config.module == "model.language_model"
    ours = llama.our_logits(config, params, tokens=TOKENS)
    expected, errors = llama.measure_rounding_of(theirs, partial(logits_of, theirs))
    assert_within_rounding(np.asarray(ours), expected, errors)


def assert_adapters_are_exchanged(theirs, folder, text_only):
    """Loads adapters of a saved model in PEFT and here, and merges them."""
    config, params = load(folder, progress=False)
    names = decoder_names(config)
    base, lora = trees_of(params, rank=2, targets=r"layers.*_proj/kernel", fmt=None)
    described = ql.io.peft_config(base, lora, names, base_model=str(folder))
    ours, changed = folder.with_name("ours"), folder.with_name("changed")
    ql.io.save_peft(ours, base, lora, names, described)
    whole = type(theirs).from_pretrained(folder, attn_implementation="eager").eval()
    adapted = peft.PeftModel.from_pretrained(whole, ours, is_trainable=True)
    lora_names = [key for key, _ in adapted.named_parameters() if "lora" in key]
    assert lora_names and not [key for key in lora_names if "vision" in key]
    expected, errors = llama.measure_rounding_of(adapted, partial(logits_of, adapted))
    assert np.abs(expected - logits_of(theirs)).max() > 0.1
    logits = llama.our_logits(config, base, lora, TOKENS)
    assert_within_rounding(np.asarray(logits), expected, errors)
    # PEFT changes the adapter and saves it again.
    llama.draw_adapters(adapted)
    adapted.save_pretrained(changed)
    expected, errors = llama.measure_rounding_of(adapted, partial(logits_of, adapted))
    new, lora, _ = ql.io.load_peft(changed, params, names)
    logits = llama.our_logits(config, new, lora, TOKENS)
    assert_within_rounding(np.asarray(logits), expected, errors)
    # Merged, it is a text-only model.
    export(folder, "merged", folder.with_name("merged"), changed)
    merged = llama.their_model(folder.with_name("merged"))
    assert type(merged).__name__ == text_only
    assert_within_rounding(logits_of(merged), expected, errors)


def test_the_text_half_equals_transformers(model, tmp_path):
    theirs, folder = model
    with pytest.warns(UserWarning, match="has a vision part. Its .. tensors are ign"):
        config, params = load(folder, progress=False)
    ours = llama.our_logits(config, params, tokens=TOKENS)
    assert_close(ours, logits_of(theirs))
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, params, tokenizer=False, progress=False)
    down = next(
        x.data
        for x in gguf.GGUFReader(path).tensors
        if x.name == "blk.1.ffn_down.weight"
    )
    layers = {path: x for path, x in leaves_by_path(params).items() if "down" in path}
    [kernel] = layers.values()
    assert_close(np.float32(down), np.asarray(kernel)[1].T, dtype=np.float16)


def test_adapters_are_those_of_the_whole_model(model, tmp_path):
    _, folder = model
    config, params = load(folder, progress=False)
    names = decoder_names(config)
    base, lora = trees_of(params, rank=2, targets=llama.PACKED, fmt=None)
    described = ql.io.peft_config(base, lora, names, base_model=str(folder))
    ql.io.save_peft(tmp_path / "adapter", base, lora, names, described)
    adapted = llama.their_model(folder, tmp_path / "adapter")
    lora_names = [key for key, _ in adapted.named_parameters() if "lora" in key]
    assert len(lora_names) == 2 * 7 * 7
    assert not [key for key in lora_names if "vision" in key]
    again = ql.io.load_peft(tmp_path / "adapter", params, names)[1]
    chex.assert_trees_all_equal(again, lora)
    ours = llama.our_logits(config, base, lora, TOKENS)
    assert_close(ours, logits_of(adapted))
    # Merged, it is a model of its own, without the vision part.
    (folder / "preprocessor_config.json").write_text("{}")
    export(folder, "merged", tmp_path / "merged", tmp_path / "adapter")
    merged = llama.their_model(tmp_path / "merged")
    assert type(merged).__name__ == "Gemma3ForCausalLM"
    assert not (tmp_path / "merged" / "preprocessor_config.json").exists()
    assert_close(logits_of(merged), logits_of(adapted))


def test_what_its_config_leaves_out_is_what_transformers_takes():
    # The text settings of the published 4B model.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    theirs = transformers.AutoConfig.for_model("gemma3", text_config=dict(text))
    filled = json.loads(theirs.text_config.to_json_string(use_diff=False))
    ours = config_from_hf({"model_type": "gemma3", "text_config": text})
    assert ours.module == "model.language_model"
    assert dataclasses.replace(ours, module="model") == config_from_hf(filled)


def test_the_text_half_of_qwen3_5_equals_transformers(tmp_path):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 32}
    random_model("qwen3_5_text", SIZES | DELTA)  # seeds, and chooses the exact rule
    config = transformers.AutoConfig.for_model(
        "qwen3_5", text_config=SIZES | DELTA, vision_config=vision
    )
    model = transformers.Qwen3_5ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    assert_text_half_equals(model, tmp_path / "model")
    assert_adapters_are_exchanged(model, tmp_path / "model", "Qwen3_5ForCausalLM")


def test_the_text_half_of_gemma_4_equals_transformers(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision |= {"position_embedding_size": 16, "patch_size": 4}
    text = SIZES | {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 1}
    text |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    text |= {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
    text |= {"initializer_range": 0.2, "enable_moe_block": True, "num_experts": 3}
    text |= {"top_k_experts": 2, "moe_intermediate_size": 16}
    config = transformers.AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=vision, audio_config=None
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    randomize(model)
    assert_text_half_equals(model, tmp_path / "model")
    assert_adapters_are_exchanged(model, tmp_path / "model", "Gemma4ForCausalLM")


QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
QWEN_VISION |= {"out_hidden_size": 32}
MROPE = {
    "rope_parameters": THETA | {"rope_type": "default", "mrope_section": [2, 1, 1]}
}
PIXTRAL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
PIXTRAL |= {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 8}
# The text settings besides SIZES, the vision settings, and the text-only model.
HALVES = {
    "qwen2_5_vl": (MROPE, QWEN_VISION, "Qwen2ForCausalLM"),
    "qwen3_vl": (
        MROPE | {"head_dim": 8},
        QWEN_VISION | {"deepstack_visual_indexes": []},
        "Qwen3ForCausalLM",
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        PIXTRAL,
        "MistralForCausalLM",
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_the_text_halves_of_other_models_equal_transformers(name, tmp_path):
    text, vision, text_only = HALVES[name]
    settings = {"text_config": SIZES | text, "vision_config": vision}
    settings["tie_word_embeddings"] = False
    kind = name.split(",")[0]
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomize(theirs)
    assert_text_half_equals(theirs, tmp_path / "model")
    assert_adapters_are_exchanged(theirs, tmp_path / "model", text_only)
