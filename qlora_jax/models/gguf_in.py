"""GGUF files: their metadata as a config, their tensors by Hugging Face name."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import qlora_jax as ql

from .config import DecoderConfig, LayerKind, Rope
from .families.family import is_count, number
from .gguf_check import check_gguf
from .names import decoder_names

# llama.cpp writes Mistral as "llama".
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
FREQUENCIES = "rope_freqs.weight"  # the tensor of `Rope.divisors`


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
    divisors = found.pop(FREQUENCIES, None)
    try:
        config = config_from_gguf(reader, found, divisors)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ql.io.CheckpointError(
            f"{path} must have values of the kinds that its keys have. Got {error!r}."
        ) from error
    ours = {theirs: name for name, theirs in gguf_names(config).items()}
    is_permuted = field(reader, "general.architecture") == "llama"
    tensors = {}
    for name, tensor in found.items():
        name = ours.get(str(name), str(name))
        shape = tuple(int(n) for n in reversed(tensor.shape))
        heads = permuted_heads(name, config) if is_permuted else None
        # Another number of rows is refused by its shape.
        rows = None
        if heads is not None and shape[0] % (2 * heads) == 0:
            rows = unpermute(np.arange(shape[0]), heads)
        tensors[name] = GGUFTensor(shape, tensor, rows)
    return config, tensors


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file: indexing decodes the rows that it asks for.

    Attributes:
        shape: Its shape, as in the Hugging Face model.
        stored: The `gguf.ReaderTensor`.
        rows: The stored row of each row; None where they are in order.
        dtype: The dtype of what indexing returns.
    """

    shape: tuple[int, ...]
    stored: Any
    rows: np.ndarray | None = None
    dtype: np.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        import gguf

        first, *rest = index if isinstance(index, tuple) else (index,)
        chosen = first if self.rows is None else self.rows[first]
        x = gguf.dequantize(self.stored.data[chosen], self.stored.tensor_type)
        return np.asarray(x[(slice(None), *rest)] if rest else x, self.dtype)


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Returns the GGUF name of each Hugging Face name of a decoder's tensors."""
    import gguf

    kind = gguf.MODEL_ARCH.QWEN3 if config.qk_norms else gguf.MODEL_ARCH.LLAMA
    known = gguf.get_tensor_name_map(kind, config.num_layers)
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

    Raises:
        CheckpointError: If it is not.
    """
    import gguf

    check_gguf(pathlib.Path(path))
    try:
        return gguf.GGUFReader(str(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ql.io.CheckpointError(f"{path} must be a GGUF file. {e!r}") from e


def read_metadata(path: str | pathlib.Path, key: str) -> Any:
    """Returns a value of the architecture's metadata; None where it is missing."""
    reader = open_gguf(path)
    return field(reader, f"{field(reader, 'general.architecture')}.{key}")


def config_from_gguf(reader: Any, found: Mapping, divisors: Any) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
        reader: A `gguf.GGUFReader`.
        found: Its tensors, by name.
        divisors: The tensor of the frequencies' divisors, or None.

    Raises:
        ValueError: If the family, or what a key asks for, is not one we compute.
    """
    family = field(reader, "general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"The architecture must be one of {ARCHITECTURES}. Got {family!r}."
        )

    def get(key: str, default: Any = None) -> Any:
        return field(reader, f"{family}.{key}", default)

    sizes = ["block_count", "embedding_length", "feed_forward_length"]
    sizes += ["attention.head_count"]
    missing = [f"{family}.{key}" for key in sizes if not is_count(get(key))]
    optional = ["attention.head_count_kv", "attention.key_length"]
    missing += [f"{family}.{key}" for key in optional if not is_count(get(key, 1))]
    if not is_count(get("block_count"), len(found)):
        missing = [f"{family}.block_count of at most {len(found)}"]
    missing += [name for name in ("token_embd.weight",) if name not in found]
    if missing:
        raise ValueError(f"a GGUF model must have {', '.join(missing)}.")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    supported = {  # values of a key; others would change the model silently
        "rope.scaling.type": ("none", "linear"),  # linear by the factor below
        "rope.scaling.factor": (1,),
        "rope.scale_linear": (1,),  # its old name
        "rope.dimension_count": (head_dim,),
        "attention.value_length": (head_dim,),
        "attention.sliding_window": (0,),
        "attention.causal": (True,),
    }
    wrong = [
        f"`{family}.{key}` must be {' or '.join(map(repr, allowed))}. Got {value!r}."
        for key, allowed in supported.items()
        if (value := get(key, allowed[0])) not in allowed
    ]
    if wrong:
        raise ValueError(" ".join(wrong))
    rope = Rope(
        number(get("rope.freq_base", 10_000.0)),
        () if divisors is None else tuple(divisors.data.tolist()),
    )
    return DecoderConfig(
        vocab_size=int(found["token_embd.weight"].shape[-1]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        layers=(LayerKind(rope),),
        rms_norm_eps=number(get("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_embeddings="output.weight" not in found,
        qk_norms="blk.0.attn_q_norm.weight" in found,
        qkv_bias="blk.0.attn_q.bias" in found,
        o_bias="blk.0.attn_output.bias" in found,
        mlp_bias="blk.0.ffn_gate.bias" in found,
    )


def permuted_heads(name: str, config: DecoderConfig) -> int | None:
    """Returns the heads of a tensor whose rows llama.cpp reorders in a Llama."""
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else None


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k: i and i + Dh/2 side by side.

    Example:
        >>> unpermute(np.array([0, 2, 1, 3]), heads=1)
        array([0, 1, 2, 3])
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
