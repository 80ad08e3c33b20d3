"""The settings of a packed kernel."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from .formats import Format, check_block_size, get_format
from .schemes import ScaleScheme

# Dtypes of weights and adapters, by name. Products have no rule for float8.
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_dtype(name: str, dtype: Any) -> str:
    """Returns a dtype's name; raises TypeError, with that of the setting."""
    found = jnp.dtype(dtype).name
    if found not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be a floating dtype: one of {', '.join(FLOAT_DTYPES)}. Got "
            f"{found}."
        )
    return found


@dataclass(frozen=True)
class Packing:
    """The number format, block size, and whether the scales are quantized too."""

    fmt: str = "nf4"
    block_size: Any = None  # an int; by default the format's
    double_quant: Any = None  # a bool; by default whether the format has it

    def __post_init__(self):
        fmt = get_format(self.fmt)
        size, double = self.block_size, self.double_quant
        size = (*fmt.block_sizes, 64)[0] if size is None else size
        double = fmt.double_scales is not None if double is None else bool(double)
        check_block_size(size)
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
        """Raises ValueError unless a format whose blocks are whole has whole blocks."""
        if self.format.block_sizes and k % self.block_size:
            sizes = [str(size) for size in self.format.block_sizes if k % size == 0]
            others = f", which {' and '.join(sizes)} divide" if sizes else ""
            raise ValueError(
                f"the contracted size must be a multiple of {self.block_size}, the "
                f"block size, for {self.fmt!r}, whose blocks are whole. "
                f"Got {k}{others}."
            )

    @property
    def format(self) -> Format:
        """The number format itself."""
        return get_format(self.fmt)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that a kernel consists of."""
        stored = self.scheme.arrays((1, 1))._asdict()
        return "codes", *(name for name, x in stored.items() if x is not None)

    @property
    def scheme(self) -> ScaleScheme:
        """The scheme of the scales."""
        double = self.format.double_scales if self.double_quant else None
        return double or self.format.scales
