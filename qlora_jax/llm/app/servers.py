"""The servers of `export --for`: what each of them loads, and how it starts.

What a record says was checked in the server's source code or, if the server runs on a
CPU, by running it.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import qlora_jax as ql

from ..models.config import DecoderConfig
from ..printable import printable

_INT4_PACKING: Any = ql.QLoRAConfig(fmt="int4_f16").packing
INT4_FMTS: tuple[str, ...] = _INT4_PACKING.format.equivalents  # int4_f16 and q4_0
# For each format of `export` that writes a packed model, the number formats that it
# can hold. The first one is the default.
FMTS_BY_FORMAT: dict[str, tuple[str, ...]] = {"bitsandbytes": ("nf4", "fp4")}
FMTS_BY_FORMAT |= {"awq": INT4_FMTS, "compressed-tensors": INT4_FMTS}
FMTS_BY_FORMAT |= {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4",)}
# For `Server.bases`: number formats, and the format of `export` for each of them.
BITSANDBYTES = dict.fromkeys(FMTS_BY_FORMAT["bitsandbytes"], "bitsandbytes")
AWQ = dict.fromkeys(INT4_FMTS, "awq")
E2M1 = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
GGUF = dict.fromkeys(INT4_FMTS, "gguf")  # in GGUF: Q4_0, in blocks of 32
# The `quant_method`s in a model's config that vLLM and SGLang load. "float" stands for
# a model without a `quant_method`.
_METHODS = ("float", "bitsandbytes", "compressed-tensors", "awq")

# A function that returns what a server computes differently, or None. Its arguments
# are the model's `config.json`, the config of the decoder, and the number format of the
# base (None for floats).
FindDifference = Callable[[Mapping[str, Any], DecoderConfig, str | None], str | None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server loads a base and an adapter.

    In the comments below, a format is a value of `export --format`, such as awq, and a
    number format is the format of packed weights, such as int4_f16.
    """

    name: str
    # 1. What it loads.
    reads: tuple[str, ...] = ()  # the `quant_method`s of models that need no export
    # The format of a packed base, by its number format.
    bases: Mapping[str, str] = field(default_factory=dict)
    floats: str = "merged"  # the format of a float base
    adapter: str | None  # the format of an adapter; None if adapters must be merged
    adapts_experts: bool = True  # whether it loads adapters of experts
    # 2. What it computes differently. None if it computes every model exactly.
    find_difference: FindDifference | None = None
    # 3. How it starts. The command and the option may contain "{base}", "{adapter}",
    # "{rank}" and "{flags}".
    command: str
    quote: Callable[[str], str] = shlex.quote  # quotes paths in the command
    option: str = ""  # added to the command if there is an adapter
    ranks: tuple[int, ...] = ()  # an adapter's rank is rounded up to one of these
    flags: Mapping[str, str] = field(default_factory=dict)  # by the format of the base
    # 4. Requests to its OpenAI-compatible API. The texts may contain "{base}" and
    # "{adapter}".
    port: int | None = None  # None if it has no API
    model: str = "{base}"  # the name of the base in requests
    # Added to requests to select the adapter.
    adapter_fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loads_gguf(self) -> bool:
        """Whether the server loads GGUF files, in which floats are float16."""
        return self.floats == "gguf"

    def describe_start(
        self,
        base: str,
        adapter: str | None,
        *,
        base_format: str,
        rank: int,
        is_chat: bool,
        system: str | None,
    ) -> str:
        """Returns the command that starts the server, and a request to it.

        `base` and `adapter` are their paths in the command. The request has the system
        message `system`, if there is one.
        """
        if printable(base) != base:  # a line break would end the command
            raise ValueError(
                f"`model` must have a path without control characters. Got {base!r}."
            )
        paths = {"base": base} | ({"adapter": adapter} if adapter else {})
        command = (self.command + (self.option if adapter else "")).format(
            **{name: self.quote(path) for name, path in paths.items()},
            rank=next((n for n in self.ranks if n >= rank), rank),
            flags=self.flags.get(base_format, ""),
        )
        if self.port is None:
            return command
        body = {"model": self.model, **(self.adapter_fields if adapter else {})}
        body = {
            key: value.format(**paths) if isinstance(value, str) else value
            for key, value in body.items()
        }
        if is_chat:
            messages = [{"role": "system", "content": system}] if system else []
            body["messages"] = [*messages, {"role": "user", "content": "Hello"}]
        else:
            body |= {"prompt": "Hello", "max_tokens": 100}
        url = f"http://localhost:{self.port}/v1/{'chat/' * is_chat}completions"
        data = shlex.quote(json.dumps(body))
        curl = f"curl {url} -H 'Content-Type: application/json' -d {data}"
        return f"{command}\n{curl}"


_NVFP4 = "its kernel rounds a tensor's float32 scale to bfloat16"
VLLM = Server(
    name="vllm",
    reads=_METHODS,
    bases={**BITSANDBYTES, **AWQ, **E2M1},
    adapter="peft-portable",
    find_difference=lambda config_json, config, fmt: _NVFP4 if fmt == "nvfp4" else None,
    command="vllm serve {base}",
    option=" --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}",
    ranks=(8, 16, 32, 64, 128, 256, 320, 512),
    port=8000,
    adapter_fields={"model": "adapter"},
)

