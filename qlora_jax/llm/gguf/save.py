"""Writes decoders and adapters as GGUF files."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
from jaxtyping import PyTree, UInt8
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.io.files import new_path
from qlora_jax.trees.paths import leaves_by_path

from ..models.checkpoint import abstract_params
from ..models.config import DecoderConfig
from ..models.decoder_names import decoder_names
from ..models.folder import ModelFolder
from .metadata import QWEN3_5, divisors_of, values_of
from .names import gguf_names
from .order import column_order, row_order
from .support import check_gguf_config
from .tokenizer import check_gguf_tokenizer, write_gguf_tokenizer

FORMATS = ("F16", "Q8_0", "Q4_0")
BLOCK = 32  # number of inputs in a block of Q4_0, Q8_0 and MXFP4
# Architectures whose norms are stored as 1 + scale.
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3", *QWEN3_5)
# Formats in which packed kernels are written with their codes and scales.
_PACKED = ("Q4_0", "MXFP4")
_Q4_0: Any = ql.QLoRAConfig(fmt="q4_0").packing
_Q4_0_FORMATS = _Q4_0.format.equivalents  # formats with the codes and scales of Q4_0
# The kernels that Q4_0 packs.
_LAYER_KERNELS = r"layers(_\d+)?/(?!.*/(router|shared_expert_gate)/).*/kernel"

Leaves = Mapping[str, Any]  # arrays and packed kernels, or adapters, by path


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
    """Writes a GGUF file tensor by tensor, under a temporary name until it is complete.

    Norms, biases, sinks and routers are always F32. The format of all other tensors
    depends on `fmt`:

    - "F16" and "Q8_0": this format, but experts in mxfp4 without an adapter keep their
      codes and scales. With "Q8_0", a tensor is F16 if its number of inputs is not a
      multiple of 32, the block size.
    - "Q4_0": only kernels of layers. Packed kernels keep their codes and scales, and
      float kernels are packed by llama.cpp's rule. Each remaining tensor is F16 if this
      represents its values exactly, and F32 if not.

    Args:
        path: The file.
        source: The folder that the model was loaded from, for the config, the context
            length and the tokenizer.
        base: The parameters of the `Decoder`. Except with Q4_0, packed kernels other
            than mxfp4 experts are decoded.
        lora: Adapters to merge into the kernels; must be None or empty for Q4_0.
        fmt: "F16", "Q8_0" or "Q4_0".
        tokenizer: Whether to write the tokenizer too.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a part of the model or tokenizer cannot be written as GGUF; if
            the parameters are not the model's; or if a value does not fit the format.

    Example:
        >>> import gguf, tempfile
        >>> from qlora_jax.llm.models.checkpoint import load
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> _, params = load(folder, progress=False)
        >>> path = folder + "/model.gguf"
        >>> save_gguf(path, folder, params, tokenizer=False, progress=False)
        >>> gguf.GGUFReader(path).fields["llama.block_count"].contents()
        2
    """
    # 1. Check everything before the file is created.
    if fmt not in FORMATS:
        raise ValueError(f"`fmt` must be one of {FORMATS}. Got {fmt!r}.")
    model = ModelFolder(pathlib.Path(source))
    config, architecture = check_gguf_source(model, tokenizer=tokenizer)
    leaves, adapters = leaves_by_path(base), leaves_by_path(lora or {})
    _check_leaves(config, leaves, adapters)
    if fmt == "Q4_0":
        _check_value_blocks(config)
        if adapters:
            raise ValueError(
                "`lora` must be left out for Q4_0, since merged kernels would have to "
                "be packed again."
            )
        leaves = _pack_q4_0(leaves)
    with _open_writer(path, architecture) as writer:
        # 2. The metadata, and the names and shapes of all tensors.
        _add_values(writer, config, model, fmt)
        if tokenizer:
            write_gguf_tokenizer(writer, model, config.vocab_size)
        tensors = _plan_tensors(config, architecture, leaves, adapters, fmt)
        divisors = divisors_of(config, architecture)
        infos = [(name, (len(x),), "F32") for name, x in divisors.items()]
        infos += [(tensor.name, tensor.shape, tensor.fmt) for tensor in tensors]
        for name, shape, tensor_fmt in infos:
            raw_dtype, dtype = gguf.GGMLQuantizationType[tensor_fmt], np.dtype("f4")
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, raw_dtype)))
            # `raw_dtype` overrides the dtype. If the dtype were uint8, the package
            # would convert the shape.
            writer.add_tensor_info(name, shape, dtype, size, raw_dtype=raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # 3. The data, in the same order.
        for x in divisors.values():
            writer.write_tensor_data(np.asarray(x, np.float32))
        # None hides the bar unless stderr is a terminal.
        disable = None if progress else True
        bar = tqdm(tensors, "writing", len(tensors), unit=" tensors", disable=disable)
        for tensor in bar:
            x = _read_tensor(tensor, leaves[tensor.path], adapters.get(tensor.path))
            x = _reorder(x, tensor, config, architecture)
            if tensor.fmt not in _PACKED:
                if tensor.hf_name.endswith(".A_log"):
                    x = -np.exp(x)  # llama.cpp stores A itself
                x = x + np.float32(_offset_of(tensor.hf_name, architecture))
                x = _encode(tensor.name, x, tensor.fmt)
            writer.write_tensor_data(np.ascontiguousarray(x))


@contextlib.contextmanager
def _open_writer(
    path: str | pathlib.Path, architecture: str
) -> Iterator[gguf.GGUFWriter]:
    with new_path(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), architecture)
        with contextlib.closing(writer):
            yield writer


def check_gguf_source(
    source: ModelFolder, *, tokenizer: bool
) -> tuple[DecoderConfig, str]:
    """Returns the config and llama.cpp's architecture; reads no weights."""
    # Without a vision part, which GGUF files lack, the decoder's path is `model`.
    config = dataclasses.replace(source.config, module="model")
    architecture = check_gguf_config(config, source.context_length)
    if tokenizer:
        check_gguf_tokenizer(source)
    return config, architecture


