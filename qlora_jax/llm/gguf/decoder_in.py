"""Reads decoders and adapters from GGUF files, under Hugging Face names."""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import qlora_jax as ql

from ..models.config import DecoderConfig
from ..models.decoder_names import decoder_names
from .delta_rule_order import value_column_order, value_row_order
from .file import GGUFFile, StoredTensor, open_gguf
from .values_in import (
    FREQUENCIES,
    LONG,
    OFFSET_NORMS,
    OSS,
    PERMUTED,
    QWEN3_5,
    SHORT,
    check_values,
    config_from_values,
)
from .values_out import nearest_architecture

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Replacements that turn Hugging Face names into names that the map of the gguf package
# knows. In the map, all experts of a layer are one tensor, and all names end in
# ".weight" or ".bias".
_NAME_PATTERNS = {
    r"\.experts\.\d+\.": ".experts.",
    r"(\.experts\.\w+_proj)\.\d+$": r"\1.weight",
    r"(\.experts\.\w+_proj)_bias$": r"\1.bias",
    r"\.experts\.gate_up_proj\.": ".experts.gate_proj.",  # see `_join_gate_up`
    r"\.sinks$": ".sinks.weight",
    r"\.dt_bias$": ".dt_proj.bias",
}
# llama.cpp writes Mistral as "llama", but "mistral" is accepted too.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3moe", "olmoe")
ARCHITECTURES += ("gemma", "gemma2", "gemma3", "smollm3", "phi3", OSS)
ARCHITECTURES += ("olmo2",)
# The keys of an adapter file.
_ALPHA = "adapter.lora.alpha"
_ADAPTER_KEYS = ("adapter.type", _ALPHA)
_ADAPTER_KEYS += ("adapter.lora.task_name", "adapter.lora.prompt_prefix")


