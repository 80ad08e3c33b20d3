"""Tables of the shapes, formats, bits and bytes of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters.base import is_adapter, parts_of
from ..quant.kernel import as_kernel
from .adapters import split
from .paths import Leaf, Tree, leaves_by_path


@dataclass(frozen=True)
class LeafRow:
    """One leaf of a summary."""

    path: str
    shape: str  # logical shape, in brackets
    fmt: str  # the format, or the dtype of a float array
    params: int  # number of weights
    nbytes: int
    float_nbytes: int  # in the logical dtype
    trainable: bool  # adapters, and kernels trained through their quantization


@dataclass(frozen=True)
class Summary:
    """The rows of both trees, and totals in bytes; `str` gives a table."""

    base: tuple[LeafRow, ...]
    lora: tuple[LeafRow, ...]

    @property
    def float_bytes(self) -> int:
        """Bytes of the base without packing."""
        return sum(row.float_nbytes for row in self.base)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base as it is stored."""
        return sum(row.nbytes for row in self.base)

    @property
    def lora_bytes(self) -> int:
        """Bytes of the adapters."""
        return sum(row.nbytes for row in self.lora)

    @property
    def trainable_params(self) -> int:
        """Number of trained weights."""
        return sum(row.params for row in self.base + self.lora if row.trainable)

    def __str__(self):
        table = [("leaf", "shape", "format", "bits/param", "bytes", "trained")]
        for row in self.base + self.lora:
            bits = f"{8 * row.nbytes / row.params:.3f}" if row.params else "-"
            trained = "yes" if row.trainable else "no"
            size = f"{row.nbytes:,}"
            table.append((row.path, row.shape, row.fmt, bits, size, trained))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        # Text is aligned to the left, numbers to the right: "{:<9}  {:<11}  ... {:<7}".
        columns = zip("<<<>><", widths, strict=True)
        line_format = "  ".join(f"{{:{align}{width}}}" for align, width in columns)
        lines = [line_format.format(*cells).rstrip() for cells in table]
        base, lora = (sum(r.params for r in rows) for rows in (self.base, self.lora))
        lines += [
            f"base: {base:,} parameters, {self.base_bytes:,} bytes "
            f"({self.float_bytes:,} in float)",
            f"adapters: {lora:,} parameters, {self.lora_bytes:,} bytes; trained "
            f"parameters: {self.trainable_params:,}",
        ]
        return "\n".join(lines)


def summary(base: Tree, lora: Tree | None = None) -> Summary:
    """Returns a table of every leaf: its shape, format, bits per parameter and bytes.

    Its attributes `base` and `lora` have a row for each leaf, with `path`, `shape`,
    `fmt`, `params`, `nbytes`, `float_nbytes` and `trainable`. Its totals in bytes are
    `float_bytes` (the base without packing), `base_bytes` and `lora_bytes`. Its
    `trainable_params` is the number of trained weights.

    Args:
        base: The base tree, or a combined tree.
        lora: The lora tree, if `base` is not a combined tree.

    Raises:
        TypeError: If the base is combined and `lora` is passed too, or if a leaf is not
            an array, a kernel or an adapter.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=2))
        >>> ql.summary(base, lora).trainable_params
        144
        >>> print(ql.summary(base, lora))
        leaf    shape        format   bits/param  bytes  trained
        bias    [8]          float32      32.000     32  no
        kernel  [64,8]       nf4           4.250    272  no
        kernel  [64,2][2,8]  lora         32.000    576  yes
        base: 520 parameters, 304 bytes (2,080 in float)
        adapters: 144 parameters, 576 bytes; trained parameters: 144
    """
    if lora is None:  # a combined tree, or one without adapters
        base, lora = split(base)
    rows = [
        tuple(_row(path, leaf) for path, leaf in leaves_by_path(tree).items())
        for tree in (base, lora)
    ]
    return Summary(*rows)


def _row(path: str, leaf: Leaf) -> LeafRow:
    if parts_of(leaf)[1] is not None:
        raise TypeError(
            f"`base` must not be combined if `lora` is given. Got {path!r}."
        )
    if is_adapter(leaf):
        shape = "".join(_brackets(x.shape) for x in leaf.arrays.values())
        sizes = leaf.size, leaf.nbytes, leaf.nbytes  # adapters are never packed
        return LeafRow(path, shape, leaf.label, *sizes, True)
    if not hasattr(leaf, "dtype"):
        raise TypeError(
            "leaves must be arrays, kernels or adapters. Got "
            f"{type(leaf).__name__} at {path!r}."
        )
    kernel = as_kernel(leaf)
    shape, float_nbytes = _brackets(kernel.shape), kernel.size * kernel.dtype.itemsize
    sizes = kernel.size, kernel.nbytes, float_nbytes
    return LeafRow(path, shape, kernel.label, *sizes, kernel.is_trained)


def _brackets(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
