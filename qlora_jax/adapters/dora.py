"""DoRA (Liu et al. 2024): LoRA with a trained magnitude for each output."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from .._jax.modes import is_local, split_as, varying_with
from ..matmul.floats import float_product
from ..quant.kernel import Kernel
from ..quant.qtensor import QTensor
from ..quant.views import take_rows
from .base import (
    SETTINGS,
    Adapter,
    Multiply,
    constrained,
    on_matrix,
    register_adapter,
)
from .config import QLoRAConfig, is_table
from .lora import (
    LoRA,
    SharedLoRA,
    add,
    cast,
    dropped,
    lora_delta,
    lora_product,
    scaled,
)
from .patterns import matches
from .product import adapted_product

# Bytes in float32 of the columns that are decoded at a time.
TILE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class DoRA(LoRA):
    """A LoRA that trains the magnitude of each output apart from its direction.

    The product of its kernel is `(x W + scaling * (x A) B) * m / c`, where c are the
    norms of the columns of `W + scaling * A B`, without a gradient (DoRA, Liu et al.
    2024, section 4). `init` makes it where the config has `use_dora`. It has the
    attributes of a `LoRA`, and one more.

    Attributes:
        m: The magnitudes, `[*batch, N]`, at first the norms of the columns of the
            packed W.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, use_dora=True)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["kernel"].m.shape, float(lora["kernel"].m[0])
        ((8,), 8.0)
    """

    m: Any

    roles = {**LoRA.roles, "m": "n"}
    label = "dora"
    ragged_product = Adapter.ragged_product

    def product(  # noqa: D102
        self, x: Array, kernel: Kernel, multiply: Multiply, key: Any, precision: Any
    ) -> Array:
        # y = x V * m / c, with V = W + scaling * A B (equation 5) and c the norms of
        # its columns. As in PEFT, c gets no gradient (section 4.3) and dropout acts on
        # the input of both products.
        kept = x if key is None else dropped(x, self.dropout, key)
        y = multiply(kept, kernel)
        norms = column_norms(self, kernel, multiply, x.dtype)
        scale = split_as(self.m.astype(jnp.float32), norms) / norms
        scale = jnp.expand_dims(scale, tuple(range(scale.ndim - 1, y.ndim - 1)))
        v = add(y, lora_product(kept, self, precision, kernel.placement))
        # The gradient of m needs it, for which it would be computed again.
        v = checkpoint_name(v, "dora_product").astype(jnp.float32)
        result = (v * split_as(scale, v)).astype(x.dtype)
        # Dropout acts on what differs from the frozen product alone.
        return result if kept is x else result + (multiply(x, kernel) - y)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        def change(w: Array, delta: Array, m: Array) -> Array:
            v = w + delta
            norms = _root(jnp.sum(jnp.square(lax.stop_gradient(v)), -2))
            return v * (m.astype(jnp.float32) / norms)[..., None, :]

        return on_matrix(kernel, change, lora_delta(self), self.m)

    def table_norms(self, kernel: Kernel) -> Array | None:  # noqa: D102
        if self.row_role != "k":  # magnitudes are those of rows
            return None
        # Tables have many rows, which `column_norms` would decode for some columns.
        return _table_norms(self, kernel) if is_local() else column_norms(self, kernel)

    def adapted_rows(  # noqa: D102
        self, rows: Array, arrays: Mapping[str, Array], scaling: Any, norms: Any
    ) -> Float32[Array, "..."]:
        v = super().adapted_rows(rows, arrays, scaling, norms)
        m = arrays["m"].astype(jnp.float32)
        if norms is not None:
            return v * jnp.broadcast_to(m / norms, v.shape)
        norms = _root(jnp.sum(jnp.square(lax.stop_gradient(v)), -1))
        return v * (m / norms)[..., None]


register_adapter(DoRA)


def new_adapter(key: Array, kernel: Kernel, config: QLoRAConfig, path: str) -> LoRA:
    """Returns the adapter of a kernel, packed by then, that adds nothing yet.

    A is drawn from `U(-1/sqrt(K), 1/sqrt(K))`: Kaiming-uniform with a = sqrt(5) (He et
    al. 2015), PEFT's default. B is zero. Magnitudes start as the norms. In a table of
    embeddings, of which few rows are seen, A is zero and B is normal, as in PEFT, and
    there is no dropout.
    """
    *batch, k, n = kernel.matrix_shape
    rank, scaling = config.rank_of(path), config.scaling_of(path)
    is_shared = matches(config.shared, path)
    if is_shared:
        batch[-1] = 1
    bound, dtype = 1 / max(k, 1) ** 0.5, config.lora_dtype
    dropout = 0.0 if is_table(path) else config.dropout
    if is_table(path) and kernel.geometry.kinds == "kn":
        a = jnp.zeros((*batch, k, rank))
        b = jax.random.normal(key, (*batch, rank, n)).astype(dtype)
    else:
        a = jax.random.uniform(key, (*batch, k, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*batch, rank, n), dtype)
    if ranks := config.ranks_of(path):
        used = jnp.array([[i < own for i in range(rank)] for own in ranks])
        a = jnp.where(jnp.broadcast_to(used[:, None, :], a.shape), a, 0)
        b = jnp.where(jnp.broadcast_to(used[:, :, None], b.shape), b, 0)
    if isinstance(scaling, tuple):
        scaling *= math.prod(batch[:-1])
    kind = SharedLoRA if is_shared else LoRA
    lora = kind(a.astype(dtype), b, scaling, dropout, kernel.geometry)
    if not config.use_dora:
        return lora
    dtype = jnp.promote_types(dtype, jnp.float32)
    m = jax.jit(column_norms)(lora, kernel).astype(dtype)
    return DoRA(**lora.arrays, m=m, **{name: getattr(lora, name) for name in SETTINGS})


def column_norms(
    lora: LoRA,
    kernel: Kernel,
    multiply: Multiply = adapted_product,
    dtype: Any = "float32",
) -> Float32[Array, "*batch n"]:
    """Returns the norms of the columns of `W + scaling * A B`, without a gradient.

    For `jax.checkpoint` policies they have the name "dora_norms". The product with W is
    computed in `dtype`, that of the input.
    """
    # V = W + s A B is as large as the float kernel. Without it, for column n,
    #   c^2 = |W[:, n]|^2 + s sum_r B[r, n] (2 (A^T W)[r, n] + s (A^T A B)[r, n])
    # and A^T W is a product of r rows with the packed kernel.
    kernel = lax.stop_gradient(_for_few_rows(kernel))
    lora = constrained(lax.stop_gradient(lora), kernel.placement)
    a, b = cast(lora.a, dtype), cast(lora.b, dtype).astype(jnp.float32)
    at_w = multiply(a.swapaxes(-1, -2), kernel).astype(jnp.float32)
    a, exact = a.astype(jnp.float32), lax.Precision.HIGHEST
    gram = float_product(a.swapaxes(-1, -2), a, exact)
    at_ab = float_product(gram, b, exact, w_moves=True)
    inner = 2 * at_w + split_as(scaled(at_ab, lora), at_w)
    change = jnp.sum(split_as(b, at_w) * inner, -2)
    squares = split_as(_column_squares(kernel), change)
    # Rounding may leave less than nothing of a column that the adapter takes away.
    norms = _root(jnp.maximum(squares + scaled(change, lora), 1e-7 * squares))
    return checkpoint_name(norms, "dora_norms")


def _column_squares(kernel: Kernel) -> Float32[Array, "*batch n"]:
    """Returns the sums of the squares of a kernel's columns."""
    # They are not stored: an optimizer would change them among the trained arrays, and
    # with the packed kernel they could become stale. XLA on CPUs does not sum weights
    # as it decodes them, so some columns are decoded at a time, if all are on a device.
    q = kernel.take().to_device()
    squares = lambda w: jnp.sum(jnp.square(w), -2)
    if not isinstance(q, QTensor) or not is_local():
        return squares(q.dequantize_matrix(jnp.float32))
    *batch, k, n = q.matrix_shape
    count = max(-(-4 * math.prod(batch) * k * n // TILE_BYTES), 1)
    width = -(-n // count)
    whole = q.with_float_scales()

    def step(i: Array, sums: Array) -> Array:
        start = jnp.minimum(i * width, n - width)
        cut = lambda a: lax.dynamic_slice_in_dim(a, start, width, a.ndim - 1)
        part = replace(whole, codes=cut(whole.codes), scales=cut(whole.scales))
        some = squares(part.dequantize_matrix(jnp.float32))
        return lax.dynamic_update_slice_in_dim(sums, some, start, sums.ndim - 1)

    sums = varying_with(jnp.zeros((*batch, n), jnp.float32), q)
    return lax.fori_loop(0, count, step, sums)


def _table_norms(lora: DoRA, kernel: Kernel) -> Float32[Array, " d"]:
    """Returns `column_norms` of a table on one device, some rows at a time."""
    lora, kernel = lax.stop_gradient((lora, kernel.take().to_device()))
    if isinstance(kernel, QTensor):
        kernel = kernel.with_float_scales()
    size, width = kernel.shape
    count = max(-(-4 * size * width // TILE_BYTES), 1)
    num_rows = -(-size // count)

    def step(i: Array, squares: Array) -> Array:
        ids = i * num_rows + jnp.arange(num_rows)
        rows, arrays = take_rows(kernel, ids), lora.arrays_at((ids,))
        v = LoRA.adapted_rows(lora, rows, arrays, lora.scaling, None)
        v = jnp.where((ids < size)[:, None], v, 0)
        return squares + jnp.sum(jnp.square(v), 0)

    squares = varying_with(jnp.zeros(width, jnp.float32), lora, kernel)
    norms = _root(lax.fori_loop(0, count, step, squares))
    return checkpoint_name(norms, "dora_norms")


def _for_few_rows(kernel: Kernel) -> Kernel:
    """Returns the kernel for a product for which no weights are gathered."""
    if kernel.placement is None:
        return kernel
    placement = replace(kernel.placement, rows=())
    is_packed = lambda node: isinstance(node, QTensor)
    put = lambda q: replace(q, placement=placement) if is_packed(q) else q
    return jax.tree.map(put, kernel, is_leaf=is_packed)


def _root(squares: Array) -> Array:
    """Returns norms; of a column of zeros a number that divides 0 to 0."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
