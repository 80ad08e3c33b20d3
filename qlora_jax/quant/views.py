"""Parts of a packed kernel: one layer of a stack, or some rows of a table."""

import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .._jax.modes import call_in_auto_mode
from .._jax.pytree import register, take_layer
from .._jax.specs import SpecEntry, spec_of
from .codes import dequantize_blocks, select_values
from .formats import FORMATS
from .kernel import Kernel
from .qtensor import QTensor, float_scales, round_to


def _of_stack(name: str) -> Any:
    """Returns a property of `LayerOfStack` that has the value of the stack."""
    return property(operator.attrgetter(f"stack.{name}"))


@dataclass(frozen=True, eq=False)
class LayerOfStack(Kernel):
    """One kernel of a packed stack `[L, *kernel]`, which products read in place."""

    stack: QTensor
    index: Array
    is_packed = True

    dtype = _of_stack("dtype")  # pyright: ignore[reportIncompatibleMethodOverride]
    geometry = _of_stack("geometry")
    packing = _of_stack("packing")
    label = _of_stack("label")  # pyright: ignore[reportIncompatibleMethodOverride]
    placement = _of_stack("placement")
    memory = _of_stack("memory")

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.stack.shape[1:]

    @property
    def matrix_shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.stack.matrix_shape[1:]

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.stack.nbytes // self.stack.shape[0]

    @property
    def spec(self) -> tuple[SpecEntry, ...]:  # noqa: D102
        return self.stack.spec[1:]

    def to_device(self) -> Kernel:  # noqa: D102
        return self.take().to_device() if self.memory == "host" else self

    def take(self) -> QTensor:  # noqa: D102
        return take_layer(self.stack, self.index)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:  # noqa: D102
        return self.take().dequantize(dtype)

    def dequantize_matrix(self, dtype: DTypeLike | None = None) -> Array:  # noqa: D102
        return self.take().dequantize_matrix(dtype)


register(LayerOfStack, ("stack", "index"), ())


def take_rows(kernel: Kernel, ids: Int[Array, "..."]) -> Float[Array, "... d"]:
    """Returns rows of a table `[V, D]` by int32 ids from 0 to V - 1, or NaN for id V.

    In a packed table, only the codes and scales of these rows are read and decoded.
    """
    q = kernel.take().to_device()
    if not isinstance(q, QTensor) or q.geometry.roles(q.ndim) not in ("kn", "nk"):
        return jnp.take(kernel.dequantize(), ids, axis=0)  # NaN for id V
    # If V is the output axis ("nk"), the matrix form is [D, V], and rows of the table
    # are its columns.
    take = _take_columns if q.geometry.roles(q.ndim) == "nk" else _take_matrix_rows
    size = q.shape[0]

    def decode_rows(q: QTensor, ids: Array) -> Array:
        flat = ids.reshape(-1)
        w = jnp.where((flat < size)[:, None], take(q, flat), jnp.nan)
        return round_to(w, q.dtype, q.dtype).reshape(*ids.shape, w.shape[-1])

    return call_in_auto_mode(
        decode_rows, lambda _: PartitionSpec(*spec_of(ids), None), q, ids
    )


def _take_columns(q: QTensor, ids: Int[Array, " t"]) -> Float[Array, "t d"]:
    # Codes [D / 2, t] (or [D, t] in 8 bits) and scales [blocks, t], decoded to [D, t].
    codes = jnp.take(q.codes, ids, axis=1, mode="clip")
    scales = jnp.take(float_scales(q), ids, axis=1, mode="clip")
    return dequantize_blocks(codes, scales, FORMATS[q.fmt]).T


def _take_matrix_rows(q: QTensor, ids: Int[Array, " t"]) -> Float[Array, "t d"]:
    fmt = FORMATS[q.fmt]
    # A byte holds the codes of two rows in 4-bit formats: [t, 1, D] -> [t, 2, D].
    codes = jnp.take(q.codes, ids // fmt.codes_per_byte, axis=0, mode="clip")
    scales = jnp.take(float_scales(q), ids // q.block_size, axis=0, mode="clip")
    values = select_values(codes[:, None], fmt)
    row_in_byte = (ids % fmt.codes_per_byte)[:, None, None]
    return jnp.take_along_axis(values, row_in_byte, axis=1)[:, 0] * scales
