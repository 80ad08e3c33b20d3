"""`qlora-jax pairs`: formats in which servers read a base and an adapter right."""

import json
import math
import pathlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import qlora_jax as ql

from ..models.families.gemma import text_config
from .base_model import BaseModel, open_model, open_run, training_of
from .configs import FMTS, ExportConfig, PairsConfig
from .contents import columns

AS_IS, MERGED = "as it is", "added to the base"
_INT4 = FMTS["awq"]


@dataclass(frozen=True)
class Server:
    """How a server takes a base and an adapter; forms are formats of `export`."""

    bases: Mapping[str, str]  # the form of a packed base, by its number format
    reads: tuple[str, ...]  # the `quant_method`s that it reads as they are
    floats: str  # the form of floats
    adapter: str | None  # the form of an adapter that is not merged, if it takes one
    command: str
    option: str = ""  # for an adapter
    flags: Mapping[str, str] = field(default_factory=dict)  # by form of the base
    # Of bases that it rounds: what it does.
    rounded: Mapping[str, str] = field(default_factory=dict)
    port: int | None = None  # of its OpenAI-compatible interface; None if it has none
    model: str = "{base}"  # the name of the base in requests
    with_adapter: Mapping[str, Any] = field(default_factory=dict)  # also in requests


_BITSANDBYTES = dict.fromkeys(FMTS["bitsandbytes"], "bitsandbytes")
_OF_VLLM = {**_BITSANDBYTES, **dict.fromkeys(_INT4, "awq")}
_E2M1 = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
_METHODS = ("bitsandbytes", "compressed-tensors", "awq", "gptq")
# PEFT adds nothing to modules that stay packed.
_DECODED = ", quantization_config=transformers.CompressedTensorsConfig("
_DECODED += "run_compressed=False)"
# Each was checked with the server's own code or, where it runs on a CPU, with itself.
SERVERS = {
    "vllm": Server(
        {**_OF_VLLM, **_E2M1},
        _METHODS,
        "merged",
        "peft-portable",
        "vllm serve {base}",
        " --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}",
        rounded={"nvfp4": "its kernel rounds the float32 of a tensor to bfloat16"},
        port=8000,
        with_adapter={"model": "adapter"},
    ),
    "sglang": Server(
        _OF_VLLM,
        _METHODS,
        "merged",
        "peft-portable",
        "python -m sglang.launch_server --model-path {base}{flags}",
        " --enable-lora --lora-paths adapter={adapter}",
        {"bitsandbytes": " --load-format bitsandbytes"},
        port=30000,
        with_adapter={"lora_path": "adapter"},
    ),
    "llama.cpp": Server(
        dict.fromkeys(_INT4, "gguf"),
        (),
        "gguf",
        "gguf-lora",
        "llama-server -m {base}",
        " --lora {adapter}",
        port=8080,
        with_adapter={"lora": [{"id": 0, "scale": 1.0}]},
    ),
    # From 0.34.1 on `ollama create` refuses `ADAPTER` (ollama's pull request 14969).
    "ollama": Server(
        {},
        (),
        "gguf",
        None,
        "ollama create adapted -f Modelfile && ollama run adapted",
        port=11434,
        model="adapted",
    ),
    "mlx": Server(
        dict.fromkeys(_INT4, "awq"),
        ("awq", "mlx"),
        "merged",
        "mlx",
        "mlx_lm.server --model {base}",
        " --adapter-path {adapter}",
        port=8080,
        model="default_model",
        with_adapter={"adapters": "{adapter}"},
    ),
    "transformers": Server(
        {**_BITSANDBYTES, **dict.fromkeys(_INT4, "compressed-tensors"), **_E2M1},
        _METHODS[:2],
        "merged",
        "peft",
        'model = transformers.AutoModelForCausalLM.from_pretrained("{base}"{flags})',
        '; model = peft.PeftModel.from_pretrained(model, "{adapter}")',
        dict.fromkeys(("compressed-tensors", *_E2M1), _DECODED),
    ),
}


@dataclass(frozen=True)
class Pair:
    """What to write of a base and an adapter for a server.

    Attributes:
        server: The server.
        base: The format of `export` for the base, or "as it is".
        adapter: The format of the adapter, or "added to the base".
        exact: Whether the server has the very weights that the adapter is for.
        why: The reason.

    Example:
        >>> from qlora_jax import cli
        >>> cli.Pair("mlx", "as it is", "mlx", True, "the weights are the same").exact
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
        packed: How the base is packed in training.
        servers: What to write for each server.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Pairs("nf4 in blocks of 64", ()).packed)
        nf4 in blocks of 64
    """

    packed: str
    servers: tuple[Pair, ...]

    def __str__(self):
        rows = [("server", "base", "adapter", "exact", "why")]
        for x in self.servers:
            exact = "yes" if x.exact else "no"
            rows.append((x.server, x.base, x.adapter, exact, x.why))
        return "\n".join([f"base: {self.packed}", *columns(rows, "<<<<<")])


