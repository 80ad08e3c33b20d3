"""Each key of each family's `config.json` counts, raises an error, or is harmless."""

import copy
import json
import typing
import warnings

import jax
import llama
import numpy as np
import pytest
import transformers
from configs import (
    DELTA,
    LINEAR,
    LLAMA3,
    SIZES,
    TEXT_FAMILIES,
    YARN,
    longrope,
    random_model,
)
from tolerances import assert_close
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.families import config_from_hf

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
WINDOWS = {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}
USED = {"use_sliding_window": True}
CAPS = {"attn_logit_softcapping": 9.0, "final_logit_softcapping": 9.0}
# Settings with which each key of a family has an effect.
ACTIVE = {
    "mistral": {"sliding_window": 8},
    "qwen2": USED | WINDOWS,
    "qwen3": USED | WINDOWS,
    "qwen3_moe": EXPERTS | USED | {"sliding_window": 8, "num_local_experts": 4},
    "qwen2_moe": EXPERTS | USED | WINDOWS | {"num_experts": 4},
    "mixtral": EXPERTS | {"sliding_window": 8, "num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4},
    "qwen3_5_text": DELTA
    | {"num_hidden_layers": 3, "layer_types": [FULL, "linear_attention", FULL]},
    "qwen3_5_moe_text": DELTA
    | EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 24}
    | {"num_hidden_layers": 3, "layer_types": [FULL, "linear_attention", FULL]},
    "gpt_oss": EXPERTS | WINDOWS | {"num_local_experts": 4, "head_dim": 8},
    "gemma2": WINDOWS | CAPS | {"head_dim": 8},
    "gemma3_text": WINDOWS | {"head_dim": 8},
    "gemma4_text": WINDOWS
    | {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 4}
    | {"vocab_size_per_layer_input": 64, "top_k_experts": 2, "num_experts": 4}
    | {"moe_intermediate_size": 16, "enable_moe_block": True},
    "gemma4_unified_text": WINDOWS | {"head_dim": 8, "global_head_dim": 16},
    "smollm3": USED | WINDOWS | {"no_rope_layers": [1, 0, 1]},
    "phi3": {"sliding_window": 8},
    "olmo3": WINDOWS,
    "gemma": {"head_dim": 8},
}
# Other values of keys, where none can be derived from the first value.
OTHERS = {
    "architectures": ["OtherForCausalLM"],
    "attn_logit_softcapping": 2.0,
    "clip_qkv": 1.0,
    "decoder_sparse_step": 2,
    "dtype": "float64",
    "final_logit_softcapping": 2.0,
    "head_dim": 16,
    "hidden_size": 64,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "layer_types": [FULL, SLIDING, SLIDING],
    "mlp_only_layers": [0],
    "no_rope_layers": [0, 1, 1],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 16,
    "problem_type": "regression",
    "rope_parameters": YARN | {"rope_theta": 5e4},
    "router_aux_loss_coef": 0.5,
    "sliding_window": 5,
    "use_bidirectional_attention": True,
    "_sliding_window_pattern": 3,
}
# Keys that no config class has, some of which transformers reads in any config.
MORE = {"is_causal": False, "attention_chunk_size": 4, "per_layer_config": {"0": {}}}
MORE |= {"sliding_window": 5, "partial_rotary_factor": 0.5, "new_key": 1}
MORE |= {"layer_types": [FULL, SLIDING, SLIDING], "lm_head_bias": True}
# Changes that the model with all changes leaves out: they need other weights or another
# output, or remove the effect of other changes.
APART = ("num_hidden_layers", "return_dict", "use_sliding_window")
APART += ("enable_moe_block",)
LONG = longrope(2, 16, rope_theta=5e4, partial_rotary_factor=0.5)["rope_parameters"]


def changed_value(key, value):
    """Returns another value of a key."""
    if key in OTHERS:
        return copy.deepcopy(OTHERS[key])  # transformers adds keys to sections
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + (value == 0)
    return "other"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TEXT_FAMILIES)
