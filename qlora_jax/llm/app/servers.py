"""`qlora-jax pairs`: formats in which servers load a base and an adapter correctly."""

import json
import math
import pathlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import qlora_jax as ql

from ..data.chat_tokenizer import open_tokenizer
from ..models.families import text_config
from .base_model import (
    BaseModel,
    LoadOptions,
    open_model,
    open_run,
    training_load_options,
)
from .configs import FMTS, ExportConfig, PairsConfig
from .contents import format_table

AS_IS, MERGED = "as it is", "added to the base"
NOT_RUN = "none"  # the form of a model that the server cannot run
_INT4 = FMTS["awq"]


@dataclass(frozen=True)
class Server:
    """How a server loads a base and an adapter. A form is a format of `export`."""

    bases: Mapping[str, str]  # number format of a packed base -> its form
    reads: tuple[str, ...]  # the `quant_method`s of folders that need no export
    floats: str  # the form of a float base
    adapter: str | None  # the form of an adapter; None if adapters must be merged
    command: str  # starts the server
    option: str = ""  # added to the command for an adapter
    # Form of the base -> more options of the command.
    flags: Mapping[str, str] = field(default_factory=dict)
    # Number formats of weights that the server rounds -> how it rounds them.
    rounded: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None  # of the OpenAI-compatible API; None without one
    model: str = "{base}"  # the name of the base in requests
    # Fields of requests that select the adapter.
    with_adapter: Mapping[str, Any] = field(default_factory=dict)


_BITSANDBYTES = dict.fromkeys(FMTS["bitsandbytes"], "bitsandbytes")
_VLLM_BASES = {**_BITSANDBYTES, **dict.fromkeys(_INT4, "awq")}
_E2M1 = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
_METHODS = ("bitsandbytes", "compressed-tensors", "awq", "gptq")
# PEFT silently skips packed modules, so transformers must decode them.
_DECODED = ", quantization_config=transformers.CompressedTensorsConfig("
_DECODED += "run_compressed=False)"
# Each entry was checked in the server's code or, if it runs on a CPU, by running it.
SERVERS = {
    "vllm": Server(
        bases={**_VLLM_BASES, **_E2M1},
        reads=_METHODS,
        floats="merged",
        adapter="peft-portable",
        command="vllm serve {base}",
        option=" --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}",
        rounded={"nvfp4": "its kernel rounds a tensor's float32 scale to bfloat16"},
        port=8000,
        with_adapter={"model": "adapter"},
    ),
    "sglang": Server(
        bases=_VLLM_BASES,
        reads=_METHODS,
        floats="merged",
        adapter="peft-portable",
        command="python -m sglang.launch_server --model-path {base}{flags}",
        option=" --enable-lora --lora-paths adapter={adapter}",
        flags={"bitsandbytes": " --load-format bitsandbytes"},
        port=30000,
        with_adapter={"lora_path": "adapter"},
    ),
    "llama.cpp": Server(
        bases=dict.fromkeys(_INT4, "gguf"),
        reads=(),
        floats="gguf",
        adapter="gguf-lora",
        command="llama-server -m {base}",
        option=" --lora {adapter}",
        port=8080,
        with_adapter={"lora": [{"id": 0, "scale": 1.0}]},
    ),
    # Since 0.34.1, `ollama create` rejects `ADAPTER` (ollama's pull request 14969).
    "ollama": Server(
        bases={},
        reads=(),
        floats="gguf",
        adapter=None,
        command="ollama create adapted -f Modelfile && ollama run adapted",
        port=11434,
        model="adapted",
    ),
    "mlx": Server(
        bases=dict.fromkeys(_INT4, "awq"),
        reads=("awq", "mlx"),
        floats="merged",
        adapter="mlx",
        command="mlx_lm.server --model {base}",
        option=" --adapter-path {adapter}",
        port=8080,
        model="default_model",
        with_adapter={"adapters": "{adapter}"},
    ),
    "transformers": Server(
        bases={**_BITSANDBYTES, **dict.fromkeys(_INT4, "compressed-tensors"), **_E2M1},
        reads=_METHODS[:2],
        floats="merged",
        adapter="peft",
        command="model = transformers.AutoModelForCausalLM.from_pretrained("
        '"{base}"{flags})',
        option='; model = peft.PeftModel.from_pretrained(model, "{adapter}")',
        flags=dict.fromkeys(("compressed-tensors", *_E2M1), _DECODED),
    ),
}


