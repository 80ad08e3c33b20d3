"""Updates that can be skipped."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..trees.paths import Tree, paths_where
from .paging import is_on_host


def skippable(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with updates that can be skipped, such as those that are NaN.

    `update` takes an extra argument `skip`, a bool or a scalar array of a bool. Where
    it is True, updates are zeros and the state, that of `tx`, does not change. It is
    passed on to `tx`, so that this works around a chain with `ql.optim.offload`, which
    must skip by itself: arrays in host memory cannot be selected.

    Args:
        tx: The transformation.

    Raises:
        ValueError: From `update` with `skip`, if `tx` keeps arrays in host memory and
            does not pass `skip` on to what keeps them there.

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
        skip: Any = None,
        **extra_args: Any,
    ) -> tuple[Tree, Tree]:
        if skip is None:
            return tx.update(updates, state, params, **extra_args)
        run = lambda skip: tx.update(updates, state, params, skip=skip, **extra_args)
        new, new_state = run(skip)
        if any(map(is_on_host, jax.tree.leaves(new_state))):
            _check_reads(run, skip, new_state)
        new = jax.tree.map(lambda x: jnp.where(skip, jnp.zeros_like(x), x), new)
        keep = lambda new, old: new if is_on_host(new) else jnp.where(skip, old, new)
        return new, jax.tree.map(keep, new_state, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_reads(run: Any, skip: Any, state: Tree) -> None:
    """Raises ValueError if an update with arrays on the host ignores `skip`."""
    # Transformations drop extra arguments that they do not know.
    program = jax.make_jaxpr(run)(jnp.asarray(skip)).jaxpr
    if any(var is program.invars[0] for eqn in program.eqns for var in eqn.invars):
        return
    raise ValueError(
        "`tx` must keep arrays in host memory by `ql.optim.offload`, and pass extra "
        "arguments on to it. Got arrays in host memory, "
        f"{paths_where(is_on_host, state)}, in a state whose update does not depend on "
        "`skip`."
    )
