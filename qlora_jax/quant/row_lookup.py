"""Rows of a table of embeddings `[V, D]`, of which the others are not decoded."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from .._jax.modes import call_in_auto_mode
from .._jax.specs import spec_of
from .codes import dequantize_blocks, select_values
from .kernel import Kernel
from .qtensor import QTensor, float_scales, round_to


def take_rows(kernel: Kernel, ids: Int[Array, "..."]) -> Float[Array, "... d"]:
    """Returns rows of a table `[V, D]`, for int32 ids from 0; V gives NaN.

    Of a packed table, the codes and scales of these rows are gathered and decoded.
    """
    q = kernel.take().to_device()
    if not isinstance(q, QTensor) or q.geometry.roles(q.ndim) not in ("kn", "nk"):
        return jnp.take(kernel.dequantize(), ids, axis=0)
    take = _of_columns if q.geometry.kinds == "nk" else _of_rows
    size = q.shape[0]

    def run(q: QTensor, ids: Array) -> Array:
        flat = ids.reshape(-1)
        w = jnp.where((flat < size)[:, None], take(q, flat), jnp.nan)
        return round_to(w, q.dtype, q.dtype).reshape(*ids.shape, w.shape[-1])

    return call_in_auto_mode(run, lambda _: PartitionSpec(*spec_of(ids), None), q, ids)


def _of_columns(q: QTensor, ids: Int[Array, " t"]) -> Float[Array, "t d"]:
    """Returns columns of the matrix form as rows."""
    codes, scales = (
        jnp.take(x, ids, axis=1, mode="clip") for x in (q.codes, float_scales(q))
    )
    return dequantize_blocks(codes, scales, q.packing, q.matrix_shape[0]).T


def _of_rows(q: QTensor, ids: Int[Array, " t"]) -> Float[Array, "t d"]:
    """Returns rows of the matrix form: halves of bytes."""
    fmt = q.packing.format
    codes = jnp.take(q.codes, ids // fmt.codes_per_byte, axis=0, mode="clip")
    scales = jnp.take(float_scales(q), ids // q.block_size, axis=0, mode="clip")
    values = select_values(codes[:, None], fmt)
    place = (ids % fmt.codes_per_byte)[:, None, None]
    return jnp.take_along_axis(values, place, axis=1)[:, 0] * scales
