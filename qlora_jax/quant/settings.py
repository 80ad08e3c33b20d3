"""How a kernel is packed: settings that are used together."""

from dataclasses import dataclass

from .formats import Format, check_block_size, get_format

# Dtypes of weights and adapters, by name. Products have no rule for float8.
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Packing:
    """Number format, block size, and whether the scales are quantized too.

    Attributes:
        fmt: Name of the number format: "nf4", "fp4", "int4" or "int8".
        block_size: Weights along the contracted axes that share a scale.
        double_quant: Whether the scales are quantized too.

    Raises:
        ValueError: If the format is unknown or the block size is out of range.
    """

    fmt: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self):
        get_format(self.fmt)
        check_block_size(self.block_size)
        object.__setattr__(self, "double_quant", bool(self.double_quant))

    @property
    def format(self) -> Format:
        """The number format itself."""
        return get_format(self.fmt)
