"""AdamW with its moments in 8 bits (Dettmers et al. 2022)."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..trees.paths import Tree, path_string, paths_where
from .blocks import Blocks, block_shapes, from_blocks, grid_of, to_blocks, zero_blocks
from .stacked_arrays import can_be_sliced


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[Tree], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW whose moments are kept in 8 bits, a quarter of float32's bytes.

    Blocks of 256 values share a float32 scale, their largest magnitude, and a code is
    the nearest value of the dynamic data type (Dettmers et al. 2022), signed for the
    first moment and unsigned for the second, as in bitsandbytes. Updates are computed
    in float32 and moments are then rounded. A positive second moment is never rounded
    to zero: it is a divisor. A value that is not finite makes its block NaN.

    Arrays with fewer than 4096 values have float32 moments. In arrays with three axes
    or more, the first is an axis of layers: blocks do not cross layers, the values of
    one layer are counted, and layers are updated one after the other. Schedules, masks,
    `optax.tree_utils`, checkpoints and `ql.optim.offload` work as with `optax.adamw`.

    Results do not depend on how devices split an array. Blocks run along its longest
    axis (not that of layers) that 256 divides; else it is flattened.

    Updates are float32. The moments of larger arrays, `mu` and `nu`, are tuples of
    `codes`, uint32 `[layers, rows / 4, columns]`, and `scales`, float32
    `[layers, 4, rows * columns / 1024]`.

    Args:
        learning_rate: A number, or a schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the square root of the second moment. Positive.
        eps_root: Added to the second moment under the square root.
        weight_decay: Share of a weight that an update at learning rate 1 takes off.
        mask: Which arrays decay: a tree of bools, or a function from the parameters to
            one. None: all.

    Raises:
        ValueError: If `b1`, `b2` or `eps` is out of its range; from `init`, if a
            parameter is not a real float array; from `update`, if the state is that of
            arrays of other shapes. The arrays are named.

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
    b1: Any, b2: Any, eps: Any, eps_root: Any
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1, b2, eps, eps_root)

    def init(params: Tree) -> optax.ScaleByAdamState:
        _check_dtypes(params)
        moment = lambda signed: jax.tree.map(lambda p: zero_blocks(p, signed), params)
        return optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), moment(True), moment(False)
        )

    def update_layers(
        g: jax.Array, mu: Any, nu: Any, count: Any
    ) -> tuple[jax.Array, Any, Any]:
        moments = from_blocks(mu, g, True), from_blocks(nu, g, False)
        state = optax.ScaleByAdamState(count, *moments)
        result: Any = adam.update(g.astype(jnp.float32), state)
        update, found = result
        return update, to_blocks(found.mu, True), to_blocks(found.nu, False)

    def update_array(
        g: jax.Array, mu: Any, nu: Any, count: Any
    ) -> tuple[jax.Array, Any, Any]:
        if not (isinstance(mu, Blocks) and g.ndim > 2 and can_be_sliced(g)):
            return update_layers(g, mu, nu, count)

        # One layer at a time, so that the moments of one are in float32.
        def update_layer(layer: Any) -> Any:
            g, mu, nu = jax.tree.map(lambda x: x[None], layer)
            return jax.tree.map(lambda x: x[0], update_layers(g, mu, nu, count))

        return jax.lax.map(update_layer, (g, mu, nu))

    def update(
        updates: Tree, state: Any, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        del params
        _check_state(updates, state)
        leaves, treedef = jax.tree.flatten(updates)
        moments = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        found = [
            update_array(*arrays, state.count)
            for arrays in zip(leaves, *moments, strict=True)
        ]
        new, mu, nu = (treedef.unflatten(x[i] for x in found) for i in range(3))
        count = optax.safe_increment(state.count)
        return new, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _check_settings(**settings: Any) -> None:
    """Raises ValueError for a number that is out of its range."""
    for name, value in settings.items():
        # `optax.inject_hyperparams` passes arrays.
        if not isinstance(value, int | float):
            continue
        if name == "eps" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"`eps` must be positive and finite. Got {value}.")
        if name != "eps" and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1). Got {value}.")


def _check_dtypes(params: Tree) -> None:
    wrong = [
        f"{path_string(path)}: {jnp.result_type(p)}"
        for path, p in jax.tree_util.tree_leaves_with_path(params)
        if not jnp.issubdtype(jnp.result_type(p), jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f"`params` must be real float arrays. Got {wrong}. Leave frozen arrays out "
            "with optax.masked or optax.partition."
        )


def _check_state(updates: Tree, state: optax.ScaleByAdamState) -> None:
    """Raises ValueError if moments are not those of arrays of these shapes."""

    def is_right(g: jax.Array, moment: Any) -> bool:
        grid = grid_of(g.shape)
        if grid is None:
            return not isinstance(moment, Blocks) and moment.shape == g.shape
        shapes = jax.tree.map(jnp.shape, moment, is_leaf=lambda x: x is not moment)
        return isinstance(moment, Blocks) and shapes == block_shapes(grid)

    found = jax.tree.map(
        lambda g, m, v: is_right(g, m) and is_right(g, v), updates, state.mu, state.nu
    )
    if wrong := paths_where(operator.not_, found):
        raise ValueError(
            f"`state` must be what `init` gives for arrays of these shapes. Got "
            f"moments of other shapes at {wrong}."
        )
