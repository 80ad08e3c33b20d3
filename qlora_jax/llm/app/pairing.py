"""`qlora-jax pairs`: formats in which servers load a base and an adapter correctly."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import qlora_jax as ql

from .base_model import BaseModel, LoadOptions, open_model_for, training_load_options
from .configs import ExportConfig, PairsConfig
from .contents import format_table
from .merge_aware import Q4_0_BLOCK_SIZE, describe_packing, fits_q4_0, target_packing_of
from .servers import INT4_FMTS, SERVERS, Server

# Stand for formats of `export`: the base is not exported, the adapter is merged into
# the base, or the server cannot run the model.
AS_IS, MERGED, NOT_RUN = "as it is", "added to the base", "none"


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

    Reads no weights. Assumes that the adapter was trained on the weights as they are
    stored, unless `fmt` or the settings of the adapter's run name another format.

    Args:
        config: The model and the adapter.

    Raises:
        ValueError: If the model or the adapter cannot be read, or if they do not fit
            each other.

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
    fmt, block_size = _find_base_packing(model, options)
    packed = "float" if fmt is None else f"{fmt} in blocks of {block_size}"
    if (target := target_packing_of(model.lora)) is not None:
        packed += (
            f", with adapters that are merged and packed in {describe_packing(target)}"
        )
    rows = (pair_for(server, model, options) for server in SERVERS.values())
    return Pairs(packed, tuple(rows))


def open_pair(config: PairsConfig | ExportConfig) -> tuple[BaseModel, LoadOptions]:
    """Returns a model with its adapter, and the options that training read it with.

    An adapter that replaces weights is not read yet, since it needs the base's weights.
    """
    model, _ = open_model_for(config)
    options = training_load_options(config, model)
    return model if model.replaces_weights else model.read_adapter(), options


def _find_base_packing(
    model: BaseModel, options: LoadOptions
) -> tuple[str, int] | tuple[None, None]:
    """Returns the format and block size of the base in training; None for floats."""
    packing = options.get("packing_config") or model.stored_packing
    return (None, None) if packing is None else (packing.fmt, packing.block_size)


def pair_for(
    server: Server, model: BaseModel, options: LoadOptions, *, tokenizer: bool = True
) -> Pair:
    """Returns the formats in which a server loads a model and its adapter.

    `options` are those with which training read the model. The adapter is merged if the
    server cannot load it, or cannot load the number format of the base. Otherwise, the
    base stays as it is if the server loads its files exactly, and is exported if not.
    If `tokenizer` is false, a GGUF file need not contain the tokenizer.
    """
    fmt, block_size = _find_base_packing(model, options)
    if server.loads_gguf:
        # Imported late, because gguf takes long to import and few commands need it.
        from ..gguf.decoder_out import check_gguf_source

        try:
            check_gguf_source(model.files, tokenizer=tokenizer)
        except ValueError as error:
            return Pair(server.name, NOT_RUN, NOT_RUN, False, str(error))
    if (target := target_packing_of(model.lora)) is not None:
        return _pair_merged(server, model, target)
    problem = _find_adapter_problem(server, model, fmt)
    # The format of the base, or None if the server does not support its number format.
    base = server.floats if fmt is None else server.bases.get(fmt)
    # Without options, training used the weights in the model's files.
    if not options and _loads_exactly(server, model, fmt):
        base = AS_IS
    elif fmt is not None and base == "gguf" and block_size != Q4_0_BLOCK_SIZE:
        base = None
    # `problem` is set if `server.adapter` is None, which type checkers do not know.
    if problem or base is None or server.adapter is None:
        problem = problem or f"it does not support {fmt} in blocks of {block_size}"
        why = f"{problem}: the sum is rounded"
        return Pair(server.name, server.floats, MERGED, False, why)
    difference = _find_difference(server, model, fmt, base)
    same = "the weights are" if fmt is None else "codes and scales are"
    why = difference or f"{same} the same"
    return Pair(server.name, base, server.adapter, difference is None, why)


def with_gguf_type(pair: Pair, gguf_type: str | None, is_merge_aware: bool) -> Pair:
    """Returns what a pair becomes if its GGUF file has the type `gguf_type`.

    A type that rounds the weights makes the pair inexact. None, which stands for Q4_0
    if the pair is exact and otherwise for F16, changes nothing. Raises ValueError if a
    file of this type cannot be written for the pair.
    """
    if gguf_type is None:
        return pair
    if pair.base == AS_IS:
        raise ValueError(
            f"`gguf_type` must be left out if {pair.server} loads the model's file as "
            f"it is. Got {gguf_type}."
        )
    if pair.exact and gguf_type == "Q4_0":
        return pair
    if is_merge_aware:
        raise ValueError(
            "`gguf_type` must be Q4_0 or left out for a merge-aware adapter, because "
            f"another type would round its weights again. Got {gguf_type}."
        )
    if pair.adapter == MERGED:
        return pair  # not exact, whatever the type is
    rounded_to = "float16" if gguf_type == "F16" else gguf_type
    why = f"weights are rounded to {rounded_to}"
    return dataclasses.replace(pair, exact=False, why=why)


def _pair_merged(server: Server, model: BaseModel, packing: Any) -> Pair:
    """Returns the format of the one file that a merge-aware adapter was trained for."""
    base, problem = server.bases.get(packing.fmt), _find_4_bit_problem(server, model)
    if base == "gguf" and not fits_q4_0(packing):
        base = None
    if base is not None and problem is None:
        difference = _find_difference(server, model, packing.fmt, base)
        why = difference or "codes and scales are the same"
        return Pair(server.name, base, MERGED, difference is None, why)
    problem = problem or f"it does not support {describe_packing(packing)}"
    if server.loads_gguf:  # would round the decoded weights to float16
        return Pair(server.name, NOT_RUN, NOT_RUN, False, problem)
    why = f"{problem}, but the decoded weights are the same"
    return Pair(server.name, server.floats, MERGED, True, why)


def _find_adapter_problem(
    server: Server, model: BaseModel, fmt: str | None
) -> str | None:
    """Returns why a server cannot load the adapter beside the base, or None."""
    adapters = ql.leaves_by_path(model.lora)
    is_plain = all(type(adapter) is ql.LoRA for adapter in adapters.values())
    is_plain = is_plain and not model.replaces_weights
    if server.adapter is None:
        return "it does not support adapters"
    if server.adapter != "peft" and not is_plain:
        return "it supports only plain LoRA adapters"
    if fmt and (problem := _find_4_bit_problem(server, model)):
        return problem
    if not server.adapts_experts and any("/experts/" in path for path in adapters):
        return "it does not support adapters of experts"
    return None


def _find_4_bit_problem(server: Server, model: BaseModel) -> str | None:
    """Returns why a server cannot load a model in 4 bits, or None."""
    # Servers that load GGUF files also load experts in 4 bits.
    if model.decoder.experts is not None and not server.loads_gguf:
        return "it is not known to load experts in 4 bits"
    return None


def _loads_exactly(server: Server, model: BaseModel, fmt: str | None) -> bool:
    """Returns whether a server loads a model's files exactly, without an export."""
    method = model.quantization.get("quant_method", "float")
    if method not in server.reads:
        return False
    config_json = _read_config_json(model)
    if server.needs_older_keys and ql.io.older_config_keys(config_json):
        return False
    # Servers keep the float16 scales in MLX and GGUF files. They round those in other
    # files to the dtype of the model.
    keeps_scales = fmt not in INT4_FMTS or method in ("mlx", "gguf")
    dtype = config_json.get("dtype", config_json.get("torch_dtype"))
    return keeps_scales or dtype == "float16"


def _read_config_json(model: BaseModel) -> dict[str, object]:
    """Returns the `config.json` of a model; empty for a GGUF file."""
    return ql.io.read_config_json(model.path) if model.path.is_dir() else {}


def _find_difference(
    server: Server, model: BaseModel, fmt: str | None, base: str
) -> str | None:
    """Returns what a server rounds or computes differently from training, or None.

    `base` is the format of the base, as in `Pair`.
    """
    if fmt is None and base == "gguf":
        return "weights are rounded to float16"
    if fmt == "int4_f16" and base == "awq" and model.decoder.unit_offset_norms:
        return "it rounds scales to bfloat16, because Gemma overflows in float16"
    if server.find_difference is None:
        return None
    return server.find_difference(_read_config_json(model), model.decoder, fmt)