@dataclass(frozen=True)
class Pair:
    """The formats of a base and an adapter for a server.

    Attributes:
        server: The server.
        base: The format of `export` for the base, or "as it is".
        adapter: The format of the adapter, or "added to the base".
        exact: Whether the server uses exactly the weights that training used.
        why: Why it is exact or not.

    Example:
        >>> from qlora_jax.llm import app
        >>> app.Pair("mlx", "as it is", "mlx", True, "the weights are the same").exact
        True
    """

    server: str
    base: str
    adapter: str
    exact: bool
    why: str

    def __str__(self):
        exact = "exact" if self.exact else "not exact"
        return f"base {self.base}, adapter {self.adapter}, {exact}: {self.why}"


@dataclass(frozen=True)
class Pairs:
    """The result of `pairs`.

    Attributes:
        packed: How the base was packed in training.
        servers: The formats for each server.

    Example:
        >>> from qlora_jax.llm import app
        >>> print(app.Pairs("nf4 in blocks of 64", ()).packed)
        nf4 in blocks of 64
    """

    packed: str
    servers: tuple[Pair, ...]

    def __str__(self):
        rows = [("server", "base", "adapter", "exact", "why")]
        for pair in self.servers:
            exact = "yes" if pair.exact else "no"
            rows.append((pair.server, pair.base, pair.adapter, exact, pair.why))
        return "\n".join([f"base: {self.packed}", *format_table(rows, "<<<<<")])


def pairs(config: PairsConfig) -> Pairs:
    """Returns the formats for each server, and whether they keep the weights exactly.

    Reads no weights. Assumes that the adapter was trained on the model as it is stored,
    unless `fmt` or the settings of the adapter's run differ.

    Args:
        config: The model and the adapter.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> table = app.pairs(app.PairsConfig(model, fmt="int4_f16", block_size=32))
        >>> {x.server: (x.base, x.exact) for x in table.servers}["llama.cpp"]
        ('gguf', True)
    """
    model, options = open_pair(config)
    packing = _find_packing(model, options)
    packed = "float" if packing is None else f"{packing[0]} in blocks of {packing[1]}"
    return Pairs(packed, tuple(pair_for(name, model, options) for name in SERVERS))


def open_pair(config: PairsConfig | ExportConfig) -> tuple[BaseModel, LoadOptions]:
    """Returns a model with its adapter, and how training read the model."""
    if config.run is None:
        model = open_model(str(config.model), config.adapter)
    else:
        model, _ = open_run(config.run, getattr(config, "step", None), config.model)
    options = training_load_options(config, model)
    return model if model.replaces_weights else model.with_adapter(), options


def _find_packing(model: BaseModel, options: LoadOptions) -> tuple[str, int] | None:
    """Returns the format and block size of the base in training; None for floats."""
    packing = options.get("packing") or model.stored_packing
    return None if packing is None else (packing.fmt, packing.block_size)


