"""`qlora-jax inspect`: what a checkpoint or an adapter is, and what it holds."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import qlora_jax as ql

from ..models.gguf.open_file import field, open_gguf
from .configs import InspectConfig
from .model import OWN_ADAPTER

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Leaf:
    """One tensor, or the adapter of one weight.

    Attributes:
        name: Its name in the file.
        shape: Its shape; a packed weight's is that of the weight.
        format: Its dtype or number format; "lora" for an adapter.
        bytes: Bytes that it takes.
        rank: The rank of an adapter; None for others.

    Example:
        >>> from qlora_jax import cli
        >>> cli.Leaf("norm.weight", (64,), "float32", 256).rank is None
        True
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    rank: int | None = None


@dataclass(frozen=True)
class Contents:
    """What `inspect` found; `str` prints it as a table.

    Attributes:
        kind: What it is: "model", "bitsandbytes model", "PEFT adapter", "GGUF model",
            "qlora_jax tree" or "safetensors".
        about: Its most important settings.
        leaves: What it holds, each as a `Leaf`.
        bytes: Bytes that all leaves take.

    Example:
        >>> from qlora_jax import cli
        >>> leaf = cli.Leaf("norm.weight", (64,), "float32", 256)
        >>> cli.Contents("safetensors", {}, (leaf,)).bytes
        256
    """

    kind: str
    about: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    bytes: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "bytes", sum(leaf.bytes for leaf in self.leaves))

    def __str__(self):
        lines = [self.kind, *(f"  {key}: {value}" for key, value in self.about.items())]
        rows = [("leaf", "shape", "format", "rank", "bytes")]
        for x in self.leaves:
            shape = "[" + ",".join(map(str, x.shape)) + "]"
            rank = "" if x.rank is None else str(x.rank)
            rows.append((x.name, shape, x.format, rank, f"{x.bytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for row in rows:
            cells = [
                cell.rjust(w) if i > 2 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.append(f"{len(self.leaves):,} leaves, {self.bytes:,} bytes")
        return "\n".join(lines)


def inspect(config: InspectConfig) -> Contents:
    """Says what a file or folder is and lists what it holds.

    Args:
        config: The path.

    Returns:
        What was found.

    Raises:
        ValueError: If it is none that this library reads, or is broken.

    Example:
        >>> import tempfile, numpy as np, qlora_jax as ql
        >>> from qlora_jax import cli
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.write_safetensors(path, {"x": np.ones((2, 3), np.float32)})
        >>> print(cli.inspect(cli.InspectConfig(path)))
        safetensors
        leaf  shape  format   rank  bytes
        x     [2,3]  float32           24
        1 leaves, 24 bytes
    """
    path = pathlib.Path(config.path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return _model(path)
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        own = path / OWN_ADAPTER
        path = own if own.is_file() else path
        tensors = ql.io.open_safetensors(path)
        if tensors.metadata.get("format") == "qlora_jax":
            return _own(path)
        return Contents("safetensors", tensors.metadata, _leaves(tensors))
    raise ValueError(
        f"`path` must be a folder, a .safetensors or a .gguf file. Got {str(path)!r}."
    )


def _leaves(tensors: Mapping[str, Any]) -> tuple[Leaf, ...]:
    """Lists tensors; the parts of a packed weight as one leaf."""
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    parts: dict[str, list[str]] = {}
    for name in tensors:
        owner = name
        while owner and owner not in states:
            owner = owner.rpartition(".")[0]
        parts.setdefault(owner or name, []).append(name)
    leaves = []
    for name, group in sorted(parts.items()):
        size = sum(tensors[part].nbytes for part in group)
        if name not in states:
            x = tensors[name]
            leaves.append(Leaf(name, tuple(x.shape), x.dtype.name, size))
            continue
        state = _state(name, tensors[states[name]])
        fmt = states[name].partition(_STATE)[2]
        nested = " double" if "nested_offset" in state else ""
        fmt = f"{fmt} block {state.get('blocksize')}{nested}"
        leaves.append(Leaf(name, tuple(state["shape"]), fmt, size))
    return tuple(leaves)


def _state(name: str, tensor: Any) -> dict[str, Any]:
    if tensor.nbytes > 1 << 16:
        raise ValueError(f"`quant_state` of {name} must be at most 65,536 bytes.")
    try:
        state = json.loads(tensor[...].tobytes())
    except ValueError as error:
        raise ValueError(f"`quant_state` of {name} must be JSON. {error}") from error
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise ValueError(f"`quant_state` of {name} must have a `shape`.")
    return state


def _model(path: pathlib.Path) -> Contents:
    raw = ql.io.read_config_json(path)
    leaves = _leaves(ql.io.open_safetensors(path))
    is_packed = any("block" in leaf.format for leaf in leaves)
    keys = ("architectures", "model_type", "dtype", "torch_dtype")
    about = {key: raw[key] for key in keys if key in raw}
    about["parameters"] = sum(math.prod(leaf.shape) for leaf in leaves)
    return Contents("bitsandbytes model" if is_packed else "model", about, leaves)


def _adapter(path: pathlib.Path) -> Contents:
    config = ql.io.PeftConfig.read(path)
    tensors = dict(ql.io.open_safetensors(path / "adapter_model.safetensors"))
    leaves = []
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors.get(f"{module}.lora_B.weight")
        if b is None or len(a.shape) != 2 or len(b.shape) != 2:
            raise ValueError(f"{module} must have lora_A and lora_B of two axes.")
        del tensors[key], tensors[f"{module}.lora_B.weight"]
        shape, rank = (b.shape[0], a.shape[1]), a.shape[0]
        fmt = f"lora {a.dtype.name}"
        leaves.append(Leaf(module, shape, fmt, a.nbytes + b.nbytes, rank))
    leaves += _leaves(tensors)
    about = {
        "base model": config.others.get("base_model_name_or_path"),
        "target modules": config.target_modules,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rank stabilized": config.use_rslora,
        "bias": config.bias,
    }
    return Contents("PEFT adapter", about, tuple(leaves))


def _own(path: pathlib.Path) -> Contents:
    """Lists a tree that `ql.io.save` wrote, having read and checked it."""
    tree, config = ql.io.restore(path)
    leaves = []
    for name, x in ql.leaves_by_path(tree).items():
        rank = getattr(x, "rank", None)  # of an adapter
        if rank is not None:
            shape, dtype = x.matrix_shape, next(iter(x.arrays.values())).dtype
            fmt = f"{x.label} {dtype.name}"
        else:
            is_packed = isinstance(x, ql.QTensor)
            shape = x.shape
            fmt = f"{x.fmt} block {x.block_size}" if is_packed else x.dtype.name
            fmt += " double" * (is_packed and x.double_quant)
        leaves.append(Leaf(name, tuple(shape), fmt, x.nbytes, rank))
    about = {} if config is None else {"rank": config.rank, "alpha": config.alpha}
    return Contents("qlora_jax tree", about, tuple(leaves))


def _gguf(path: pathlib.Path) -> Contents:
    reader = open_gguf(path)
    leaves = tuple(
        Leaf(
            tensor.name,
            tuple(int(n) for n in reversed(tensor.shape)),
            tensor.tensor_type.name,
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    )
    about = {
        "architecture": field(reader, "general.architecture"),
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
    }
    return Contents("GGUF model", about, leaves)
