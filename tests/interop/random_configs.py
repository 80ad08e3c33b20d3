"""Random small configs of each family, over all options of its config class.

To add a family, add an entry to `FAMILY_DRAWS`: its `model_type`, a function that draws
random values for the options of its config class, and the names of options that the
function does not have to draw. `test_families.py` then compares logits, cached steps,
packed rows, adapters and their gradients with transformers and PEFT, and checks that no
option is left out.
"""

import datetime
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from configs import LINEAR, LLAMA3, SIZES, YARN

Options = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR_ATTENTION = "linear_attention"
QUICK_SEEDS = (0,)
# A further model of the quick run: the first Gemma 4 has no experts.
QUICK_DRAWS = ("gemma4_text, seed 14",)
_FIRST = datetime.date.today().toordinal() * 15
LONG_SEEDS = tuple(range(_FIRST, _FIRST + 15))  # for a long run; they change every day
# Options that no function has to draw. All models here have the same value of them, or
# they change only the loss, for which test_families.py has a test of its own. One more,
# `per_layer_config`, is computed by transformers from other options of Gemma 4.
UNDRAWN = "architectures model_type vocab_size max_position_embeddings is_causal"
UNDRAWN += " output_router_logits router_aux_loss_coef per_layer_config use_cache"
UNDRAWN += " initializer_range pretraining_tp router_jitter_noise"


class FamilyDraw(NamedTuple):
    """How to draw a family's options."""

    draw: Callable[[random.Random], Options]
    # Options that are not drawn: they have one supported value, or no effect.
    undrawn: str = "hidden_act"


def draw_settings(kind: str, seed: int) -> Options:
    """Returns the settings of a small model of a family."""
    return SIZES | FAMILY_DRAWS[kind].draw(random.Random(f"{kind} {seed}"))


def draw_bool(rng: random.Random) -> bool:
    """Returns True or False."""
    return rng.random() < 0.5


def draw_sizes(rng: random.Random, head_dims: tuple[int | None, ...] = ()) -> Options:
    """Returns sizes, and the other options that all families have.

    `head_dims` are the possible values of `head_dim`. By default, the option is left
    out, as some families do not have it.
    """
    num_kv_heads = rng.choice((1, 2))
    sizes = {
        "hidden_size": rng.choice((24, 48)),
        "intermediate_size": rng.choice((20, 48)),
        "num_hidden_layers": rng.randint(1, 5),
        "num_attention_heads": num_kv_heads * rng.randint(1, 3),
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": rng.choice((1e-6, 1e-2)),
        "tie_word_embeddings": draw_bool(rng),
    }
    return sizes | ({"head_dim": rng.choice(head_dims)} if head_dims else {})


def draw_rope(rng: random.Random, **more: Any) -> Options:
    """Returns `rope_parameters`, in which `more` are further entries."""
    default = {"rope_type": "default"}
    yarn = YARN | {"truncate": draw_bool(rng), "beta_fast": rng.choice((8.0, 32.0))}
    section = rng.choice((default, LINEAR, LLAMA3, yarn))
    section = section | {"rope_theta": rng.choice((1e3, 1e4))} | more
    return {"rope_parameters": section}


def draw_section(rng: random.Random) -> Options:
    """Returns the section of one kind of layers in `rope_parameters`."""
    section = draw_rope(rng)["rope_parameters"]
    section.pop("truncate", None)  # transformers 5.24 ignores it in such a section
    return section


def draw_types(rng: random.Random, count: int, *types: str) -> Options:
    """Returns `layer_types`: one type for each layer, or None for the default."""
    layer_types = [rng.choice(types) for _ in range(count)]
    return {"layer_types": rng.choice((None, layer_types))}


def draw_windows(rng: random.Random, count: int) -> Options:
    """Returns the options of families that can switch their windows off."""
    options = draw_types(rng, count, SLIDING, FULL)
    options |= {"use_sliding_window": True, "sliding_window": rng.choice((3, 8))}
    options |= {"max_window_layers": rng.randint(0, count)}
    return rng.choice((options, {"use_sliding_window": False}))


def draw_flags(rng: random.Random, names: str) -> Options:
    """Returns True or False for each name."""
    return {name: draw_bool(rng) for name in names.split()}


