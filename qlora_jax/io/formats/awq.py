"""AWQ (the GEMM version), with zero points of 8."""

# Weight = (code - zero point) * scale. `scales` are [K / B, N], and `qzeros`
# [K / B, N / 8] have eight zero points per int32. `qweight` [K, N / 8] packs eight
# outputs into a word, in an interleaved order. Files are read so that an exported
# folder can be compared and exported again. AWQ's own files have other zero points,
# which the integer formats cannot represent.

from typing import Any

import numpy as np

from ...quant.qtensor import QTensor
from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import DeferredTensor, LazyMatrix, SliceableTensor, transposed
from .file_format import Config, FileFormat, Kernels, Parts, Settings, Writer
from .layouts import INT4_FORMATS, INT32, INTEGER_FORMATS, UINT8, dtype_settings

# The output whose code is in each nibble of AWQ's words, from the lowest nibble on, and
# its inverse: the nibble of each output.
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]
_EIGHTS = np.int32(-0x77777778)  # eight zero points of 8, 0x88888888


def _codes(words: SliceableTensor) -> LazyMatrix:
    """Returns the codes `[N, K / 2]` of the words `[K, N / 8]`."""

    def read(rows: slice, columns: slice) -> np.ndarray:
        first_word, last_word = rows.start // 8, -(-rows.stop // 8)
        stored = words[columns.start * 2 : columns.stop * 2, first_word:last_word]
        packed = np.ascontiguousarray(stored).view(np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1)
        # [K, words, 8] -> [K, N]; rows may begin or end inside a word.
        codes = nibbles.reshape(*stored.shape, 8)[..., _POSITIONS]
        inputs = codes.reshape(len(stored), -1)
        inputs = inputs[:, rows.start - first_word * 8 : rows.stop - first_word * 8]
        return (inputs[::2] << 4 | inputs[1::2]).T

    k, num_words = words.shape
    return LazyMatrix(UINT8, (num_words * 8, k // 2), read)


def _read_settings(settings: Settings) -> dict[str, Any]:
    # Newer files call the version `format`.
    version = settings.get("version", settings.get("format", "gemm"))
    if settings.get("backend") == "llm-awq":  # transformers' name for a version of AWQ
        version = "llm-awq"
    return {**settings, "version": str(version).lower()}


def _read(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    words = parts.tensor("qweight", "int32")
    zeros = parts.tensor("qzeros", "int32")
    scales = parts.tensor("scales", "float16", "bfloat16")
    (k, num_words), (num_blocks, n) = words.shape, scales.shape
    is_awq = num_words * 8 == n and k % 2 == 0
    message = f"`qweight` must be [K, {n} / 8], with even K. Got {[k, num_words]}."
    require(is_awq, message)
    has_valid_zeros = list(zeros.shape) == [num_blocks, num_words]
    message = f"`qzeros` must be {[num_blocks, num_words]}. Got {list(zeros.shape)}."
    require(has_valid_zeros, message)
    message = "zero points must be 8. Start from the float model that was packed."
    require(bool((np.asarray(zeros[...]) == _EIGHTS).all()), message)
    fmt, dtype = INTEGER_FORMATS[str(scales.dtype)]
    return {"weight": packed_weight(fmt, dtype, _codes(words), transposed(scales))}


def _problem(q: QTensor) -> str | None:
    n = q.matrix_shape[-1]
    return f"its outputs must be a multiple of 8. Got {n}" if n % 8 else None


def _tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    num_blocks = k // q.block_size
    zeros = np.full((num_blocks, n // 8), _EIGHTS, INT32)

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
    parts=("qzeros", "scales"),
    read=_read,
    methods={"awq": {"version": ("gemm",)}},
    read_settings=_read_settings,
    write=Writer("AWQ", INT4_FORMATS, _tensors, _config, _problem),
)