@dataclass(frozen=True, eq=False)
class _Alternating:
    """Two arrays of bytes whose rows alternate; indexing reads only the chosen rows."""

    first: np.ndarray
    second: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the two arrays together."""
        return 2 * len(self.first), self.first.shape[1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        indices = np.arange(self.shape[0])[rows]
        chosen = np.empty((len(indices), self.shape[1]), self.first.dtype)
        for parity, x in enumerate((self.first, self.second)):
            is_from_x = indices % 2 == parity
            chosen[is_from_x] = x[indices[is_from_x] // 2]
        return chosen


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file: indexing reads, and decodes, only the chosen rows.

    If `tensor_type` is None, indexing returns the stored bytes without decoding them.
    """

    shape: tuple[int, ...]  # of what indexing with [:] returns
    stored: Any  # an array, or `_Alternating`
    tensor_type: "GGMLQuantizationType | None" = None
    rows: np.ndarray | None = None  # where `stored` has each row; None: in order
    offset: float = 0.0  # number that llama.cpp added to the values

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return np.dtype(np.uint8 if self.tensor_type is None else np.float32)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        rows, *trailing = index if isinstance(index, tuple) else (index,)
        x = self.stored[rows if self.rows is None else self.rows[rows]]
        if self.tensor_type is not None:
            x = self._decode(x, self.tensor_type)
        return x[(slice(None), *trailing)]

    def _decode(
        self, stored: np.ndarray, tensor_type: "GGMLQuantizationType"
    ) -> np.ndarray:
        import gguf

        # The package decodes 16 rows at a time, so group short rows into longer ones.
        group = math.gcd(len(stored), 4) if self.shape[-1] <= 1024 else 1
        x = gguf.dequantize(stored.reshape(len(stored) // group, -1), tensor_type)
        x = x.reshape(len(stored), *self.shape[1:])
        return np.asarray(x - self.offset if self.offset else x, self.dtype)


def read_gguf(
    file: GGUFFile,
) -> tuple[DecoderConfig, dict[str, GGUFTensor], dict[str, Any]]:
    """Returns the config, the tensors by Hugging Face name, and a `config.json`.

    Tensors are decoded when they are indexed. Weights in Q4_0 and MXFP4 stay bytes,
    which `ql.io.packed_tensors` turns into packed weights.
    """
    architecture: Any = file.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The architecture must be one of {ARCHITECTURES}. Got {architecture!r}."
        )
    # 1. The config. The divisors of frequencies are tensors, but not parameters.
    stored = dict(file.tensors)
    divisors = {
        name: tuple(stored.pop(name).data.tolist())
        for name in (FREQUENCIES, SHORT, LONG)
        if name in stored
    }
    prefix = f"{architecture}."
    keys = [key for key in file.values if key.startswith(prefix)]
    values = {key.removeprefix(prefix): file.values[key] for key in keys}
    try:
        check_values(architecture, values, stored.keys())
        size = stored["token_embd.weight"].shape[0]
        config, raw = config_from_values(architecture, values, stored, size, divisors)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ql.io.CheckpointError(
            f"{file.path} must have metadata values of the expected types. Got "
            f"{error!r}."
        ) from error
    # 2. The Hugging Face names. One tensor may hold the kernels of all experts.
    hf_names: dict[str, list[str]] = {}
    for hf_name, gguf_name in gguf_names(config, architecture).items():
        hf_names.setdefault(gguf_name, []).append(hf_name)
    if config.experts is not None and config.experts.joined == "alternating":
        stored = _join_gate_up(stored)
    # 3. The tensors; those without a Hugging Face name are reported by `ql.io.load`.
    tensors = {}
    for gguf_name, tensor in stored.items():
        names = hf_names.get(gguf_name, [gguf_name])
        tensors |= _name_tensors(tensor, names, config, architecture)
    return config, tensors, raw


def _join_gate_up(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Joins the gate and up tensors of experts into one, in which their rows alternate.

    The joined tensor has the name of the gate.
    """
    joined = dict(stored)
    for name, gate in stored.items():
        up = stored.get(name.replace("_gate_", "_up_"))
        if ".ffn_gate_exps." not in name or up is None:
            continue
        if (up.tensor_type, up.shape) != (gate.tensor_type, gate.shape):
            continue  # `ql.io.load` rejects their shapes
        del joined[up.name]
        num_experts, n, *k = gate.shape
        if k:  # kernels, one for each expert
            pairs = zip(gate.data, up.data, strict=True)
            data: Any = [_Alternating(*pair) for pair in pairs]
        else:  # biases
            data = np.stack([gate.data, up.data], axis=-1).reshape(num_experts, 2 * n)
        joined[name] = replace(gate, shape=(num_experts, 2 * n, *k), data=data)
    return joined


def _name_tensors(
    tensor: StoredTensor, names: list[str], config: DecoderConfig, architecture: str
) -> Iterator[tuple[str, GGUFTensor]]:
    """Yields the parts of a stored tensor with their names.

    A matrix in Q4_0 or MXFP4 is yielded as bytes, and its name gets the suffix "_q4_0"
    or "_mxfp4".
    """
    shape, parts = tensor.shape, [tensor.data]
    if len(names) > 1 and len(shape) == 3 and len(names) == shape[0]:
        parts, shape = tensor.data, shape[1:]  # one part for each expert
    fmt = tensor.tensor_type.name
    # A tensor with another number of experts gets the first name. `ql.io.load` then
    # rejects its shape.
    for name, data in zip(names, parts, strict=False):
        rows = stored_rows(name, shape, config, architecture)
        # For Q4_0, `io/formats/gguf.py` expects such names.
        is_q4_0 = fmt == "Q4_0" and name.endswith(".weight")
        if len(shape) == 2 and (is_q4_0 or fmt == "MXFP4"):
            yield f"{name}_{fmt.lower()}", GGUFTensor(data.shape, data, None, rows)
        else:
            offset = offset_of(name, architecture)
            yield name, GGUFTensor(shape, data, tensor.tensor_type, rows, offset)


def gguf_fmt(file: GGUFFile) -> str | None:
    """Returns the format of a GGUF file's packed layers, or None."""
    layers = [x for name, x in file.tensors.items() if name.startswith("blk.")]
    formats = {x.tensor_type.name for x in layers if len(x.shape) > 1}
    if "MXFP4" in formats:  # only experts have this format
        return "mxfp4"
    # Routers, and kernels that blocks of 32 do not fit, are float.
    return "q4_0" if formats - {"F32", "F16", "BF16"} == {"Q4_0"} else None


def gguf_names(config: DecoderConfig, architecture: str) -> dict[str, str]:
    """Maps Hugging Face tensor names to GGUF names.

    The experts of a layer have one GGUF name, and are listed in order.
    """
    import gguf

    # llama.cpp has no architecture called "mistral".
    arch = "LLAMA" if architecture == "mistral" else architecture.upper()
    arch = gguf.MODEL_ARCH[arch.replace("-", "_")]
    name_map = gguf.get_tensor_name_map(arch, config.num_layers)
    names = decoder_names(config)
    gguf_name_of: dict[str, str] = {}
    num_experts = config.experts.count if config.experts else 1
    for path, entry in names.entries.items():
        # The batch axes of a leaf, if it has any, are layers and then experts.
        sizes = len(entry.numbers.get("layer", ())), num_experts
        for hf_name in names.of(path, sizes[: names.num_batch_axes(path)]).flat:
            mapped = hf_name
            for pattern, replacement in _NAME_PATTERNS.items():
                mapped = re.sub(pattern, replacement, mapped)
            gguf_name = name_map.get_name(mapped, try_suffixes=(".weight", ".bias"))
            # No name is missing for decoders that `check_gguf_config` accepts.
            if gguf_name is not None:
                gguf_name_of[hf_name] = gguf_name
    return gguf_name_of


def row_order(
    name: str, num_rows: int, config: DecoderConfig, architecture: str
) -> np.ndarray | None:
    """Returns the indices by which llama.cpp orders rows; None if it is the same."""
    if architecture in QWEN3_5:
        return value_row_order(name, num_rows, config)
    heads = {".q_proj.": config.num_heads, ".k_proj.": config.num_kv_heads}
    count = next((heads[part] for part in heads if part in name), None)
    # A wrong number of rows is reported later, with the expected shape.
    if architecture not in PERMUTED or count is None or num_rows % (2 * count):
        return None
    return permute(np.arange(num_rows), count)


def stored_rows(
    name: str, shape: tuple[int, ...], config: DecoderConfig, architecture: str
) -> np.ndarray | None:
    """Returns the index at which each row of a tensor is stored; None if in order."""
    order = row_order(name, shape[0], config, architecture)
    return None if order is None else np.argsort(order)


def offset_of(name: str, architecture: str) -> float:
    """Returns the number that llama.cpp adds to the values of a tensor."""
    is_norm = architecture in OFFSET_NORMS and name.endswith("norm.weight")
    return 1.0 if is_norm and not name.endswith("linear_attn.norm.weight") else 0.0


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Interleaves the two halves of each head's rows, as llama.cpp stores them.

    Row i + Dh/2 then follows row i, where Dh is the size of a head.
    """
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def read_gguf_lora(path: str | pathlib.Path, config: DecoderConfig) -> ql.io.PlainLoRA:
    """Reads a file with adapters for llama.cpp; `ql.io.load_peft` accepts the result.

    `config` is the model's config. The result names modules as in a text-only model,
    such as "model.layers.0.mlp.up_proj". Raises a CheckpointError if the file is
    broken, not a LoRA, or for another architecture.
    """
    # 1. Check the metadata.
    file, architecture = open_gguf(path), nearest_architecture(config)
    expected = {"general.type": "adapter", "adapter.type": "lora"}
    expected["general.architecture"] = architecture
    problems = [
        f"`{key}` must be {value!r}. Got {actual!r:.80}."
        for key, value in expected.items()
        if (actual := file.values.get(key)) != value
    ]
    alpha = file.values.get(_ALPHA)
    if not isinstance(alpha, float) or not 0 < alpha < math.inf:
        problems.append(f"`{_ALPHA}` must be a positive number. Got {alpha!r:.80}.")
    keys = [key for key in file.values if key.startswith("adapter.")]
    unknown = [key for key in keys if key not in _ADAPTER_KEYS]
    problems += [f"`{key}` is not supported." for key in unknown]
    # 2. Decode the factors, `[rank, K]` and `[N, rank]`.
    config = replace(config, module="model")
    names = gguf_names(config, architecture)
    hf_names = {gguf_name: hf_name for hf_name, gguf_name in names.items()}
    factors: dict[str, dict[str, np.ndarray]] = {}
    for tensor in file.tensors.values():
        gguf_name, _, part = tensor.name.rpartition(".lora_")
        shape = tensor.shape
        if gguf_name not in hf_names or part not in ("a", "b") or len(shape) != 2:
            problems.append(f"{tensor.name}: unexpected tensor of shape {shape}")
            continue
        name = hf_names[gguf_name]
        # B has the rows of the kernel, and A has its columns. A wrong number of columns
        # is reported by `ql.io.load_peft`.
        is_b = part == "b"
        rows = stored_rows(name, shape, config, architecture) if is_b else None
        x = GGUFTensor(shape, tensor.data, tensor.tensor_type, rows)[:]
        columns = None if is_b else value_column_order(name, config)
        if columns is not None and len(columns) == shape[1]:
            x = x[:, np.argsort(columns)]
        factors.setdefault(name.removesuffix(".weight"), {})[part] = x
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ql.io.CheckpointError(f"{path} is not a LoRA for this model:\n  {lines}")
    assert isinstance(alpha, float)
    return ql.io.PlainLoRA(alpha, factors)
