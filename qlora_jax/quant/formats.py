"""Number formats, and the settings of a packed kernel.

A *code* is an index into the table of values of a format.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from . import schemes
from .schemes import ScaleScheme

# Dtypes of weights and adapters, by name. Products do not support float8.
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Format:
    """A table of values, the rule that assigns a code to a number, and its scales.

    A normalized number gets the code of the nearest table value. `ties` selects the
    value for a number at a float32 midpoint, and how weights are normalized:

    * ``"lower"``: the lower value. The scale is the block's largest magnitude times
      `1 / peak`, and weights are multiplied by its reciprocal (bitsandbytes).
    * ``"even"``: the value with the even code. The scale is the largest magnitude
      divided by `peak`, and weights are divided by it (IEEE 754; compressed-tensors).
    * ``"upper"``: the upper value, for integers only: add 8.5 and drop the fraction.
      The scale has a sign, so that the block's largest weight is mapped to `peak`,
      whatever its own sign is (llama.cpp).
    """

    name: str  # the name that users type
    bits: int  # of a stored code: 4 (two codes per byte) or 8
    values: tuple[float, ...]  # the table, indexed by code
    peak: float  # what a block's largest magnitude, or signed weight, is mapped to
    scales: ScaleScheme = schemes.FLOAT32
    # For double quantization; None if the format does not support it.
    double_scales: ScaleScheme | None = schemes.DOUBLE
    ties: str = "lower"
    # The block sizes that files in this format have, the usual one first. If there are
    # none, any size is allowed.
    block_sizes: tuple[int, ...] = ()

    @property
    def codes_per_byte(self) -> int:
        """Number of codes in a byte."""
        return 8 // self.bits

    @cached_property
    def table(self) -> np.ndarray:
        """The table as float32 `[2**bits]`, indexed by code."""
        # A NumPy array: a JAX array made at import would start the backend.
        return np.asarray(self.values, np.float32)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether the values are consecutive integers."""
        return bool(np.all(np.diff(self.table) == 1))

    @property
    def equivalents(self) -> tuple[str, ...]:
        """The names of the formats that decode codes and scales as this one does.

        They differ in how weights are quantized, and in the block sizes that they
        allow. Codes and scales in a file therefore do not show which of them was used.
        """
        decoding = self.values, self.scales.decode
        return tuple(
            name
            for name, fmt in FORMATS.items()
            if (fmt.values, fmt.scales.decode) == decoding
        )

    @cached_property
    def order(self) -> np.ndarray:
        """Codes by ascending value, -0.0 before 0.0; equal values (FP4) by code."""
        return np.lexsort((~np.signbit(self.table), self.table)).astype(np.uint8)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """The largest number that rounds to a value, for each value but the highest.

        They are in ascending order. With "upper" ties, they are not used, because codes
        of consecutive integers are computed from sums and roundings.
        """
        ascending = self.table[self.order]
        midpoints = (ascending[1:] + ascending[:-1]) / np.float32(2)
        if self.ties != "even":
            return midpoints
        # If the upper neighbor of a midpoint has the even code, the midpoint rounds up,
        # and the threshold is the float32 below the midpoint. For -0.0 and 0.0, whose
        # midpoint is 0, the threshold is the largest negative number that is not
        # flushed to zero.
        below = np.nextafter(midpoints, -np.inf)
        below = np.where(midpoints == 0, -schemes.SMALLEST_NORMAL, below)
        return np.where(self.order[1:] % 2 == 0, below, midpoints).astype(np.float32)


# fmt: off
# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of the normal distribution,
# with the digits that bitsandbytes stores.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
NF4 = Format("nf4", 4, _NF4, 1.0)

# Sign, two exponent bits, one mantissa bit (E2M1), as bitsandbytes orders and scales
# them; code 8 is a second zero. Adding 0.0 turns its value, -0.0, into 0.0.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(float(np.float32(v) / np.float32(12)) for v in _FP4_MAGNITUDES)
FP4 = Format("fp4", 4, _FP4 + tuple(-v + 0.0 for v in _FP4), 1.0)

INT4 = Format("int4", 4, tuple(float(v) for v in range(-8, 8)), 7.0)
INT8 = Format("int8", 8, tuple(float(v) for v in range(-128, 128)), 127.0)

# For the remaining formats, `double_scales` is None.
# The values of AWQ, GPTQ and compressed-tensors, with the scales and ties of
# compressed-tensors for
# `QuantizationArgs(num_bits=4, symmetric=True, scale_dtype=torch.float16)`.
INT4_F16 = Format(
    "int4_f16",
    4,
    INT4.values,
    7.5,
    schemes.FLOAT16_NOT_ZERO,
    None,
    ties="even",
    block_sizes=(128, 64, 32),
)
# The same values, with the scales and ties of GGUF's Q4_0.
Q4_0 = Format(
    "q4_0", 4, INT4.values, -8.0, schemes.FLOAT16, None, ties="upper", block_sizes=(32,)
)