def _add_values(
    writer: gguf.GGUFWriter, config: DecoderConfig, source: ModelFolder, fmt: str
) -> None:
    writer.add_name(source.path.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{fmt}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    adders = {int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in values_of(config, writer.arch, source.context_length).items():
        getattr(writer, f"add_{adders[type(value)]}")(f"{writer.arch}.{key}", value)


def _check_value_blocks(config: DecoderConfig) -> None:
    """Raises if llama.cpp's order of the value heads would divide a block."""
    rule = config.delta_rule
    if rule is not None and rule.value_dim % BLOCK:
        raise ValueError(
            f"`value_dim` must be a multiple of {BLOCK} for Q4_0. Got {rule}."
        )


def _check_leaves(config: DecoderConfig, leaves: Leaves, adapters: Leaves) -> None:
    params = leaves_by_path(abstract_params(config))
    expected = {path: x.shape for path, x in params.items()}
    actual = {path: tuple(x.shape) for path, x in leaves.items()}
    if wrong := sorted({path for path, _ in expected.items() ^ actual.items()}):
        raise ValueError(
            "`base` must contain the model's parameters. Missing, unexpected or of "
            f"another shape: {wrong}."
        )
    if unknown := sorted(adapters.keys() - leaves.keys()):
        raise ValueError(f"`lora` must have the paths of kernels. Got {unknown}.")


class _PlannedTensor(NamedTuple):
    name: str
    hf_name: str  # its name in the Hugging Face model; for experts, the first one's
    path: str  # path of the leaf that contains it
    batch_index: tuple[int, ...]  # its index on the leaf's batch axes
    columns: slice  # its columns in the leaf
    is_kernel: bool  # whether its last two axes are transposed
    shape: tuple[int, ...]
    fmt: str  # the name of its format in llama.cpp


def _plan_tensors(
    config: DecoderConfig, architecture: str, leaves: Leaves, adapters: Leaves, fmt: str
) -> list[_PlannedTensor]:
    names, gguf_name_of = decoder_names(config), gguf_names(config, architecture)
    tensors = []
    for path, leaf in leaves.items():
        # 1. The names, one for each layer. All experts of a layer are one tensor.
        batch_axes, is_kernel = names.num_batch_axes(path), bool(names.roles(path))
        hf_names = names.of(path, leaf.shape[:batch_axes])
        if hf_names.ndim > 1:
            hf_names, batch_axes = hf_names[:, 0], 1
        # 2. The shape, and the columns of each tensor that the leaf becomes, by the
        # text that replaces "_gate_" in its name. Most leaves become one tensor with
        # all columns, whose name does not change.
        shape, columns_of = tuple(leaf.shape[batch_axes:]), {"_gate_": slice(None)}
        if is_convolution := path.endswith("/conv1d"):
            shape = (shape[0], shape[2])  # without an axis of size 1
        if "/experts/gate_up_proj/" in path:  # columns of gate and up alternate
            shape = (*shape[:-1], shape[-1] // 2)
            columns_of = {"_gate_": slice(0, None, 2), "_up_": slice(1, None, 2)}
        shape = (*shape[:-2], shape[-1], shape[-2]) if is_kernel else shape
        # 3. The format. llama.cpp stores vectors, biases, convolutions, routers and
        # gates of experts in F32.
        is_small = len(shape) == 1 or is_convolution
        is_small = is_small or re.search("/router/|/shared_expert_gate/|/bias$", path)
        is_merged = path in adapters
        tensor_fmt = "F32"
        if not is_small:
            tensor_fmt = _choose_format(path, leaf, shape, fmt, is_merged)
        for index, hf_name in np.ndenumerate(hf_names):
            for part, columns in columns_of.items():
                name = gguf_name_of[hf_name].replace("_gate_", part)
                tensors.append(
                    _PlannedTensor(
                        name=name,
                        hf_name=hf_name,
                        path=path,
                        batch_index=index,
                        columns=columns,
                        is_kernel=is_kernel,
                        shape=shape,
                        fmt=tensor_fmt,
                    )
                )
    return tensors


def _choose_format(
    path: str, leaf: Any, shape: tuple[int, ...], fmt: str, is_merged: bool
) -> str:
    is_expert = ql.is_packed(leaf) and "/experts/" in path
    if not is_merged and is_expert and (leaf.fmt, leaf.block_size) == ("mxfp4", BLOCK):
        return "MXFP4"
    if fmt == "Q8_0" and shape[-1] % BLOCK:
        return "F16"
    if fmt != "Q4_0" or ql.is_packed(leaf):
        return fmt
    x = np.asarray(leaf).astype(np.float32)
    with np.errstate(over="ignore"):
        return "F16" if np.array_equal(x.astype(np.float16), x) else "F32"


def _read_tensor(tensor: _PlannedTensor, leaf: Any, lora: Any) -> np.ndarray:
    """Returns a tensor's values, or its bytes if the format is in `_PACKED`."""
    if tensor.fmt in _PACKED:
        return _block_bytes(leaf, tensor.batch_index, tensor.columns)
    values = np.empty(tensor.shape, np.float32)
    # Decode and merge one matrix at a time, to save memory.
    for expert in np.ndindex(tensor.shape[:-2]):
        x = _merge_matrix(leaf, lora, (*tensor.batch_index, *expert))
        x = x[..., tensor.columns]
        x = x.swapaxes(-1, -2) if tensor.is_kernel else x
        values[expert] = x.reshape(values[expert].shape)
    return values


def _reorder(
    x: np.ndarray, tensor: _PlannedTensor, config: DecoderConfig, architecture: str
) -> np.ndarray:
    """Returns the rows and columns of a tensor in llama.cpp's order."""
    rows = row_order(tensor.hf_name, len(x), config, architecture)
    x = x if rows is None else x[rows]
    columns = column_order(tensor.hf_name, config)
    if columns is not None and tensor.fmt in _PACKED:
        # Whole blocks of weights change their places.
        blocks = columns.reshape(-1, BLOCK)[:, 0] // BLOCK
        x = x.reshape(len(x), len(blocks), -1)[:, blocks].reshape(len(x), -1)
    elif columns is not None:
        x = x[:, columns]
    return x


def _offset_of(name: str, architecture: str) -> float:
    """Returns the number that llama.cpp adds to the values of a tensor."""
    is_norm = architecture in _OFFSET_NORMS and name.endswith("norm.weight")
    return 1.0 if is_norm and not name.endswith("linear_attn.norm.weight") else 0.0


def _merge_matrix(leaf: Any, lora: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns a part of a leaf, decoded and with its adapter added."""

    def select(x: Any) -> Any:
        # An axis of size 1 is shared by all indices, hence the remainder.
        starts = [i % n for i, n in zip(index, x.shape, strict=False)]
        return x[tuple(slice(i, i + 1) for i in starts)]

    base: PyTree = {"x": jax.tree.map(select, leaf)}
    adapters: PyTree = {}
    if lora is not None:
        adapters = {"x": jax.tree.map(select, lora)}
    merged = ql.merge(base, adapters)["x"]
    return np.asarray(merged).reshape(leaf.shape[len(index) :])


def _encode(name: str, x: np.ndarray, fmt: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite. Got NaN or infinity.")
    quantization_type = gguf.GGMLQuantizationType[fmt]
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is rejected below
        encoded = gguf.quantize(np.ascontiguousarray(x), quantization_type)
    # The floats that may have overflowed: all values, or the scales of blocks.
    stored_floats = encoded
    if fmt == "Q8_0":  # a block begins with its scale in float16
        _, block_bytes = gguf.GGML_QUANT_SIZES[quantization_type]
        blocks = encoded.reshape(-1, block_bytes)[:, :2]
        stored_floats = np.ascontiguousarray(blocks).view(np.float16)
    if not np.isfinite(stored_floats).all():
        largest = float(np.abs(x).max())
        raise ValueError(f"{name} must fit {fmt}. Got a value of {largest}.")
    return encoded


def _pack_q4_0(leaves: Leaves) -> dict[str, Any]:
    """Packs the float kernels of all layers, except routers, by llama.cpp's rule.

    Raises a ValueError that lists the packed kernels that Q4_0 cannot store unchanged.
    """
    packed, problems = dict(leaves), []
    for path, x in leaves.items():
        if ql.is_packed(x):
            if x.fmt not in _Q4_0_FORMATS or x.block_size != BLOCK:
                problems.append(f"{path}: {x.fmt} in blocks of {x.block_size}")
        elif re.fullmatch(_LAYER_KERNELS, path) and x.shape[-2] % BLOCK == 0:
            packed[path] = ql.quantize(x, "q4_0")
    if problems:
        raise ValueError(
            f"packed kernels must be {' or '.join(_Q4_0_FORMATS)} in blocks of {BLOCK} "
            "for Q4_0, since others would have to be packed again. Write F16, which "
            f"decodes them. Got {'; '.join(sorted(problems))}."
        )
    return packed


# In llama.cpp, a block of 32 codes is a scale, and 16 bytes with code i in the low and
# code i + 16 in the high half of byte i.
def _block_bytes(
    q: ql.QTensor, index: tuple[int, ...], columns: slice
) -> UInt8[np.ndarray, "*experts n bytes"]:
    """Returns the chosen columns of the kernel `[*experts, K, N]` at `index`, as bytes.

    Each column becomes a row of the result.
    """
    parts = (np.asarray(x[index])[..., columns] for x in (q.codes, q.scales))
    # [*experts, N, K / 2] and [*experts, N, K / 32]
    packed, scales = (x.swapaxes(-1, -2) for x in parts)
    codes = np.stack([packed >> 4, packed & 15], axis=-1)
    codes = codes.reshape(*scales.shape, 2, BLOCK // 2)
    halves = codes[..., 0, :] | codes[..., 1, :] << 4
    scales = np.ascontiguousarray(scales)[..., None].view(np.uint8)
    return np.concatenate([scales, halves], axis=-1).reshape(*packed.shape[:-1], -1)


def save_gguf_lora(
    path: str | pathlib.Path, source: str | pathlib.Path, adapter: ql.io.PlainLoRA
) -> None:
    """Writes adapters for llama.cpp, which applies them to their model's GGUF file.

    `source` is the folder of the model. Raises a ValueError if llama.cpp would compute
    different logits, or if there are adapters of experts, since all experts of a layer
    are one tensor in GGUF.
    """
    if experts := sorted(name for name in adapter.factors if ".experts." in name):
        raise ValueError(
            "an adapter file for llama.cpp must not contain adapters of experts: write "
            f"the merged model as GGUF. Got {len(experts)}, such as {experts[0]}."
        )
    config, architecture = check_gguf_source(
        ModelFolder(pathlib.Path(source)), tokenizer=False
    )
    names = gguf_names(config, architecture)
    with _open_writer(path, architecture) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        for module, factors in adapter.factors.items():
            hf_name = f"{module}.weight"
            a, b = factors["a"], factors["b"]
            rows = row_order(hf_name, len(b), config, architecture)
            b = b if rows is None else b[rows]
            columns = column_order(hf_name, config)
            a = a if columns is None else a[:, columns]
            writer.add_tensor(f"{names[hf_name]}.lora_a", np.ascontiguousarray(a))
            writer.add_tensor(f"{names[hf_name]}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
