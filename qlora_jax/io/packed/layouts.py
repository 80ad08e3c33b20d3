"""The layouts in which other libraries store 4-bit weights, each with its reader."""

# To support another layout, write a function from the parts of a weight (tensors by the
# ends of their names) and the settings of the folder to one or more `PackedWeight`s.
# Reject everything that is not supported with `require`. Add a `PartsLayout` with the
# function to `LAYOUTS`, list the supported settings in `readers.py`, and add the layout
# to tests/io/test_packed_readers.py; test_fuzz_io.py then corrupts its files. Loading,
# slicing, re-packing and their errors need no further code.

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from ..files import require
from ..names import Names
from ..tensors import DeferredTensor
from .weight import (
    INTEGER_FORMATS,
    PackedWeight,
    Parts,
    SliceableTensor,
    View,
    check_4bit_words,
    packed_weight,
    read_input_blocks,
    read_scalar,
    require_part,
    swap_nibbles,
    transposed,
    unpack_words,
    zero_point_biases,
)

Settings = Mapping[str, Any]  # `quantization_config` in a folder's `config.json`


@dataclass(frozen=True)
class PartsLayout:
    """The names of the parts of a weight, and the function that reads them."""

    marker: str  # every weight in this layout has this part
    optional: tuple[str, ...]  # a weight may have these parts
    # Maps the parts and the settings to weights, by the ends of the weights' names.
    read: Callable[[Parts, Settings], Mapping[str, PackedWeight]]
    dtype: str = ""  # of the marker, if other layouts have a part of the same name
    separator: str = "."  # between the name of a module and the name of a part
    ignored: tuple[str, ...] = ()  # parts that do not describe weights


# AWQ (the GEMM version) and GPTQ: weight = (code - zero point) * scale.
# Both store `scales` [K / B, N], and `qzeros` [K / B, N / 8] with eight zero points per
# int32. AWQ packs eight outputs into a word of `qweight` [K, N / 8], in an interleaved
# order. GPTQ packs eight inputs into a word of `qweight` [K / 8, N], and `g_idx` [K] is
# the block of each input. The first version of GPTQ stores each zero point minus one.

# The position of each of the eight outputs in AWQ's word; 0 is the lowest nibble.
_AWQ_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]


