"""The QTensor: a kernel in packed codes and block scales, as a pytree.

Invariants, for a kernel whose matrix form is `[*batch, K, N]` (see `Geometry`), with
`B = block_size`:

- `dequantize(q)[..., k, n] = table[code[..., k, n]] * scale[..., k // B, n]`, the
  product in float32 and rounded once to `q.dtype`;
- `codes` is uint8: `[*batch, ceil(K / 2), N]` for 4-bit formats, `[*batch, K, N]` for
  int8;
- `scales` is float32 `[*batch, ceil(K / B), N]`, or uint8 of that shape beside
  `scale_scales` float32 `[*batch, ceil(N * ceil(K / B) / 256)]` and `scale_offset`
  float32 `[*batch]` when double-quantized.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from .blockwise import (
    dequantize_blocks,
    dequantize_scales,
    quantize_blocks,
    quantize_scales,
)
from .explicit import explicit_mesh, fitting_spec, in_auto_mode, spec_of
from .formats import Format, check_block_size, get_format
from .geometry import Geometry
from .pytree import register


@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """A quantized kernel. Made by `quantize`, read by `dequantize` and `matmul`.

    Leaves and invariants are listed in this module's docstring.

    Attributes:
        codes: Packed codes, uint8.
        scales: Block scales: float32, or uint8 when double-quantized.
        scale_scales: Scales of 256 scales each, or None.
        scale_offset: The mean that was taken off the scales, or None.
        fmt: Name of the number format.
        block_size: Weights along the contracted axis that share a scale.
        dtype_name: The logical dtype.
        pad: Rows of codes beyond K (1 where K is odd).
        geometry: How the kernel's axes map to `[*batch, K, N]`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.ones((128, 4)), "nf4", double_quant=False)
        >>> q
        QTensor(nf4, float32[128,4], block_size=64, 4.5 bits)
        >>> q.shape, q.codes.shape, q.scales.shape
        ((128, 4), (64, 4), (2, 4))
    """

    codes: Any
    scales: Any
    scale_scales: Any
    scale_offset: Any
    fmt: str
    block_size: int
    dtype_name: str
    pad: int
    geometry: Geometry

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix form, `(*batch, K, N)`."""
        *batch, rows, n = self.codes.shape
        per_byte = 8 // get_format(self.fmt).bits
        return (*batch, rows * per_byte - self.pad, n)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's own shape."""
        return self.geometry.kernel_shape(self.matrix_shape)

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype, to which `dequantize` rounds."""
        return jnp.dtype(self.dtype_name)

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored arrays take."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    @property
    def bits_per_param(self) -> float:
        """Stored bits for each weight, scales included."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.scale_scales is not None

    def __repr__(self):
        try:
            dims = ",".join(map(str, self.shape))
            bits = f"{self.bits_per_param:.4g} bits"
        except (AttributeError, TypeError, ValueError):  # placeholders as leaves
            return f"QTensor({self.fmt}, codes={self.codes!r}, scales={self.scales!r})"
        double = ", double_quant" if self.double_quant else ""
        return (
            f"QTensor({self.fmt}, {self.dtype_name}[{dims}], "
            f"block_size={self.block_size}{double}, {bits})"
        )


register(
    QTensor,
    ("codes", "scales", "scale_scales", "scale_offset"),
    ("fmt", "block_size", "dtype_name", "pad", "geometry"),
)


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
    if is_concrete(w) and not is_finite(w):
        raise ValueError("weights must be finite. Got NaN or infinite values.")
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
    dtype = getattr(w, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        found = type(w).__name__ if dtype is None else dtype
        raise TypeError(f"weights must be a floating-point array. Got {found}.")
    if w.ndim < 2:
        raise ValueError(f"weights must have at least 2 axes. Got shape {w.shape}.")


def is_concrete(w: Any) -> bool:
    """Whether the values of `w` can be looked at now."""
    return isinstance(w, np.ndarray | jax.Array) and not isinstance(w, Tracer)


@jax.jit
def _all_finite(w):
    return jnp.all(jnp.isfinite(w))


def is_finite(w: Any) -> bool:
    """Whether every value of the array is finite."""
    return bool(_all_finite(w))


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


def float_scales(q: QTensor) -> Float[Array, "*batch blocks n"]:
    """The scales as float32 `[*batch, ceil(K / B), N]`, double-quantized or not."""
    if not q.double_quant:
        return q.scales
    expand = dequantize_scales
    mesh = explicit_mesh(q.scales, q.scale_scales)
    if mesh is not None:
        spec = fitting_spec(mesh, spec_of(q.scales), q.scales.shape)
        expand = in_auto_mode(expand, mesh, spec)
    return expand(q.scales, q.scale_scales, q.scale_offset)


def dequantize_matrix(q: QTensor, dtype: Any = None) -> Float[Array, "*batch k n"]:
    """The weights in matrix form, rounded to `q.dtype` and then cast to `dtype`."""
    w = dequantize_blocks(
        q.codes, float_scales(q), get_format(q.fmt), q.block_size, q.matrix_shape[-2]
    )
    return round_to(w, q.dtype, q.dtype if dtype is None else jnp.dtype(dtype))


def round_to(w: Array, first: Any, then: Any) -> Array:
    """Casts to `first` and then to `then`, so that both roundings happen.

    A plain pair of casts is one that XLA may drop (`xla_allow_excess_precision`).
    """
    wider = jnp.promote_types(first, then) != first
    if wider and jnp.finfo(first).bits < 32:
        info = jnp.finfo(first)
        w = lax.reduce_precision(w, info.nexp, info.nmant)
        return w.astype(then)
    return w.astype(first).astype(then)


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
