"""AWQ (the GEMM version), and GPTQ, which is only read."""

# In both, weight = (code - zero point) * scale. Both store `scales` [K / B, N], and
# `qzeros` [K / B, N / 8] with eight zero points per int32. AWQ packs eight outputs into
# a word of `qweight` [K, N / 8], in an interleaved order. GPTQ packs eight inputs into
# a word of `qweight` [K / 8, N], and `g_idx` [K] is the block of each input. The first
# version of GPTQ stores each zero point minus one.

from typing import Any

import numpy as np

from ...quant.qtensor import QTensor
from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import DeferredTensor, LazyMatrix, SliceableTensor, transposed
from .file_format import Config, FileFormat, Kernels, Parts, Settings, Writer
from .layouts import (
    INT4_FORMATS,
    INT32,
    INTEGER_FORMATS,
    UINT8,
    dtype_settings,
    swap_nibbles,
    unpack_words,
    zero_point_biases,
)

# The output whose code is in each nibble of AWQ's words, from the lowest nibble on, and
# its inverse: the nibble of each output.
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]


def _awq_codes(words: SliceableTensor) -> LazyMatrix:
    """Returns the codes `[N, K / 2]` of AWQ's words `[K, N / 8]`."""
    codes = unpack_words(words, _POSITIONS)  # [K, N]

    def read(rows: slice, columns: slice) -> np.ndarray:
        inputs = codes[columns.start * 2 : columns.stop * 2, rows]
        return (inputs[::2] << 4 | inputs[1::2]).T

    k, n = codes.shape
    return LazyMatrix(UINT8, (n, k // 2), read)


def _read_settings(settings: Settings) -> dict[str, Any]:
    # Newer files call the version of both methods `format`.
    key = {"awq": "version", "gptq": "checkpoint_format"}[settings["quant_method"]]
    version = settings.get(key, settings.get("format"))
    if settings.get("backend") == "llm-awq":  # transformers' name for a version of AWQ
        version = "llm-awq"
    return {**settings, key: str(version).lower()} if version else {**settings}


def _read(parts: Parts, settings: Settings) -> dict[str, PackedWeight]:
    words = parts.tensor("qweight", "int32")
    zeros = parts.tensor("qzeros", "int32")
    scales = parts.tensor("scales", "float16", "bfloat16")
    num_blocks, n = scales.shape
    parts.check_bits("qzeros", n)
    # Without settings, the length of a row of `qweight` tells the two apart.
    row_sizes = {"awq": n // 8, "gptq": n}
    methods = [name for name, size in row_sizes.items() if words.shape[1] == size]
    method = settings.get("quant_method", methods[0] if methods else None)
    message = f"`qweight` must be [K / 8, {n}], or for AWQ [K, {n} / 8]. Got "
    require(method in methods, f"{message}{list(words.shape)}.")
    is_awq = method == "awq"
    k = words.shape[0] * (1 if is_awq else 8)
    has_valid_zeros = tuple(zeros.shape) == (num_blocks, n // 8) and n % 8 == 0
    message = f"`qzeros` must be [{num_blocks}, {n} / 8]. Got {list(zeros.shape)}."
    require(has_valid_zeros, message)
    require(k % 2 == 0, f"`qweight` must have an even number of inputs. Got {k}.")
    scales = transposed(scales)
    if is_awq:
        codes, input_blocks = _awq_codes(words), None
        zero_points = unpack_words(zeros, _POSITIONS)
    else:
        message = "`g_idx` must be given, because `desc_act` is true. Got none."
        require("g_idx" in parts or not settings.get("desc_act"), message)
        codes = swap_nibbles(transposed(words))
        input_blocks = parts.input_blocks("g_idx", k, num_blocks)
        is_first_version = settings.get("checkpoint_format", "gptq") == "gptq"
        # As in GPTQModel, a single sum adds one to all eight zero points of a word.
        # A stored 15 therefore carries into the next zero point.
        offset = 0x11111111 if is_first_version else 0
        zero_points = unpack_words(zeros, offset=offset)
    fmt, dtype = INTEGER_FORMATS[str(scales.dtype)]
    biases = zero_point_biases(zero_points, scales)
    options: Any = dict(biases=biases, input_blocks=input_blocks)
    return {"weight": packed_weight(fmt, dtype, codes, scales, **options)}


def _problem(q: QTensor) -> str | None:
    n = q.matrix_shape[-1]
    return f"its outputs must be a multiple of 8. Got {n}" if n % 8 else None


def _tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    num_blocks = k // q.block_size
    # Our formats have a zero point of 8 for every weight.
    zeros = np.full((num_blocks, n // 2), 0x88, np.uint8).view(INT32)

    def pack_words() -> np.ndarray:
        packed = np.asarray(q.codes)
        # [K / 2, N] bytes -> [K / 2, 2, N] -> [K, N / 8, 8] codes, in AWQ's order
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(k, n // 8, 8)
        codes = codes[..., _ORDER]
        pairs = np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)
        return pairs.view(INT32)[..., 0]

    module = name.removesuffix("weight")
    return {
        f"{module}qweight": DeferredTensor(INT32, (k, n // 8), pack_words),
        f"{module}qzeros": zeros,
        f"{module}scales": q.scales,
    }


def _config(
    kernels: Kernels, float_modules: list[str], config: Config
) -> dict[str, Any]:
    size = next(iter(kernels.values())).block_size
    settings = dict(quant_method="awq", version="gemm", bits=4, group_size=size)
    settings |= dict(zero_point=True, modules_to_not_convert=float_modules)
    return {"quantization_config": settings, **dtype_settings(kernels, config)}


AWQ = FileFormat(
    marker=r"(.*\.|)qweight",
    parts=("qzeros", "scales", "g_idx"),
    read=_read,
    methods={
        "awq": {"version": ("gemm",)},
        "gptq": {"checkpoint_format": ("gptq", "gptq_v2")},
    },
    read_settings=_read_settings,
    write=Writer("AWQ", INT4_FORMATS, _tensors, _config, _problem),
)
