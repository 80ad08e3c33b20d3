"""The number formats. A *code* is an index into the table of a format."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .schemes import DOUBLE, FLOAT32, ScaleScheme, StoredScales


@dataclass(frozen=True)
class Format:
    """A table of values, the rule that assigns a code to a number, and its scales.

    A normalized number takes the code of the nearest table value, and the lower one at
    a float32 midpoint, as in bitsandbytes.
    """

    name: str  # the name users type
    bits: int  # of a stored code: 4 (two codes a byte) or 8
    values: tuple[float, ...]  # the table, indexed by code
    peak: float  # magnitude of a block's largest weight: scale = absmax * (1 / peak)
    scales: ScaleScheme = FLOAT32
    double_scales: ScaleScheme | None = DOUBLE  # for double quantization, if supported

    @property
    def codes_per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def is_double(self, stored: StoredScales) -> bool:
        """Whether scales are in arrays that `self.scales` does not have."""
        own = self.scales.arrays((1, 1))
        pairs = zip(stored, own, strict=True)
        return any(x is not None and y is None for x, y in pairs)

    @cached_property
    def table(self) -> np.ndarray:
        """The table as float32 `[2**bits]`, indexed by code."""
        # NumPy: a JAX array made at import would start the backend.
        return np.asarray(self.values, np.float32)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether the values are consecutive integers."""
        return bool(np.all(np.diff(self.table) == 1))

    @cached_property
    def order(self) -> np.ndarray:
        """Codes by ascending value; equal values (FP4's two zeros) by code."""
        return np.argsort(self.table, kind="stable").astype(np.uint8)

    @cached_property
    def midpoints(self) -> np.ndarray:
        """Float32 midpoints of neighbouring values, ascending, `[2**bits - 1]`."""
        ascending = self.table[self.order]
        return (ascending[1:] + ascending[:-1]) / np.float32(2)


# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of the normal distribution,
# with the digits that bitsandbytes stores.
NF4 = Format(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    1.0,
)

# Sign, two exponent bits, one mantissa bit (E2M1), as bitsandbytes orders and scales
# them; code 8 is a second zero.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = Format(
    "fp4",
    4,
    tuple(float(np.float32(v) / np.float32(12)) for v in _FP4_MAGNITUDES)
    + tuple(-float(np.float32(v) / np.float32(12)) + 0.0 for v in _FP4_MAGNITUDES),
    1.0,
)

INT4 = Format("int4", 4, tuple(float(v) for v in range(-8, 8)), 7.0)
INT8 = Format("int8", 8, tuple(float(v) for v in range(-128, 128)), 127.0)

FORMATS = {fmt.name: fmt for fmt in (NF4, FP4, INT4, INT8)}


def get_format(name: str) -> Format:
    """Returns the format called `name`; raises ValueError if there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"`fmt` must be one of {sorted(FORMATS)}. Got {name!r}.")
    return FORMATS[name]


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless `block_size` is a power of two from 16 to 4096."""
    is_int = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not is_int or not 16 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(
            f"`block_size` must be a power of two from 16 to 4096. Got {block_size!r}."
        )
