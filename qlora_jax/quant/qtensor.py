"""The QTensor: a kernel in packed codes and block scales, as a pytree."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._jax.memory import all_below, is_concrete
from .._jax.modes import call_in_auto_mode
from .._jax.pytree import register
from .._jax.specs import AnyMesh, SpecEntry, fitting_spec, spec_of
from .codes import dequantize_blocks
from .formats import FORMATS, Packing, check_dtype, checked_result_dtype, get_format
from .geometry import Contract, Geometry
from .host_codes import HostCodes, Put, on_device, placed_codes
from .kernel import Kernel, Placement
from .schemes import StoredScales

Entry = TypeVar("Entry")


@dataclass(frozen=True, eq=False, repr=False)
class QTensor(Kernel):
    """A quantized kernel. `quantize` makes it; `dequantize` and `matmul` read it.

    Its weights, computed in float32 and rounded once to `dtype`, are

        w[..., k, n] = table[codes[..., k, n]] * scales[..., k // B, n]

    with `B = block_size` and decoded scales (QLoRA, Dettmers et al. 2023, section 3:
    blocks, NormalFloat, double quantization).

    It is a pytree of four arrays, which `from_parts` checks. It is not an array itself:
    operators, indexing, conversion and attributes of arrays such as `.T` raise a
    TypeError that names `matmul` and `dequantize`. Only `==` and `!=` do not: they
    compare identities, as for most Python objects.

    Attributes:
        codes: The uint8 codes: `[*batch, K / 2, N]` for 4-bit formats, with even rows
            in the high nibbles; `[*batch, K, N]` for int8. In host memory
            (`memory="host"` of `qlora_jax.sharding.place`), an object of that shape.
        scales: Block scales `[*batch, K / B, N]`: uint8 if double-quantized, else
            float32 in nf4, fp4, int4 and int8, float16 in int4_f16 and q4_0, uint8
            (exponents) in mxfp4, and float8_e4m3fn in nvfp4.
        scale_scales: If double-quantized, float32 scales of 256 scales each, `[*batch,
            ceil(N * K / B / 256)]`. In nvfp4, a float32 factor and divisor of all
            scales, `[*batch, 2]`. Else None.
        scale_offset: If double-quantized, the mean that was subtracted from the scales,
            float32 `[*batch]`. Else None.
        fmt: Name of the number format, as in `quantize`.
        block_size: Number of weights along the contracted axes that share a scale.
        dtype_name: The logical dtype, such as "bfloat16".
        geometry: How the kernel's axes map to `[*batch, K, N]`; `geometry.kinds` has a
            letter for each trailing axis: b (batch), k (contracted) or n (output).
        placement: The sharding over Auto mesh axes, if `qlora_jax.sharding.place` put
            the kernel on a mesh; else None.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.ones((128, 4)), "nf4", double_quant=False)
        >>> q
        QTensor(nf4, float32[128,4], block_size=64, 4.5 bits)
        >>> q.shape, q.codes.shape, q.scales.shape
        ((128, 4), (64, 4), (2, 4))
    """

    # JAX may replace these arrays by shapes, shardings or other placeholders. In host
    # memory, `codes` is a `HostCodes`.
    codes: Array
    scales: Array
    scale_scales: Array | None
    scale_offset: Array | None
    fmt: str
    block_size: int
    dtype_name: str
    geometry: Geometry
    placement: Placement | None = None
    is_packed = True

    @classmethod
    def from_parts(
        cls,
        codes: Array,
        scales: Array,
        scale_scales: Array | None = None,
        scale_offset: Array | None = None,
        *,
        shape: Sequence[int],
        fmt: str,
        block_size: int | None,
        dtype: DTypeLike,
        contract: Contract = -2,
    ) -> "QTensor":
        """Returns a QTensor from its arrays, such as those of a checkpoint.

        The arrays are those of `QTensor`. They may also be `jax.ShapeDtypeStruct`s.

        Args:
            codes: The uint8 codes.
            scales: Block scales.
            scale_scales: Scales of the scales, if the format has them; else None.
            scale_offset: The mean of the scales if double-quantized; else None.
            shape: The kernel's own shape.
            fmt: The number format.
            block_size: Number of weights along K that share a scale; None for the
                default of the format.
            dtype: The logical dtype.
            contract: The contracted axes, as in `quantize`.

        Raises:
            TypeError: If a part has the wrong dtype or is not an array, if `shape` is
                not a sequence of integers, or if `dtype` is not "bfloat16", "float16",
                "float32" or "float64".
            ValueError: If a part has the wrong shape, is not finite, or is an array
                that the format does not have; if the scales decode to NaN or infinity;
                or if a setting is out of range. The error lists every wrong part.

        Example:
            >>> import jax.numpy as jnp, qlora_jax as ql
            >>> ql.QTensor.from_parts(
            ...     jnp.zeros((64, 4), jnp.uint8), jnp.ones((2, 4)),
            ...     shape=(128, 4), fmt="nf4", block_size=64, dtype="bfloat16")
            QTensor(nf4, bfloat16[128,4], block_size=64, 4.5 bits)
        """
        stored = StoredScales(scales, scale_scales, scale_offset)
        number_format = get_format(fmt)
        # Only double-quantized scales have arrays that other schemes lack.
        unexpected = [
            name
            for name, x in stored._asdict().items()
            if x is not None and name not in number_format.scales.array_names
        ]
        if unexpected and number_format.double_scales is None:
            raise ValueError(
                f"`{unexpected[0]}` must be None for {fmt!r}, whose scales are "
                f"{number_format.scales.name}. Got an array."
            )
        packing = Packing(fmt, block_size, bool(unexpected))
        try:
            shape = tuple(map(operator.index, shape))
        except TypeError:
            raise TypeError(
                f"`shape` must be a sequence of integers. Got {shape!r}."
            ) from None
        geometry = Geometry.contracting(contract, shape)
        matrix_shape = geometry.matrix_shape(shape)
        name = check_dtype("dtype", dtype)
        q = cls(codes, *stored, fmt, packing.block_size, name, geometry)
        _check_parts(q, packing, shape, matrix_shape)
        return q

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix form, `(*batch, K, N)`."""
        *batch, rows, n = self.codes.shape
        return (*batch, rows * (8 // FORMATS[self.fmt].bits), n)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's own shape, as before it was packed."""
        return self.geometry.kernel_shape(self.matrix_shape)

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype, to which `dequantize` rounds."""
        return jnp.dtype(self.dtype_name)

    @property
    def bits_per_param(self) -> float:
        """Stored bits per weight, including the scales."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.scale_offset is not None

    @property
    def stored_scales(self) -> StoredScales:
        """The arrays in which the scales are stored."""
        return StoredScales(self.scales, self.scale_scales, self.scale_offset)

    def with_float_scales(self) -> "QTensor":
        """Returns the same kernel with scales that are not quantized.

        It takes more memory than a double-quantized kernel (0.37 bits per weight in
        blocks of 64), but less time in products with few rows, as in text generation.

        Example:
            >>> import jax.numpy as jnp, qlora_jax as ql
            >>> q = ql.quantize(jnp.ones((64, 512)), "nf4", double_quant=True)
            >>> plain = q.with_float_scales()
            >>> plain.double_quant, bool((plain.dequantize() == q.dequantize()).all())
            (False, True)
        """
        return with_scales(self, StoredScales(float_scales(self)))

    @property
    def packing(self) -> Packing:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Format, block size and `double_quant`: the settings it was packed with."""
        return Packing(self.fmt, self.block_size, self.double_quant)

    @property
    def label(self) -> str:  # noqa: D102
        return self.fmt

    @property
    def spec(self) -> tuple[SpecEntry, ...]:  # noqa: D102
        return tuple(self.geometry.kernel_spec(spec_of(self.codes), self.ndim))

    @property
    def memory(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the codes are between products: "device" or "host"."""
        return "host" if isinstance(self.codes, HostCodes) else "device"

    def to_device(self) -> "QTensor":  # noqa: D102
        is_host = self.memory == "host"
        return replace(self, codes=on_device(self.codes)) if is_host else self

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Returns the float weights in the kernel's own shape.

        Args:
            dtype: Dtype of the result; by default the kernel's own. Weights are rounded
                to the kernel's own dtype first.

        Raises:
            TypeError: If `dtype` is not floating-point.

        Example:
            >>> import jax.numpy as jnp, qlora_jax as ql
            >>> ql.quantize(jnp.ones((64, 2, 4)), contract=-3).dequantize().shape
            (64, 2, 4)
        """
        return _dequantize(self, checked_result_dtype(dtype))

    def dequantize_matrix(self, dtype: DTypeLike | None = None) -> Array:  # noqa: D102
        fmt = FORMATS[self.fmt]
        w = dequantize_blocks(on_device(self.codes), float_scales(self), fmt)
        return round_to(w, self.dtype, self.dtype if dtype is None else dtype)

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
    ("fmt", "block_size", "dtype_name", "geometry", "placement"),
    "qlora_jax.QTensor",
)


def _check_parts(
    q: QTensor, packing: Packing, shape: tuple, matrix_shape: tuple
) -> None:
    """Raises an error that lists every array with a wrong type, shape or value."""
    *batch, k, n = matrix_shape
    packing.check_rows(k)
    rows = k // packing.format.codes_per_byte
    codes = jax.ShapeDtypeStruct((*batch, rows, n), np.uint8)
    scales = packing.scheme.arrays((*batch, k // packing.block_size, n))._asdict()
    types: list[str] = []  # messages about wrong types
    values: list[str] = []  # messages about wrong values
    for name, expected in {"codes": codes, **scales}.items():
        part = getattr(q, name)
        if expected is None:
            continue
        if packing.double_quant and name.startswith("scale_") and part is None:
            values.append("`scale_scales` and `scale_offset` must be given together.")
        elif part is None or not hasattr(part, "dtype"):
            types.append(f"`{name}` must be an array. Got {type(part).__name__}.")
        elif part.dtype != expected.dtype:
            types.append(f"`{name}` must be {expected.dtype}. Got {part.dtype}.")
        elif tuple(part.shape) != expected.shape:
            shapes = f"{expected.shape}. Got {tuple(part.shape)}"
            values.append(f"`{name}` must have shape {shapes}.")
        elif expected.dtype != np.uint8 and is_concrete(part):
            if not all_below(part, math.inf):
                values.append(f"`{name}` must be finite. Got NaN or infinite values.")
    # Even finite arrays can decode to NaN or infinite scales: in mxfp4, a scale stored
    # as 255 is NaN, and in nvfp4, the divisor may be 0.
    stored = jax.tree.leaves(q.stored_scales)
    if not types and not values and all(map(is_concrete, stored)):
        with jax.ensure_compile_time_eval():
            decoded = float_scales(jax.tree.map(jnp.asarray, q))
        if not all_below(decoded, math.inf):
            values.append(
                "the scales must decode to finite numbers. Got NaN or infinite values."
            )
    if types or values:
        listing = "\n  ".join(types + values)
        title = f"these are not the parts of a kernel of shape {shape}, {packing}"
        raise (TypeError if types else ValueError)(f"{title}:\n  {listing}")


def float_scales(q: QTensor) -> Float[Array, "*batch blocks n"]:
    """The scales as float32 `[*batch, K / B, N]`, without a gradient."""
    if q.scales.dtype == np.float32:  # every scheme stores float32 scales as they are
        return lax.stop_gradient(q.scales)
    fmt, stored = FORMATS[q.fmt], q.stored_scales
    scheme = fmt.double_scales if stored.scale_offset is not None else None
    decoded = call_in_auto_mode(
        (scheme or fmt.scales).decode,
        lambda mesh: fitting_spec(mesh, spec_of(q.scales), q.scales.shape),
        stored,
    )
    return lax.stop_gradient(decoded)


def with_scales(q: QTensor, stored: StoredScales) -> QTensor:
    """Returns the kernel with other arrays of scales, such as decoded ones."""
    return replace(q, **stored._asdict())


def axes_of_array(
    matrix_axes: Sequence[Entry], ndim: int, unsplit_entry: Entry
) -> tuple[Entry, ...]:
    """Returns the mesh axes of a stored array, from those of its kernel's matrix.

    An axis that is not split gets `unsplit_entry`: None in a spec, () in `Axes`.
    """
    # Codes and block scales are split like the matrix form. The other arrays are tiny,
    # so only their batch axes are split.
    batch = tuple(matrix_axes[:-2])
    if ndim == len(batch) + 2:
        return tuple(matrix_axes)
    return (*batch, *[unsplit_entry] * (ndim - len(batch)))


def stored_specs(
    mesh: AnyMesh, spec: Sequence[SpecEntry], fn: Callable, *operands: PyTree
) -> PyTree:
    """Returns the specs of the stored arrays that `fn(*operands)` returns.

    They are split over the same mesh axes as the matrix form of their kernel, by its
    `spec`, where the mesh axes divide their sizes.
    """
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    return jax.tree.map(
        lambda x: fitting_spec(mesh, axes_of_array(spec, x.ndim, None), x.shape),
        jax.eval_shape(fn, *structs),
    )


def placed(q: QTensor, put: Put, placement: Placement, memory: str) -> QTensor:
    """Returns the kernel with its arrays on a mesh, and its codes in `memory`."""
    axes = placement.kernel
    stored = jax.tree.map(
        lambda x: put(x, axes_of_array(axes, x.ndim, ()), None), q.stored_scales
    )
    codes = placed_codes(q.codes, put, axes, memory)
    return replace(with_scales(q, stored), codes=codes, placement=placement)


def round_to(w: Array, dtype: DTypeLike, result_dtype: DTypeLike) -> Array:
    """Casts to `dtype` and then to `result_dtype`, so that both roundings happen."""
    info, result = jnp.finfo(dtype), jnp.finfo(result_dtype)
    has_more_bits = result.nmant > info.nmant or result.nexp > info.nexp
    if info.bits < 32 and has_more_bits:
        # XLA may drop the first of such casts (`xla_allow_excess_precision`).
        w = lax.reduce_precision(w, info.nexp, info.nmant)
        return w.astype(result_dtype)
    return w.astype(dtype).astype(result_dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(q: QTensor, dtype: np.dtype | None) -> Float[Array, "..."]:
    def decode(q: QTensor) -> Array:
        return q.geometry.from_matrix(q.dequantize_matrix(dtype))

    return call_in_auto_mode(
        decode, lambda mesh: fitting_spec(mesh, q.spec, q.shape), q
    )
