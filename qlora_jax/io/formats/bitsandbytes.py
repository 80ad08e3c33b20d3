"""4-bit weights of bitsandbytes, without torch."""

# A weight [N, K] is stored as `weight` (uint8, two codes to a byte, row by row),
# `absmax` (one scale for each block), `quant_map` (the table of values) and JSON in
# `quant_state.bitsandbytes__nf4`. Blocks may cross rows. If the scales are quantized
# too, `nested_absmax` and `nested_quant_map` hold their scales and their table
# (Dettmers et al. 2023, section 3).

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from ...quant.formats import FLOAT_DTYPES, Packing, get_format
from ...quant.qtensor import QTensor
from ...quant.schemes import DYNAMIC_MAP, SCALES_PER_GROUP
from ..files import CheckpointError, parse_json, require
from ..stored_weight import PackedWeight, StoredWeight
from ..tensors import DeferredTensor, LazyMatrix, LazyTensor, SliceableTensor
from .file_format import Config, FileFormat, Kernels, Parts, Settings, Writer
from .layouts import UINT8

_STATE = "quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16
_SMALLEST_BLOCK = 32  # the smallest block size that bitsandbytes reads
_SMALLEST_NEW_BLOCK = 16  # the smallest block size of a `QTensor`

_FileTensor = LazyTensor | np.ndarray