SGLANG = Server(
    name="sglang",
    reads=_METHODS,
    bases={**BITSANDBYTES, **AWQ},
    adapter="peft-portable",
    command="python -m sglang.launch_server --model-path {base}{flags}",
    option=" --enable-lora --lora-paths adapter={adapter}",
    flags={"bitsandbytes": " --load-format bitsandbytes"},
    port=30000,
    adapter_fields={"lora_path": "adapter"},
)

LLAMA_CPP = Server(
    name="llama.cpp",
    bases=GGUF,
    floats="gguf",
    adapter="gguf-lora",
    adapts_experts=False,
    command="llama-server -m {base}",
    option=" --lora {adapter}",
    port=8080,
    adapter_fields={"lora": [{"id": 0, "scale": 1.0}]},
)

# Since 0.34.1, `ollama create` rejects `ADAPTER` (ollama's pull request 14969).
OLLAMA = Server(
    name="ollama",
    bases=GGUF,
    floats="gguf",
    adapter=None,
    command="echo FROM {base} > Modelfile && ollama create adapted -f Modelfile && "
    "ollama run adapted",
    port=11434,
    model="adapted",
)

# PEFT silently skips packed modules, so transformers must decode them.
_DECODED = (
    ", quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)"
)
TRANSFORMERS = Server(
    name="transformers",
    reads=("float", "bitsandbytes", "compressed-tensors"),
    bases={**BITSANDBYTES, **dict.fromkeys(INT4_FMTS, "compressed-tensors"), **E2M1},
    adapter="peft",
    command="model = transformers.AutoModelForCausalLM.from_pretrained({base}{flags})",
    quote=repr,  # as Python string literals
    option="; model = peft.PeftModel.from_pretrained(model, {adapter})",
    flags=dict.fromkeys(("compressed-tensors", *E2M1), _DECODED),
)

# The families whose logits in mlx-lm 0.32 were compared with those of transformers.
_TESTED_WITH_MLX = frozenset(
    "gemma2 gemma3_text llama mistral mixtral olmo2 olmoe phi3 qwen2 "
    "qwen3 qwen3_moe smollm3".split()
)
# Families for which mlx-lm supports only the default rotary positions.
_DEFAULT_ROPE = ("qwen3_moe", "mixtral", "gemma2", "phi3")
# Families for which mlx-lm supports biases of the query, key and value layers.
_BIASES = ("llama", "olmo2", "olmoe", "qwen2", "smollm3")
# Families in which mlx-lm assumes a head size of `hidden_size / num_heads`.
_HEADS = ("qwen2", "mixtral", "phi3")


def _find_mlx_difference(
    config_json: Mapping[str, Any], config: DecoderConfig, fmt: str | None
) -> str | None:
    from qlora_jax.io.model_folder import older_config_keys

    from ..models.families import text_only_config  # imports Flax

    raw = text_only_config(config_json)
    family, is_gemma3 = raw["model_type"], raw["model_type"] == "gemma3_text"
    if family not in _TESTED_WITH_MLX:
        return f"mlx-lm was not tested with {family}"
    rope = (raw | older_config_keys(raw)).get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    rope_types = ("default",)
    if family not in _DEFAULT_ROPE:
        rope_types += ("linear", "llama3")
    # mlx-lm uses sliding windows only in Gemma 3. There, every `period`-th layer has
    # none, and all other layers have one.
    max_length = raw.get("max_position_embeddings") or float("inf")
    has_window = [(x.window or max_length) < max_length for x in config.layers]
    period = raw.get("sliding_window_pattern") or 6
    mlx_window = [is_gemma3 and (i + 1) % period != 0 for i in range(len(has_window))]
    head_size = config.hidden_size // config.num_heads
    problems = {
        f"{rope_type} rotary positions": rope_type not in rope_types,
        "the window": has_window != mlx_window,
        "biases": config.qkv_bias and family not in _BIASES,
        "the size of heads": family in _HEADS and config.head_dim != head_size,
        "the cap of logits": is_gemma3 and config.logit_soft_cap is not None,
    }
    parts = [part for part, is_wrong in problems.items() if is_wrong]
    return f"mlx-lm computes {' and '.join(parts)} differently" if parts else None


MLX = Server(
    name="mlx",
    bases=AWQ,
    adapter="mlx",
    adapts_experts=False,
    find_difference=_find_mlx_difference,
    command="mlx_lm.server --model {base}",
    option=" --adapter-path {adapter}",
    port=8080,
    model="default_model",
    adapter_fields={"adapters": "{adapter}"},
)

_ALL = (VLLM, SGLANG, LLAMA_CPP, OLLAMA, MLX, TRANSFORMERS)
SERVERS: dict[str, Server] = {server.name: server for server in _ALL}