def test_no_key_of_a_config_is_passed_over(kind, tmp_path):
    """A changed key gives an error or a warning, or has its effect in transformers.

    The effects are tested on one random model with all changes that give neither an
    error nor a warning: those of keys that qlora_jax reads, and of harmless keys.
    """
    settings = SIZES | ACTIVE.get(kind, {})
    theirs = transformers.AutoConfig.for_model(kind, **settings)
    filled = json.loads(theirs.to_json_string(use_diff=False))

    def describe_config(**changes):
        return repr(config_from_hf(filled | changes))

    plain, accepted, counted = describe_config(), {}, set()
    values = {key: changed_value(key, value) for key, value in filled.items()} | MORE
    values |= {"rope_parameters": LONG} if kind == "phi3" else {}
    for key in values.keys() - {"model_type"}:
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                changed = describe_config(**{key: values[key]})
        except ValueError as error:
            names = (key, "layer_types", "no_rope_layers", "sliding_window")
            assert any(f"`{name}`" in str(error) for name in names), (key, error)
            continue
        if warned:
            assert f"'{key}'" in str(warned[0].message)
            continue
        accepted[key] = values[key]
        if changed != plain:
            counted.add(key)
    epsilons = {"rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"}
    assert counted >= {"tie_word_embeddings", "hidden_size"} and counted & epsilons
    together = {key: x for key, x in accepted.items() if key not in APART}
    model = random_model(kind, settings | together)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path, progress=False)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 24))
    logits = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    # A key without its effect moves the logits by more than 1%. With all changes, the
    # attention scores are large, which amplifies their rounding errors.
    assert_close(logits, llama.logits_of(model, tokens), terms=2**17)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": longrope(4, 64)["rope_parameters"],
}
# Other values of keys of `rope_parameters`, or values if the section lacks the key.
ROPE_VALUES = {
    "factor": 3.0,
    "attention_factor": 1.5,
    "beta_fast": 20.0,
    "beta_slow": 2.0,
    "high_freq_factor": 3.0,
    "long_factor": [3.0, 2.0, 4.0, 1.5],
    "low_freq_factor": 1.5,
    "mrope_section": [1, 1, 2],
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "original_max_position_embeddings": 24,
    "partial_rotary_factor": 0.5,
    "rope_theta": 5e4,
    "rope_type": "proportional",
    "short_factor": [1.2, 1.0, 2.0, 1.4],
    "truncate": False,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROPES)
def test_no_key_of_rope_parameters_is_passed_over(kind):
    """A changed key gives an error or a warning, or transformers' frequencies."""
    assert ROPE_VALUES.keys() == typing.get_type_hints(RopeParameters).keys()
    raw = {"model_type": "llama", **SIZES}
    changes = [{key: value} for key, value in ROPE_VALUES.items()]
    changes += [{}, {"mscale": 0.7, "mscale_all_dim": 0.4}, {"new_key": 1}]
    for change in changes:
        section = {"rope_parameters": ROPES[kind] | change}
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                rope = config_from_hf(raw | section).layers[0].rope
        except ValueError as error:
            assert any(f"`{key}`" in str(error) for key in change), (change, error)
            continue
        if warned:
            (key,) = change
            assert f"'rope_parameters.{key}'" in str(warned[0].message)
            continue
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**SIZES | section))
        frequencies = rope.theta ** (-np.arange(0, 8, 2) / 8)
        got = frequencies / np.asarray(rope.divisors or 1)
        assert_close(got, theirs.inv_freq.numpy(), terms=16)
        assert_close(rope.scale, theirs.attention_scaling, terms=16)


def test_an_unknown_key_is_named():
    raw = {"model_type": "llama", **SIZES, "window_of_dreams": 7, "mlp_scale": None}
    with pytest.warns(UserWarning, match=r"are ignored: \['window_of_dreams'\]"):
        config_from_hf(raw)
