"""Models and chips of `aot_scale.py`: shapes of each model's `config.json`."""

from dataclasses import dataclass
from typing import Any

from memory import MODELS as SMALLER

from qlora_jax.llm.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.llm.models.families import config_from_hf


def _decoder(*sizes: int, heads: int, rope: Rope, **options: Any) -> DecoderConfig:
    """Takes `sizes` as vocabulary, hidden size, MLP size and number of layers."""
    return DecoderConfig(
        *sizes,
        num_heads=heads,
        layers=(LayerKind(rope),),
        num_kv_heads=8,
        tie_embeddings=False,
        **options,
    )


def _gpt_oss(layers: int, experts: int) -> DecoderConfig:
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    overrides = {"num_hidden_layers": layers, "num_local_experts": experts}
    overrides |= {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    return config_from_hf({**sizes, **heads, **overrides, "num_experts_per_tok": 4})


_QWEN: dict[str, Any] = {"heads": 40, "rope": Rope(1e6), "qkv_bias": True}
_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_QWEN3_1_7B = _QWEN3 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
_QWEN3_4B = _QWEN3 | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
# The text halves of models from 2026. The sizes are those of their `config.json`, as
# copied in THUDM/slime (scripts/models), in the notebook on Gemma 4 of
# rasbt/LLMs-from-scratch (ch05/17_gemma4), and in the defaults of transformers.
_QWEN3_5: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
}
_QWEN3_5_27B = _QWEN3_5 | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 48,
}
_QWEN3_5_35B_A3B = _QWEN3_5 | {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_GEMMA_4: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "vocab_size": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
}
_GEMMA_4_31B = _GEMMA_4 | {
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
_GEMMA_4_E4B = _GEMMA_4 | {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
}
_GEMMA_4_26B_A4B = _GEMMA_4 | {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
CONFIGS = {
    "Qwen3.5-27B": _QWEN3_5_27B,
    "Qwen3.5-35B-A3B": _QWEN3_5_35B_A3B,
    "Gemma-4-E4B": _GEMMA_4_E4B,
    "Gemma-4-31B": _GEMMA_4_31B,
    "Gemma-4-26B-A4B": _GEMMA_4_26B_A4B,
}
MODELS = {
    "Llama-3.2-3B": SMALLER["Llama-3.2-3B"],
    "Llama-3.1-8B": SMALLER["Llama-3.1-8B"],
    "Qwen2.5-14B": _decoder(152064, 5120, 13824, 48, **_QWEN),
    "Qwen2.5-32B": _decoder(152064, 5120, 27648, 64, **_QWEN),
    "Llama-3.1-70B": SMALLER["Llama-3.1-70B"],
    "Llama-3.1-405B": _decoder(
        128256, 16384, 53248, 126, heads=128, rope=Rope(500_000.0)
    ),
    "Qwen3-1.7B": config_from_hf(_QWEN3_1_7B),
    "Qwen3-4B": config_from_hf(_QWEN3_4B),
    "Qwen3-30B-A3B": config_from_hf(_QWEN3_MOE),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    **{name: config_from_hf(raw) for name, raw in CONFIGS.items()},
}


@dataclass(frozen=True)
class Chip:
    """Rates of a chip, per second.

    Attributes:
        flops: Peak of bfloat16 products.
        hbm_rate: HBM's bandwidth.
        ici_rate: Bytes sent to neighbours, over all links together, one way.
        host_rate: Bytes between the host and a chip, one way.
    """

    flops: float
    hbm_rate: float
    ici_rate: float
    host_rate: float


# Google Cloud's pages of the chips: 197 and 918 TFLOP/s, 819 and 1640 GB/s, 1600 and
# 3584 Gbit/s of interconnect. PCIe is not stated there: 14 GB/s is half of a fourth
# generation link of 16 lanes.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 14e9),
    "v6e": Chip(918e12, 1640e9, 448e9, 14e9),
}
# Bytes that a program may use, as the TPU compiler reports them, or as in the
# descriptions of GPUs in `gpu_hlo.py`.
HBM = {
    "v5e": 15.75 * 2**30,
    "v6e": 31.24 * 2**30,
    "h100": 84_978_434_048,
    "t4": 15_843_721_216,
}


def chip_of(record: dict) -> str:
    """Returns the name of a row's chips."""
    return record["topology"].partition(":")[0]
