"""LoRA (Hu et al. 2021, section 4.1): `y = x W + scaling * (x A) B`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from .._jax.modes import split_as
from ..product.floats import float_product, ragged_float_product
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from ..quant.views import take_rows
from .base import (
    Adapter,
    ProductCall,
    constrained,
    on_matrix,
    register_adapter,
    replace_arrays,
)

SETTINGS = ("scaling", "dropout", "geometry")  # of every low-rank adapter
CHECKPOINT_NAME = "lora_product"  # of `x A`, for `jax.checkpoint` policies


L = TypeVar("L", bound="LowRank")


@dataclass(frozen=True, eq=False)
class LowRank(Adapter):
    """An adapter that trains A and B, and adds `scaling * A B` to its kernel.

    The sum may be scaled afterwards, as in a `DoRA`.
    """

    a: Array
    b: Array
    # The scaling must not be trained. It is therefore static, because optimizers change
    # all leaves: weight decay would shrink an array even if its gradient is zero.
    scaling: float
    dropout: float
    geometry: Geometry

    roles = {"a": "kr", "b": "rn"}
    settings = SETTINGS

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        lora = constrained(self, kernel)
        return on_matrix(kernel, jnp.add, lora_delta(lora))

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        if self.row_role is None:
            return super().lookup(ids, kernel)
        rows = take_rows(kernel, ids)
        lora, norms = self._at_rows((ids,)), self._table_norms(kernel)
        return lora._adapt_rows(rows, norms).astype(rows.dtype)

    def lookup_by_row(  # noqa: D102
        self, ids: Array, kernel: Kernel, places: Array, take: Callable[[Array], Array]
    ) -> Float[Array, "..."]:
        if self.row_role is None:
            return super().lookup_by_row(ids, kernel, places, take)
        # 1. Index the places of the bank and the rows of the table at once. Otherwise,
        #    XLA takes a full A for each row of the input.
        places = jnp.expand_dims(places, tuple(range(1, ids.ndim)))
        row_loras = self._at_rows((places, ids), take)
        # 2. Compute the norms once for each adapter of the bank, for the same reason.
        bank_norms = jax.vmap(lambda lora: lora._table_norms(kernel))(self)
        norms = jax.tree.map(take, bank_norms)  # None if there are no norms

        # 3. Adapt the rows of the table.
        def adapt(lora: Self, rows: Array, norms: Array | None) -> Array:
            return lora._adapt_rows(rows, norms)

        return jax.vmap(adapt)(row_loras, take_rows(kernel, ids), norms)

    @property
    def row_role(self) -> str | None:
        """The role of the rows of a table `[V, D]`; None for any other kernel."""
        return {"kn": "k", "nk": "n"}.get(self.geometry.kinds)

    def _at_rows(
        self, index: tuple[Array, ...], take: Callable[[Array], Array] = lambda x: x
    ) -> Self:
        """Returns the adapter with only those entries that some rows of a table use.

        `index` is `(ids,)`, or `(places, ids)` if the arrays are those of a bank. An id
        of V gives NaN. Arrays without an axis of rows, such as B `[r, D]`, are returned
        whole; those of a bank are passed to `take`, which takes them at the places.
        """

        def take_entries(name: str, x: Array) -> Array:
            row_role: Any = self.row_role  # not None, because the kernel is a table
            row_axis = self.roles[name].find(row_role)
            if row_axis < 0:
                return take(x)
            # Move the axis of rows to the front, or behind the axis of a bank, so that
            # `index` selects along the first axes.
            front = len(index) - 1
            x = jnp.moveaxis(x, front + row_axis, front)
            return x.at[index].get(mode="fill", fill_value=jnp.nan)

        return replace_arrays(self, take_entries)

    def _table_norms(self, kernel: Kernel) -> Array | None:
        """Returns the norms of columns if `_adapt_rows` needs them, else None."""
        return None

    def _adapt_rows(self, rows: Array, norms: Array | None) -> Array:
        """Returns adapted rows `[..., D]` in float32, with the arrays of `_at_rows`."""
        # If the rows of the table are along K, a lookup is a product with one-hot rows,
        # so a row changes by A[id] B. Along N, it changes by B[:, id]^T A^T.
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        left, right = (a, b) if self.row_role == "k" else (b, a.swapaxes(-1, -2))
        change = float_product(left, right, lax.Precision.HIGHEST)
        return add_change(rows.astype(jnp.float32), self.scaling * change)


@dataclass(frozen=True, eq=False)
class LoRA(LowRank):
    """A low-rank adapter of one kernel. Only its two arrays are trained.

    It adds `scaling * (x A) B` to the product of its kernel (LoRA, Hu et al. 2021,
    section 4.1). `init` makes adapters; `apply` and the integrations compute with them.

    Attributes:
        a: A, `[*batch, K, r]` in the config's `lora_dtype`: K runs over the kernel's
            contracted axes.
        b: B, `[*batch, r, N]` in the same dtype, zero at first: N runs over the
            kernel's output axes.
        scaling: Multiplier of the product: `alpha / rank`, or `alpha / sqrt(rank)` if
            it is rank-stabilized.
        dropout: Rate of dropout on the adapter's input, in [0, 1).
        geometry: How the kernel's axes map to `[*batch, K, N]`, as in `QTensor`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, alpha=8)
        >>> _, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scaling
        ((64, 4), (4, 8), 2.0)
    """

    # Fields of `LowRank`. The tests of docstrings read them from this class.
    a: Array
    b: Array
    scaling: float
    dropout: float
    geometry: Geometry

    label = "lora"
    is_linear = True
    can_be_in_bank = True
    can_be_ragged = True

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        y = call.multiply(x, kernel)
        x = apply_dropout(x, self.dropout, call.dropout_key)
        change = lora_product(x, self, kernel, call.precision, call.offsets)
        return add_change(y, change)


register_adapter(LoRA)


def is_low_rank(lora: object) -> TypeGuard[LowRank]:
    """Whether an adapter is low-rank, such as a LoRA or a DoRA."""
    return isinstance(lora, LowRank)


def add_change(y: Array, change: Array) -> Array:
    """Returns `y + change` in the dtype of `y`."""
    return y + split_as(change.astype(y.dtype), y)


def lora_product(
    x: Float[Array, "..."],
    lora: LowRank,
    kernel: Kernel,
    precision: lax.PrecisionLike = None,
    offsets: Array | None = None,
) -> Float[Array, "..."]:
    """Returns `scaling * (x A) B` in float32 for x `[*batch, ..., K]`.

    Both products are computed in the dtype of `x` with float32 sums. With `offsets`,
    the rows of x are sorted by expert, and the result has the dtype of `x`.
    """
    if offsets is not None:
        lora = constrained(lora, kernel, x)
        # B is smaller than the product.
        b = scaled(lora.b.astype(jnp.float32), lora)
        a, b = cast(lora.a, x.dtype), cast(b, x.dtype)
        arguments: Any = offsets, precision, kernel.placement
        h = ragged_float_product(x, a, *arguments, role="k")  # [M, r]
        h = checkpoint_name(h, CHECKPOINT_NAME)
        return ragged_float_product(h, b, *arguments, role="n")
    # Cast first, so that a mesh moves arrays in the dtype of x.
    lora = replace_arrays(lora, lambda _, w: cast(w, x.dtype))
    lora = constrained(lora, kernel, x)
    h = float_product(x, lora.a, precision).astype(x.dtype)
    h = checkpoint_name(h, CHECKPOINT_NAME)  # [*batch, ..., r]
    return scaled(float_product(h, lora.b, precision), lora)


def lora_delta(lora: LowRank) -> Float32[Array, "*batch k n"]:
    """Returns `scaling * A B` in float32, in matrix form."""
    a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
    delta = float_product(a, b, lax.Precision.HIGHEST)
    return scaled(delta, lora)


def scaled(y: Array, lora: LowRank) -> Array:
    """Returns `scaling * y`."""
    # A product with 1, the default, would only take time to compile.
    return y if lora.scaling == 1 else y * lora.scaling


def with_scaling(lora: L, scaling: float) -> L:
    """Returns an equal adapter of another scaling, in which B is multiplied instead."""
    if lora.scaling == scaling:
        return lora
    wide = jnp.promote_types(lora.b.dtype, jnp.float32)
    b = lora.b.astype(wide) * (lora.scaling / scaling)
    return dataclasses.replace(lora, b=b.astype(lora.b.dtype), scaling=scaling)


def cast(w: Array, dtype: DTypeLike) -> Array:
    """Returns `w.astype(dtype)`, bit for bit, in a form that stays inside loops."""
    # XLA moves a cast of each layer's A and B out of a scan and keeps the copies of all
    # layers: 0.34 GB for an 8B model at rank 64. It does not move a `reduce_precision`.
    # `reduce_precision` flushes subnormal numbers of float16 to zero, so it is used
    # only if both dtypes have the same exponent range, as float32 and bfloat16 do.
    source, target = jnp.finfo(w.dtype), jnp.finfo(dtype)
    if source.nexp == target.nexp and source.nmant > target.nmant:
        w = lax.reduce_precision(w, int(target.nexp), int(target.nmant))
    return w.astype(dtype)


def apply_dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Applies inverted dropout to an input, if there is a key."""
    if key is None or rate == 0:
        return x
    # `jax.random.PRNGKey` makes raw keys, which are wrapped. A stack has a key for each
    # matrix, which scans slice. If the whole stack is multiplied at once, the first key
    # is used for all of `x`.
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    keys: Array = key if is_typed else jax.random.wrap_key_data(key)
    first_key = keys.reshape(-1)[0] if keys.ndim else keys
    is_kept = jax.random.bernoulli(first_key, 1 - rate, x.shape)
    return jnp.where(is_kept, x / (1 - rate), jnp.zeros_like(x))