@dataclass(frozen=True, eq=False)
class BitsAndBytesWeight(StoredWeight):
    """A weight whose codes and scales are vectors: its blocks may cross rows."""

    codes: _FileTensor  # uint8[ceil(N * K / 2), 1], two codes to a byte
    scales: _FileTensor  # float32 or uint8, [ceil(N * K / B)]
    keeps_dtype: bool = True

    @property
    def problem(self) -> str | None:  # noqa: D102
        k, block_size = self.shape[1], self.packing.block_size
        message = f"has {k} inputs and blocks of {block_size}, which cross its rows"
        return message if k % block_size else None

    def codes_and_scales(self) -> tuple[SliceableTensor, SliceableTensor]:  # noqa: D102
        n, k = self.shape
        stored = self.scales.reshape(n, k // self.packing.block_size)

        def read_scales(rows: slice, blocks: slice) -> np.ndarray:
            scales = np.asarray(stored[rows, blocks])
            is_finite = bool(np.isfinite(scales).all())
            require(is_finite, f"{self.name}.absmax must be finite.")
            return scales

        scales = LazyMatrix(stored.dtype, stored.shape, read_scales)
        return self.codes.reshape(n, k // 2), scales

    def reblocked(self) -> PackedWeight | None:
        """Returns the same values in blocks within rows; None if these are too small.

        Each new block is a part of one stored block, and has the scale of that block.
        """
        (n, k), old_size = self.shape, self.packing.block_size
        size = math.gcd(k, old_size)
        if size < _SMALLEST_NEW_BLOCK:
            return None

        def compute_scales() -> np.ndarray:
            scales = self.float_scales(slice(0, -(-n * k // old_size)))
            old_blocks = np.arange(n * k // size) * size // old_size
            return scales[old_blocks].reshape(n, -1)

        packing = Packing(self.packing.fmt, size, False)
        codes = self.codes.reshape(n, k // 2)
        scales = DeferredTensor(np.dtype(np.float32), (n, k // size), compute_scales)
        weight = PackedWeight(self.shape, self.dtype, packing, codes, scales)
        return replace(weight, keeps_dtype=True, name=self.name)

    def float_scales(self, blocks: slice) -> Float32[np.ndarray, " blocks"]:
        """Returns the scales of blocks as float32."""
        scales = np.asarray(self.scales[blocks])
        if self.scale_scales is None:
            return scales
        group = np.arange(blocks.start, blocks.stop) // SCALES_PER_GROUP
        return DYNAMIC_MAP[scales] * self.scale_scales[group] + self.scale_offset

    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight: table values times scales, rounded to `dtype`."""
        k, block_size = self.shape[1], self.packing.block_size
        start, stop = rows.start * k, rows.stop * k
        # Decode whole blocks, which begin at a byte. Rows may begin inside a block.
        blocks = slice(start // block_size, -(-stop // block_size))
        first, last = blocks.start * block_size, blocks.stop * block_size
        packed = np.asarray(self.codes[first // 2 : last // 2]).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        scales = np.repeat(self.float_scales(blocks), block_size)[: codes.size]
        values = self.packing.format.table[codes] * scales
        part = slice(start - first, stop - first)
        return values[part].reshape(-1, k).astype(self.dtype)


def _read(parts: Parts, _: Settings) -> dict[str, StoredWeight]:
    # The name of the state, which is the marker, ends in the number format.
    (fmt,) = (x.removeprefix(_STATE) for x in parts if x.startswith(_STATE))
    state = _read_state(parts[_STATE + fmt])
    shape, packing, dtype = _parse_state(state, fmt)
    # The dtype and the shape that each part must have.
    num_weights = math.prod(shape)
    num_blocks = math.ceil(num_weights / packing.block_size)
    expected = {
        "": ("uint8", (math.ceil(num_weights / 2), 1)),
        "absmax": ("uint8" if packing.double_quant else "float32", (num_blocks,)),
        "quant_map": ("float32", (16,)),
    }
    if packing.double_quant:
        num_groups = math.ceil(num_blocks / SCALES_PER_GROUP)
        expected["nested_absmax"] = ("float32", (num_groups,))
        expected["nested_quant_map"] = ("float32", (256,))
    tensors = {part: x if part else _view_as_bytes(x) for part, x in parts.items()}
    for part, (part_dtype, part_shape) in expected.items():
        x = tensors.get(part)
        stored = None if x is None else (str(x.dtype), x.shape)
        message = f"`{part or 'weight'}` must be {part_dtype}{part_shape}. Got "
        require(stored == (part_dtype, part_shape), f"{message}{stored}.")
    _check_table(tensors["quant_map"], get_format(fmt).table)
    nested: dict[str, Any] = {}
    if packing.double_quant:
        _check_table(tensors["nested_quant_map"], DYNAMIC_MAP)
        nested["scale_offset"] = _read_nested_offset(state)
        nested["scale_scales"] = x = np.asarray(tensors["nested_absmax"])
        require(bool(np.isfinite(x).all()), "`nested_absmax` must be finite.")
    arrays = tensors[""], tensors["absmax"]
    return {"": BitsAndBytesWeight(shape, dtype, packing, *arrays, **nested)}


def _read_state(tensor: SliceableTensor) -> dict[str, Any]:
    is_small = math.prod(tensor.shape) <= _MAX_STATE_BYTES
    message = f"`quant_state` must be at most {_MAX_STATE_BYTES} bytes."
    require(str(tensor.dtype) == "uint8" and is_small, message)
    state = parse_json(np.asarray(tensor).tobytes(), "`quant_state`")
    require(isinstance(state, dict), "`quant_state` must be a JSON object.")
    return state


def _parse_state(
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
    is_float = dtype in FLOAT_DTYPES
    require(is_float, f"`dtype` must be floating-point. Got {dtype!r:.80}.")
    n, k = state["shape"]
    return (n, k), Packing(fmt, block_size, "nested_offset" in state), jnp.dtype(dtype)


def _view_as_bytes(codes: _FileTensor) -> _FileTensor:
    # FSDP shards arrays of one dtype only, so it needs bfloat16 as the dtype of codes
    # (`bnb_4bit_quant_storage`).
    if str(codes.dtype) not in FLOAT_DTYPES:
        return codes
    nbytes = math.prod(codes.shape) * codes.dtype.itemsize
    if isinstance(codes, LazyTensor):  # changes only the metadata
        return replace(codes, dtype=UINT8, shape=(nbytes, 1))
    return np.asarray(codes).reshape(-1, 1).view(np.uint8).reshape(nbytes, 1)


def _read_nested_offset(state: dict[str, Any]) -> np.float32:
    offset, block_size = state["nested_offset"], state.get("nested_blocksize")
    dtype = state.get("nested_dtype", "float32")
    limit = float(np.finfo(np.float32).max)
    is_number = type(offset) in (int, float) and abs(offset) < limit
    require(is_number, f"`nested_offset` must be a float32 number. Got {offset!r:.80}.")
    message = f"nested scales must be float32 in blocks of {SCALES_PER_GROUP}. Got "
    message += f"{dtype!r:.80} in blocks of {block_size!r:.80}."
    require(block_size == SCALES_PER_GROUP and dtype == "float32", message)
    return np.float32(offset)


def _check_table(tensor: SliceableTensor, table: np.ndarray) -> None:
    stored = np.asarray(tensor)
    message = "the table of values must equal bitsandbytes' table. Got one that begins "
    message += f"with {stored[:3].tolist()}."
    require(np.array_equal(stored, table), message)


def _read_int8(parts: Parts, _: Settings) -> dict[str, StoredWeight]:
    raise CheckpointError("8-bit weights of bitsandbytes are not supported")


def _read_settings(settings: Settings) -> dict[str, Any]:
    message = "`load_in_8bit` must be false: 8-bit weights are not supported. Got true."
    require(not settings.get("load_in_8bit"), message)
    return {**settings, "fmt": settings.get("bnb_4bit_quant_type", "fp4")}


def _problem(q: QTensor) -> str | None:
    smallest, k = _SMALLEST_BLOCK, q.matrix_shape[-2]
    if q.block_size < smallest:
        return f"its block size must be at least {smallest}. Got {q.block_size}"
    reason = (
        f"its {k} inputs must be a multiple of the block size, or blocks of "
        f"bitsandbytes would cross rows. Got block size {q.block_size}. Pack it with "
        "a block size that divides the inputs, or leave it in float"
    )
    return reason if k % q.block_size else None


def _tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape

    # bitsandbytes stores [N, K], row by row. Each of our bytes has two codes along K.
    def flat_later(x: Any, *shape: int) -> DeferredTensor:
        return DeferredTensor(x.dtype, shape, lambda: np.asarray(x).T.reshape(shape))

    codes = flat_later(q.codes, n * k // 2, 1)
    scales = flat_later(q.scales, k // q.block_size * n)
    state: dict[str, Any] = {"quant_type": q.fmt, "blocksize": q.block_size}
    state |= {"dtype": q.dtype_name, "shape": [n, k]}
    tensors: dict[str, Any] = {name: codes, f"{name}.absmax": scales}
    tensors[f"{name}.quant_map"] = q.packing.format.table
    if q.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(q.scale_scales)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
        state |= dict(nested_blocksize=SCALES_PER_GROUP, nested_dtype="float32")
        state["nested_offset"] = float(np.asarray(q.scale_offset))
    state_bytes = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}.{_STATE}{q.fmt}"] = state_bytes
    return tensors


def _config(kernels: Kernels, float_modules: list[str], _: Config) -> dict[str, Any]:
    q = next(iter(kernels.values()))
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": q.dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": q.fmt,
        "bnb_4bit_use_double_quant": q.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": float_modules,
        "llm_int8_threshold": 6.0,
    }
    return {"quantization_config": settings}


BITSANDBYTES = FileFormat(
    marker=r"(.*)\.quant_state\.bitsandbytes__.*",
    parts=("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),
    read=_read,
    methods={"bitsandbytes": {"bnb_4bit_quant_type": ("fp4", "nf4")}},
    read_settings=_read_settings,
    write=Writer(
        "bitsandbytes",
        ("nf4", "fp4"),
        _tensors,
        _config,
        _problem,
        shared=("fmt", "double_quant"),  # each weight stores its own block size
    ),
)
BITSANDBYTES_INT8 = FileFormat(marker=r"(.*\.SCB)", read=_read_int8)
