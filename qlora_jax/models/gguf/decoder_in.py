"""Reads a GGUF file's config, and its tensors by Hugging Face name."""

import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import qlora_jax as ql

from ..config import DecoderConfig
from ..decoder_names import decoder_names
from ..families.gemma import text_config
from .open_file import field, open_gguf
from .values import (
    FREQUENCIES,
    LONG,
    OFFSET_NORMS,
    OSS,
    PERMUTED,
    SHORT,
    check_values,
    config_from_values,
)

# Names of what is one tensor for all experts there, and of gpt-oss's parameters.
_PARAMETERS = {
    r"\.experts\.\d+\.": ".experts.",
    r"(\.experts\.\w+_proj)\.\d+$": r"\1.weight",
    r"(\.experts\.\w+_proj)_bias$": r"\1.bias",
    r"\.experts\.gate_up_proj\.": ".experts.gate_proj.",  # with up: `_joined`
    r"\.sinks$": ".sinks.weight",
}
# llama.cpp writes Mistral as "llama".
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3moe", "olmoe")
ARCHITECTURES += ("gemma2", "gemma3", "smollm3", "phi3", OSS)


def read_gguf(
    path: str | pathlib.Path,
) -> "tuple[DecoderConfig, dict[str, GGUFTensor | GGUFBytes]]":
    """Returns the config and the tensors by Hugging Face name, not yet decoded.

    `ql.io.packed_tensors` takes a weight in Q4_0 by its bytes.
    """
    reader = open_gguf(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    factors = {
        name: tuple(found.pop(name).data.tolist())
        for name in (FREQUENCIES, SHORT, LONG)
        if name in found
    }
    embedding = found.get("token_embd.weight")
    vocab_size = 0 if embedding is None else int(embedding.shape[-1])
    kind = field(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        known = ARCHITECTURES
        raise ValueError(f"The architecture must be one of {known}. Got {kind!r}.")
    keys = [key for key in reader.fields if key.startswith(f"{kind}.")]
    try:
        values = {key.removeprefix(f"{kind}."): field(reader, key) for key in keys}
        check_values(kind, values, found)
        config = config_from_values(kind, values, found, vocab_size, factors)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ql.io.CheckpointError(
            f"{path} must have values of the kinds that its keys have. Got {error!r}."
        ) from error
    hf_names: dict[str, list[str]] = {}
    for name, gguf_name in gguf_names(config, kind).items():
        hf_names.setdefault(gguf_name, []).append(name)
    if config.experts is not None and config.experts.interleaved:
        found = _joined(found)
    tensors = {}
    for gguf_name, tensor in found.items():
        names = hf_names.get(gguf_name, [gguf_name])  # or the name in the file
        shape = tuple(int(n) for n in reversed(tensor.shape))
        fmt, stored = tensor.tensor_type.name, [tensor.data]
        if len(names) > 1 and len(shape) == 3 and len(names) == shape[0]:  # experts
            stored, shape = tensor.data, shape[1:]
        for name, data in zip(names, stored, strict=False):
            rows = stored_rows(name, shape, config, kind)
            x = GGUFTensor(shape, data, tensor.tensor_type, rows, offset_of(name, kind))
            if fmt == "Q4_0" and len(shape) == 2 and name.endswith(".weight"):
                name, x = f"{name}_q4_0", GGUFBytes(data.shape, data, rows)
            elif fmt == "MXFP4" and len(shape) == 2:
                name, x = f"{name}_mxfp4", GGUFBytes(data.shape, data, rows)
            tensors[name] = x
    return config, tensors


class _Joined(NamedTuple):
    """A tensor of gate and up, whose rows take turns."""

    tensor_type: Any
    shape: tuple[int, ...]  # in GGUF's order
    data: Any


def _joined(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns tensors with those of gate and up as one, by the name of gate."""
    joined: dict[str, Any] = dict(found)
    for name, gate in found.items():
        up = found.get(name.replace("_gate_", "_up_"))
        if ".ffn_gate_exps." not in name or up is None:
            continue
        kind, shape = gate.tensor_type, tuple(gate.shape)
        if (up.tensor_type, tuple(up.shape)) != (kind, shape):
            continue  # which is refused by its shape
        del joined[up.name]
        if len(shape) == 3:
            data: Any = [
                _ByTurns(*pair) for pair in zip(gate.data, up.data, strict=True)
            ]
            joined[name] = _Joined(kind, (shape[0], 2 * shape[1], shape[2]), data)
        else:
            data = np.stack([gate.data, up.data], axis=-1)
            shape = (2 * shape[0], *shape[1:])
            joined[name] = _Joined(kind, shape, data.reshape(shape[::-1]))
    return joined


@dataclass(frozen=True, eq=False)
class _ByTurns:
    """The rows of two arrays of bytes by turns; indexing reads what it asks for."""

    first: np.ndarray
    second: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of both."""
        return 2 * len(self.first), self.first.shape[1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        places = np.arange(self.shape[0])[rows]
        found = np.empty((len(places), self.shape[1]), self.first.dtype)
        for turn, x in enumerate((self.first, self.second)):
            at = places % 2 == turn
            found[at] = x[places[at] // 2]
        return found


def gguf_fmt(path: pathlib.Path) -> str | None:
    """Returns the format of a GGUF file's packed layers, or None."""
    layers = [x for x in open_gguf(path).tensors if x.name.startswith("blk.")]
    kinds = {x.tensor_type.name for x in layers if len(x.shape) > 1}
    if "MXFP4" in kinds:  # experts; other layers are in float
        return "mxfp4"
    return "q4_0" if kinds == {"Q4_0"} else None


@dataclass(frozen=True, eq=False)
class GGUFBytes:
    """The bytes of the rows of a tensor of a GGUF file."""

    shape: tuple[int, ...]
    stored: np.ndarray | _ByTurns
    rows: np.ndarray | None = None  # the stored row of each row; None: in order
    dtype: np.dtype = np.dtype(np.uint8)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        first, columns = index
        return self.stored[first if self.rows is None else self.rows[first]][:, columns]


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file: indexing decodes the rows that it asks for."""

    shape: tuple[int, ...]  # in the Hugging Face model
    stored: np.ndarray | _ByTurns
    kind: Any  # a `gguf.GGMLQuantizationType`
    rows: np.ndarray | None = None  # the stored row of each row; None: in order
    offset: float = 0.0  # that llama.cpp added to the values
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        import gguf

        first, *rest = index if isinstance(index, tuple) else (index,)
        chosen = first if self.rows is None else self.rows[first]
        stored = self.stored[chosen]
        # The package decodes 16 rows at a time: short ones go faster together.
        group = math.gcd(len(stored), 4) if self.shape[-1] <= 1024 else 1
        x = gguf.dequantize(stored.reshape(len(stored) // group, -1), self.kind)
        x = x.reshape(len(stored), *self.shape[1:])
        x = x[(slice(None), *rest)] if rest else x
        return np.asarray(x - self.offset if self.offset else x, self.dtype)


def gguf_names(config: DecoderConfig, kind: str) -> dict[str, str]:
    """Maps a decoder's Hugging Face tensor names to GGUF names, experts' in order."""
    import gguf

    # llama.cpp has no architecture of the name.
    arch = "LLAMA" if kind == "mistral" else kind.upper().replace("-", "_")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_layers)
    names = decoder_names(config)
    found: dict[str, str] = {}
    sizes = config.num_layers, config.experts.count if config.experts else 1
    for path in names.entries:
        for name in names.of(path, sizes[: names.num_batch_axes(path)]).flat:
            whole = name
            for pattern, new in _PARAMETERS.items():
                whole = re.sub(pattern, new, whole)
            gguf_name = known.get_name(whole, try_suffixes=(".weight", ".bias"))
            if gguf_name is not None:  # it is for all that `gguf_architecture` takes
                found[name] = gguf_name
    return found


def context_of(source: pathlib.Path) -> int:
    """Returns the number of tokens that a model was trained with."""
    if source.suffix == ".gguf":
        reader = open_gguf(source)
        kind = field(reader, "general.architecture")
        found = field(reader, f"{kind}.context_length")
    else:
        raw = text_config(ql.io.read_config_json(source))
        found = raw.get("max_position_embeddings")
    if not found:
        raise ValueError(f"{source} must say how many positions the model has.")
    return int(found)


def permuted_heads(name: str, config: DecoderConfig, kind: str) -> int | None:
    """Returns the heads of a tensor whose rows llama.cpp reorders, else None."""
    if kind not in PERMUTED:
        return None
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else None


def stored_rows(
    name: str, shape: tuple[int, ...], config: DecoderConfig, kind: str
) -> np.ndarray | None:
    """Returns the stored row of each row of a tensor, or None if they are in order."""
    heads = permuted_heads(name, config, kind)
    # Another number of rows is refused by its shape.
    if heads is None or shape[0] % (2 * heads):
        return None
    return np.argsort(permute(np.arange(shape[0]), heads))


def offset_of(name: str, kind: str) -> float:
    """Returns the number that llama.cpp adds to a tensor."""
    is_norm = kind in OFFSET_NORMS and name.endswith("norm.weight")
    return 1.0 if is_norm else 0.0


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Interleaves rows i and i + Dh/2 of each head, as llama.cpp stores them."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