def draw_experts(rng: random.Random, count: str = "num_experts") -> Options:
    """Returns the options of a mixture of experts."""
    return {count: rng.randint(2, 5), "num_experts_per_tok": rng.randint(1, 2)}


def draw_llama(rng: random.Random) -> Options:
    """Returns the options of Llama."""
    sizes = draw_sizes(rng, (None, 12)) | draw_rope(rng)
    return sizes | draw_flags(rng, "attention_bias mlp_bias")


def draw_mistral(rng: random.Random) -> Options:
    """Returns the options of Mistral."""
    window = {"sliding_window": rng.choice((None, 3, 8))}
    return draw_sizes(rng, (None, 12)) | draw_rope(rng) | window


def draw_qwen2(rng: random.Random) -> Options:
    """Returns the options of Qwen2."""
    sizes = draw_sizes(rng)
    return sizes | draw_rope(rng) | draw_windows(rng, sizes["num_hidden_layers"])


def draw_qwen3(rng: random.Random) -> Options:
    """Returns the options of Qwen3."""
    sizes = draw_sizes(rng, (8, 12)) | draw_rope(rng)
    sizes |= draw_windows(rng, sizes["num_hidden_layers"])
    return sizes | draw_flags(rng, "attention_bias")


def draw_smollm3(rng: random.Random) -> Options:
    """Returns the options of SmolLM3."""
    sizes = draw_sizes(rng) | draw_rope(rng) | draw_flags(rng, "attention_bias")
    count = sizes["num_hidden_layers"]
    no_rope_layers = [rng.randint(0, 1) for _ in range(count)]
    return (
        sizes
        | draw_windows(rng, count)
        | draw_flags(rng, "mlp_bias")
        | {"no_rope_layers": rng.choice((None, no_rope_layers))}
        | {"no_rope_layer_interval": rng.randint(2, 4)}
    )


def draw_phi3(rng: random.Random) -> Options:
    """Returns the options of Phi-3."""
    sizes = draw_sizes(rng)
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    # The number of rotated values must be even.
    fraction = rng.choice((0.5, 1.0)) if head_dim % 4 == 0 else 1.0
    pairs = int(head_dim * fraction) // 2
    rope = {"rope_theta": 1e4, "partial_rotary_factor": fraction}
    factors = {
        f"{length}_factor": [rng.uniform(1, 4) for _ in range(pairs)]
        for length in ("short", "long")
    }
    kinds = {"rope_type": "default"}, {"rope_type": "longrope"} | factors
    return sizes | {
        "rope_parameters": rope | rng.choice(kinds),
        "original_max_position_embeddings": rng.choice((20, 64)),
        "sliding_window": rng.choice((None, 8)),
    }


def draw_mixtral(rng: random.Random) -> Options:
    """Returns the options of Mixtral."""
    return draw_mistral(rng) | draw_experts(rng, "num_local_experts")


def draw_olmoe(rng: random.Random) -> Options:
    """Returns the options of OLMoE."""
    options = draw_sizes(rng) | draw_rope(rng) | draw_experts(rng)
    return options | draw_flags(rng, "attention_bias norm_topk_prob")


def draw_qwen3_moe(rng: random.Random) -> Options:
    """Returns the options of Qwen3-MoE."""
    sizes = draw_sizes(rng, (8, 12)) | draw_rope(rng)
    count = sizes["num_hidden_layers"]
    windows = {"use_sliding_window": draw_bool(rng)}
    windows |= {"sliding_window": rng.choice((3, 8))}
    dense = rng.choice(([], rng.sample(range(count), 1)))
    flags = draw_flags(rng, "attention_bias norm_topk_prob")
    return sizes | draw_experts(rng) | windows | flags | {
        "moe_intermediate_size": rng.choice((16, 24)),
        "decoder_sparse_step": rng.randint(1, 2),
        "mlp_only_layers": dense,
    }  # fmt: skip


