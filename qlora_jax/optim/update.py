"""One call of a transformation's `update`, with flat lists of arrays for trees."""

from typing import Any, NamedTuple

import jax
import optax

from .._jax.pytree import split_arrays
from ..trees.paths import Tree, path_string


class NotInParts(Exception):
    """Says why an update cannot be made in parts."""


class Arrays(NamedTuple):
    """The arguments of an update, as flat lists; `params` is empty where None."""

    updates: list[Any]
    state: list[Any]
    params: list[Any]
    extra: list[Any]


class Update:
    """One call of a transformation's `update`, with flat lists for trees.

    Attributes:
        arrays: The arguments.
    """

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        updates: Tree,
        state: Tree,
        params: Tree | None,
        extra_args: dict[str, Any],
    ):
        self._tx = tx
        extra, self._rebuild_extra = split_arrays(extra_args)
        paths, self._updates_def = jax.tree_util.tree_flatten_with_path(updates)
        self.paths = [path_string(path) for path, _ in paths]
        leaves, self._state_def = jax.tree.flatten(state)
        self._params_def = None if params is None else jax.tree.structure(params)
        given = jax.tree.leaves(params)
        self.arrays = Arrays([x for _, x in paths], leaves, given, extra)

    def __call__(self, arrays: Arrays) -> tuple[list[Any], list[Any]]:
        """Returns the new updates and the new state, for arguments of any sizes."""
        params = None
        if self._params_def is not None:
            params = self._params_def.unflatten(arrays.params)
        updates, state = self._tx.update(
            self._updates_def.unflatten(arrays.updates),
            self._state_def.unflatten(arrays.state),
            params,
            **self._rebuild_extra(arrays.extra),
        )
        found = jax.tree.structure((updates, state))
        if found != jax.tree.structure(self.rebuild(arrays.updates, arrays.state)):
            raise NotInParts("the update changes the structure of its arguments")
        return jax.tree.leaves(updates), jax.tree.leaves(state)

    def rebuild(self, updates: list[Any], state: list[Any]) -> tuple[Tree, Tree]:
        """Returns flat results as trees."""
        return self._updates_def.unflatten(updates), self._state_def.unflatten(state)

    def init(self, params: list[Any]) -> Any:
        """Returns the first state for parameters of any sizes."""
        treedef = self._updates_def if self._params_def is None else self._params_def
        return self._tx.init(treedef.unflatten(params))

    def state_shapes(self, params: list[Any]) -> list[tuple[int, ...]] | None:
        """Shapes of the state for `params`; None if its structure differs."""
        state = jax.eval_shape(self.init, params)
        if jax.tree.structure(state) != self._state_def:
            return None
        return [x.shape for x in jax.tree.leaves(state)]
