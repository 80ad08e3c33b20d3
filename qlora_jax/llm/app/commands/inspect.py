"""`qlora-jax inspect`: the tensors of a checkpoint or an adapter."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import qlora_jax as ql

from ...data.readers import describe_path
from ...printable import printable
from ...reading import reading
from ...train.outputs import NATIVE_ADAPTER, plural, read_metrics
from ..configs import InspectConfig
from ..run_folder import (
    CONFIG,
    METRICS,
    RESULT,
    is_run,
    read_run_config,
)


@dataclass(frozen=True)
class Leaf:
    """One tensor, or the adapter of one weight in this library's format.

    Attributes:
        name: Its name in the file.
        shape: Its shape; for a packed or adapted weight, the shape before packing.
        format: Its dtype or number format; for an adapter, its kind and its dtype.
        bytes: Its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int


@dataclass(frozen=True)
class Contents:
    """The result of `inspect`; `str` prints it as a table.

    Attributes:
        kind: Such as "model", "bitsandbytes model", "PEFT adapter", "qlora_jax tree",
            "run" or "safetensors".
        about: The most important settings.
        leaves: A `Leaf` for each tensor or adapter.
        bytes: The size of all leaves in bytes.
    """

    kind: str
    about: Mapping[str, Any]
    leaves: tuple[Leaf, ...]
    bytes: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "bytes", sum(leaf.bytes for leaf in self.leaves))

    def __str__(self):
        about = (printable(f"{key}: {value}") for key, value in self.about.items())
        lines = [printable(self.kind), *(f"  {line}" for line in about)]
        width = max([4, *(len(printable(leaf.name)) for leaf in self.leaves)])
        lines.append(f"{'leaf':{width}}  shape, format, bytes")
        for leaf in self.leaves:
            shape = "[" + ",".join(map(str, leaf.shape)) + "]"
            details = f"{shape}, {printable(leaf.format)}, {leaf.bytes:,}"
            lines.append(f"{printable(leaf.name):{width}}  {details}")
        count = plural(len(self.leaves), "leaf", "leaves")
        return "\n".join([*lines, f"{count}, {self.bytes:,} bytes"])


def inspect(config: InspectConfig) -> Contents:
    """Returns the kind, the settings and the leaves of a file or a folder.

    Args:
        config: The path.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If the path is not supported, or its contents are damaged.

    Example:
        >>> import tempfile, numpy as np, qlora_jax as ql
        >>> from qlora_jax.llm import app
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.write_safetensors(path, {"x": np.ones((2, 3), np.float32)})
        >>> print(app.inspect(app.InspectConfig(path)))
        safetensors
        leaf  shape, format, bytes
        x     [2,3], float32, 24
        1 leaf, 24 bytes
    """
    path = pathlib.Path(config.path)
    supported = "a folder or a .safetensors file"
    if not path.exists():
        described = describe_path(path)
        raise FileNotFoundError(f"`path` must be {supported}. Got {described}.")
    ql.io.check_links(path)
    # A run contains an adapter, and a model's folder may contain one too, so the order
    # of these checks matters.
    if is_run(path):
        return _inspect_run(path)
    if (path / "adapter_config.json").is_file():
        return _inspect_adapter(path)
    if (path / "config.json").is_file():
        return _inspect_model(path)
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        native = path / NATIVE_ADAPTER  # takes precedence over other tensors
        path = native if native.is_file() else path
        tensors = ql.io.open_safetensors(path)
        if tensors.metadata.get("format") == "qlora_jax":
            return _inspect_native(path)
        return Contents("safetensors", tensors.metadata, _make_leaves(tensors))
    raise ValueError(f"`path` must be {supported}. Got {str(path)!r}.")


def _inspect_run(path: pathlib.Path) -> Contents:
    file, settings = path / RESULT, read_run_config(path / CONFIG).to_settings()
    with reading(file):
        result = dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}
    rows = read_metrics(path / METRICS)
    names = ("model", "data", "fmt", "steps")
    if settings["merge_aware"]:
        names += ("merge_aware",)
    about = {key: settings[key] for key in names}
    # The step of the newest metrics; the newest saved state may be older.
    about["finished steps"] = max((row["step"] for row in rows), default=0)
    about |= {k: result[k] for k in ("source", "loss", "valid_loss") if k in result}
    adapter = path / "adapter"  # exists once the run has finished
    leaves = ()
    if (native := adapter / NATIVE_ADAPTER).is_file():
        leaves = _inspect_native(native).leaves
    elif adapter.is_dir():
        leaves = _inspect_adapter(adapter).leaves
    return Contents("run", about, leaves)


def _make_leaves(tensors: Mapping[str, Any]) -> tuple[Leaf, ...]:
    """Returns a `Leaf` for each tensor; all parts of a packed weight share one."""
    return tuple(
        Leaf(name, tuple(x.shape), _describe_format(x), x.nbytes)
        for name, x in sorted(ql.io.packed_tensors(tensors).items())
    )


def _describe_format(x: Any) -> str:
    if (packing := getattr(x, "packing", None)) is None:
        return x.dtype.name
    double = " double" * packing.double_quant
    return f"{packing.fmt} block {packing.block_size}{double}"


def _inspect_model(path: pathlib.Path) -> Contents:
    raw = ql.io.read_config_json(path)
    leaves = _make_leaves(ql.io.open_safetensors(path))
    is_packed = any("block" in leaf.format for leaf in leaves)  # see _describe_format
    keys = ("architectures", "model_type", "dtype", "torch_dtype")
    about = {key: raw[key] for key in keys if key in raw}
    about["parameters"] = sum(math.prod(leaf.shape) for leaf in leaves)
    method = ql.io.read_quantization(path).get("quant_method", "bitsandbytes")
    return Contents(f"{method} model" if is_packed else "model", about, leaves)


def _inspect_adapter(path: pathlib.Path) -> Contents:
    config = ql.io.PeftConfig.read(path)
    about = {
        "base model": config.extra_settings.get("base_model_name_or_path"),
        "target modules": config.target_modules,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "rank stabilized": config.use_rslora,
        "bias": config.bias,
    }
    tensors = ql.io.open_safetensors(path / "adapter_model.safetensors")
    return Contents("PEFT adapter", about, _make_leaves(tensors))


def _inspect_native(path: pathlib.Path) -> Contents:
    # A tree that `ql.io.save` wrote: parameters, packed kernels and adapters.
    tree, config = ql.io.restore(path)
    leaves = []
    for name, x in ql.leaves_by_path(tree).items():
        if getattr(x, "rank", None) is None:  # not an adapter
            shape, fmt = x.shape, _describe_format(x)
        else:
            shape, dtype = x.matrix_shape, next(iter(x.arrays.values())).dtype
            fmt = f"{x.label} {dtype.name}"
            if isinstance(x, ql.MergeAware):
                fmt += f" for {_describe_format(x)}"
        leaves.append(Leaf(name, tuple(shape), fmt, x.nbytes))
    about = {} if config is None else {"rank": config.rank, "alpha": config.alpha}
    return Contents("qlora_jax tree", about, tuple(leaves))