def pairs(config: PairsConfig) -> Pairs:
    """Returns what to write of a base and an adapter for each server, and how exact.

    Reads no weights. What an adapter was trained on is the model as it is, unless `fmt`
    or its run says how it was packed.

    Args:
        config: The model and the adapter.

    Raises:
        ValueError: If the model or the adapter cannot be read or do not fit.

    Example:
        >>> import tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> found = cli.pairs(cli.PairsConfig(model, fmt="int4_f16", block_size=32))
        >>> {x.server: (x.base, x.exact) for x in found.servers}["llama.cpp"]
        ('gguf', True)
    """
    model, how = open_pair(config)
    packed = _packed(model, how)
    said = "float" if packed is None else f"{packed[0]} in blocks of {packed[1]}"
    return Pairs(said, tuple(pair_for(name, model, how) for name in SERVERS))


def open_pair(config: PairsConfig | ExportConfig) -> tuple[BaseModel, dict[str, Any]]:
    """Returns a model with its adapter, and how it was read for training."""
    if config.run is None:
        model = open_model(str(config.model), config.adapter)
    else:
        model, _ = open_run(config.run, getattr(config, "step", None), config.model)
    how = training_of(config, model)
    return model if model.replaces_weights else model.with_adapter(), how


def _packed(model: BaseModel, how: Mapping[str, Any]) -> tuple[str, int] | None:
    """Returns number format and block size of the base in training; None for floats."""
    found = how.get("packing") or model.stored_packing
    return None if found is None else (found.fmt, found.block_size)


def pair_for(name: str, model: BaseModel, how: Mapping[str, Any]) -> Pair:
    """Returns what to write for a server of a model that was read so for training."""
    server, packed = SERVERS[name], _packed(model, how)
    pair = lambda *args: Pair(name, *args)
    merged = lambda why: pair(
        server.floats, MERGED, False, f"{why}: the sum is rounded"
    )
    adapters = ql.leaves_by_path(model.lora)
    kinds = {*map(type, adapters.values())}
    is_plain = not model.replaces_weights and kinds <= {ql.LoRA}
    if server.adapter is None:
        return merged("it takes no adapter beside a base")
    if server.adapter != "peft" and not is_plain:
        return merged("it takes no adapter but plain LoRA")
    is_gguf, of_gguf = model.path.suffix == ".gguf", server.floats == "gguf"
    has_experts = packed is not None and model.config.experts is not None
    if has_experts and server.floats == "merged":
        return merged("it was not seen to load experts in 4 bits")
    if name in ("mlx", "llama.cpp") and any("/experts/" in path for path in adapters):
        return merged("it takes no adapters of experts")
    problem = _mlx_problem(model) if name == "mlx" else None
    if packed is None:
        if of_gguf and not is_gguf:
            return pair("gguf", server.adapter, False, "weights are rounded to float16")
        # mlx-lm does not read all of what transformers 5 writes.
        is_as_it_is = is_gguf == of_gguf and not (name == "mlx" and _is_newer(model))
        form = AS_IS if is_as_it_is else server.floats
        why = problem or "the weights are the same"
        return pair(form, server.adapter, problem is None, why)
    fmt, size = packed
    is_read = of_gguf if is_gguf else _is_read(server, model, fmt)
    form = AS_IS if is_read and not how else server.bases.get(fmt)
    if form == AS_IS and name == "mlx" and _is_newer(model):
        form = server.bases.get(fmt)
    if form is None or (form == "gguf" and size != 32):
        return merged(f"it has no {fmt} in blocks of {size}")
    why = problem or server.rounded.get(fmt)
    if fmt == "int4_f16" and form == "awq" and model.config.unit_offset_norms:
        why = "it rounds scales to bfloat16, because Gemma overflows in float16"
    same = "codes and scales are the same"
    return pair(form, server.adapter, why is None, why or same)


def _is_newer(model: BaseModel) -> bool:
    """Whether a folder's config has keys that it says in the older form too."""
    return model.path.is_dir() and bool(
        ql.io.older_config_keys(ql.io.read_config_json(model.path))
    )


