"""Each family of models against transformers and PEFT, on small random models."""

import json
import random
import re
from functools import partial

import jax
import jax.numpy as jnp
import llama
import numpy as np
import peft_adapters
import pytest
import random_configs
import torch
import transformers
from configs import (
    DELTA,
    EXPERTS,
    HEADS,
    LINEAR,
    LLAMA3,
    OLMOE,
    SIZES,
    TEXT_FAMILIES,
    YARN,
    longrope,
    random_model,
)
from safetensors.numpy import load_file, save_file
from tolerances import assert_close, assert_within_rounding, relative_error

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder, init_cache
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.families import FAMILIES, config_from_hf
from qlora_jax.llm.models.hf_config import taken_keys

WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
# With this `initializer_range`, activations are large enough to be clamped.
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
OSS |= HEADS | {"rope_parameters": YARN | {"truncate": False}}
OSS |= {"initializer_range": 0.4}
SLIDING, FULL = "sliding_attention", "full_attention"
BIASES = {"attention_bias": True, "mlp_bias": True}
ROPES = {FULL: LINEAR | {"factor": 8.0, "rope_theta": 1e6}}
ROPES |= {SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
# What differs from SIZES, by model_type. Windows are shorter than the 40 tokens.
CASES = {
    "llama": HEADS,
    "llama, biases, llama3": BIASES | {"rope_parameters": LLAMA3},
    "llama, linear": {"rope_parameters": LINEAR},
    "mistral": HEADS | {"sliding_window": 8},
    "mistral, no window": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2, yarn": WINDOWS | {"max_window_layers": 1, "rope_parameters": YARN},
    "qwen3": HEADS | {"attention_bias": True},
    "qwen3, yarn": HEADS
    | WINDOWS
    | {"layer_types": [SLIDING, FULL, FULL]}
    | {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0}},
    "qwen3_moe": HEADS | EXPERTS | {"norm_topk_prob": True},
    "qwen3_moe, windows": EXPERTS | WINDOWS | {"attention_bias": True},
    "qwen3_moe, dense first": EXPERTS | {"mlp_only_layers": [0]},
    "qwen3_moe, dense between": EXPERTS
    | {"decoder_sparse_step": 2, "num_hidden_layers": 5},
    "mixtral": HEADS | {"num_local_experts": 4, "sliding_window": 8},
    "olmoe": OLMOE | {"attention_bias": True},
    "qwen3_5_text": DELTA,
    "qwen3_5_text, yarn": DELTA
    | {"num_hidden_layers": 5, "attention_bias": True, "linear_conv_kernel_dim": 3}
    | {"layer_types": ["linear_attention"] * 2 + [FULL] + ["linear_attention"] * 2}
    | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "gpt_oss": OSS,
    "gpt_oss, no yarn": OSS
    | {"layer_types": [FULL, SLIDING, FULL], "rope_parameters": LINEAR},
    "gemma2": HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma2, low caps": HEADS
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": HEADS | {"num_hidden_layers": 7, "sliding_window": 8},
    "gemma3_text, linear, cap": HEADS
    | {"sliding_window": 8, "final_logit_softcapping": 3.0}
    | {"layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": ROPES},
    "smollm3": {"num_hidden_layers": 5},
    "smollm3, windows": WINDOWS | BIASES | {"no_rope_layers": [1, 0, 1]},
    "phi3": {"sliding_window": 8},
    "phi3, longrope": longrope(4, original=64),
    "phi3, partial": longrope(2, original=20, partial_rotary_factor=0.5),
}
# Random configs from random_configs.py, called "llama, seed 0" and so on. Those marked
# `long` are for the long run.
SEEDS = [(seed, ()) for seed in random_configs.QUICK_SEEDS]
SEEDS += [(seed, pytest.mark.long) for seed in random_configs.LONG_SEEDS]
DRAWS = [
    pytest.param(f"{kind}, seed {seed}", marks=marks)
    for kind in random_configs.FAMILY_DRAWS
    for seed, marks in SEEDS
] + [*random_configs.QUICK_DRAWS]


