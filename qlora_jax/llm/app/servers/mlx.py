"""mlx-lm 0.32."""

import math
from collections.abc import Mapping
from typing import Any

import qlora_jax as ql

from ...models.config import DecoderConfig
from .server import AWQ, Server

# Families for which mlx-lm supports fewer types of rotary positions than for others,
# and the types that it supports for them.
_ROPES = dict.fromkeys(("qwen3_moe", "mixtral", "gemma2", "glm4", "phi3"), ("default",))
# Families for which mlx-lm supports biases of the query, key and value layers.
_BIASES = ("glm4", "granite", "llama", "olmo2", "olmoe", "qwen2", "seed_oss", "smollm3")
# Families whose logits in mlx-lm were not compared with those of transformers.
_UNTESTED = (
    "arcee",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma4_text",
    "gemma4_unified_text",
    "glm4_moe_lite",
    "kimi_k2",
    "lfm2",
    "llama4_text",
    "ministral3",
    "olmo3",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "starcoder2",
)
# Families in which mlx-lm assumes a head size of `hidden_size / num_heads`.
_HEADS = ("granite", "qwen2", "mixtral", "phi3")


def _find_difference(
    config_json: Mapping[str, Any], config: DecoderConfig, fmt: str | None
) -> str | None:
    if not config_json:
        return None
    from ...models.families import text_only_config  # imports Flax

    raw = text_only_config(config_json)
    family, is_gemma3 = raw["model_type"], raw["model_type"] == "gemma3_text"
    if family in _UNTESTED:
        return f"mlx-lm was not tested with {family}"
    rope = (raw | ql.io.older_config_keys(raw)).get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    # mlx-lm uses sliding windows only in Gemma 3. There, every `period`-th layer has
    # none, and all other layers have one.
    max_length = raw.get("max_position_embeddings") or math.inf
    has_window = [(x.window or math.inf) < max_length for x in config.layers]
    period = raw.get("sliding_window_pattern") or 6
    mlx_window = [is_gemma3 and (i + 1) % period != 0 for i in range(len(has_window))]
    problems = {
        "experts": family == "gpt_oss",
        f"{rope_type} rotary positions": rope_type
        not in _ROPES.get(family, ("default", "linear", "llama3")),
        "the window": has_window != mlx_window,
        "biases": config.qkv_bias and family not in _BIASES,
        "the size of heads": family in _HEADS
        and config.head_dim != config.hidden_size // config.num_heads,
        "the cap of logits": is_gemma3 and config.logit_soft_cap is not None,
    }
    parts = [part for part, is_wrong in problems.items() if is_wrong]
    return f"mlx-lm computes {' and '.join(parts)} differently" if parts else None


MLX = Server(
    name="mlx",
    reads=("float", "awq", "mlx"),
    bases=AWQ,
    adapter="mlx",
    adapts_experts=False,
    needs_older_keys=True,  # it does not read every config that transformers 5 writes
    find_difference=_find_difference,
    command="mlx_lm.server --model {base}",
    option=" --adapter-path {adapter}",
    port=8080,
    model="default_model",
    adapter_fields={"adapters": "{adapter}"},
)
