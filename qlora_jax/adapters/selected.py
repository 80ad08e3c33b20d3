"""Adapters that are chosen from a bank, for the full input or for each row of it."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._jax.modes import explicit_mesh, in_auto_mode, split_by
from .._jax.pytree import register
from .._jax.specs import Axes, free_prefix, make_spec, mesh_axes
from ..quant.kernel import Kernel
from .base import Adapter, ProductCall

# A selected adapter has some attributes of the bank's adapters, as properties.
# pyright: reportIncompatibleVariableOverride=false

_SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names("lora_product")


@dataclass(frozen=True, eq=False)
class Selected(Adapter):
    """An adapter that `ql.select` chooses from a bank, possibly different for each row.

    Attributes:
        adapters: The adapters of the bank, as one adapter of a stack of kernels. Its
            last batch axis has the E places of the bank.
        ids: int32 `[*batch]`, or `[*batch, R]` for each row of the first axis of the
            input; -1 selects the frozen kernel without an adapter.
    """

    adapters: Adapter
    ids: Array

    untrained_leaves = ("ids",)
    arrays, settings, label, dropout, geometry = (  # pyright: ignore
        property(operator.attrgetter(f"adapters.{name}"))
        for name in ("arrays", "settings", "label", "dropout", "geometry")
    )

    @property
    def roles(self) -> dict[str, str]:  # noqa: D102
        return {name: "e" + roles for name, roles in self.adapters.roles.items()}

    def at(self, index: tuple[int, ...]) -> Self:  # noqa: D102
        return dataclasses.replace(
            self, adapters=self.adapters.at(index), ids=self.ids[index]
        )

    def _replace(self, arrays: Mapping[str, PyTree], **settings: Any) -> Self:
        adapters = self.adapters._replace(arrays, **settings)
        return dataclasses.replace(self, adapters=adapters)

    def change(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        # 1. Take adapters from the bank only when x is ready. Without the barrier, XLA
        #    takes the adapters of all layers first, as on CPUs in JAX 0.10.2.
        batch_ndim = len(self.batch_shape)
        ids = lax.optimization_barrier((lax.stop_gradient(x), self.ids))[1]

        def change_of(
            x: Array, lora: Adapter, is_off: Array, key: Array | None
        ) -> Array:
            change = lora.change(x, kernel, call._replace(dropout_key=key))
            is_off = jnp.expand_dims(is_off, tuple(range(is_off.ndim, change.ndim)))
            return jnp.where(is_off, 0, change)

        # 2. One adapter for the full input.
        if self.ids.ndim == batch_ndim:
            return change_of(x, self._take_adapters(ids), ids == -1, call.dropout_key)
        if batch_ndim or x.shape[:1] != self.ids.shape:
            raise ValueError(
                "`ids` must be one number, or one for each row of the first axis of "
                "the input of a kernel without batch axes. Got "
                f"{self.ids.shape[-1]} for an input {x.shape} and batch axes "
                f"{self.batch_shape}."
            )
        keys = call.dropout_key
        keys = None if keys is None else jax.random.split(keys, self.ids.shape)

        # 3. One adapter for each row, under a vmap. The backward pass takes A and B of
        #    each row again, because saving them would keep those of all layers in
        #    memory.
        @functools.partial(jax.checkpoint, policy=_SAVE_PRODUCTS)
        def changes_of_rows(
            bank: Selected, x: Array, ids: Array, keys: PyTree
        ) -> Array:
            by_row = bank._take_adapters(ids), ids == -1, keys
            by_row = jax.tree.map(lambda a: _split_as_rows(a, x), by_row)
            return jax.vmap(change_of)(x, *by_row)

        return changes_of_rows(self, x, ids, keys)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        if self.ids.ndim > len(self.batch_shape):
            raise ValueError(
                "`ids` must be one number where weights are merged. Got one for each "
                f"of {self.ids.shape[-1]} rows."
            )
        is_off = jnp.any(self.ids == -1)  # all ids along the batch axes are equal
        merged = self._take_adapters(self.ids).merged(kernel)
        return jnp.where(is_off, kernel.dequantize(), merged)

    def _take_adapters(self, ids: Array) -> Adapter:
        """Returns the adapters of the ids. For an id of -1, their arrays are zero."""
        return jax.tree.map(lambda stored: self._take(stored, ids), self.adapters)

    def _take(self, stored: Array, ids: Array) -> Array:
        """Takes the arrays of the ids from an array of the bank, `[*batch, E, ...]`."""
        batch_ndim = len(self.batch_shape)

        def take(stored: Array, ids: Array) -> Array:
            # An id of -1 returns zeros; other ids that are not in the bank return NaN.
            index = jnp.where(ids < -1, stored.shape[0], ids)
            taken = stored.at[index].get(mode="fill", fill_value=jnp.nan)
            is_off = jnp.expand_dims(ids == -1, tuple(range(ids.ndim, taken.ndim)))
            return jnp.where(is_off, 0, taken)

        for _ in range(batch_ndim):
            take = jax.vmap(take)
        mesh = explicit_mesh(stored, ids)
        if mesh is None:
            return take(stored, ids)
        axes = mesh_axes(stored)
        ids_axes = [()] * (ids.ndim - batch_ndim)
        spec = make_spec(*axes[:batch_ndim], *ids_axes, *axes[batch_ndim + 1 :])
        return in_auto_mode(take, mesh, spec)(stored, ids)


def _split_as_rows(array: Array, x: Array) -> Array:
    """Splits the first axis of an array over Explicit mesh axes like that of x."""
    mesh = explicit_mesh(array, x)
    if mesh is None:
        return array
    row_axes: Axes = mesh_axes(x)[0]
    # A mesh axis can split only one axis of an array.
    other_axes = [free_prefix(axes, {*row_axes}) for axes in mesh_axes(array)[1:]]
    return split_by(array, mesh, make_spec(row_axes, *other_axes))


register(Selected, ("adapters", "ids"), (), "qlora_jax.Selected")