def pair_for(
    name: str, model: BaseModel, options: LoadOptions, *, tokenizer: bool = True
) -> Pair:
    """Returns the formats for a server, if training read the model with `options`.

    An adapter that the server cannot load is merged. Otherwise the base keeps its form
    if the server reads it, or is exported in the server's form for its number format.
    If `tokenizer` is false, a GGUF file need not contain the tokenizer.
    """
    server, packing = SERVERS[name], _find_packing(model, options)

    def pair(base: str, adapter: str, exact: bool, why: str) -> Pair:
        return Pair(name, base, adapter, exact, why)

    def merged(why: str) -> Pair:
        return pair(server.floats, MERGED, False, f"{why}: the sum is rounded")

    if server.floats == "gguf":
        # Imported late, because gguf takes long to import and few commands need it.
        from ..gguf.decoder_out import check_gguf_source

        try:
            check_gguf_source(model.files, tokenizer=tokenizer)
        except ValueError as error:
            return pair(NOT_RUN, NOT_RUN, False, str(error))
    # Does the server load such adapters?
    adapters = ql.leaves_by_path(model.lora)
    kinds = {*map(type, adapters.values())}
    is_plain = not model.replaces_weights and kinds <= {ql.LoRA}
    if server.adapter is None:
        return merged("it does not support adapters")
    if server.adapter != "peft" and not is_plain:
        return merged("it supports only plain LoRA adapters")
    is_gguf, needs_gguf = model.path.suffix == ".gguf", server.floats == "gguf"
    has_experts = packing is not None and model.config.experts is not None
    if has_experts and server.floats == "merged":
        return merged("it is not known to load experts in 4 bits")
    if name in ("mlx", "llama.cpp") and any("/experts/" in path for path in adapters):
        return merged("it does not support adapters of experts")
    # A float base keeps its form if the server reads it.
    problem = _mlx_problem(model) if name == "mlx" else None
    if packing is None:
        if needs_gguf and not is_gguf:
            return pair("gguf", server.adapter, False, "weights are rounded to float16")
        # mlx-lm does not read every config that transformers 5 writes.
        keeps_form = is_gguf == needs_gguf and not (
            name == "mlx" and _lacks_older_keys(model)
        )
        form = AS_IS if keeps_form else server.floats
        why = problem or "the weights are the same"
        return pair(form, server.adapter, problem is None, why)
    # A packed base keeps its form if training used it as it is stored.
    fmt, block_size = packing
    is_read = needs_gguf if is_gguf else _is_read(server, model, fmt)
    form = AS_IS if is_read and not options else server.bases.get(fmt)
    if form == AS_IS and name == "mlx" and _lacks_older_keys(model):
        form = server.bases.get(fmt)
    # GGUF's Q4_0 has blocks of 32 weights.
    if form is None or (form == "gguf" and block_size != 32):
        return merged(f"it does not support {fmt} in blocks of {block_size}")
    why = problem or server.rounded.get(fmt)
    if fmt == "int4_f16" and form == "awq" and model.config.unit_offset_norms:
        why = "it rounds scales to bfloat16, because Gemma overflows in float16"
    exact = why is None
    return pair(form, server.adapter, exact, why or "codes and scales are the same")


def _lacks_older_keys(model: BaseModel) -> bool:
    """Returns whether a folder's config lacks the older keys for renamed settings."""
    return model.path.is_dir() and bool(
        ql.io.older_config_keys(ql.io.read_config_json(model.path))
    )


# For mlx-lm 0.32: the types of rotary positions that it supports, for families in which
# it supports only a few, and the families in which it supports biases.
_MLX_ROPES = dict.fromkeys(("qwen3_moe", "mixtral", "gemma2", "phi3"), ("default",))
_MLX_BIASES = ("llama", "olmoe", "qwen2", "smollm3")
# Families in which mlx-lm assumes a head size of `hidden_size / num_heads`.
_MLX_HEADS = ("qwen2", "mixtral", "phi3")


