"""Chooses the files that a server of `export --for` gets."""

from dataclasses import dataclass
from typing import Any

import qlora_jax as ql
from qlora_jax.io.model_folder import read_config_json
from qlora_jax.trees.paths import leaves_by_path

from ..as_trained import LoadOptions, open_model_for, training_load_options
from ..configs import ExportConfig
from ..merge_aware import (
    Q4_0_BLOCK_SIZE,
    describe_packing,
    fits_q4_0,
    target_packing_of,
)
from ..open_model import OpenModel
from ..servers import INT4_FMTS, SERVERS, Server

# Stand for formats of `export`: the base is not exported, or the adapter is merged into
# the base.
AS_IS, MERGED = "as it is", "added to the base"


@dataclass(frozen=True)
class Pair:
    """The formats of a base and an adapter for a server.

    Attributes:
        server: The server.
        base: The format of `export` for the base, or "as it is".
        adapter: The format of the adapter, or "added to the base".
        exact: Whether the server uses exactly the weights that training used.
        why: Why it is exact or not.
    """

    server: str
    base: str
    adapter: str
    exact: bool
    why: str

    def __str__(self):
        exact = "exact" if self.exact else "not exact"
        return f"base {self.base}, adapter {self.adapter}, {exact}: {self.why}"


def open_pair(config: ExportConfig) -> tuple[OpenModel, LoadOptions, Pair]:
    """Returns a model with its adapter, how training read it, and what a server gets.

    The adapter is read, unless it replaces weights, which needs the base's weights.
    Raises ValueError if the server cannot run the model.
    """
    server, model = SERVERS[str(config.server)], open_model_for(config)
    model.check_for_torch("for", server.name, ())
    options = training_load_options(config, model)
    if not model.replaces_weights:
        model = model.read_adapter()
    if server.loads_gguf:
        # Imported late, because gguf takes long to import and few commands need it.
        from ...gguf.save import check_gguf_source

        check_gguf_source(model.files, tokenizer=config.tokenizer)
    return model, options, _find_pair(server, model, options)


def _find_pair(server: Server, model: OpenModel, options: LoadOptions) -> Pair:
    """Returns the formats in which a server loads a model and its adapter.

    `options` are those with which training read the model. The adapter is merged if the
    server cannot load it, or cannot load the number format of the base. Otherwise, the
    base stays as it is if the server loads its files exactly, and is exported if not.
    """
    if (target := target_packing_of(model.lora)) is not None:
        return _pair_merged(server, model, target)
    packing = options.get("packing_config") or model.stored_packing
    fmt, block_size = (packing.fmt, packing.block_size) if packing else (None, None)
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


def _pair_merged(server: Server, model: OpenModel, packing: Any) -> Pair:
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
        raise ValueError(f"{server.name} cannot run {model.name}: {problem}.")
    why = f"{problem}, but the decoded weights are the same"
    return Pair(server.name, server.floats, MERGED, True, why)


def _find_adapter_problem(
    server: Server, model: OpenModel, fmt: str | None
) -> str | None:
    """Returns why a server cannot load the adapter beside the base, or None."""
    adapters = leaves_by_path(model.lora)
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


def _find_4_bit_problem(server: Server, model: OpenModel) -> str | None:
    """Returns why a server cannot load a model in 4 bits, or None."""
    # Servers that load GGUF files also load experts in 4 bits.
    if model.decoder.experts is not None and not server.loads_gguf:
        return "it is not known to load experts in 4 bits"
    return None


def _loads_exactly(server: Server, model: OpenModel, fmt: str | None) -> bool:
    """Returns whether a server loads a model's files exactly, without an export."""
    if model.quantization.get("quant_method", "float") not in server.reads:
        return False
    # Servers round float16 scales to the dtype of the model.
    config_json = read_config_json(model.path)
    dtype = config_json.get("dtype", config_json.get("torch_dtype"))
    return fmt not in INT4_FMTS or dtype == "float16"


def _find_difference(
    server: Server, model: OpenModel, fmt: str | None, base: str
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
    config_json = read_config_json(model.path)
    return server.find_difference(config_json, model.decoder, fmt)
