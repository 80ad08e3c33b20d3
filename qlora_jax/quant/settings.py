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
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self):
        fmt = get_format(self.fmt)
        check_block_size(self.block_size)
        object.__setattr__(self, "double_quant", bool(self.double_quant))
        if self.double_quant and fmt.double_scales is None:
            raise ValueError(
                f"`double_quant` must be False for {self.fmt!r}, whose scales are "
                f"{fmt.scales.name}. Got True."
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