# What mlx-lm 0.32 computes for each family, in addition to what it always does.
_MLX_ROPES = dict.fromkeys(("qwen3_moe", "mixtral", "gemma2", "phi3"), ("default",))
_MLX_BIASES = ("llama", "olmoe", "qwen2", "smollm3")
_MLX_HEADS = ("qwen2", "mixtral", "phi3")  # of the hidden size by the heads


def _mlx_problem(model: BaseModel) -> str | None:
    """Returns what mlx-lm computes otherwise than the model's config says, or None."""
    if model.path.is_file():
        return None
    raw, config = ql.io.read_config_json(model.path), model.config
    raw = text_config(raw)
    kind, rope = raw["model_type"], raw | ql.io.older_config_keys(raw)
    rope = (rope.get("rope_scaling") or {}).get
    rope_type = rope("rope_type") or rope("type") or "default"
    longest = raw.get("max_position_embeddings") or math.inf
    windows = [(x.window or math.inf) < longest for x in config.layers]
    every = raw.get("sliding_window_pattern") or 6
    is_gemma3 = kind == "gemma3_text"
    pattern = [(i + 1) % every != 0 for i in range(len(windows))]
    problems = {
        "experts": kind == "gpt_oss",
        f"{rope_type} rotary positions": rope_type
        not in _MLX_ROPES.get(kind, ("default", "linear", "llama3")),
        "the window": windows != pattern if is_gemma3 else any(windows),
        "biases": config.qkv_bias and kind not in _MLX_BIASES,
        "the size of heads": kind in _MLX_HEADS
        and config.head_dim != config.hidden_size // config.num_heads,
        "the cap of logits": is_gemma3 and config.logit_soft_cap is not None,
    }
    wrong = [part for part, is_wrong in problems.items() if is_wrong]
    return f"mlx-lm computes {' and '.join(wrong)} otherwise" if wrong else None


def _is_read(server: Server, model: BaseModel, fmt: str) -> bool:
    """Whether a server reads the packed weights of a model's folder as they are."""
    raw = ql.io.read_config_json(model.path)
    method = model.quantization.get("quant_method")
    # Servers but MLX round float16 scales to the dtype of the model.
    is_held = fmt not in _INT4 or raw.get("dtype", raw.get("torch_dtype")) == "float16"
    return method in server.reads and (is_held or method == "mlx")


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for
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
    source: str,
    files: Mapping[str, pathlib.Path],
) -> None:
    """Writes a README with the command that starts a server, a request, and files."""
    names = {part: f"./{file.name}" for part, file in files.items()}
    local = pathlib.Path(source)
    names.setdefault("base", str(local.absolute()) if local.exists() else source)
    if model.path.is_file() and pair.base == AS_IS:
        names["base"] = str(model.path.absolute())
    server = SERVERS[pair.server]
    largest = max((x.rank for x in ql.leaves_by_path(model.lora).values()), default=0)
    rank = next((n for n in _RANKS if n >= largest), largest)
    form = model.quantization.get("quant_method") if pair.base == AS_IS else pair.base
    flags = server.flags.get(str(form), "")
    option = server.option if "adapter" in files else ""
    command = (server.command + option).format(**names, rank=rank, flags=flags)
    request = _request(server, model, names, "adapter" in files)
    text = _README.format(
        source=source,
        name=pair.server,
        command=command,
        request=request,
        pair=pair,
        version=ql.__version__,
    )
    (folder / "README.md").write_text(text, "utf-8")
    if pair.server == "ollama":
        (folder / "Modelfile").write_text(f"FROM {names['base']}\n", "utf-8")


def _request(
    server: Server, model: BaseModel, names: Mapping[str, str], has_adapter: bool
) -> str:
    """Returns the part of a README with a request that names the adapter."""
    if server.port is None:
        return ""
    body = {"model": server.model, **(server.with_adapter if has_adapter else {})}
    body = {k: x.format(**names) if isinstance(x, str) else x for k, x in body.items()}
    is_chat = ql.train.open_tokenizer(model.path).has_template
    ask = {"messages": [{"role": "user", "content": "Hello"}]}
    body |= ask if is_chat else {"prompt": "Hello", "max_tokens": 100}
    url = f"http://localhost:{server.port}/v1/{'chat/' * is_chat}completions"
    data = shlex.quote(json.dumps(body))
    which = ", which names the adapter" if has_adapter else ""
    curl = f"curl {url} -H 'Content-Type: application/json' -d {data}"
    return f"\nA request{which}:\n\n    {curl}\n"
