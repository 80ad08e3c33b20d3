"""Weights in bitsandbytes' 4-bit format, as a checkpoint stores them.

A weight `[N, K]` is `weight` (uint8, two codes a byte, row by row), `absmax`,
`quant_map` and JSON in `quant_state.bitsandbytes__nf4`; with quantized scales also
`nested_absmax` and `nested_quant_map` (Dettmers et al. 2023, section 3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from ...quant.formats import get_format
from ...quant.schemes import DYNAMIC_MAP, SCALES_PER_BLOCK
from ...quant.settings import FLOAT_DTYPES, Packing
from ...trees.paths import refuse_listed
from ..files import CheckpointError, parse_json, require
from ..tensors import LazyTensor

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A 4-bit weight in a checkpoint."""

    shape: tuple[int, ...]  # (N, K)
    dtype: np.dtype  # before packing
    packing: Packing
    codes: Any  # uint8[ceil(N * K / 2), 1], two a byte
    scales: Any  # float32 or uint8, [ceil(N * K / B)]
    scale_scales: Any = None  # float32, one for 256 scales
    scale_offset: np.float32 | None = None  # the mean of the scales
    keeps_dtype = True  # whether weights are rounded to `dtype`, whatever is asked for

    @property
    def problem(self) -> str | None:
        """Why its blocks are not those of a `QTensor`; None if they are."""
        k, size = self.shape[1], self.packing.block_size
        text = f"has {k} inputs and blocks of {size}, which cross its rows"
        return text if k % size else None

    @property
    def common_block(self) -> int:
        """The most weights that are always in one row and in one block."""
        return math.gcd(self.shape[1], self.packing.block_size)

    def rows(self) -> tuple[Any, Any]:
        """Returns codes `[N, K / 2]` and scales `[N, K / B]`; slices are read."""
        n, k = self.shape
        scales = self.scales.reshape(n, k // self.packing.block_size)
        return self.codes.reshape(n, k // 2), scales

    def float_scales(self, blocks: slice) -> Float32[np.ndarray, " blocks"]:
        """Returns the scales of blocks as float32."""
        scales = np.asarray(self.scales[blocks])
        if self.scale_scales is None:
            return scales
        group = np.arange(blocks.start, blocks.stop) // SCALES_PER_BLOCK
        nested = np.asarray(self.scale_scales)[group]
        return DYNAMIC_MAP[scales] * nested + self.scale_offset

    def codes_of(self, rows: slice) -> UInt8[np.ndarray, "n k"]:
        """Returns the codes of rows, one a byte."""
        k = self.shape[1]
        start, stop = rows.start * k, rows.stop * k
        packed = np.asarray(self.codes[start // 2 : -(-stop // 2)]).reshape(-1, 1)
        # The first code is in the high bits; a row may begin inside a byte.
        codes = np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1)
        return codes[start % 2 :][: stop - start].reshape(-1, k)

    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight: table value times scale, rounded to its dtype."""
        k, size = self.shape[1], self.packing.block_size
        start, stop = rows.start * k, rows.stop * k
        first = start // size
        scales = self.float_scales(slice(first, -(-stop // size)))
        block = np.arange(start, stop) // size - first
        values = self.packing.format.table[self.codes_of(rows)]
        return (values * scales[block].reshape(-1, k)).astype(self.dtype)


def bitsandbytes_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors; a 4-bit weight is a `PackedTensor`."""
    states = {name: name.rpartition(_STATE)[::2] for name in tensors if _STATE in name}
    found = dict(tensors)
    problems = []
    for name, (weight, fmt) in states.items():
        try:
            packed = _packed(tensors, weight, fmt, name)
        except ValueError as error:
            problems.append(f"{weight}: {error}")
            continue
        for part in _PARTS:
            found.pop(f"{weight}.{part}", None)
        del found[name]
        found[weight] = packed
    refuse_listed(
        "these are not 4-bit weights of bitsandbytes", problems, CheckpointError
    )
    return found


def _packed(tensors: Mapping[str, Any], weight: str, fmt: str, key: str) -> Any:
    state = _read_state(tensors[key])
    shape: Any = state.get("shape")
    block_size: Any = state.get("blocksize")
    is_size = lambda n: type(n) is int and 0 < n < 1 << 31
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(map(is_size, shape))
    require(is_shape, f"`shape` must be two sizes. Got {shape!r:.80}.")
    message = f"`blocksize` must be a size. Got {block_size!r:.80}."
    require(is_size(block_size), message)
    kind, dtype = state.get("quant_type"), state.get("dtype")
    require(
        kind == fmt and fmt in ("nf4", "fp4"),
        "`quant_type` must be nf4 or fp4, as in its name. Got "
        f"{kind!r:.80}, {fmt!r:.80}.",
    )
    require(dtype in FLOAT_DTYPES, f"`dtype` must be floating. Got {dtype!r:.80}.")
    is_nested = "nested_offset" in state
    packing = Packing(fmt, block_size, is_nested)
    count = math.prod(shape)
    blocks = math.ceil(count / block_size)
    wanted = {
        "": ("uint8", (math.ceil(count / 2), 1)),
        ".absmax": ("uint8" if is_nested else "float32", (blocks,)),
        ".quant_map": ("float32", (16,)),
    }
    if is_nested:
        groups = math.ceil(blocks / SCALES_PER_BLOCK)
        wanted[".nested_absmax"] = ("float32", (groups,))
        wanted[".nested_quant_map"] = ("float32", (256,))
    stored = {part: tensors.get(weight + part) for part in wanted}
    stored[""] = _as_bytes(stored[""])
    for part, (own, size) in wanted.items():
        part_of = stored[part]
        found = part_of if part_of is None else (str(part_of.dtype), part_of.shape)
        message = f"{weight + part} must be {own}{size}. Got {found}."
        require(found == (own, size), message)
    _check_table(tensors[weight + ".quant_map"], get_format(fmt).table)
    parts = (stored[""], tensors[weight + ".absmax"])
    if is_nested:
        _check_table(tensors[weight + ".nested_quant_map"], DYNAMIC_MAP)
        parts += tensors[weight + ".nested_absmax"], _nested_offset(state)
    return PackedTensor(tuple(shape), jnp.dtype(dtype), packing, *parts)


def _as_bytes(codes: Any) -> Any:
    """Returns codes that are stored as other numbers, in bytes; a file is not read.

    `bnb_4bit_quant_storage` is bfloat16 for FSDP, which splits arrays of one dtype.
    """
    if codes is None or str(codes.dtype) not in FLOAT_DTYPES:
        return codes
    size = math.prod(codes.shape) * codes.dtype.itemsize
    if isinstance(codes, LazyTensor):
        return replace(codes, dtype=np.dtype(np.uint8), shape=(size, 1))
    return np.asarray(codes).reshape(-1, 1).view(np.uint8).reshape(size, 1)


def _read_state(tensor: Any) -> dict:
    require(
        str(tensor.dtype) == "uint8" and math.prod(tensor.shape) <= MAX_STATE_BYTES,
        f"`quant_state` must be at most {MAX_STATE_BYTES} bytes.",
    )
    state = parse_json(np.asarray(tensor).tobytes(), "`quant_state`")
    require(isinstance(state, dict), "`quant_state` must be a JSON object.")
    return state


def _nested_offset(state: dict) -> np.float32:
    offset, size = state["nested_offset"], state.get("nested_blocksize")
    dtype = state.get("nested_dtype", "float32")
    is_number = type(offset) in (int, float)
    require(
        is_number and abs(offset) < float(np.finfo(np.float32).max),
        f"`nested_offset` must be a number. Got {offset!r:.80}.",
    )
    require(
        size == SCALES_PER_BLOCK and dtype == "float32",
        f"nested scales must be float32 in blocks of {SCALES_PER_BLOCK}. Got "
        f"{dtype!r:.80}, {size!r:.80}.",
    )
    return np.float32(offset)


def _check_table(tensor: Any, table: np.ndarray) -> None:
    found = np.asarray(tensor)
    if not np.array_equal(found, table):
        raise CheckpointError(
            "the table of values must be bitsandbytes'. Got another, which begins "
            f"{found[:3].tolist()}."
        )
