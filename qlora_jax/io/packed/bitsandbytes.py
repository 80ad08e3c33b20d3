"""Reads 4-bit weights of bitsandbytes, without torch."""

# A weight [N, K] is stored as `weight` (uint8, two codes to a byte, row by row),
# `absmax` (one scale for each block), `quant_map` (the table of values) and JSON in
# `quant_state.bitsandbytes__nf4`. Blocks may cross rows. If the scales are quantized
# too, `nested_absmax` and `nested_quant_map` hold their scales and their table
# (Dettmers et al. 2023, section 3).

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from ...quant.formats import FLOAT_DTYPES, Packing, get_format
from ...quant.schemes import DYNAMIC_MAP, SCALES_PER_BLOCK
from ...trees.paths import refuse_listed
from ..files import CheckpointError, parse_json, require
from ..tensors import LazyTensor
from .weight import SliceableTensor

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAX_STATE_BYTES = 1 << 16

_FileTensor = LazyTensor | np.ndarray


@dataclass(frozen=True, eq=False)
class BitsAndBytesWeight:
    """A 4-bit weight `[N, K]` in the layout of bitsandbytes."""

    shape: tuple[int, int]
    dtype: np.dtype  # of the weight before packing
    packing: Packing
    codes: _FileTensor  # uint8[ceil(N * K / 2), 1], two codes to a byte
    scales: _FileTensor  # float32 or uint8, [ceil(N * K / B)]
    scale_scales: _FileTensor | None = None  # float32, one for 256 scales
    scale_offset: np.float32 | None = None  # the mean of the scales
    keeps_dtype = True  # decoded weights have `dtype`, even if `load` gets another

    @property
    def problem(self) -> str | None:
        """Why a `QTensor` cannot hold its bytes; None if it can."""
        k, block_size = self.shape[1], self.packing.block_size
        message = f"has {k} inputs and blocks of {block_size}, which cross its rows"
        return message if k % block_size else None

    @property
    def common_block(self) -> int:
        """The largest size of blocks that cross neither a row nor a stored block."""
        return math.gcd(self.shape[1], self.packing.block_size)

    def rows(self) -> tuple[SliceableTensor, SliceableTensor]:
        """Returns the codes `[N, K / 2]` and scales `[N, K / B]` of a `QTensor`."""
        n, k = self.shape
        scales = self.scales.reshape(n, k // self.packing.block_size)
        return self.codes.reshape(n, k // 2), scales

    def float_scales(self, blocks: slice) -> Float32[np.ndarray, " blocks"]:
        """Returns the scales of blocks as float32."""
        scales = np.asarray(self.scales[blocks])
        if self.scale_scales is None:
            return scales
        group = np.arange(blocks.start, blocks.stop) // SCALES_PER_BLOCK
        nested_scales = np.asarray(self.scale_scales)[group]
        return DYNAMIC_MAP[scales] * nested_scales + self.scale_offset

    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight: table values times scales, rounded to `dtype`."""
        k, block_size = self.shape[1], self.packing.block_size
        start, stop = rows.start * k, rows.stop * k
        first_block = start // block_size
        scales = self.float_scales(slice(first_block, -(-stop // block_size)))
        blocks = np.arange(start, stop) // block_size - first_block
        values = self.packing.format.table[self._codes_of_rows(rows)]
        return (values * scales[blocks].reshape(-1, k)).astype(self.dtype)

    def _codes_of_rows(self, rows: slice) -> UInt8[np.ndarray, "n k"]:
        k = self.shape[1]
        start, stop = rows.start * k, rows.stop * k
        packed = np.asarray(self.codes[start // 2 : -(-stop // 2)]).reshape(-1, 1)
        # The first code is in the high bits. A row may begin inside a byte.
        codes = np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1)
        return codes[start % 2 :][: stop - start].reshape(-1, k)


def bitsandbytes_weights(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors, with the parts of each 4-bit weight joined."""
    result, problems = dict(tensors), []
    for state_name in [name for name in tensors if _STATE in name]:
        name, _, fmt = state_name.rpartition(_STATE)
        try:
            result[name] = _read_weight(tensors, name, fmt)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        for part in _PARTS:
            result.pop(f"{name}.{part}", None)
        del result[state_name]
    title = "these 4-bit weights of bitsandbytes cannot be read"
    refuse_listed(title, problems, CheckpointError)
    return result


def _read_weight(tensors: Mapping[str, Any], name: str, fmt: str) -> BitsAndBytesWeight:
    state = _read_state(tensors[f"{name}{_STATE}{fmt}"])
    shape, packing, dtype = _read_settings(state, fmt)
    is_nested = packing.double_quant
    # The dtype and the shape that each part must have.
    num_weights = math.prod(shape)
    num_blocks = math.ceil(num_weights / packing.block_size)
    expected = {
        "": ("uint8", (math.ceil(num_weights / 2), 1)),
        ".absmax": ("uint8" if is_nested else "float32", (num_blocks,)),
        ".quant_map": ("float32", (16,)),
    }
    if is_nested:
        num_groups = math.ceil(num_blocks / SCALES_PER_BLOCK)
        expected[".nested_absmax"] = ("float32", (num_groups,))
        expected[".nested_quant_map"] = ("float32", (256,))
    parts = {part: tensors[name + part] for part in expected if name + part in tensors}
    if "" in parts:
        parts[""] = _view_as_bytes(parts[""])
    for part, (part_dtype, part_shape) in expected.items():
        x = parts.get(part)
        stored = None if x is None else (str(x.dtype), x.shape)
        message = f"{name + part} must be {part_dtype}{part_shape}. Got {stored}."
        require(stored == (part_dtype, part_shape), message)
    _check_table(parts[".quant_map"], get_format(fmt).table)
    weight = BitsAndBytesWeight(shape, dtype, packing, parts[""], parts[".absmax"])
    if not is_nested:
        return weight
    _check_table(parts[".nested_quant_map"], DYNAMIC_MAP)
    offset, scale_scales = _read_nested_offset(state), parts[".nested_absmax"]
    return replace(weight, scale_scales=scale_scales, scale_offset=offset)


def _read_state(tensor: SliceableTensor) -> dict[str, Any]:
    is_small = math.prod(tensor.shape) <= _MAX_STATE_BYTES
    message = f"`quant_state` must be at most {_MAX_STATE_BYTES} bytes."
    require(str(tensor.dtype) == "uint8" and is_small, message)
    state = parse_json(np.asarray(tensor).tobytes(), "`quant_state`")
    require(isinstance(state, dict), "`quant_state` must be a JSON object.")
    return state


def _read_settings(
    state: dict[str, Any], fmt: str
) -> tuple[tuple[int, int], Packing, np.dtype]:
    def is_size(n: object) -> bool:
        return type(n) is int and 0 < n < 1 << 31  # isinstance would accept True

    shape, block_size = state.get("shape"), state.get("blocksize")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(map(is_size, shape))
    require(is_shape, f"`shape` must be two sizes. Got {shape!r:.80}.")
    require(is_size(block_size), f"`blocksize` must be a size. Got {block_size!r:.80}.")
    quant_type, dtype = state.get("quant_type"), state.get("dtype")
    message = (
        "`quant_type` must be nf4 or fp4, and equal the end of the tensor's name. "
        f"Got {quant_type!r:.80} and {fmt!r:.80}."
    )
    require(quant_type == fmt and fmt in ("nf4", "fp4"), message)
    message = f"`dtype` must be floating-point. Got {dtype!r:.80}."
    require(dtype in FLOAT_DTYPES, message)
    n, k = state["shape"]
    return (n, k), Packing(fmt, block_size, "nested_offset" in state), jnp.dtype(dtype)


def _view_as_bytes(codes: _FileTensor) -> _FileTensor:
    # FSDP shards arrays of one dtype only, so it needs bfloat16 as the dtype of codes
    # (`bnb_4bit_quant_storage`).
    if str(codes.dtype) not in FLOAT_DTYPES:
        return codes
    nbytes = math.prod(codes.shape) * codes.dtype.itemsize
    if isinstance(codes, LazyTensor):  # changes only the metadata
        return replace(codes, dtype=np.dtype(np.uint8), shape=(nbytes, 1))
    return np.asarray(codes).reshape(-1, 1).view(np.uint8).reshape(nbytes, 1)


def _read_nested_offset(state: dict[str, Any]) -> np.float32:
    offset, block_size = state["nested_offset"], state.get("nested_blocksize")
    dtype = state.get("nested_dtype", "float32")
    limit = float(np.finfo(np.float32).max)
    is_number = type(offset) in (int, float) and abs(offset) < limit
    require(is_number, f"`nested_offset` must be a float32 number. Got {offset!r:.80}.")
    message = f"nested scales must be float32 in blocks of {SCALES_PER_BLOCK}. Got "
    message += f"{dtype!r:.80} in blocks of {block_size!r:.80}."
    require(block_size == SCALES_PER_BLOCK and dtype == "float32", message)
    return np.float32(offset)


def _check_table(tensor: SliceableTensor, table: np.ndarray) -> None:
    stored = np.asarray(tensor)
    message = "the table of values must equal bitsandbytes' table. Got one that begins "
    message += f"with {stored[:3].tolist()}."
    require(np.array_equal(stored, table), message)
