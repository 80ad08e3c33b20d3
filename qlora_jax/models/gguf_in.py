"""GGUF files: their metadata as a config, their tensors by Hugging Face name."""

import functools
import pathlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import qlora_jax as ql

from .config import DecoderConfig
from .decoder_names import decoder_names
from .gguf_check import check_gguf
from .gguf_config import (
    FREQUENCIES,
    LONG,
    OFFSET_NORMS,
    PERMUTED,
    SHORT,
    check_values,
    config_from_values,
)

# llama.cpp writes Mistral as "llama".
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES += ("gemma2", "gemma3", "smollm3", "phi3")


def read_gguf(
    path: str | pathlib.Path,
) -> "tuple[DecoderConfig, dict[str, GGUFTensor]]":
    """Returns the config, and the tensors by their Hugging Face names.

    Tensors without such a name keep theirs. They are decoded when they are asked for.

    Raises:
        ValueError: If the family, or what a key asks for, is not one we compute.
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
    try:
        config = config_from_gguf(reader, found, vocab_size, factors)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ql.io.CheckpointError(
            f"{path} must have values of the kinds that its keys have. Got {error!r}."
        ) from error
    kind = str(field(reader, "general.architecture"))
    ours = {theirs: name for name, theirs in gguf_names(config, kind).items()}
    tensors = {}
    for name, tensor in found.items():
        name = ours.get(str(name), str(name))
        shape = tuple(int(n) for n in reversed(tensor.shape))
        heads = permuted_heads(name, config, kind)
        # Another number of rows is refused by its shape.
        rows = None
        if heads is not None and shape[0] % (2 * heads) == 0:
            rows = unpermute(np.arange(shape[0]), heads)
        tensors[name] = GGUFTensor(shape, tensor, rows, offset_of(name, kind))
    return config, tensors


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file: indexing decodes the rows that it asks for.

    Attributes:
        shape: Its shape, as in the Hugging Face model.
        stored: The `gguf.ReaderTensor`.
        rows: The stored row of each row; None where they are in order.
        offset: What the stored values have been added.
        dtype: The dtype of what indexing returns.
    """

    shape: tuple[int, ...]
    stored: Any
    rows: np.ndarray | None = None
    offset: float = 0.0
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        import gguf

        first, *rest = index if isinstance(index, tuple) else (index,)
        chosen = first if self.rows is None else self.rows[first]
        x = gguf.dequantize(self.stored.data[chosen], self.stored.tensor_type)
        x = x[(slice(None), *rest)] if rest else x
        return np.asarray(x - self.offset if self.offset else x, self.dtype)


def gguf_names(config: DecoderConfig, kind: str) -> dict[str, str]:
    """Returns the GGUF name of each Hugging Face name of a decoder's tensors."""
    import gguf

    # llama.cpp has no architecture of the name.
    arch = "LLAMA" if kind == "mistral" else kind.upper()
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_layers)
    names = decoder_names(config)
    found: dict[str, str] = {}
    for path in names.entries:
        lead = (config.num_layers,) * names.num_batch_axes(path)
        for name in names.of(path, lead).flat:
            theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is not None:  # it is for all that `gguf_architecture` takes
                found[name] = theirs
    return found


def field(reader: Any, key: str, default: Any = None) -> Any:
    """Returns what a field of a `gguf.GGUFReader` holds, or the default."""
    found = reader.fields.get(key)
    return default if found is None else found.contents()


def open_gguf(path: str | pathlib.Path) -> Any:
    """Returns a `gguf.GGUFReader` of a file that is whole.

    The last file's is kept: a command reads its config, tokenizer and weights.

    Raises:
        CheckpointError: If it is not.
    """
    path = pathlib.Path(path)
    version = None
    if path.is_file():
        stat = path.stat()
        version = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return _open(path.absolute(), version)


@functools.lru_cache(maxsize=1)
def _open(path: pathlib.Path, version: Any) -> Any:
    del version  # another one is another file
    import gguf

    class Reader(gguf.GGUFReader):
        # Slices of a plain array take a third of the time of a memmap's.
        data = property(lambda self: self._data, lambda self, x: self._set(x))

        def _set(self, data: Any) -> None:
            self._data = np.asarray(data)

    check_gguf(path)
    try:
        return Reader(str(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ql.io.CheckpointError(f"{path} must be a GGUF file. {e!r}") from e


def read_metadata(path: str | pathlib.Path, key: str) -> Any:
    """Returns a value of the architecture's metadata; None where it is missing."""
    reader = open_gguf(path)
    return field(reader, f"{field(reader, 'general.architecture')}.{key}")


def config_from_gguf(
    reader: Any, names: Collection[str], vocab_size: int, factors: Mapping
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
        reader: A `gguf.GGUFReader`.
        names: The names of its tensors.
        vocab_size: Rows of the embedding.
        factors: What the frequencies are divided by, by tensor.

    Raises:
        ValueError: If the family, or what a key asks for, is not one we compute.
    """
    family = field(reader, "general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"The architecture must be one of {ARCHITECTURES}. Got {family!r}."
        )
    values = {
        key.removeprefix(f"{family}."): field(reader, key)
        for key in reader.fields
        if key.startswith(f"{family}.")
    }
    check_values(family, values, names)
    return config_from_values(family, values, names, vocab_size, factors)


def permuted_heads(name: str, config: DecoderConfig, kind: str) -> int | None:
    """Returns the heads of a tensor whose rows llama.cpp reorders."""
    if kind not in PERMUTED:
        return None
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else None


def offset_of(name: str, kind: str) -> float:
    """Returns what llama.cpp's files add to a tensor."""
    is_norm = kind in OFFSET_NORMS and name.endswith("norm.weight")
    return 1.0 if is_norm else 0.0


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k: i and i + Dh/2 side by side.

    Example:
        >>> unpermute(np.array([0, 2, 1, 3]), heads=1)
        array([0, 1, 2, 3])
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
