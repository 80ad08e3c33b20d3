"""The layouts of codes and the settings of scales that several libraries share."""

from typing import Any

import ml_dtypes
import numpy as np

from ...quant.formats import INT4_F16
from ...quant.qtensor import QTensor
from ..tensors import LazyMatrix, SliceableTensor
from .file_format import Config, Kernels

UINT8, INT32 = np.dtype(np.uint8), np.dtype("<i4")
# The formats whose codes and scales AWQ, compressed-tensors and others store.
INT4_FORMATS = INT4_F16.equivalents
# The format and the dtype of weights with integer codes (the first two arguments of
# `packed_weight`), by the dtype of the scales.
INTEGER_FORMATS = {
    "float16": ("int4_f16", "float16"),
    "bfloat16": ("int4_f16", "bfloat16"),
    "float32": ("int4", "float32"),
}


def swap_nibbles(words: SliceableTensor) -> LazyMatrix:
    """Returns codes `[N, K / 2]` from words with the first code in the low bits."""
    size = np.dtype(words.dtype).itemsize

    def read(rows: slice, columns: slice) -> np.ndarray:
        first_word, last_word = columns.start // size, -(-columns.stop // size)
        stored = np.ascontiguousarray(words[rows, first_word:last_word])
        # Words are little-endian, so bytes are in order; only their halves are swapped.
        start = columns.start - first_word * size
        stored = stored.view(np.uint8)[:, start : start + columns.stop - columns.start]
        return stored >> 4 | stored << 4

    n, num_words = words.shape
    return LazyMatrix(UINT8, (n, num_words * size), read)


def integer_scale_dtype(q: QTensor) -> np.dtype:
    """Returns the dtype in which the scales of integer codes are stored."""
    # Weights in bfloat16 have scales in bfloat16, unless this would round a scale.
    scales = np.asarray(q.scales)
    is_exact = (scales.astype(ml_dtypes.bfloat16).astype(scales.dtype) == scales).all()
    is_bfloat16 = q.dtype_name == "bfloat16" and is_exact
    return np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else scales.dtype)


def dtype_settings(kernels: Kernels, config: Config) -> dict[str, Any]:
    """Returns the settings in `config.json` of the dtype of scales and activations."""
    if next(iter(kernels.values())).fmt not in INT4_FORMATS:
        # vLLM has no MXFP4 in float16, and transformers has E2M1 only in bfloat16.
        return {"dtype": "bfloat16", "torch_dtype": None}
    if str(config.get("model_type")).startswith("gemma"):
        return {}  # Gemma overflows in float16, so its dtype is kept
    # "float16" sorts last: one kernel whose scales need float16 decides for the model.
    dtypes = (integer_scale_dtype(q).name for q in kernels.values())
    return {"dtype": max(dtypes), "torch_dtype": None}