def draw_qwen3_5(rng: random.Random) -> Options:
    """Returns the options of Qwen3.5, dense."""
    sizes = draw_sizes(rng, (8, 16)) | draw_flags(rng, "attention_bias")
    count, num_key_heads = sizes["num_hidden_layers"], rng.choice((1, 2))
    # A model without attention is not supported, as its cache would have no positions.
    types = [rng.choice((LINEAR_ATTENTION, FULL)) for _ in range(count - 1)]
    types.insert(rng.randint(0, count - 1), FULL)
    return sizes | draw_rope(rng, partial_rotary_factor=rng.choice((0.25, 0.5))) | {
        "layer_types": types,
        "linear_num_key_heads": num_key_heads,
        "linear_num_value_heads": num_key_heads * rng.choice((1, 2)),
        "linear_key_head_dim": rng.choice((4, 8)),
        "linear_value_head_dim": rng.choice((6, 8)),
        "linear_conv_kernel_dim": rng.randint(2, 4),
        "initializer_range": 0.2,
    }  # fmt: skip


def draw_qwen3_5_moe(rng: random.Random) -> Options:
    """Returns the options of Qwen3.5 with experts."""
    widths = ("moe_intermediate_size", "shared_expert_intermediate_size")
    experts = draw_experts(rng) | {width: rng.choice((16, 24)) for width in widths}
    return draw_qwen3_5(rng) | experts


def draw_gpt_oss(rng: random.Random) -> Options:
    """Returns the options of gpt-oss."""
    sizes = draw_sizes(rng, (8, 12)) | draw_rope(rng)
    sizes |= draw_types(rng, sizes["num_hidden_layers"], SLIDING, FULL)
    experts = draw_experts(rng, "num_local_experts")
    # With these weights, activations are large enough to be clamped.
    window = {"sliding_window": rng.choice((3, 8)), "initializer_range": 0.4}
    return sizes | experts | window | draw_flags(rng, "attention_bias")


def draw_gemma2(rng: random.Random) -> Options:
    """Returns the options of Gemma 2."""
    sizes = draw_sizes(rng, (8, 12)) | draw_rope(rng)
    return (
        sizes
        | draw_types(rng, sizes["num_hidden_layers"], SLIDING, FULL)
        | draw_flags(rng, "attention_bias")
        | {"query_pre_attn_scalar": rng.choice((8, 16))}
        | {"sliding_window": rng.choice((3, 8))}
        | {"attn_logit_softcapping": rng.choice((None, 2.0, 50.0))}
        | {"final_logit_softcapping": rng.choice((None, 3.0, 30.0))}
    )


def draw_gemma3(rng: random.Random) -> Options:
    """Returns the options of Gemma 3."""
    ropes = {kind: draw_section(rng) for kind in (FULL, SLIDING)}
    options = draw_gemma2(rng) | {"rope_parameters": ropes}
    # The pattern only counts if `layer_types` is None.
    pattern = {"sliding_window_pattern": rng.choice((2, 3))}
    return options | pattern | {"attn_logit_softcapping": None}


def draw_qwen2_moe(rng: random.Random) -> Options:
    """Returns the options of Qwen2-MoE."""
    # With more layers, gradients would amplify rounding errors too much.
    count = rng.randint(1, 3)
    sizes = draw_sizes(rng) | draw_rope(rng) | {"num_hidden_layers": count}
    dense = rng.choice((None, rng.sample(range(count), 1)))
    flags = draw_flags(rng, "qkv_bias norm_topk_prob")
    return sizes | draw_windows(rng, count) | draw_experts(rng) | flags | {
        "moe_intermediate_size": rng.choice((16, 24)),
        "shared_expert_intermediate_size": rng.choice((12, 16)),
        "decoder_sparse_step": rng.randint(1, 2),
        "mlp_only_layers": dense,
    }  # fmt: skip


def draw_olmo2(rng: random.Random) -> Options:
    """Returns the options of OLMo 2."""
    return draw_sizes(rng) | draw_rope(rng) | draw_flags(rng, "attention_bias")


def draw_olmo3(rng: random.Random) -> Options:
    """Returns the options of OLMo 3."""
    options = draw_sizes(rng) | draw_flags(rng, "attention_bias")
    options |= draw_types(rng, options["num_hidden_layers"], SLIDING, FULL)
    ropes = {kind: draw_section(rng) for kind in (FULL, SLIDING)}
    window = {"sliding_window": rng.choice((3, 8))}
    return options | window | {"rope_parameters": ropes}


