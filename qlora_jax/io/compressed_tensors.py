"""4-bit weights of compressed-tensors, as a checkpoint stores them.

A weight `[N, K]` is `weight_packed`, the first code in the lowest bits, and
`weight_scale` `[N, K / B]`. For integers (pack-quantized) eight codes are in an int32,
and scales are floats; `weight_shape` is `[N, K]`. For E2M1 two codes are in a byte, and
scales in E8M0 (mxfp4-pack-quantized), or in E4M3 with a `weight_global_scale`
(nvfp4-pack-quantized).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..quant.settings import Packing
from ..trees.paths import refuse_listed
from .files import CheckpointError, require

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale")
_REFUSED = {
    "weight_zero_point": "zero points: the weights must be symmetric",
    "weight_g_idx": "an order of its inputs (act order)",
}
# The format and the logical dtype, by the dtypes of codes and scales. The maker decodes
# E2M1 in bfloat16.
_KINDS = {
    ("int32", "float16"): ("int4_f16", "float16"),
    ("int32", "bfloat16"): ("int4_f16", "bfloat16"),
    ("int32", "float32"): ("int4", "float32"),
    ("uint8", "uint8"): ("mxfp4", "bfloat16"),
    ("uint8", "float8_e4m3fn"): ("nvfp4", "bfloat16"),
}


@dataclass(frozen=True, eq=False)
class _Codes:
    """Codes `[N, K / 2]` as a `QTensor` has them, the first in the high bits."""

    packed: Any  # int32 `[N, K / 8]` or uint8 `[N, K / 2]`

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        size = self.packed.dtype.itemsize
        first = columns.start // size
        found = self.packed[rows, first : -(-columns.stop // size)]
        found = np.ascontiguousarray(found).view(np.uint8)
        skipped = columns.start - first * size
        found = found[:, skipped : skipped + columns.stop - columns.start]
        return found >> 4 | found << 4


@dataclass(frozen=True, eq=False)
class _Scales:
    """Scales `[N, K / B]` in the dtype of a format; refuses what that cannot hold."""

    stored: Any
    dtype: Any
    name: str

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        found = np.asarray(self.stored[index])
        scales = found.astype(self.dtype)
        is_same = scales.astype(np.float32) == found.astype(np.float32)
        is_number = scales != 255 if scales.dtype == np.uint8 else np.isfinite(scales)
        if not (is_same & is_number).all():
            raise CheckpointError(
                f"{self.name} must hold finite {np.dtype(self.dtype).name} numbers. "
                f"Got others in {found.dtype}."
            )
        return scales


@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """A 4-bit weight in a checkpoint, as `PackedTensor` is one of bitsandbytes."""

    shape: tuple[int, ...]  # (N, K)
    dtype: np.dtype  # to which weights are rounded, if no other is asked for
    packing: Packing
    codes: Any
    scales: Any
    scale_scales: Any = None  # a factor and a divisor, in nvfp4
    scale_offset = None
    is_in_rows = True
    keeps_dtype = False

    @property
    def common_block(self) -> int:
        """Its block size."""
        return self.packing.block_size

    def rows(self) -> tuple[Any, Any]:
        """Returns codes `[N, K / 2]` and scales `[N, K / B]`; slices are read."""
        return self.codes, self.scales

    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight: table value times scale, rounded to its dtype."""
        _, k = self.shape
        size = self.packing.block_size
        packed = self.codes[rows, slice(0, k // 2)]
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, k)
        scales = self.scales[rows, slice(0, k // size)]
        if self.packing.fmt == "mxfp4":
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scales = scales.astype(np.float32)
        if self.scale_scales is not None:
            scales = scales * self.scale_scales[0] / self.scale_scales[1]
        values = self.packing.format.table[codes]
        return (values * np.repeat(scales, size, axis=1)).astype(self.dtype)


def compressed_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors; a 4-bit weight is a `CompressedTensor`."""
    found, problems = dict(tensors), []
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "weight_packed":
            continue
        prefix = f"{module}." if module else ""
        names = {part: prefix + part for part in (*_PARTS, *_REFUSED)}
        parts = {part: tensors[n] for part, n in names.items() if n in tensors}
        try:
            packed = _packed(parts, names["weight_scale"])
        except ValueError as error:
            problems.append(f"{module}: {error}")
            continue
        for part in parts:
            del found[names[part]]
        found[prefix + "weight"] = packed
    title = (
        "these are not 4-bit weights of compressed-tensors that can be read as they are"
    )
    refuse_listed(title, problems, CheckpointError)
    return found


def _packed(parts: Mapping[str, Any], scale_name: str) -> CompressedTensor:
    for part, what in _REFUSED.items():
        require(part not in parts, f"`{part}` must be left out. It has {what}.")
    packed, scale = parts["weight_packed"], parts.get("weight_scale")
    require(scale is not None, "`weight_scale` must be given. Got none.")
    assert scale is not None
    kinds = str(packed.dtype), str(scale.dtype)
    require(kinds in _KINDS, f"codes and scales must be of {[*_KINDS]}. Got {kinds}.")
    fmt, dtype = _KINDS[kinds]
    require(len(packed.shape) == 2, f"codes must have two axes. Got {packed.shape}.")
    n, k = packed.shape[0], packed.shape[1] * 2 * packed.dtype.itemsize
    if fmt.startswith("int4"):
        said = parts.get("weight_shape")
        said = None if said is None else np.asarray(said[...]).tolist()
        message = f"`weight_shape` must be [{n}, {k}], for 4 bits. Got {said}."
        require(said == [n, k], message)
    blocks = scale.shape[-1] if scale.shape else 0
    message = f"`weight_scale` must be [{n}, K / block size], K being {k}. Got "
    is_whole = len(scale.shape) == 2 and scale.shape[0] == n and blocks > 0
    require(is_whole and k % blocks == 0, f"{message}{scale.shape}.")
    packing = Packing(fmt, k // blocks, False)
    stored = packing.scheme.arrays((blocks, n)).scales.dtype
    return CompressedTensor(
        (n, k),
        jnp.dtype(dtype),
        packing,
        _Codes(packed),
        _Scales(scale, stored, scale_name),
        _factors(parts.get("weight_global_scale"), fmt),
    )


def _factors(whole: Any, fmt: str) -> np.ndarray | None:
    if fmt != "nvfp4":
        require(whole is None, "`weight_global_scale` must be left out. Got one.")
        return None
    is_one = whole is not None and tuple(whole.shape) in ((), (1,))
    require(is_one, "`weight_global_scale` must be one number.")
    assert whole is not None
    found = float(np.asarray(whole[...], np.float32).reshape(()))
    message = f"`weight_global_scale` must be positive and finite. Got {found}."
    require(0 < found < np.inf, message)
    return np.array([1, found], np.float32)
