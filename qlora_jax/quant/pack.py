"""Packs kernels of any shape, and trains float kernels through their packed form."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._jax.memory import all_below, is_concrete
from .._jax.modes import call_in_auto_mode, split_as
from .._jax.pytree import register
from .._jax.specs import AnyMesh, spec_of
from .codes import quantize_blocks
from .formats import FLOAT_DTYPES, Packing
from .geometry import Geometry
from .kernel import ArrayKernel
from .qtensor import QTensor, stored_specs
from .schemes import StoredScales


def quantize_kernel(
    w: Float[Array, "..."],
    packing: Packing,
    geometry: Geometry,
) -> QTensor:
    """Quantizes a floating-point kernel; raises the errors of `check_values`."""
    check_values(w, packing, geometry)
    return quantize_unchecked(w, packing, geometry)


def quantize_unchecked(
    w: Array | np.ndarray,
    packing: Packing,
    geometry: Geometry,
    *largest: Array,
) -> QTensor:
    """Quantizes a kernel without the checks of its values, which read all weights.

    `largest` is the optional second argument of `ScaleScheme.encode`, `[*batch]`. Only
    NVFP4 uses it. The scale of a block is its largest weight there, so the largest
    scale of a kernel is the largest magnitude of its weights.
    """
    w = jnp.asarray(w)
    if w.ndim >= len(geometry.kinds):  # else it is a slice of a kernel with these axes
        geometry = Geometry.of(geometry.kinds, w.shape)
    return _quantize(w, packing, geometry, *largest)


def check_kernel(w: PyTree) -> None:
    """Raises an error unless `w` is a float array with at least two axes."""
    if isinstance(w, jax.ShapeDtypeStruct):
        raise TypeError(
            "weights must be arrays. Got a ShapeDtypeStruct. For shapes, call the "
            "function under jax.eval_shape."
        )
    kind = w.dtype if isinstance(w, np.ndarray | jax.Array) else type(w)
    name = getattr(kind, "name", None) or getattr(kind, "__name__", str(kind))
    if name not in FLOAT_DTYPES:
        raise TypeError(
            "weights must be a floating-point array: one of "
            f"{', '.join(FLOAT_DTYPES)}. Got {name}."
        )
    if w.ndim < 2:
        raise ValueError(f"weights must have at least 2 axes. Got shape {w.shape}.")


def check_values(
    w: Array | np.ndarray,
    packing: Packing,
    geometry: Geometry,
) -> None:
    """Raises ValueError if the shape, or a known value, does not fit the format."""
    packing.check_rows(geometry.matrix_shape(w.shape)[-2])
    if not is_concrete(w):
        return
    # For ordinary weights, one cheap pass is enough. Only kernels with larger weights
    # are packed and decoded, to find out which step overflows.
    scheme = packing.scheme
    if all_below(w, min(scheme.limit(w.size), surely_decoded_below(w.dtype))):
        return
    if not all_below(w, math.inf):
        raise ValueError("weights must be finite. Got NaN or infinite values.")
    with jax.ensure_compile_time_eval():
        q = quantize_unchecked(w, packing, geometry)
        decodes_to_finite = all_below(q.dequantize(), math.inf)
    if not q.stored_scales.is_finite():
        raise ValueError(f"weights must be {scheme.overflow}")
    if not decodes_to_finite:
        raise ValueError(
            f"weights must be smaller for {packing.fmt!r}, which decodes some of them "
            f"to infinity in {q.dtype_name}."
        )


def surely_decoded_below(dtype: DTypeLike) -> float:
    """Returns a magnitude below which decoded weights are finite in every format."""
    # A decoded weight is less than twice the largest weight of its kernel.
    return float(min(jnp.finfo(dtype).max, np.finfo(np.float32).max)) / 2


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(
    w: Array,
    packing: Packing,
    geometry: Geometry,
    *largest: Array,
) -> QTensor:
    def pack(w: Array, *largest: Array) -> tuple[Array, StoredScales]:
        codes, scales = quantize_blocks(geometry.to_matrix(w), packing, *largest)
        return codes, packing.scheme.encode(scales, *largest)

    def specs(mesh: AnyMesh) -> PyTree:
        spec = tuple(geometry.matrix_spec(spec_of(w), w.ndim))
        return stored_specs(mesh, spec, pack, w, *largest)

    stored: StoredScales
    codes, stored = call_in_auto_mode(pack, specs, w, *largest)
    name = jnp.dtype(w.dtype).name
    return QTensor(codes, *stored, packing.fmt, packing.block_size, name, geometry)


@dataclass(frozen=True, eq=False)
class StraightThrough(ArrayKernel):
    """A trained float kernel that the forward pass quantizes.

    The gradient passes the quantizer as if it were the identity (the straight-through
    estimator, Bengio et al. 2013). The weights of `to_qtensor` are exactly those that
    the forward pass used. `init` makes one for each target if `freeze_base=False`. Like
    a QTensor, it is not an array.

    Attributes:
        kernel: The float kernel, in its own shape and dtype. It is the only leaf.
        packing: How the forward pass quantizes it: `packing.fmt`, `packing.block_size`
            and `packing.double_quant`.
        geometry: How the kernel's axes map to `[*batch, K, N]`, as in `QTensor`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=2, freeze_base=False)
        >>> params = {"kernel": jnp.ones((64, 4))}
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> base["kernel"].to_qtensor()
        QTensor(nf4, float32[64,4], block_size=64, double_quant, 4.375 bits)
        >>> jax.grad(lambda k: k.dequantize().sum())(base["kernel"]).kernel[0, 0]
        Array(1., dtype=float32)
    """

    kernel: Array
    packing: Packing  # pyright: ignore[reportIncompatibleVariableOverride]
    geometry: Geometry
    is_trained = True

    @property
    def label(self) -> str:  # noqa: D102
        return f"{self.dtype.name} through {self.packing.fmt}"

    @property
    def value(self) -> Array:  # noqa: D102
        return self.kernel

    def to_qtensor(self) -> QTensor:
        """Returns the QTensor that `quantize` returns for the kernel.

        Raises:
            ValueError: Outside jit, as in `quantize`: if a weight is not finite, or too
                large for the format.
        """
        return quantize_kernel(self.kernel, self.packing, self.geometry)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Returns the weights that the forward pass uses.

        The gradient of the result is passed to `kernel` unchanged.

        Args:
            dtype: Dtype of the result; by default the kernel's own. Weights are rounded
                to the kernel's own dtype first.

        Raises:
            TypeError: If `dtype` is not floating-point.
            ValueError: Outside jit, as in `to_qtensor`.
        """
        w = lax.stop_gradient(self.kernel)
        packed = quantize_kernel(w, self.packing, self.geometry)
        return straight_through(self.kernel, packed.dequantize(dtype))


register(
    StraightThrough, ("kernel",), ("packing", "geometry"), "qlora_jax.StraightThrough"
)


# Packed weights are a step function of the float ones, whose derivative is 0 almost
# everywhere. The straight-through estimator takes 1 in its place.
def straight_through(source: Array, value: Array) -> Array:
    """Returns `value`. Its gradient goes to `value`, and a copy of it to `source`."""
    return _pass_gradient(split_as(source.astype(value.dtype), value), value)


@jax.custom_vjp
def _pass_gradient(source: Array, value: Array) -> Array:
    return value


_pass_gradient.defvjp(
    lambda source, value: (value, None), lambda _, gradient: (gradient, gradient)
)
