"""AdamW with its moments in 8 bits (Dettmers et al. 2022)."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..trees.paths import Tree, path_string, paths_where
from .blocks import (
    Blocks,
    Moment,
    block_shapes,
    from_blocks,
    grid_of,
    to_blocks,
    zero_blocks,
)
from .layerwise import can_be_sliced

# `optax.inject_hyperparams` passes arrays in place of numbers.
Number = float | Array


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW whose moments are kept in 8 bits, a quarter of float32's bytes.

    Each block of 256 values has one float32 scale, its largest magnitude. A code is
    the nearest value of the dynamic data type (Dettmers et al. 2022), signed for the
    first moment and unsigned for the second, as in bitsandbytes. Updates are computed
    in float32, and the new moments are then rounded. A positive second moment is never
    rounded to zero, because it is a divisor. A value that is not finite makes its whole
    block NaN.

    Arrays with fewer than 4096 values keep float32 moments. If an array has three axes
    or more, the first one is the axis of layers. Blocks then do not extend over layers,
    the limit of 4096 applies to a single layer, and layers are updated one after the
    other. Schedules, masks, `optax.tree_utils`, checkpoints and `ql.optim.offload` work
    as with `optax.adamw`.

    Results do not depend on how devices split an array. Blocks run along the longest
    axis (other than the axis of layers) that is divisible by 256. An array without such
    an axis is flattened.

    Updates are float32. The moments of larger arrays, `mu` and `nu`, are tuples of
    `codes`, uint32 `[layers, rows / 4, columns]`, and `scales`, float32
    `[layers, 4, rows * columns / 1024]`.

    Args:
        learning_rate: A number, or a schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the square root of the second moment. Positive.
        eps_root: Added to the second moment under the square root.
        weight_decay: Fraction of a weight that an update subtracts at learning rate 1.
        mask: Which arrays decay: a tree of bools, or a function that returns one for
            the parameters. By default, all arrays decay.

    Raises:
        ValueError: If `b1`, `b2` or `eps` is out of range. From `init`, if a parameter
            is not a real float array. From `update`, if the state belongs to arrays of
            other shapes. The message lists the arrays.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"w": jnp.ones((256, 64))}
        >>> tx = ql.optim.adamw8bit(1e-2)
        >>> state = tx.init(params)
        >>> sum(x.nbytes for x in jax.tree.leaves(state[0].mu)) / params["w"].nbytes
        0.25390625
        >>> updates, state = jax.jit(tx.update)(params, state, params)
        >>> float(updates["w"][0, 0])
        -0.0100009...
    """
    _check_settings(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        _scale_by_adam(b1, b2, eps, eps_root),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(
    b1: Number, b2: Number, eps: Number, eps_root: Number
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1, b2, eps, eps_root)

    def init(params: Tree) -> optax.ScaleByAdamState:
        _check_dtypes(params)
        mu = jax.tree.map(lambda param: zero_blocks(param, signed=True), params)
        nu = jax.tree.map(lambda param: zero_blocks(param, signed=False), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update_layers(
        gradient: Array, mu: Moment, nu: Moment, count: Array
    ) -> tuple[Array, Moment, Moment]:
        state = optax.ScaleByAdamState(
            count,
            from_blocks(mu, gradient, signed=True),
            from_blocks(nu, gradient, signed=False),
        )
        # Optax annotates both as trees of any kind. Here, each is one array.
        result: Any = adam.update(gradient.astype(jnp.float32), state)
        update, new_state = result
        new_mu = to_blocks(new_state.mu, signed=True)
        new_nu = to_blocks(new_state.nu, signed=False)
        return update, new_mu, new_nu

    def update_array(
        gradient: Array, mu: Moment, nu: Moment, count: Array
    ) -> tuple[Array, Moment, Moment]:
        is_stack = gradient.ndim > 2 and can_be_sliced(gradient)
        if not (isinstance(mu, Blocks) and is_stack):
            return update_layers(gradient, mu, nu, count)

        # One layer at a time, so that the moments of only one layer are in float32.
        def update_layer(
            layer: tuple[Array, Moment, Moment],
        ) -> tuple[Array, Moment, Moment]:
            gradient, mu, nu = jax.tree.map(lambda x: x[None], layer)
            new_layer = update_layers(gradient, mu, nu, count)
            return jax.tree.map(lambda x: x[0], new_layer)

        return jax.lax.map(update_layer, (gradient, mu, nu))

    def update(
        updates: Tree, state: Any, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        del params
        _check_state(updates, state)
        update_leaf = functools.partial(update_array, count=state.count)
        results = jax.tree.map(update_leaf, updates, state.mu, state.nu)
        # Each array has a triple of results. Make three trees of them.
        new_updates, mu, nu = (
            jax.tree.map(lambda _, triple, i=i: triple[i], updates, results)
            for i in range(3)
        )
        count = optax.safe_increment(state.count)
        return new_updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _check_settings(**settings: Number) -> None:
    for name, value in settings.items():
        if not isinstance(value, int | float):
            continue
        if name == "eps" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"`eps` must be positive and finite. Got {value}.")
        if name != "eps" and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1). Got {value}.")


def _check_dtypes(params: Tree) -> None:
    not_float = [
        f"{path_string(path)}: {jnp.result_type(param)}"
        for path, param in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.issubdtype(jnp.result_type(param), jnp.floating)
    ]
    if not_float:
        raise ValueError(
            f"`params` must be real float arrays. Got {not_float}. Leave frozen arrays "
            "out with optax.masked or optax.partition."
        )


def _check_state(updates: Tree, state: optax.ScaleByAdamState) -> None:
    def moment_fits(gradient: Array, moment: Moment) -> bool:
        grid = grid_of(gradient.shape)
        if not isinstance(moment, Blocks):
            return grid is None and moment.shape == gradient.shape
        shapes = Blocks(*map(jnp.shape, moment))
        return grid is not None and shapes == block_shapes(grid)

    def both_fit(gradient: Array, mu: Moment, nu: Moment) -> bool:
        return moment_fits(gradient, mu) and moment_fits(gradient, nu)

    fits = jax.tree.map(both_fit, updates, state.mu, state.nu)
    if wrong_paths := paths_where(operator.not_, fits):
        raise ValueError(
            "`state` must come from `init` for arrays shaped like `updates`. Got "
            f"moments of other shapes at {wrong_paths}."
        )