def _mlx_problem(model: BaseModel) -> str | None:
    """Returns what mlx-lm computes differently from the model's config, or None."""
    if model.path.is_file():
        return None
    raw, config = ql.io.read_config_json(model.path), model.config
    raw = text_config(raw)
    family, is_gemma3 = raw["model_type"], raw["model_type"] == "gemma3_text"
    rope = (raw | ql.io.older_config_keys(raw)).get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    # mlx-lm has windows only in Gemma 3, in all layers except every `period`-th.
    max_length = raw.get("max_position_embeddings") or math.inf
    has_window = [(x.window or math.inf) < max_length for x in config.layers]
    period = raw.get("sliding_window_pattern") or 6
    mlx_window = [is_gemma3 and (i + 1) % period != 0 for i in range(len(has_window))]
    problems = {
        "experts": family == "gpt_oss",
        f"{rope_type} rotary positions": rope_type
        not in _MLX_ROPES.get(family, ("default", "linear", "llama3")),
        "the window": has_window != mlx_window,
        "biases": config.qkv_bias and family not in _MLX_BIASES,
        "the size of heads": family in _MLX_HEADS
        and config.head_dim != config.hidden_size // config.num_heads,
        "the cap of logits": is_gemma3 and config.logit_soft_cap is not None,
    }
    parts = [part for part, is_wrong in problems.items() if is_wrong]
    return f"mlx-lm computes {' and '.join(parts)} differently" if parts else None


def _is_read(server: Server, model: BaseModel, fmt: str) -> bool:
    """Returns whether a server loads the packed weights of a folder exactly."""
    raw = ql.io.read_config_json(model.path)
    method = model.quantization.get("quant_method")
    # All servers except mlx-lm round float16 scales to the dtype of the model.
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    keeps_scales = fmt not in _INT4 or dtype == "float16"
    return method in server.reads and (keeps_scales or method == "mlx")


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of `--max-lora-rank`
_README = """\
# {source}, with an adapter, for {name}

In this folder:

    {command}
{request}
Written by qlora_jax {version}: {pair}.
"""


def write_start(
    folder: pathlib.Path,
    pair: Pair,
    model: BaseModel,
    files: Mapping[str, pathlib.Path],
) -> None:
    """Writes a README with the command that starts a server and a request to it."""
    # The base and the adapter in the command and the request: the files in this folder,
    # or the path or name of the model.
    paths = {part: f"./{file.name}" for part, file in files.items()}
    local = pathlib.Path(model.name)
    paths.setdefault("base", str(local.absolute()) if local.exists() else model.name)
    if model.path.is_file() and pair.base == AS_IS:
        paths["base"] = str(model.path.absolute())
    server = SERVERS[pair.server]
    rank = max((x.rank for x in ql.leaves_by_path(model.lora).values()), default=0)
    rank = next((n for n in _VLLM_RANKS if n >= rank), rank)
    form = model.quantization.get("quant_method") if pair.base == AS_IS else pair.base
    flags = server.flags.get(str(form), "")
    option = server.option if "adapter" in files else ""
    command = (server.command + option).format(**paths, rank=rank, flags=flags)
    request = _make_request(server, model, paths, "adapter" in files)
    text = _README.format(
        source=model.name,
        name=pair.server,
        command=command,
        request=request,
        pair=pair,
        version=ql.__version__,
    )
    (folder / "README.md").write_text(text, "utf-8")
    if pair.server == "ollama":
        (folder / "Modelfile").write_text(f"FROM {paths['base']}\n", "utf-8")


def _make_request(
    server: Server, model: BaseModel, paths: Mapping[str, str], has_adapter: bool
) -> str:
    """Returns the part of a README with a request; empty for servers without an API."""
    if server.port is None:
        return ""
    body = {"model": server.model, **(server.with_adapter if has_adapter else {})}
    body = {k: x.format(**paths) if isinstance(x, str) else x for k, x in body.items()}
    is_chat = open_tokenizer(model.path).has_template
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    body |= chat if is_chat else {"prompt": "Hello", "max_tokens": 100}
    url = f"http://localhost:{server.port}/v1/{'chat/' * is_chat}completions"
    data = shlex.quote(json.dumps(body))
    clause = ", which names the adapter" if has_adapter else ""
    curl = f"curl {url} -H 'Content-Type: application/json' -d {data}"
    return f"\nA request{clause}:\n\n    {curl}\n"
