"""Checks the arrays that a QTensor is built from."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._jax.memory import all_below, is_concrete
from .formats import SCALES_PER_BLOCK
from .geometry import Geometry
from .settings import FLOAT_DTYPES, Packing


class Parts(NamedTuple):
    """The arrays of a QTensor.

    Attributes:
        codes: Packed codes.
        scales: Block scales.
        scale_scales: Scales of the scales, or None.
        scale_offset: The mean of the scales, or None.
    """

    codes: Any
    scales: Any
    scale_scales: Any = None
    scale_offset: Any = None


def stored_shapes(packing: Packing, matrix_shape: tuple[int, ...]) -> Parts:
    """Returns the shape of each array of a kernel `[*batch, K, N]` in matrix form."""
    *batch, k, n = matrix_shape
    rows = math.ceil(k * packing.format.bits / 8)
    blocks = math.ceil(k / packing.block_size)
    codes, scales = (*batch, rows, n), (*batch, blocks, n)
    if not packing.double_quant:
        return Parts(codes, scales)
    groups = math.ceil(n * blocks / SCALES_PER_BLOCK)
    return Parts(codes, scales, (*batch, groups), tuple(batch))


def check_parts(
    parts: Parts, packing: Packing, geometry: Geometry, shape: tuple[int, ...]
) -> None:
    """Refuses arrays that are not those of a kernel of `shape`.

    Args:
        parts: The arrays; `jax.ShapeDtypeStruct` leaves are taken too.
        packing: How the kernel is packed.
        geometry: How the kernel's axes map to its matrix form.
        shape: The kernel's own shape.

    Raises:
        TypeError: If a part is not an array, or has another dtype.
        ValueError: If a part is missing, has another shape, or, where its values can be
            looked at, holds NaN or infinite ones. All such parts are named.
    """
    shapes = stored_shapes(packing, geometry.matrix_shape(shape))
    scales = "uint8" if packing.double_quant else "float32"
    dtypes = Parts("uint8", scales, "float32", "float32")
    kinds: list[str] = []
    values: list[str] = []
    for name, wanted, dtype in zip(Parts._fields, shapes, dtypes, strict=True):
        part: Any = getattr(parts, name)
        if wanted is None:
            continue
        if name.startswith("scale_") and isinstance(part, type(None)):
            values.append("`scale_scales` and `scale_offset` must be given together.")
        elif part is None or not hasattr(part, "dtype"):
            kinds.append(f"`{name}` must be an array. Got {type(part).__name__}.")
        elif part.dtype != np.dtype(dtype):
            kinds.append(f"`{name}` must be {dtype}. Got {part.dtype}.")
        elif tuple(part.shape) != wanted:
            values.append(
                f"`{name}` must have shape {wanted}. Got {tuple(part.shape)}."
            )
        elif dtype == "uint8" or not is_concrete(part):
            continue
        elif not all_below(part, math.inf):
            values.append(f"`{name}` must be finite. Got NaN or infinite values.")
    if not (kinds or values):
        return
    listing = "\n  ".join(kinds + values)
    title = f"these are not the parts of a kernel of shape {shape}, {packing}"
    raise (TypeError if kinds else ValueError)(f"{title}:\n  {listing}")


def check_dtype(dtype: Any) -> str:
    """Returns the name of a logical dtype.

    Raises:
        TypeError: If it is not one that weights may have.
    """
    name = jnp.dtype(dtype).name
    if name not in FLOAT_DTYPES:
        raise TypeError(
            f"`dtype` must be one of {', '.join(FLOAT_DTYPES)}. Got {name}."
        )
    return name
