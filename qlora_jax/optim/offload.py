"""Keeps optimizer state in host memory between steps (QLoRA's paged optimizer)."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from ..trees.paths import Tree, paths_where


# This is the paged optimizer of Dettmers et al. 2023, section 3. Here, host memory is
# part of the type of an array (`jax.memory.Space.Host`), and the compiler schedules the
# copies.
def offload(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose state is in host memory between steps.

    Arrays are moved to the host. Scalars, such as the count, stay on the device. The
    structure of the state and the bits of its values are those of `tx`. `update` moves
    the state of one parameter at a time to the device, so call it under `jax.jit`, with
    the state and the parameters donated (`donate_argnums`). The arrays on the host are
    then updated in place.

    `tx` must treat each parameter separately, as AdamW, Lion, Adafactor and
    `optax.MultiSteps` do. Clipping by global norm does not: put it in front of
    `offload`, in an `optax.chain`.

    `update` takes an extra argument `skip`, a boolean scalar. If it is True, all
    updates are zero, and the state does not change. This is for gradients that are not
    finite: `jnp.where` does not accept arrays in host memory.

    Args:
        tx: The transformation whose state is kept in host memory.

    Raises:
        ValueError: From `init`, if `tx` mixes parameters.

    Example:
        >>> import jax, jax.numpy as jnp, optax, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((3, 64, 8))}  # three layers
        >>> _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> tx = ql.optim.offload(optax.adamw(1e-4))
        >>> state = tx.init(lora)
        >>> state[0].mu["kernel"].a.sharding.memory_kind
        'pinned_host'
        >>> updates, state = jax.jit(tx.update)(lora, state, lora)
        >>> updates["kernel"].a.sharding.memory_kind, int(state[0].count)
        ('device', 1)
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Tree) -> Tree:
        on_host = paths_where(lambda x: isinstance(x, Array) and _is_on_host(x), params)
        if on_host:
            raise ValueError(f"`params` must be in device memory. Got {on_host}.")
        if not jax.tree.leaves(params):  # as in `optax.tree.map_params`
            return tx.init(params)
        _check_parameters_are_separate(tx, params)
        return _init_one_by_one(tx, params)

    def update(
        updates: Tree,
        state: Tree,
        params: Tree | None = None,
        *,
        skip: bool | Array | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, Tree]:
        if not jax.tree.leaves(updates):
            return tx.update(updates, state, params, **extra_args)
        return _update_one_by_one(tx, updates, state, params, skip, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _init_one_by_one(tx: optax.GradientTransformation, params: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(jax.eval_shape(tx.init, params))
    for param, positions in zip(_parts(params), _positions(tx, params), strict=True):
        arrays = jax.tree.leaves(tx.init(param))
        for position, x in zip(positions, arrays, strict=True):
            leaves[position] = _to_host(x)
    return structure.unflatten(leaves)


def _update_one_by_one(
    tx: optax.GradientTransformationExtraArgs,
    updates: Tree,
    state: Tree,
    params: Tree | None,
    skip: bool | Array | None,
    extra_args: dict[str, Any],
) -> tuple[Tree, Tree]:
    old_leaves, structure = jax.tree.flatten(state)
    new_leaves: list[Any] = [*old_leaves]
    new_updates: list[Any] = []
    positions_of = _positions(tx, updates if params is None else params)
    param_parts = [None] * len(positions_of) if params is None else _parts(params)
    done: Tree = ()
    for update, param, positions in zip(
        _parts(updates), param_parts, positions_of, strict=True
    ):
        # The copies of one parameter's state wait for the update of the one before.
        on_host = [old_leaves[position] for position in positions]
        on_host, _ = lax.optimization_barrier((on_host, done))
        old_arrays = [jax.device_put(x, jax.memory.Space.Device) for x in on_host]
        part: list[Any] = [None] * len(old_leaves)
        for position, x in zip(positions, old_arrays, strict=True):
            part[position] = x
        new_update, new_part = tx.update(
            update, structure.unflatten(part), param, **extra_args
        )
        new_arrays = jax.tree.leaves(new_part)
        if skip is not None:
            zeros = jax.tree.map(jnp.zeros_like, new_update)
            new_update = jax.tree.map(partial(jnp.where, skip), zeros, new_update)
            new_arrays = [*map(partial(jnp.where, skip), old_arrays, new_arrays)]
        new_arrays = [_to_host(x) for x in new_arrays]
        done = new_update, new_arrays
        new_updates += jax.tree.leaves(new_update)
        for position, x in zip(positions, new_arrays, strict=True):
            new_leaves[position] = x
    results = jax.tree.structure(updates).unflatten(new_updates)
    return results, structure.unflatten(new_leaves)


def _parts(tree: Tree) -> Iterator[Tree]:
    """Yields the tree with all leaves but one replaced by None, for each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    for i, x in enumerate(leaves):
        yield structure.unflatten([x if i == j else None for j in range(len(leaves))])


def _positions(tx: optax.GradientTransformation, params: Tree) -> list[list[int]]:
    """Returns the positions of the leaves of the state that each parameter needs.

    The state of a single parameter has some of the leaves of the whole state, under the
    same paths: its own, and those that all parameters share, such as the count.
    """

    def paths(params: Tree) -> list[Any]:
        state = jax.eval_shape(tx.init, params)
        return [path for path, _ in jax.tree.leaves_with_path(state)]

    position_of = {path: position for position, path in enumerate(paths(params))}
    return [[position_of[path] for path in paths(part)] for part in _parts(params)]


def _check_parameters_are_separate(
    tx: optax.GradientTransformationExtraArgs, params: Tree
) -> None:
    """Raises ValueError if one update of the whole tree has another result."""
    # One weight of each parameter suffices, with gradients that are large enough to be
    # clipped, and with zeros, to which noise may be added.
    with jax.ensure_compile_time_eval():
        small = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, x.dtype), params)
        state = tx.init(small)
        for size in (1e4, 0.0):
            grads = jax.tree.map(lambda x, size=size: x * size, small)
            together = tx.update(grads, state, small)
            separate = _update_one_by_one(tx, grads, state, small, None, {})
            together, separate = jax.device_get((together, separate))
            if not all(jax.tree.leaves(jax.tree.map(_is_close, together, separate))):
                raise ValueError(
                    "`tx` must update each parameter separately. Got one that mixes "
                    "them, such as clipping by global norm. Put that part in front of "
                    "`offload`: "
                    "optax.chain(optax.clip_by_global_norm(1.0), ql.optim.offload(tx))."
                )


def _is_close(x: Any, y: Any) -> bool:
    # XLA may round the two differently. Keys cannot be compared, but what they draw is.
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return is_key or np.allclose(np.float32(x), np.float32(y), rtol=0.01)


def _is_on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _to_host(x: Array) -> Array:
    # Scalars and keys stay on the device.
    if jnp.ndim(x) == 0 or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    return jax.device_put(x, jax.memory.Space.Host)
