"""Updates that can be skipped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..trees.paths import Tree, paths_where
from .paging import is_on_host


def skippable(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates that can be skipped, such as updates that are NaN.

    `update` takes an extra argument `skip`, a bool or a boolean scalar array. If it is
    True, all updates are zero, and the state does not change. The state is that of
    `tx`. `skip` is also passed on to `tx`. `skippable` can thus wrap a chain that
    contains `ql.optim.offload`, which has to skip by itself because `jnp.where` does
    not accept arrays in host memory.

    Args:
        tx: The transformation.

    Raises:
        ValueError: From `update` with `skip`, if `tx` keeps arrays in host memory and
            does not pass `skip` on to the transformation that keeps them there.

    Example:
        >>> import jax.numpy as jnp, optax, qlora_jax as ql
        >>> params, grads = jnp.ones(2), jnp.array([1.0, jnp.nan])
        >>> tx = ql.optim.skippable(optax.adamw(1e-4))
        >>> is_bad = ~jnp.isfinite(grads).all()
        >>> updates, state = tx.update(grads, tx.init(params), params, skip=is_bad)
        >>> updates.tolist(), state[0].mu.tolist(), int(state[0].count)
        ([0.0, 0.0], [0.0, 0.0], 0)
    """
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: Tree,
        state: Tree,
        params: Tree | None = None,
        *,
        skip: bool | Array | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, Tree]:
        if skip is None:
            return tx.update(updates, state, params, **extra_args)

        def update_unless(skip: bool | Array) -> tuple[Tree, Tree]:
            return tx.update(updates, state, params, skip=skip, **extra_args)

        def zero_if_skipped(x: Array) -> Array:
            return jnp.where(skip, jnp.zeros_like(x), x)

        def select_state(new: Array, old: Array) -> Array:
            return new if is_on_host(new) else jnp.where(skip, old, new)

        new_updates, new_state = update_unless(skip)
        if any(map(is_on_host, jax.tree.leaves(new_state))):
            _check_depends_on_skip(update_unless, skip, new_state)
        new_updates = jax.tree.map(zero_if_skipped, new_updates)
        return new_updates, jax.tree.map(select_state, new_state, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_depends_on_skip(
    update_unless: Callable[[bool | Array], tuple[Tree, Tree]],
    skip: bool | Array,
    state: Tree,
) -> None:
    """Raises ValueError if an update with arrays in host memory ignores `skip`."""
    # Optax drops extra arguments on the way to transformations that do not take them.
    jaxpr = jax.make_jaxpr(update_unless)(jnp.asarray(skip)).jaxpr
    if any(var is jaxpr.invars[0] for eqn in jaxpr.eqns for var in eqn.invars):
        return
    raise ValueError(
        "`tx` must keep arrays in host memory with `ql.optim.offload`, and pass extra "
        "arguments on to it. Got an update that does not depend on `skip`, of a state "
        f"with arrays in host memory at {paths_where(is_on_host, state)}."
    )
