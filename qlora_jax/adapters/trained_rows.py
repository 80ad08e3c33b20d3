"""Rows of a table that are trained alone, such as those of new tokens."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..matmul.floats import float_product
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from ..quant.views import take_rows
from .base import SETTINGS, Adapter, Multiply, on_matrix, register_adapter


@dataclass(frozen=True, eq=False)
class TrainedRows(Adapter):
    """Rows of a table `[V, D]` that are trained in the place of its own.

    `init` makes it where `trainable_rows` of the config says so: PEFT's
    `trainable_token_indices`.

    Attributes:
        rows: The trained rows, `[*batch, t, D]`; at first those of the table.
        scaling: Of no effect: an adapter has one.
        dropout: Likewise.
        geometry: The table's axes, "kn".
        indices: The numbers of the rows, rising.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"embedding": jnp.zeros((9, 64)), "kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, trainable_rows={"embedding": [7, 8]})
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["embedding"].rows.shape
        (2, 64)
    """

    rows: Any
    scaling: Any
    dropout: float
    geometry: Geometry
    indices: tuple[int, ...]

    roles = {"rows": "rn"}
    settings = (*SETTINGS, "indices")
    label = "trained rows"

    def _size(self, role: str) -> int:
        # How many rows the table has is not known; at least these.
        return self.indices[-1] + 1 if role == "k" else super()._size(role)

    def product(  # noqa: D102
        self, x: Array, kernel: Kernel, multiply: Multiply, key: Any, precision: Any
    ) -> Array:
        chosen = x[..., np.array(self.indices)]
        rest = x.at[..., np.array(self.indices)].set(0)
        y = float_product(chosen, self.rows.astype(x.dtype), precision, w_moves=True)
        return multiply(rest, kernel) + y.astype(x.dtype)

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        indices = jnp.array(self.indices)
        place = jnp.searchsorted(indices, ids)
        new = jnp.take(self.rows.astype(kernel.dtype), place, axis=0, mode="clip")
        is_new = jnp.take(indices, place, mode="clip") == ids
        return jnp.where(is_new[..., None], new, take_rows(kernel, ids))

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        def put(w: Array, rows: Array) -> Array:
            return w.at[..., np.array(self.indices), :].set(rows.astype(w.dtype))

        return on_matrix(kernel, put, self.rows)


register_adapter(TrainedRows)


def new_trained_rows(
    kernel: Kernel, indices: tuple[int, ...], dtype: Any
) -> TrainedRows:
    """Returns copies of a table's rows to train, whose dtype is at least `dtype`."""
    rows = lax.stop_gradient(take_rows(kernel, jnp.array(indices)))
    rows = rows.astype(jnp.promote_types(rows.dtype, dtype))
    return TrainedRows(rows, 1.0, 0.0, kernel.geometry, indices)