def settings_of(name):
    kind, _, seed = name.partition(", seed ")
    if seed:
        return random_configs.draw_settings(kind, int(seed))
    return SIZES | CASES[name]


# The draws come first, so that they have the same parameter indices as in the test of
# adapters, which has no other cases. pytest then runs all tests of a draw together.
@pytest.fixture(scope="module", params=[*DRAWS, *CASES])
def case(request, tmp_path_factory):
    """Makes a random model: its folder, its config and decoder, tokens, and two logits.

    The first logits are those of transformers for both rows of tokens. The second ones
    are a list of two: those of the first 17 tokens of the first row alone, and of the
    first 23 tokens of the second row alone. Each comes with the error that rounding may
    cause, since random configs amplify rounding errors.
    """
    model = random_model(request.param.split(",")[0], settings_of(request.param))
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 40)).numpy()
    parts = tokens, tokens[:1, :17], tokens[1:, :23]
    row_logits, *part_logits = (
        llama.measure_rounding_of(model, partial(llama.logits_of, model, x))
        for x in parts
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    config, params = load(folder, progress=False)
    apply = jax.jit(partial(Decoder(config).apply, {"params": params}))
    return folder, (config, apply), jnp.asarray(tokens), row_logits, part_logits


def test_logits_equal_transformers(case):
    _, (_, apply), tokens, (expected, error), _ = case
    assert np.abs(expected).max() > 1
    assert_within_rounding(np.asarray(apply(tokens)), expected, error)


def test_cached_steps_equal_the_full_forward_pass(case):
    _, (config, apply), tokens, (expected, error), _ = case

    def step(cache, start):
        now = jax.lax.dynamic_slice_in_dim(tokens, start, 4, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(4)[None], (2, 4))
        logits, cache = apply(now, positions=positions, cache=cache)
        return cache, logits

    _, logits = jax.lax.scan(step, init_cache(config, 2, 40), jnp.arange(0, 40, 4))
    assert_within_rounding(np.concatenate(logits, axis=1), expected, error)


def test_packed_rows_equal_the_rows_alone(case):
    _, (_, apply), tokens, _, parts = case
    packed = jnp.concatenate([tokens[:1, :17], tokens[1:, :23]], axis=1)
    logits = np.asarray(apply(packed, segment_ids=jnp.array([[4] * 17 + [1] * 23])))
    for got, part in zip((logits[:, :17], logits[:, 17:]), parts, strict=True):
        assert_within_rounding(got, *part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DRAWS, indirect=True)
def test_adapters_on_all_linear_layers_and_their_gradients_equal_peft(case, tmp_path):
    folder = case[0]
    linear = peft_adapters.all_linear(folder)
    theirs = tmp_path / "theirs"
    model = peft_adapters.train_there(folder, theirs, r=2, lora_alpha=4, **linear)
    config, params = load(folder, progress=False)
    peft_adapters.assert_there_and_back(config, params, tmp_path, model)
    peft_adapters.assert_gradients(folder, theirs, tmp_path)


@pytest.mark.parametrize("kind", random_configs.FAMILY_DRAWS)
def test_draws_vary_all_options_of_a_config_class(kind):
    config = transformers.AutoConfig.for_model(kind)
    options = json.loads(config.to_json_string(use_diff=False)).keys()
    options &= taken_keys(kind)
    family, values = random_configs.FAMILY_DRAWS[kind], {}
    for seed in range(100):
        for key, value in family.draw(random.Random(seed)).items():
            values.setdefault(key, set()).add(repr(value))
    varied = {key for key, drawn in values.items() if len(drawn) > 1}
    undrawn = {*random_configs.UNDRAWN.split(), *family.undrawn.split()}
    left = options - varied - undrawn
    endings = ("_token_id", "dropout", "_pdrop")
    assert sorted(key for key in left if not key.endswith(endings)) == []


def test_every_family_has_draws():
    # test_text_half.py compares the text halves of models with a vision part.
    assert sorted(random_configs.FAMILY_DRAWS) == TEXT_FAMILIES


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "qwen3_moe, dense first", "qwen3_moe, dense between", "gpt_oss"],
)
def test_the_loss_that_balances_experts_is_that_of_transformers(tmp_path, name):
    factor = {"output_router_logits": True, "router_aux_loss_coef": 50.0}
    model = random_model(name.split(",")[0], SIZES | CASES[name] | factor)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path, progress=False)
    assert config.experts is not None and config.experts.balance == 50
    ids = torch.randint(1, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # padding
    labels = torch.where(mask == 1, ids, -100)
    expected = model(ids, attention_mask=mask, labels=labels)
    rows = [ids[0].numpy(), ids[1, :7].numpy()]
    rows = [data.Row(x.astype(np.int32), x, "") for x in rows]
    [batch] = data.eval_batches(rows, batch_size=2, max_length=12)
    loss = train.decoder_loss(ql.linen.wrap(Decoder(config)), config.experts.balance)
    total, count = jax.jit(loss)({}, params, batch, None)
    assert_close(total / count, expected.loss.item())
    plain = model(ids, attention_mask=mask, labels=labels, output_router_logits=False)
    assert expected.loss.item() - plain.loss.item() > 50


def test_experts_in_mxfp4_are_those_of_transformers(tmp_path):
    sizes = SIZES | OSS | {"intermediate_size": 64}
    random_model("gpt_oss", sizes).save_pretrained(tmp_path)
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    tensors = load_file(path)
    for name in [n for n in tensors if re.fullmatch(r".*experts\.\w*_proj", n)]:
        count, k, n = tensors.pop(name).shape
        shape = count, n, k // 32
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
        tensors[f"{name}_scales"] = rng.integers(122, 125, shape).astype(np.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, params = load(tmp_path, progress=False)
    experts = params["layers"]["mlp"]["experts"]
    assert {experts[name]["kernel"].fmt for name in experts} == {"mxfp4"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).float()
    tokens = np.random.default_rng(1).integers(0, 64, (2, 40))
    expected = llama.logits_of(model, tokens)
    logits = llama.our_logits(config, params, tokens=tokens)
    assert_close(logits, expected)
    # If the model is written in float, transformers loads it like any other model.
    names = decoder_names(config)
    out = tmp_path / "merged"
    ql.io.save_merged(out, tmp_path, {}, names, dtype=jnp.float32, progress=False)
    again = llama.logits_of(llama.their_model(out), tokens)
    assert_close(again, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("fmt", ["F16", "Q8_0"])
def test_transformers_loads_our_gguf(tmp_path, kind, fmt):
    # The reader of transformers assumes a head size of 128 for Qwen3.
    changes = {"initializer_range": 0.1, "head_dim": 128 if kind == "qwen3" else 8}
    model = random_model(kind, SIZES | changes)
    model.save_pretrained(tmp_path)
    _, params = load(tmp_path, progress=False)
    path = tmp_path / "m.gguf"
    save_gguf(path, tmp_path, params, fmt=fmt, tokenizer=False, progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(1).integers(0, 64, (2, 40))
    logits, original = (llama.logits_of(x, tokens) for x in (theirs, model))
    if fmt == "F16":
        assert_close(logits, original)
    else:  # the errors of 8-bit weights
        assert relative_error(logits, original) < 0.04


@pytest.mark.parametrize("kind", TEXT_FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind):
    config = transformers.AutoConfig.for_model(kind)
    filled = json.loads(config.to_json_string(use_diff=False))
    needed = ["vocab_size", "hidden_size", "intermediate_size"]
    needed += ["num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    # A model with experts in all layers has no `intermediate_size`.
    small = {name: filled[name] for name in needed if name in filled}
    small["model_type"] = kind
    assert config_from_hf(small) == config_from_hf(filled)
    assert filled["architectures"] is None
    causal = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    assert causal.__name__ == FAMILIES[kind].architecture
