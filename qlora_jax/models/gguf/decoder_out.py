"""Writes a decoder as a GGUF file."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
from flax.traverse_util import flatten_dict

import qlora_jax as ql

from ..._jax.progress import progress_bar
from ..checkpoint import abstract_params, read_config
from ..config import DecoderConfig
from ..decoder_names import decoder_names
from .decoder_in import context_of, gguf_names, offset_of, permute, permuted_heads
from .packed_blocks import BLOCK, block_rows, in_q4_0
from .tokenizer_out import check_gguf_tokenizer, write_gguf_tokenizer
from .values import factors_of, gguf_architecture, values_of

FORMATS = ("F16", "Q8_0", "Q4_0")
_BLOCKS = ("Q4_0", "MXFP4")  # whose bytes are those of packed kernels
_LARGEST = float(np.finfo(np.float16).max)


def save_gguf(
    path: str | pathlib.Path,
    source: str | pathlib.Path,
    base: Mapping[str, Any],
    lora: Mapping[str, Any] | None = None,
    *,
    fmt: str = "F16",
    tokenizer: bool = True,
    progress: bool = True,
) -> None:
    """Writes a GGUF file, a tensor at a time, under a temporary name until complete.

    Norms and biases are float32, kernels and the embedding `fmt`. Q8_0 has blocks of 32
    inputs: tensors whose inputs 32 does not divide are F16. In both, experts in mxfp4
    without adapters keep their codes and scales. Q4_0 is for the layers' kernels: codes
    and scales stay if it has such ones, and floats are packed by its rule. All else is
    F16 there if that holds each number, and F32 if not.

    Args:
        path: The file.
        source: The folder or `.gguf` file that the model was loaded from: it has the
            config, the context length and the tokenizer.
        base: The parameters of the `Decoder`; F16 and Q8_0 decode other packed
            kernels, a matrix at a time.
        lora: Adapters to merge into them; none for Q4_0.
        fmt: "F16", "Q8_0" or "Q4_0".
        tokenizer: Whether to write the tokenizer too.
        progress: Whether to show a bar.

    Raises:
        ValueError: If GGUF, as written here, lacks a part of the model or tokenizer; if
            the parameters are not the model's; or if a value does not fit.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.checkpoint import load
        >>> from qlora_jax.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> _, params = load(folder, progress=False)
        >>> path = folder + "/model.gguf"
        >>> save_gguf(path, folder, params, tokenizer=False, progress=False)
        >>> load(path, progress=False)[0].num_layers
        2
    """
    if fmt not in FORMATS:
        raise ValueError(f"`fmt` must be one of {FORMATS}. Got {fmt!r}.")
    source = pathlib.Path(source)
    config, architecture = check_gguf_source(source, tokenizer=tokenizer)
    leaves = flatten_dict(base, sep="/")
    adapters = flatten_dict(lora or {}, sep="/")
    _check_leaves(config, leaves, adapters)
    if fmt == "Q4_0":
        if adapters:
            raise ValueError(
                "`lora` must be left out for Q4_0, which would pack the sum again."
            )
        leaves = in_q4_0(leaves)
    with (
        ql.io.new_path(path) as new,
        contextlib.closing(gguf.GGUFWriter(str(new), architecture)) as writer,
    ):
        _add_values(writer, config, source, fmt)
        if tokenizer:
            write_gguf_tokenizer(writer, source, config.vocab_size)
        planned = _plan(config, architecture, leaves, adapters, fmt)
        factors = factors_of(config, architecture)
        for name, divisors in factors.items():
            _add_info(writer, name, (len(divisors),), "F32")
        for tensor in planned:
            _add_info(writer, tensor.name, tensor.shape, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for divisors in factors.values():
            writer.write_tensor_data(np.asarray(divisors, np.float32))
        span: Any = dict(iterable=planned, total=len(planned))
        for tensor in progress_bar("writing", " tensors", progress, **span):
            x = _stored(tensor, leaves[tensor.path], adapters.get(tensor.path))
            heads = permuted_heads(tensor.hf_name, config, architecture)
            x = x if heads is None else permute(x, heads)
            if tensor.kind not in _BLOCKS:
                x = x + np.float32(offset_of(tensor.hf_name, architecture))
                x = _coded(tensor.name, x, tensor.kind)
            writer.write_tensor_data(np.ascontiguousarray(x))


def check_gguf_source(
    source: pathlib.Path, *, tokenizer: bool
) -> tuple[DecoderConfig, str]:
    """Returns the config and llama.cpp's architecture; reads no weights."""
    config = dataclasses.replace(read_config(source), module="model")
    architecture = gguf_architecture(config, context_of(source))
    if tokenizer:
        check_gguf_tokenizer(source)
    return config, architecture


