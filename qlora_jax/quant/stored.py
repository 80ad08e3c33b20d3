"""Checks the arrays that a QTensor is built from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._jax.memory import all_below, is_concrete
from .geometry import Geometry
from .settings import Packing


def axes_of_array(matrix: Sequence[Any], ndim: int, unsplit: Any) -> tuple[Any, ...]:
    """Returns how an array with `ndim` axes is split, from its kernel's matrix form."""
    # Codes and block scales are split as the matrix form; other arrays are tiny.
    batch = tuple(matrix[:-2])
    if ndim == len(batch) + 2:
        return tuple(matrix)
    return (*batch, *[unsplit] * (ndim - len(batch)))


def check_parts(
    parts: Mapping[str, Any], packing: Packing, geometry: Geometry, shape: Sequence[int]
) -> None:
    """Raises an error that lists all arrays that are not those of such a kernel."""
    *batch, k, n = geometry.matrix_shape(shape)
    packing.check_rows(k)
    rows = math.ceil(k / packing.format.codes_per_byte)
    blocks = math.ceil(k / packing.block_size)
    codes = jax.ShapeDtypeStruct((*batch, rows, n), np.uint8)
    scales = packing.scheme.arrays((*batch, blocks, n))._asdict()
    kinds: list[str] = []
    values: list[str] = []
    for name, wanted in {"codes": codes, **scales}.items():
        part = parts[name]
        if wanted is None:
            continue
        if packing.double_quant and name.startswith("scale_") and part is None:
            values.append("`scale_scales` and `scale_offset` must be given together.")
        elif part is None or not hasattr(part, "dtype"):
            kinds.append(f"`{name}` must be an array. Got {type(part).__name__}.")
        elif part.dtype != wanted.dtype:
            kinds.append(f"`{name}` must be {wanted.dtype}. Got {part.dtype}.")
        elif tuple(part.shape) != wanted.shape:
            values.append(
                f"`{name}` must have shape {wanted.shape}. Got {tuple(part.shape)}."
            )
        elif (
            wanted.dtype != np.uint8
            and is_concrete(part)
            and not all_below(part, math.inf)
        ):
            values.append(f"`{name}` must be finite. Got NaN or infinite values.")
    if not (kinds or values):
        return
    listing = "\n  ".join(kinds + values)
    title = f"these are not the parts of a kernel of shape {shape}, {packing}"
    raise (TypeError if kinds else ValueError)(f"{title}:\n  {listing}")
