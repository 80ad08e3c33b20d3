"""Leaves that are trained in full, and tables of which some rows are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ..product.floats import float_product
from ..quant.geometry import Geometry
from ..quant.kernel import FloatKernel, Kernel
from ..quant.views import take_rows
from .base import (
    Adapter,
    ProductCall,
    frozen_product,
    on_matrix,
    register_adapter,
)


class Replacement(Adapter):
    """An adapter whose array replaces a leaf, or rows of it. It has no dropout."""

    dropout = 0.0


@dataclass(frozen=True, eq=False)
class Trained(Replacement):
    """A trained array that replaces a frozen leaf, such as a bias, a norm or a head.

    `init` makes one for each leaf that the config's `trainable` matches. It is in the
    lora tree, so optimizers and files treat it like any other adapter. The base tree
    keeps the original leaf.

    Attributes:
        value: The trained array, in the leaf's shape, initialized with the leaf. Its
            dtype is at least as precise as the config's `lora_dtype`. The model uses it
            in the leaf's dtype.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> config = ql.QLoRAConfig(rank=4, trainable="bias")
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["bias"].value.shape, ql.merge(base, lora)["bias"].shape
        ((8,), (8,))
    """

    value: Array

    roles = {"value": ""}
    label = "trained"
    # The leaf need not be a kernel, so all of its axes are batch axes.
    geometry = Geometry("", ())

    @property
    def replacement(self) -> Array:  # noqa: D102
        return self.value

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        trained = FloatKernel(self.merged(kernel), kernel.geometry)
        return frozen_product(x, trained, call)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        return self.value.astype(kernel.dtype)

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        return jnp.take(self.merged(kernel), ids, axis=0)


register_adapter(Trained)


def new_trained(leaf: PyTree, dtype: DTypeLike) -> Trained:
    """Returns a copy of a leaf to train; its dtype is promoted with `dtype`."""
    # Without a copy, a training step that donates the lora tree would free the base.
    return Trained(jnp.array(leaf, jnp.promote_types(leaf.dtype, dtype), copy=True))


@dataclass(frozen=True, eq=False)
class TrainedRows(Replacement):
    """Rows of a table `[V, D]` that are trained, such as those of new tokens.

    `init` makes one for each table that the config's `trainable_rows` matches. It
    corresponds to PEFT's `trainable_token_indices`.

    Attributes:
        rows: The trained rows, `[*batch, t, D]`, initialized with those of the table.
        indices: The indices of the rows, in ascending order.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"embedding": jnp.zeros((9, 64)), "kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, trainable_rows={"embedding": [7, 8]})
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["embedding"].rows.shape
        (2, 64)
    """

    rows: Array
    indices: tuple[int, ...]

    # As in a LoRA with B = `rows`, whose A would select these rows. The rank is t.
    roles = {"rows": "rn"}
    settings = ("indices",)
    label = "trained rows"
    geometry = Geometry()  # that of a table, "kn"

    @property
    def replaced_rows(self) -> tuple[int, ...]:  # noqa: D102
        return self.indices

    def _settings_misfit(self, batch: Sequence[int], k: int) -> str | None:
        if all(index < k for index in self.indices):
            return None
        return f"its table has {k} rows. Got an adapter of rows {self.indices}."

    def _size(self, role: str) -> int:
        # The adapter does not store the table's number of rows; this is the minimum.
        return self.indices[-1] + 1 if role == "k" else super()._size(role)

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        # x W = x_frozen W_frozen + x_trained W_trained, with x [*batch, ..., V].
        indices = np.array(self.indices)
        x_trained, x_frozen = x[..., indices], x.at[..., indices].set(0)
        rows = self.rows.astype(x.dtype)
        y = float_product(x_trained, rows, call.precision)
        return frozen_product(x_frozen, kernel, call) + y.astype(x.dtype)

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        indices = jnp.array(self.indices)
        # Find the position of each id among the trained rows, if it is one of them.
        position = jnp.searchsorted(indices, ids)
        is_trained = jnp.take(indices, position, mode="clip") == ids
        rows = self.rows.astype(kernel.dtype)
        trained = jnp.take(rows, position, axis=0, mode="clip")
        return jnp.where(is_trained[..., None], trained, take_rows(kernel, ids))

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        def replace_rows(w: Array, rows: Array) -> Array:
            return w.at[..., np.array(self.indices), :].set(rows.astype(w.dtype))

        return on_matrix(kernel, replace_rows, self.rows)


register_adapter(TrainedRows)