def draw_gemma(rng: random.Random) -> Options:
    """Returns the options of Gemma 1."""
    options = draw_sizes(rng, (8, 12)) | draw_rope(rng)
    return options | draw_flags(rng, "attention_bias")


def draw_gemma4(rng: random.Random) -> Options:
    """Returns the options of Gemma 4."""
    sizes = draw_sizes(rng, (8, 12)) | draw_flags(rng, "attention_bias")
    count = rng.randint(2, 6)
    types = [rng.choice((SLIDING, FULL)) for _ in range(count - 1)] + [FULL]
    # Layers can share only the keys and values of earlier layers of their type.
    num_shared = rng.randint(0, count - 1)
    while {*types[: count - num_shared]} != {*types}:
        num_shared -= 1
    # Layers that share keys and values need per-layer inputs in transformers 5.24.
    per_layer_width = 6 if num_shared else rng.choice((0, 6))
    fraction = {"partial_rotary_factor": rng.choice((0.25, 0.5, 1.0))}
    full = {"rope_type": "proportional", "rope_theta": 1e2, "factor": 2.0} | fraction
    full = rng.choice((full, draw_section(rng)))
    ropes = {SLIDING: draw_section(rng), FULL: full}
    flags = draw_flags(rng, "enable_moe_block attention_k_eq_v use_double_wide_mlp")
    return sizes | flags | {
        "num_hidden_layers": count,
        "layer_types": types,
        "num_kv_shared_layers": num_shared,
        "sliding_window": rng.choice((3, 8)),
        "rope_parameters": ropes,
        "global_head_dim": rng.choice((12, 16)),
        "num_global_key_value_heads": rng.choice((None, 1)),
        "hidden_size_per_layer_input": per_layer_width,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "final_logit_softcapping": rng.choice((None, 3.0, 30.0)),
        "initializer_range": 0.2,
        "num_experts": rng.randint(2, 5),
        "top_k_experts": rng.randint(1, 2),
        "moe_intermediate_size": rng.choice((16, 24)),
    }  # fmt: skip


def draw_gemma4_unified(rng: random.Random) -> Options:
    """Returns the options of Gemma 4 12B."""
    options = draw_gemma4(rng)
    absent = "hidden_size_per_layer_input vocab_size_per_layer_input enable_moe_block"
    absent += " num_experts top_k_experts moe_intermediate_size"
    return {key: x for key, x in options.items() if key not in absent.split()}


_GEMMA = "hidden_activation use_bidirectional_attention"
FAMILY_DRAWS = {
    "gemma4_text": FamilyDraw(draw_gemma4, f"{_GEMMA} vocab_size_per_layer_input"),
    "gemma4_unified_text": FamilyDraw(draw_gemma4_unified, _GEMMA),
    "llama": FamilyDraw(draw_llama),
    "mistral": FamilyDraw(draw_mistral),
    "qwen2": FamilyDraw(draw_qwen2),
    "qwen3": FamilyDraw(draw_qwen3),
    "smollm3": FamilyDraw(draw_smollm3),
    "phi3": FamilyDraw(draw_phi3),
    "mixtral": FamilyDraw(draw_mixtral),
    "olmoe": FamilyDraw(draw_olmoe, "hidden_act clip_qkv"),
    # `num_local_experts` is another name of `num_experts`.
    "qwen3_moe": FamilyDraw(draw_qwen3_moe, "hidden_act num_local_experts"),
    "qwen2_moe": FamilyDraw(draw_qwen2_moe),
    "qwen3_5_text": FamilyDraw(draw_qwen3_5),
    "qwen3_5_moe_text": FamilyDraw(draw_qwen3_5_moe),
    "gpt_oss": FamilyDraw(draw_gpt_oss, "hidden_act swiglu_alpha swiglu_limit"),
    "gemma2": FamilyDraw(draw_gemma2, _GEMMA),
    "gemma3_text": FamilyDraw(
        draw_gemma3, f"{_GEMMA} attn_logit_softcapping _sliding_window_pattern"
    ),
    "olmo2": FamilyDraw(draw_olmo2),
    "olmo3": FamilyDraw(draw_olmo3),
    "gemma": FamilyDraw(draw_gemma, "hidden_act use_bidirectional_attention"),
}
