"""Whole kernels in and out of their packed form, in their own shape."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.memory import is_concrete
from .._jax.modes import explicit_mesh, in_auto_mode
from .._jax.specs import fitting_spec, spec_of
from .blockwise import quantize_blocks
from .formats import Format, check_block_size, get_format
from .geometry import Geometry
from .qtensor import QTensor, dequantize_matrix
from .scales import quantize_scales


def quantize_kernel(
    w: Float[Array, "..."],
    fmt: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    geometry: Geometry | None = None,
) -> QTensor:
    """Quantizes one kernel; `geometry` says which axes are contracted.

    Raises:
        TypeError: If `w` is not a floating-point array.
        ValueError: If the format, the block size or the rank is unknown or unfit, or,
            outside jit, if `w` holds NaN or infinite values.
    """
    check_settings(fmt, block_size)
    check_kernel(w)
    check_finite(w)
    if geometry is None:
        geometry = Geometry()
    return quantize_checked(w, fmt, block_size, double_quant, geometry)


def quantize_checked(
    w: Any, fmt: str, block_size: int, double_quant: bool, geometry: Geometry
) -> QTensor:
    """As `quantize_kernel`, for what has been checked: weights are read once more."""
    w = jnp.asarray(w)
    geometry = Geometry.of(geometry.kinds, w.shape)
    return _quantize(w, get_format(fmt), block_size, bool(double_quant), geometry)


def check_settings(fmt: str, block_size: int) -> Format:
    """Returns the format called `fmt`, or raises ValueError for a bad setting."""
    number_format = get_format(fmt)
    check_block_size(block_size)
    return number_format


def check_kernel(w: Any) -> None:
    """Raises TypeError unless `w` is a float array, ValueError if it lacks axes."""
    is_array = isinstance(w, np.ndarray | jax.Array)
    if not is_array or not jnp.issubdtype(w.dtype, jnp.floating):
        found = w.dtype if is_array else type(w).__name__
        raise TypeError(f"weights must be a floating-point array. Got {found}.")
    if w.ndim < 2:
        raise ValueError(f"weights must have at least 2 axes. Got shape {w.shape}.")


@jax.jit
def _all_finite(w):
    return jnp.all(jnp.isfinite(w))


def is_finite(w: Any) -> bool:
    """Whether every value of the array is finite."""
    return bool(_all_finite(w))


def check_finite(w: Any) -> None:
    """Raises ValueError if values can be looked at and one is NaN or infinite."""
    if is_concrete(w) and not is_finite(w):
        raise ValueError("weights must be finite. Got NaN or infinite values.")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(w, fmt, block_size, double_quant, geometry):
    def compute(w):
        matrix = geometry.to_matrix(w)
        codes, scales = quantize_blocks(matrix, fmt, block_size)
        if double_quant:
            return codes, *quantize_scales(scales)
        return codes, scales, None, None

    mesh = explicit_mesh(w)
    if mesh is not None:
        outputs = jax.eval_shape(compute, jax.ShapeDtypeStruct(w.shape, w.dtype))
        spec = geometry.matrix_spec(spec_of(w), w.ndim)
        # Nested scales are tiny: their matrix axis is replicated.
        specs = [spec, spec, (*spec[:-2], None), spec[:-2]]
        out_specs = tuple(
            None if x is None else fitting_spec(mesh, s, x.shape)
            for x, s in zip(outputs, specs, strict=True)
        )
        compute = in_auto_mode(compute, mesh, out_specs)
    codes, scales, scale_scales, scale_offset = compute(w)
    k = math.prod(w.shape[a] for a in geometry.axes("k", w.ndim))
    pad = codes.shape[-2] * 8 // fmt.bits - k
    return QTensor(
        codes,
        scales,
        scale_scales,
        scale_offset,
        fmt.name,
        block_size,
        jnp.dtype(w.dtype).name,
        pad,
        geometry,
    )


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize_kernel(q: QTensor, dtype: Any = None) -> Float[Array, "..."]:
    """Returns the kernel in its own shape; see `dequantize`."""

    def compute(q):
        return q.geometry.from_matrix(dequantize_matrix(q, dtype))

    mesh = explicit_mesh(q)
    if mesh is not None:
        spec = q.geometry.kernel_spec(spec_of(q.codes), q.ndim)
        spec = fitting_spec(mesh, spec, q.shape)
        compute = in_auto_mode(compute, mesh, spec)
    return compute(q)
