"""`qlora-jax models`: the table of supported models."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..gguf.values_out import check_gguf_config
from ..models.families import FAMILIES, TEXT_HALVES
from ..models.family import Family, UnsupportedOption
from .configs import ModelsConfig

# The config of a small model. It has the options that some families require; all others
# have their defaults. `vocab_size` must be the default of `vocab_size_per_layer_input`.
_SMALL = {"vocab_size": 262_144, "hidden_size": 256, "intermediate_size": 64}
_SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 32}
_SMALL |= {"max_position_embeddings": 64, "num_experts_per_tok": 2}
# A family has GGUF files if llama.cpp supports it with one of these. For some families,
# it needs a value that is not the default, but that many published models have.
_GGUF_OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"norm_topk_prob": True},
    {"residual_multiplier": 0.5},
    {"sliding_window": None},
)
_CONTEXT_LENGTH = 1 << 20  # longer than windows, so that these have an effect


class _Published(NamedTuple):
    """The models of a family on the hub."""

    title: str
    sizes: str
    example: str


_PUBLISHED = {
    "llama": _Published(
        "Llama 2 and 3, SmolLM2", "135M to 405B", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "mistral": _Published(
        "Mistral", "7B to 123B", "mistralai/Mistral-7B-Instruct-v0.3"
    ),
    "qwen2": _Published("Qwen2 and 2.5", "0.5B to 72B", "Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen3": _Published("Qwen3", "0.6B to 32B", "Qwen/Qwen3-0.6B"),
    "smollm3": _Published("SmolLM3", "3B", "HuggingFaceTB/SmolLM3-3B"),
    "phi3": _Published(
        "Phi-3 and Phi-4", "3.8B to 14B", "microsoft/Phi-4-mini-instruct"
    ),
    "mixtral": _Published(
        "Mixtral", "8x7B, 8x22B", "mistralai/Mixtral-8x7B-Instruct-v0.1"
    ),
    "olmoe": _Published("OLMoE", "7B-A1B", "allenai/OLMoE-1B-7B-0924-Instruct"),
    "qwen2_moe": _Published(
        "Qwen2 with experts", "14B-A2.7B, 57B-A14B", "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    ),
    "qwen3_moe": _Published(
        "Qwen3 with experts", "30B-A3B, 235B-A22B", "Qwen/Qwen3-30B-A3B"
    ),
    "qwen3_5_text": _Published("Qwen3.5", "0.8B to 27B", "Qwen/Qwen3.5-0.8B"),
    "qwen3_5_moe_text": _Published(
        "Qwen3.5 with experts", "35B-A3B and larger", "Qwen/Qwen3.5-35B-A3B"
    ),
    "gpt_oss": _Published("gpt-oss", "20B, 120B", "openai/gpt-oss-20b"),
    "gemma": _Published("Gemma 1", "2B, 7B", "google/gemma-1.1-2b-it"),
    "gemma2": _Published("Gemma 2", "2B to 27B", "google/gemma-2-2b-it"),
    "gemma3_text": _Published("Gemma 3", "270M to 27B", "google/gemma-3-1b-it"),
    "gemma4_text": _Published(
        "Gemma 4", "E2B, E4B, 31B, 26B-A4B", "google/gemma-4-E2B-it"
    ),
    "gemma4_unified_text": _Published("Gemma 4, 12B", "12B", "google/gemma-4-12B-it"),
    "deepseek_v2": _Published(
        "DeepSeek V2", "16B-A2.4B, 236B-A21B", "deepseek-ai/DeepSeek-V2-Lite-Chat"
    ),
    "deepseek_v3": _Published(
        "DeepSeek V3 and R1", "671B-A37B", "unsloth/DeepSeek-V3-bf16"
    ),
    "kimi_k2": _Published("Kimi K2", "1T-A32B", "moonshotai/Kimi-K2-Thinking"),
    "glm4_moe_lite": _Published("GLM-4.7-Flash", "30B-A3B", "zai-org/GLM-4.7-Flash"),
    "llama4_text": _Published(
        "Llama 4", "109B-A17B, 400B-A17B", "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    ),
    "lfm2": _Published("LFM2", "350M to 2.6B", "LiquidAI/LFM2-1.2B"),
    "ministral3": _Published(
        "Ministral 3", "3B to 14B", "mistralai/Ministral-3-3B-Reasoning-2512"
    ),
    "olmo2": _Published("OLMo 2", "1B to 32B", "allenai/OLMo-2-0425-1B-Instruct"),
    "olmo3": _Published("OLMo 3", "7B, 32B", "allenai/Olmo-3-7B-Instruct"),
    "granite": _Published("Granite 3", "2B, 8B", "ibm-granite/granite-3.3-2b-instruct"),
    "glm4": _Published("GLM-4", "9B, 32B", "zai-org/GLM-4-9B-0414"),
    "cohere2": _Published(
        "Cohere 2", "7B to 111B", "CohereLabs/c4ai-command-r7b-12-2024"
    ),
    "seed_oss": _Published("Seed-OSS", "36B", "ByteDance-Seed/Seed-OSS-36B-Instruct"),
    "arcee": _Published("Arcee", "4.5B", "arcee-ai/AFM-4.5B"),
    "starcoder2": _Published("StarCoder2", "3B to 15B", "bigcode/starcoder2-3b"),
}


@dataclass(frozen=True)
class ModelFamily:
    """A supported family of models.

    Attributes:
        title: Its name.
        sizes: The sizes of its published models, in parameters.
        model_types: The values of `model_type` in `config.json`. Those after the first
            have a vision part, which is not read.
        gguf: Whether its models can be written as GGUF files, unless llama.cpp does not
            support their options.
        options: The options of `config.json` that are read, besides the common ones.
        fixed: The options with one supported value, and this value.
        example: The id of one of its models on the hub.

    Example:
        >>> from qlora_jax.llm import app
        >>> families = app.models(app.ModelsConfig()).families
        >>> [x.gguf for x in families if "qwen3" in x.model_types]
        [True]
    """

    title: str
    sizes: str
    model_types: tuple[str, ...]
    gguf: bool
    options: tuple[str, ...]
    fixed: Mapping[str, object]
    example: str


@dataclass(frozen=True)
class Models:
    """The result of `models`.

    Attributes:
        families: The families of models.

    Example:
        >>> from qlora_jax.llm import app
        >>> str(app.Models(())).splitlines()[0]
        '| Family | Sizes | `model_type` | GGUF | Example |'
    """

    families: tuple[ModelFamily, ...]

    def __str__(self):
        titles = "Family", "Sizes", "`model_type`", "GGUF", "Example"
        models = [
            (
                family.title,
                family.sizes,
                _code(*family.model_types),
                "yes" if family.gguf else "no",
                _code(family.example),
            )
            for family in self.families
        ]
        option_titles = "Family", "Options", "Options with one supported value"
        options = [
            (
                family.title,
                _code(*family.options),
                _code(*(f"{k}={json.dumps(x)}" for k, x in family.fixed.items())),
            )
            for family in self.families
        ]
        return "\n".join(
            [*_markdown(titles, models), "", *_markdown(option_titles, options)]
        )


def models(config: ModelsConfig) -> Models:
    """Returns the supported families of models; reads no files.

    Args:
        config: The settings, of which there are none.

    Example:
        >>> from qlora_jax.llm import app
        >>> "Qwen3" in [x.title for x in app.models(app.ModelsConfig()).families]
        True
    """
    return Models(tuple(_describe(FAMILIES[name]) for name in _PUBLISHED))


def _describe(family: Family) -> ModelFamily:
    name, published = family.model_type, _PUBLISHED[family.model_type]
    wrappers = (x for x, (text_type, *_) in TEXT_HALVES.items() if text_type == name)
    fixed = _find_fixed_options(family)
    return ModelFamily(
        published.title,
        published.sizes,
        (name, *wrappers),
        any(_has_gguf(family, options) for options in _GGUF_OPTIONS),
        tuple(sorted({*family.keys.split()} - fixed.keys())),
        fixed,
        published.example,
    )


def _find_fixed_options(family: Family) -> dict[str, object]:
    """Returns the options for which the family rejects all values but one."""
    fixed = {}
    for key in sorted(family.keys.split()):
        try:
            family.read_config({**_SMALL, key: "another value"})
        except UnsupportedOption as error:
            fixed |= error.supported
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            pass  # the option has several values, and this is not one of them
    return fixed


def _has_gguf(family: Family, options: dict[str, object]) -> bool:
    with warnings.catch_warnings(action="ignore"):  # about some rotary positions
        try:
            config = family.read_config({**_SMALL, **options})
            check_gguf_config(config, _CONTEXT_LENGTH)
        except ValueError:
            return False
    return True


def _code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]