def _awq_codes(words: SliceableTensor) -> View:
    """Returns the codes `[N, K / 2]` of AWQ's words `[K, N / 8]`."""
    k, num_words = words.shape
    n = num_words * 8

    def read(rows: slice, columns: slice) -> np.ndarray:
        first_word, last_word = rows.start // 8, -(-min(rows.stop, n) // 8)
        inputs = slice(columns.start * 2, columns.stop * 2)
        stored = np.asarray(words[inputs, first_word:last_word])
        codes = unpack_words(stored, _AWQ_POSITIONS)
        # Rows may begin or end inside a word.
        codes = codes[:, rows.start - first_word * 8 :][:, : rows.stop - rows.start]
        return (codes[::2] << 4 | codes[1::2]).T

    return View((n, k // 2), np.dtype(np.uint8), read)


def _read_awq_or_gptq(parts: Parts, settings: Settings) -> dict[str, PackedWeight]:
    words = require_part(parts, "qweight", "int32")
    zeros = require_part(parts, "qzeros", "int32")
    scales = require_part(parts, "scales", "float16 bfloat16")
    num_blocks, n = scales.shape
    check_4bit_words("qzeros", zeros, n)
    # Without settings, the length of a row of `qweight` tells the two apart.
    row_sizes = {"awq": n // 8, "gptq": n}
    candidates = [name for name, size in row_sizes.items() if words.shape[1] == size]
    method = settings.get("quant_method", candidates[0] if candidates else None)
    message = f"`qweight` must be [K / 8, {n}], or for AWQ [K, {n} / 8]. Got "
    require(method in candidates, f"{message}{list(words.shape)}.")
    is_awq = method == "awq"
    k = words.shape[0] * (1 if is_awq else 8)
    has_valid_zeros = tuple(zeros.shape) == (num_blocks, n // 8) and n % 8 == 0
    message = f"`qzeros` must be [{num_blocks}, {n} / 8]. Got {list(zeros.shape)}."
    require(has_valid_zeros, message)
    require(k % 2 == 0, f"`qweight` must have an even number of inputs. Got {k}.")
    scales = transposed(scales)
    if is_awq:
        codes, input_blocks = _awq_codes(words), None
        biases = zero_point_biases(zeros, scales, _AWQ_POSITIONS)
    else:
        message = "`g_idx` must be given, because `desc_act` is true. Got none."
        require("g_idx" in parts or not settings.get("desc_act"), message)
        codes = swap_nibbles(transposed(words))
        input_blocks = read_input_blocks(parts, "g_idx", k, num_blocks)
        is_first_version = settings.get("checkpoint_format", "gptq") == "gptq"
        # As in GPTQModel, a single sum adds one to all eight zero points of a word. A
        # stored 15 therefore carries into the next zero point.
        offset = 0x11111111 if is_first_version else 0
        biases = zero_point_biases(zeros, scales, offset=offset)
    fmt, dtype = INTEGER_FORMATS[str(scales.dtype)]
    arrays = codes, scales, None, biases, input_blocks
    return {"weight": packed_weight(fmt, dtype, *arrays)}


# compressed-tensors: pack-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized.
# A weight [N, K] is stored as `weight_packed`, with the first code in the lowest bits,
# and `weight_scale` [N, K / B]. Integer codes are in int32 and have float scales.
# `weight_shape` is [N, K], and there may be a `weight_zero_point` [N / 8, K / B] and a
# `weight_g_idx` [K]. E2M1 codes are in bytes. Their scales are E8M0, or E4M3 with a
# `weight_global_scale`.

# Arguments of `packed_weight` by the dtypes of codes and scales. compressed-tensors
# decodes E2M1 to bfloat16.
_COMPRESSED_FORMATS = {("int32", key): value for key, value in INTEGER_FORMATS.items()}
_COMPRESSED_FORMATS |= {
    ("uint8", "uint8"): ("mxfp4", "bfloat16"),
    ("uint8", "float8_e4m3fn"): ("nvfp4", "bfloat16"),
}
_INTEGER_PARTS = ("weight_zero_point", "weight_g_idx")
_FORMAT_PARTS = ("weight_global_scale", *_INTEGER_PARTS)  # of some formats only
_COMPRESSED_PARTS = ("weight_scale", "weight_shape", *_FORMAT_PARTS)


def _read_compressed(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    require("weight_scale" in parts, "`weight_scale` must be given. Got none.")
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    dtypes = str(packed.dtype), str(scales.dtype)
    choices = [*_COMPRESSED_FORMATS]
    message = f"codes and scales must have dtypes {choices}. Got {dtypes}."
    require(dtypes in choices, message)
    fmt, dtype = _COMPRESSED_FORMATS[dtypes]
    require(len(packed.shape) == 2, f"codes must have two axes. Got {packed.shape}.")
    format_parts = {"nvfp4": ("weight_global_scale",), "mxfp4": ()}
    for name in _FORMAT_PARTS:
        is_allowed = name in format_parts.get(fmt, _INTEGER_PARTS)
        message = f"`{name}` must be left out for {fmt}. Got one."
        require(is_allowed or name not in parts, message)
    codes = swap_nibbles(packed)
    scale_scales = biases = input_blocks = None
    if fmt == "nvfp4":
        divisor = read_scalar(parts, "weight_global_scale")
        scale_scales = np.array([1, divisor], np.float32)
    elif fmt != "mxfp4":
        n, k = codes.shape[0], codes.shape[1] * 2
        _check_compressed_shape(parts, n, k)
        num_blocks = scales.shape[-1] if scales.shape else 0
        input_blocks = read_input_blocks(parts, "weight_g_idx", k, num_blocks)
        if "weight_zero_point" in parts:
            zeros = require_part(parts, "weight_zero_point", "int32")
            shape = [-(-n // 8), *scales.shape[1:]]
            message = f"`weight_zero_point` must be {shape}. Got {list(zeros.shape)}."
            require(list(zeros.shape) == shape, message)
            biases = zero_point_biases(transposed(zeros), scales)
    arrays = codes, scales, scale_scales, biases, input_blocks
    return {"weight": packed_weight(fmt, dtype, *arrays)}


def _check_compressed_shape(parts: Parts, n: int, k: int) -> None:
    stored = parts.get("weight_shape")
    shape = None if stored is None else np.asarray(stored[...]).tolist()
    # Report the number of bits if another number explains the length of the rows.
    if isinstance(shape, list) and len(shape) == 2 and shape[0] == n and shape[1] > 0:
        check_4bit_words("weight_packed", parts["weight_packed"], shape[1])
    message = f"`weight_shape` must be [{n}, {k}], for 4 bits. Got {shape}."
    require(shape == [n, k], message)


# ModelOpt's NVFP4: `weight` [N, K / 2] with two codes per byte, `weight_scale`
# [N, K / 16] in E4M3, and the factor `weight_scale_2`. The scales of activations and
# key-value caches are ignored: both stay in float here, which servers may also choose.

_ACTIVATIONS = ("input_scale", "k_scale", "v_scale")


def _read_modelopt(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    codes = swap_nibbles(require_part(parts, "weight", "uint8"))
    scales = require_part(parts, "weight_scale", "float8_e4m3fn")
    factors = np.array([read_scalar(parts, "weight_scale_2"), 1], np.float32)
    return {"weight": packed_weight("nvfp4", "bfloat16", codes, scales, factors)}


# MLX: `weight` [N, K / 8] has eight codes per uint32, with the first code in the lowest
# bits, and `scales` are [N, K / B]. In mode affine, weight = code * scale + bias, with
# `biases` [N, K / B]. In modes mxfp4 and nvfp4, codes are E2M1 and a scale is one byte:
# E8M0 for 32 weights, or E4M3 for 16.


def _read_mlx(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    codes = swap_nibbles(require_part(parts, "weight", "uint32"))
    scales = require_part(parts, "scales", " ".join(["uint8", *INTEGER_FORMATS]))
    dtype = str(scales.dtype)
    if dtype in INTEGER_FORMATS:
        biases = require_part(parts, "biases", dtype)
        message = f"`biases` must be {list(scales.shape)}. Got {list(biases.shape)}."
        require(biases.shape == scales.shape, message)
        fmt = INTEGER_FORMATS[dtype]
        return {"weight": packed_weight(*fmt, codes, scales, biases=biases)}
    message = "`biases` must be left out if `scales` are uint8. Got some."
    require("biases" not in parts, message)
    if codes.shape[1] * 2 != scales.shape[1] * 16:  # not NVFP4
        return {"weight": packed_weight("mxfp4", "bfloat16", codes, scales)}
    e4m3 = np.dtype(ml_dtypes.float8_e4m3fn)
    e4m3_scales = View(scales.shape, e4m3, lambda *index: scales[index].view(e4m3))
    factors = np.ones(2, np.float32)
    return {"weight": packed_weight("nvfp4", "bfloat16", codes, e4m3_scales, factors)}


# GGUF's Q4_0 and MXFP4: every 32 inputs of an output are a block, which consists of a
# scale and 16 bytes. The scale is float16 in `weight_q4_0` [N, 18 * K / 32], and E8M0
# in `NAME_mxfp4` [N, 17 * K / 32]. The low half of byte i is the code of input i, and
# the high half is the code of input i + 16.


def _gguf_weight(
    parts: Parts, name: str, fmt: str, dtype: str, scale_dtype: DTypeLike
) -> PackedWeight:
    stored = require_part(parts, name, "uint8")
    scale_bytes = np.dtype(scale_dtype).itemsize
    block_bytes = scale_bytes + 16
    n, num_blocks = stored.shape[0], stored.shape[1] // block_bytes
    message = (
        f"`{name}` must be whole blocks of {block_bytes} bytes. Got {stored.shape}."
    )
    require(stored.shape[1] == num_blocks * block_bytes, message)

    def read_blocks(rows: slice, blocks: slice) -> np.ndarray:
        columns = slice(blocks.start * block_bytes, blocks.stop * block_bytes)
        data = np.asarray(stored[rows, columns])
        return data.reshape(len(data), -1, block_bytes)

    def read_codes(rows: slice, columns: slice) -> np.ndarray:
        # A block has 16 columns, each of two codes. Columns may begin inside a block.
        first, last = columns.start // 16, -(-columns.stop // 16)
        data = read_blocks(rows, slice(first, last))[..., scale_bytes:]
        # [rows, blocks, 16 bytes] -> [rows, blocks, 32 codes] -> [rows, K / 2]
        codes = np.concatenate([data & 15, data >> 4], axis=-1)
        pairs = (codes[..., ::2] << 4 | codes[..., 1::2]).reshape(len(codes), -1)
        return pairs[:, columns.start - first * 16 : columns.stop - first * 16]

    def read_scales(rows: slice, blocks: slice) -> np.ndarray:
        data = np.ascontiguousarray(read_blocks(rows, blocks)[..., :scale_bytes])
        return data.view(scale_dtype)[..., 0]

    codes = View((n, num_blocks * 16), np.dtype(np.uint8), read_codes)
    scales = View((n, num_blocks), np.dtype(scale_dtype), read_scales)
    return packed_weight(fmt, dtype, codes, scales)


def _read_q4_0(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    name = "weight_q4_0"
    return {"weight": _gguf_weight(parts, name, "q4_0", "float32", np.float16)}


def _read_gguf_mxfp4(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    return {"": _gguf_weight(parts, "mxfp4", "mxfp4", "bfloat16", np.uint8)}


# gpt-oss stores all experts of a layer together. In MXFP4, they are `NAME_blocks`
# [E, N, K / 32, 16], with the first code in the low bits, and `NAME_scales`
# [E, N, K / 32] in E8M0. In float, they are `NAME` [E, K, N]. Here they become weights
# [N, K] called `NAME.0`, `NAME.1` ..., as in other models and in name tables.


def _read_gpt_oss(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    blocks = require_part(parts, "blocks", "uint8", axes=4)
    scales = require_part(parts, "scales", "uint8", axes=3)
    *shape, block_bytes = blocks.shape
    message = f"`scales` must be {shape} and `blocks` have 16 bytes each. Got "
    message += f"{list(scales.shape)} and {list(blocks.shape)}."
    require(list(scales.shape) == shape and block_bytes == 16, message)
    num_experts, n, num_blocks = shape
    codes = blocks.reshape(num_experts, n, num_blocks * 16)  # [E, N, K / 2]
    weights = {}
    for i in range(num_experts):
        arrays = swap_nibbles(_expert_matrix(codes, i)), _expert_matrix(scales, i)
        weights[f".{i}"] = packed_weight("mxfp4", "bfloat16", *arrays)
    return weights


def _expert_matrix(stack: SliceableTensor, index: int) -> View:
    # Lazy tensors can be indexed only by slices.
    expert = slice(index, index + 1)
    return View(stack.shape[1:], stack.dtype, lambda *part: stack[expert, *part][0])


def split_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Splits float stacks `NAME` `[E, K, N]` into `NAME.0`, `NAME.1` ... `[N, K]`."""
    split: dict[str, Any] = {}
    for name, x in tensors.items():
        if len(x.shape) == 3 and names.is_stack(name):
            for index in range(x.shape[0]):
                split[f"{name}.{index}"] = transposed(_expert_matrix(x, index))
        else:
            split[name] = x
    return split


def join_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Inverts `split_experts`: stacks `NAME.0`, `NAME.1` ... as `NAME`."""
    joined: dict[str, Any] = {}
    stacks: dict[str, list[Any]] = {}
    for name, x in tensors.items():
        stem = name.rpartition(".")[0]
        if names.is_stack(stem):
            joined[stem] = None  # keeps the order of the tensors; filled in below
            stacks.setdefault(stem, []).append(x)
        else:
            joined[name] = x

    def stack_experts(experts: list[Any]) -> DeferredTensor:
        return DeferredTensor(
            experts[0].dtype,
            (len(experts), *experts[0].shape[::-1]),
            lambda: np.stack([np.asarray(x[:, :]).T for x in experts]),
        )

    return joined | {stem: stack_experts(experts) for stem, experts in stacks.items()}


LAYOUTS = (
    PartsLayout("weight_packed", _COMPRESSED_PARTS, _read_compressed),
    PartsLayout("qweight", ("qzeros", "scales", "g_idx"), _read_awq_or_gptq),
    PartsLayout(
        "weight_scale_2",
        ("weight", "weight_scale"),
        _read_modelopt,
        ignored=_ACTIVATIONS,
    ),
    PartsLayout("blocks", ("scales",), _read_gpt_oss, dtype="uint8", separator="_"),
    PartsLayout("weight", ("scales", "biases"), _read_mlx, dtype="uint32"),
    PartsLayout("weight_q4_0", (), _read_q4_0),
    PartsLayout("mxfp4", (), _read_gguf_mxfp4, separator="_"),
)