def _add_values(
    writer: Any, config: DecoderConfig, source: pathlib.Path, fmt: str
) -> None:
    writer.add_name(source.stem if source.suffix == ".gguf" else source.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{fmt}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    adders = {int: "uint32", float: "float32", str: "string"}
    for key, value in values_of(config, writer.arch, context_of(source)).items():
        getattr(writer, f"add_{adders[type(value)]}")(f"{writer.arch}.{key}", value)


def _check_leaves(config: DecoderConfig, leaves: Mapping, adapters: Mapping) -> None:
    params: dict[str, Any] = flatten_dict(abstract_params(config), sep="/")
    wanted = {path: x.shape for path, x in params.items()}
    given = {path: tuple(x.shape) for path, x in leaves.items()}
    if wrong := sorted({path for path, _ in wanted.items() ^ given.items()}):
        raise ValueError(f"`base` must hold the model's parameters. Wrong: {wrong}.")
    if stray := sorted(adapters.keys() - leaves.keys()):
        raise ValueError(f"`lora` must have the paths of kernels. Got {stray}.")


class _Planned(NamedTuple):
    """A tensor to write."""

    name: str
    hf_name: str  # name in the Hugging Face model
    path: str  # of the leaf that holds it
    index: tuple[int, ...]  # on the leaf's batch axes
    columns: slice  # of the leaf that it has
    is_kernel: bool  # then its last axes are transposed
    shape: tuple[int, ...]
    kind: str  # "F32", "MXFP4" or one of `FORMATS`


def _plan(
    config: DecoderConfig,
    architecture: str,
    leaves: Mapping[str, Any],
    adapters: Mapping[str, Any],
    fmt: str,
) -> list[_Planned]:
    """Returns the tensors to write."""
    names, gguf_of = decoder_names(config), gguf_names(config, architecture)
    planned = []
    for path, leaf in leaves.items():
        batch_axes, is_kernel = names.num_batch_axes(path), bool(names.roles(path))
        found = names.of(path, leaf.shape[:batch_axes])
        if found.ndim > 1:  # experts, which are one tensor
            found, batch_axes = found[:, 0], 1
        shape, parts = tuple(leaf.shape[batch_axes:]), {"_gate_": slice(None)}
        if "/experts/gate_up_proj/" in path:  # two tensors, of columns by turns
            shape = (*shape[:-1], shape[-1] // 2)
            parts = {"_gate_": slice(0, None, 2), "_up_": slice(1, None, 2)}
        shape = (*shape[:-2], *shape[:-3:-1]) if is_kernel else shape
        # llama.cpp has these in F32.
        is_small = len(shape) == 1 or re.search("/router/|/bias$", path)
        is_merged = path in adapters
        kind = "F32" if is_small else _kind(path, leaf, shape, fmt, is_merged)
        for index, hf_name in np.ndenumerate(found):
            for part, columns in parts.items():
                name = gguf_of[hf_name].replace("_gate_", part)
                own = name, hf_name, path, index, columns
                planned.append(_Planned(*own, is_kernel, shape, kind))
    return planned


def _kind(
    path: str, leaf: Any, shape: tuple[int, ...], fmt: str, is_merged: bool
) -> str:
    is_packed = isinstance(leaf, ql.QTensor)
    if is_packed and not is_merged and "/experts/" in path:
        if (leaf.fmt, leaf.block_size) == ("mxfp4", BLOCK):
            return "MXFP4"
    if fmt != "Q4_0":
        return fmt if shape[-1] % 32 == 0 else "F16"
    if is_packed:
        return fmt
    x = np.asarray(leaf).astype(np.float32)
    with np.errstate(over="ignore"):
        return "F16" if np.array_equal(x.astype(np.float16), x) else "F32"


def _stored(tensor: _Planned, leaf: Any, lora: Any) -> np.ndarray:
    """Returns a tensor's values, or bytes if its kernels are packed in its format."""
    if tensor.kind in _BLOCKS:
        return block_rows(leaf, tensor.index, tensor.columns)
    found = np.empty(tensor.shape, np.float32)
    for expert in np.ndindex(tensor.shape[:-2]):
        x = _merged(leaf, lora, (*tensor.index, *expert))[..., tensor.columns]
        found[expert] = x.swapaxes(-1, -2) if tensor.is_kernel else x
    return found


def _merged(leaf: Any, lora: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns a part of a leaf, decoded and with its adapter added."""

    def part(x: Any) -> Any:  # of an axis of one, which is for all, that
        places = [i % n for i, n in zip(index, x.shape, strict=False)]
        return x[tuple(slice(i, i + 1) for i in places)]

    added = {}
    if lora is not None:
        added["x"] = jax.tree.map(part, lora)
        if isinstance(lora.scaling, tuple):  # one for each matrix
            own = part(np.reshape(lora.scaling, lora.batch_shape)).ravel().tolist()
            added["x"] = dataclasses.replace(added["x"], scaling=tuple(own))
    merged = ql.merge({"x": jax.tree.map(part, leaf)}, added)["x"]
    return np.asarray(merged).reshape(leaf.shape[len(index) :])


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    coded, dtype = gguf.GGMLQuantizationType[kind], np.dtype(np.float32)
    size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, coded)))
    # `raw_dtype` replaces the dtype; one of bytes would change the shape.
    writer.add_tensor_info(name, shape, dtype, size, raw_dtype=coded)


def _coded(name: str, x: np.ndarray, kind: str) -> np.ndarray:
    """Returns a tensor's values in the format `kind`."""
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite. Got NaN or infinity.")
    limit = {"F32": np.inf, "Q8_0": _LARGEST * 127}.get(kind, _LARGEST)
    if (largest := float(np.abs(x).max())) > limit:
        raise ValueError(f"{name} must fit {kind}. Got a value of {largest}.")
    return gguf.quantize(np.ascontiguousarray(x), gguf.GGMLQuantizationType[kind])