# OCP Microscaling Formats 1.0, section 5.3.3 (E2M1): sign, two exponent bits, one
# mantissa bit. bitsandbytes' FP4 differs: it has 1/16 instead of 1/2.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, schemes.E2M1_MAX)
_E2M1 += tuple(-value for value in _E2M1)
# The scale is a power of two, so a block's largest weight is mapped to a number from
# 3.5 up to 7, instead of to `peak`. 4 is the largest power of two among the values.
MXFP4 = Format(
    "mxfp4", 4, _E2M1, 4.0, schemes.E8M0, None, ties="even", block_sizes=(32,)
)
# The peak is 1 because E4M3 itself divides the largest weight by 6.
NVFP4 = Format(
    "nvfp4", 4, _E2M1, 1.0, schemes.E4M3, None, ties="even", block_sizes=(16,)
)

FORMATS = {
    fmt.name: fmt for fmt in (NF4, FP4, INT4, INT8, INT4_F16, Q4_0, MXFP4, NVFP4)
}


def get_format(name: str) -> Format:
    """Returns a format by its name; raises ValueError if there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"`fmt` must be one of {sorted(FORMATS)}. Got {name!r}.")
    return FORMATS[name]


def check_dtype(argument: str, dtype: DTypeLike) -> str:
    """Returns a dtype's name; raises TypeError if it is not in `FLOAT_DTYPES`."""
    try:
        # NumPy takes None for float64.
        dtype_name = "None" if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        dtype_name = repr(dtype)
    if dtype_name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{argument}` must be a floating dtype: one of {', '.join(FLOAT_DTYPES)}. "
            f"Got {dtype_name}."
        )
    return dtype_name


def checked_result_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """Returns None or a floating dtype; raises TypeError for any other dtype."""
    if dtype is None:
        return None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating-point. Got {jnp.dtype(dtype)}.")
    return jnp.dtype(dtype)


@dataclass(frozen=True)
class Packing:
    """The number format, block size, and whether the scales are quantized too."""

    fmt: str = "nf4"
    # None selects the format's default. After `__post_init__`, these are int and bool.
    block_size: Any = None
    double_quant: Any = None

    def __post_init__(self):
        fmt, size, double = get_format(self.fmt), self.block_size, self.double_quant
        if size is None:
            size = fmt.block_sizes[0] if fmt.block_sizes else 64
        if double is None:
            double = fmt.double_scales is not None
        if not isinstance(double, int | np.bool_) or double not in (0, 1):
            raise ValueError(f"`double_quant` must be True or False. Got {double!r}.")
        double = bool(double)
        is_int = isinstance(size, int) and not isinstance(size, bool)
        if not is_int or not 16 <= size <= 4096 or size & (size - 1):
            raise ValueError(
                f"`block_size` must be a power of two from 16 to 4096. Got {size!r}."
            )
        if fmt.block_sizes and size not in fmt.block_sizes:
            sizes = " or ".join(map(str, sorted(fmt.block_sizes)))
            raise ValueError(
                f"`block_size` must be {sizes} for {self.fmt!r}. Got {size}."
            )
        if double and fmt.double_scales is None:
            raise ValueError(
                f"`double_quant` must be False for {self.fmt!r}, whose scales are "
                f"{fmt.scales.name}. Got True."
            )
        object.__setattr__(self, "block_size", size)
        object.__setattr__(self, "double_quant", double)

    def check_rows(self, k: int) -> None:
        """Raises ValueError unless K is a multiple of the block size."""
        if k % self.block_size:
            allowed = sorted(self.format.block_sizes) or (16, 32, 64, 128)
            sizes = [str(size) for size in allowed if k % size == 0]
            hint = f"Use block_size={' or '.join(sizes)}" if sizes else "Exclude it"
            raise ValueError(
                f"the contracted size must be a multiple of `block_size`, which is "
                f"{self.block_size} here. Got {k}. {hint}."
            )

    @property
    def format(self) -> Format:
        """The number format itself."""
        return get_format(self.fmt)

    @property
    def array_names(self) -> tuple[str, ...]:
        """The names of the arrays that a kernel consists of."""
        return "codes", *self.scheme.array_names

    @property
    def scheme(self) -> ScaleScheme:
        """The scheme of the scales."""
        double = self.format.double_scales if self.double_quant else None
        return double or self.format.scales
