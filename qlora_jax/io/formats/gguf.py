"""GGUF's Q4_0 and MXFP4, under the names that the reader of GGUF files gives them."""

# Every 32 inputs of an output are a block, which consists of a scale and 16 bytes. The
# scale is float16 in `weight_q4_0` [N, 18 * K / 32], and E8M0 in `NAME_mxfp4`
# [N, 17 * K / 32]. The low half of byte i is the code of input i, and the high half is
# the code of input i + 16.

import numpy as np
from jax.typing import DTypeLike

from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import LazyMatrix
from .file_format import FileFormat, Parts, Settings
from .layouts import UINT8


def _codes_and_scales(
    parts: Parts, name: str, scale_dtype: DTypeLike
) -> tuple[LazyMatrix, LazyMatrix]:
    stored = parts.tensor(name, "uint8")
    scale_bytes = np.dtype(scale_dtype).itemsize
    block_bytes = scale_bytes + 16
    n, num_blocks = stored.shape[0], stored.shape[1] // block_bytes
    is_whole = stored.shape[1] == num_blocks * block_bytes
    message = f"`{name}` must be whole blocks of {block_bytes} bytes. Got "
    require(is_whole, f"{message}{stored.shape}.")

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

    codes = LazyMatrix(UINT8, (n, num_blocks * 16), read_codes)
    scales = LazyMatrix(np.dtype(scale_dtype), (n, num_blocks), read_scales)
    return codes, scales


def _read_q4_0(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    arrays = _codes_and_scales(parts, "weight_q4_0", np.float16)
    return {"weight": packed_weight("q4_0", "float32", *arrays)}


def _read_mxfp4(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    arrays = _codes_and_scales(parts, "mxfp4", np.uint8)
    return {"": packed_weight("mxfp4", "bfloat16", *arrays)}


GGUF_Q4_0 = FileFormat(marker=r"(.*\.|)weight_q4_0", read=_read_q4_0)
GGUF_MXFP4 = FileFormat(marker="(.*)_mxfp4", read=_read_mxfp4)
