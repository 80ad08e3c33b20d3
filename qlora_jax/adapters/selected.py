"""Adapters that are chosen from a bank, for the whole input or for each row of it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._jax.modes import explicit_mesh, in_auto_mode, split_by
from .._jax.pytree import register
from .._jax.specs import Axes, make_spec, typed_axes, unused
from ..quant.kernel import Kernel
from ..quant.views import take_rows
from .base import SETTINGS, Adapter, Multiply, sliced_kind
from .dora import DoRA
from .lora import LoRA

_KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(
    "lora_product", "dora_product", "dora_norms"
)


class Selected(LoRA):
    """An adapter that `ql.select` chooses from a bank, perhaps another for each row.

    Its arrays have one more axis in front of their own: the places of the bank.

    Attributes:
        kind: The kind of the adapters in the bank.
        scaling: float32 `[*batch, E]`.
        ids: int32 `[*batch]`, or `[R]`, for each row of the first axis of the input. -1
            is the frozen kernel alone.
    """

    kind: ClassVar[Any]
    ids: Any
    inputs = ("scaling", "ids")

    def product(  # noqa: D102
        self, x: Array, kernel: Kernel, multiply: Multiply, key: Any, precision: Any
    ) -> Array:
        batch, size = len(self.batch_shape), self.ids.shape[-1:]
        # Else XLA takes the adapters of all layers first, as it does on CPUs in 0.10.2.
        ids = lax.optimization_barrier((lax.stop_gradient(x), self.ids))[1]

        def one(x: Array, adapter: Adapter, is_off: Array, key: Any) -> Array:
            plain = multiply(x, kernel)

            def once(other: Array, of: Kernel) -> Array:
                return plain if other is x and of is kernel else multiply(other, of)

            y = adapter.product(x, kernel, once, key, precision)
            is_off = jnp.expand_dims(is_off, tuple(range(is_off.ndim, y.ndim)))
            return jnp.where(is_off, plain, y)

        if self.ids.ndim == batch:
            return one(x, self._chosen(ids), ids == -1, key)
        if batch or x.shape[:1] != size:
            raise ValueError(
                "`ids` must be one number, or one for each row of the first axis of "
                "the input of a kernel without batch axes. Got "
                f"{self.ids.shape[-1]} for an input {x.shape} and batch axes "
                f"{self.batch_shape}."
            )
        # Products with the kernel fold the rows, so it is decoded once.
        if key is not None:
            key = jax.random.split(key, size)

        # The backward pass takes A and B of each row again: else it would keep those of
        # all layers.
        @functools.partial(jax.checkpoint, policy=_KEEP_PRODUCTS)
        def of_rows(adapter: Selected, x: Array, ids: Array, key: Any) -> Array:
            rows = adapter._chosen(ids), ids == -1, key
            rows = jax.tree.map(lambda a: _split_as_rows(a, x), rows)
            return jax.vmap(one)(x, *rows)

        return of_rows(self, x, ids, key)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        if self.ids.ndim > len(self.batch_shape):
            raise ValueError(
                "`ids` must be one number where weights are merged. Got one for each "
                f"of {self.ids.shape[-1]} rows."
            )
        is_off = jnp.any(self.ids == -1)  # they are equal
        return jnp.where(
            is_off, kernel.dequantize(), self._chosen(self.ids).merged(kernel)
        )

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        rows = take_rows(kernel, ids)
        if self.ids.ndim == 0:
            chosen = self._chosen(self.ids).lookup(ids, kernel)
            return jnp.where(self.ids == -1, rows, chosen)
        if self.row_role is None or ids.shape[:1] != self.ids.shape:
            raise ValueError(
                "`ids` must be one number, or one for each row of the first axis of "
                "the ids of a table [V, D]. Got "
                f"{self.ids.shape[-1]} for ids {ids.shape}."
            )
        take = lambda x: self._take(x, self.ids)
        # Both indices at once, else XLA takes an A for each row.
        place = jnp.where(self.ids < -1, self.scaling.shape[0], self.ids)
        place = jnp.expand_dims(place, tuple(range(1, ids.ndim)))
        arrays = self.arrays_at((place, ids), take)
        # Norms of all adapters of the bank; by row, each would need its whole A.
        adapters = self._adapters({**self.arrays, "scaling": self.scaling})
        norms = jax.vmap(lambda adapter: adapter.table_norms(kernel))(adapters)
        scaling, norms = jax.tree.map(take, (self.scaling, norms))
        adapted = jax.vmap(self.adapted_rows)(rows, arrays, scaling, norms)
        is_off = jnp.expand_dims(self.ids == -1, tuple(range(1, rows.ndim)))
        return jnp.where(is_off, rows, adapted.astype(rows.dtype))

    ragged_product = Adapter.ragged_product

    def _chosen(self, ids: Array) -> Any:
        """Returns the adapters of the ids; all of a -1 is zero."""
        stored = {**self.arrays, "scaling": self.scaling}
        return self._adapters({name: self._take(a, ids) for name, a in stored.items()})

    def _adapters(self, arrays: Mapping[str, Array]) -> Any:
        return self.kind(**arrays, dropout=self.dropout, geometry=self.geometry)

    def _take(self, stored: Array, ids: Array) -> Array:
        batch = len(self.batch_shape)

        def take(stored: Array, ids: Array) -> Array:
            # Others than -1 that are not in the bank give NaN.
            index = jnp.where(ids < -1, stored.shape[0], ids)
            taken = stored.at[index].get(mode="fill", fill_value=jnp.nan)
            is_off = jnp.expand_dims(ids == -1, tuple(range(ids.ndim, taken.ndim)))
            return jnp.where(is_off, 0, taken)

        for _ in range(batch):
            take = jax.vmap(take)
        mesh = explicit_mesh(stored, ids)
        if mesh is None:
            return take(stored, ids)
        axes = typed_axes(stored)
        new = [()] * (ids.ndim - batch)
        spec = make_spec(*axes[:batch], *new, *axes[batch + 1 :])
        return in_auto_mode(take, mesh, spec)(stored, ids)


def _split_as_rows(array: Array, x: Array) -> Array:
    """Returns an array whose first axis is split over Explicit axes as that of x is."""
    mesh = explicit_mesh(array, x)
    if mesh is None:
        return array
    rows: Axes = typed_axes(x)[0]
    others = [unused(axes, {*rows}) for axes in typed_axes(array)[1:]]
    return split_by(array, mesh, make_spec(rows, *others))


def _selected(kind: type[Adapter]) -> Any:
    name = f"Selected{kind.__name__}"
    roles = {array: "e" + own for array, own in kind.roles.items()}
    namespace = {"__module__": __name__, "kind": sliced_kind(kind), "roles": roles}
    ids, bases = [("ids", Any)], (Selected, kind)
    cls: Any = dataclasses.make_dataclass(
        name, ids, bases=bases, namespace=namespace, frozen=True, eq=False
    )
    static = tuple(setting for setting in SETTINGS if setting not in Selected.inputs)
    return register(cls, (*roles, *Selected.inputs), static, f"qlora_jax.{name}")


SelectedLoRA, SelectedDoRA = _selected(LoRA), _selected(DoRA)
SELECTED: dict[type[Adapter], Any] = {LoRA: SelectedLoRA, DoRA: SelectedDoRA}
