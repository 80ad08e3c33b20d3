"""The paged optimizer: an optimizer's state in host memory between steps.

QLoRA (Dettmers et al. 2023, section 3) pages Adam's moments out to the host. Here the
state's arrays are in host memory by type (`jax.memory.Space.Host`), and the compiler
places and moves them. *Stacks*, arrays whose first axis is an axis of layers, pass
through the device one layer at a time and are updated in place; others pass whole.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..trees.paths import Tree, path_string
from .host import is_on_host, to_device, to_host
from .host_init import init_on_host
from .layerwise import split
from .parts import OWN, Part, zeros
from .skippable import skippable
from .stacks import stack_sizes
from .update import NotInParts, Update


def offload(
    tx: optax.GradientTransformation,
    *,
    stacks: str | Sequence[str] = (),
    layerwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's state in host memory between steps.

    Only arrays are moved; scalars, such as the count, stay on the device. The state has
    the structure that `tx` gives it, so checkpoints, `optax.tree_utils` and
    `inject_hyperparams` work as without `offload`. Call `update` under `jax.jit`,
    with the state donated (`donate_argnums`): the host's arrays are then updated in
    place. Donate the parameters of a step too, or the updates of `jax.jit(tx.update)`:
    JAX gives donated memory to the first result of the same shape, and a process on
    CPUs ends where that is an array on the device (JAX 0.10.2 to 0.12.0.1).

    Stacks are updated layer by layer, so that the moments of one layer at a time are on
    the device; `init` makes them so too, and a state may be larger than the device's
    memory. Stacks are adapters with a batch axis, kernels with one that are trained
    through their quantization, and the arrays that `stacks` names; all other arrays are
    updated whole. Layer by layer equals whole, within rounding, where a transformation
    treats each layer alike, as adamw, `ql.optim.adamw8bit`, lion, sgd, schedules,
    `inject_hyperparams` and `MultiSteps` do. The program of `tx` is checked for this.
    One that mixes layers, such as adafactor or clipping by global norm, is applied to
    the whole tree, and all of its state is on the device during the update. Put such a
    part outside:
    `optax.chain(optax.clip_by_global_norm(1.0), ql.optim.offload(optax.adamw(1e-4)))`.
    Put `optax.MultiSteps` inside: around `offload` it selects between whole states, so
    it takes a second copy, and the TPU compiler refuses to donate them.

    `update` takes `skip`, as that of `ql.optim.skippable` does: where it is True, the
    state stays as it was, and updates are zeros.

    To compile ahead of time, mark the state's arrays: `jax.eval_shape` does not record
    where they are. Give arrays with axes a `jax.ShapeDtypeStruct` whose sharding has
    `memory_kind="pinned_host"`, and scalars one on the device.

    Args:
        tx: The transformation whose state is kept in host memory.
        stacks: Pattern, or several, of the paths of other arrays whose first axis is an
            axis of layers, such as `"layers/.*/bias"` of a scanned model. Adapters and
            trained kernels need no pattern.
        layerwise: Whether stacks are updated layer by layer. None: where the result is
            the same. True: always, and an error where it is not the same. False: never.

    Returns:
        The transformation, for use wherever `tx` was: on the lora tree, on a combined
        tree inside `optax.partition` or `optax.masked`, or in `optax.chain`.

    Raises:
        TypeError: If `tx` is not a gradient transformation.
        ValueError: From `init`, if parameters are in host memory or a pattern of
            `stacks` matches none; from `update`, if `layerwise` is True and `tx` mixes
            layers: the arrays and the operations that mix them are named.

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
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            "`tx` must be an optax.GradientTransformation. Got "
            f"{type(tx).__name__}. Call the optimizer first: optax.adamw(1e-4)."
        )
    tx = skippable(tx)

    def init(params: Tree) -> Tree:
        _check_on_device(params)
        sizes = stack_sizes(params, stacks)
        return init_on_host(tx, params, sizes if layerwise is not False else [])

    def update(
        updates: Tree, state: Tree, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, Tree]:
        call = Update(tx, updates, state, params, extra_args)
        sizes = stack_sizes(updates, stacks) if layerwise is not False else []
        if any(sizes):
            try:
                return _update_in_parts(call, split(call, sizes))
            except NotInParts as error:
                if layerwise:
                    raise ValueError(
                        "`layerwise` must be None or False where `tx` does not treat "
                        f"each layer of a stack alike. Got True, but {error}. Put that "
                        "part of `tx` outside `offload`."
                    ) from None
        new, state = tx.update(updates, to_device(state), params, **extra_args)
        return new, jax.tree.map(to_host, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_in_parts(update: Update, parts: Sequence[Part]) -> tuple[Tree, Tree]:
    *stacked, rest = parts
    arrays = update.arrays
    # What all parts share, such as the count, is updated once. Layers read its value
    # from before the step.
    updates, state = update(rest.of(arrays, to_device, zeros, to_device))
    state = [to_host(x) for x in state]
    for part in stacked:
        new_updates, new_state = _update_layers(update, part)
        updates = [new_updates.get(i, x) for i, x in enumerate(updates)]
        state = [new_state.get(i, x) for i, x in enumerate(state)]
    return update.rebuild(updates, state)


def _update_layers(
    update: Update, part: Part
) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """Updates stacks of one number of layers; returns them by their positions.

    The loop carries the host's arrays and replaces one layer at a time: a scan with
    stacked outputs would make a second copy of them in host memory. Updates replace
    their gradients in the same way.
    """
    arrays = update.arrays
    one = lambda x, i: to_device(lax.dynamic_slice_in_dim(x, i, 1))
    at = lambda xs, i: part.of(xs, lambda x: one(x, i), zeros, to_device)
    put = lambda x, new, i: lax.dynamic_update_slice_in_dim(x, new, i, 0)
    new_updates, _ = jax.eval_shape(lambda xs: update(at(xs, 0)), arrays)
    buffers = {
        i: x if x.dtype == new.dtype else jnp.zeros(x.shape, new.dtype)
        for i, (x, new) in enumerate(zip(arrays.updates, new_updates, strict=True))
        if part.own[i]
    }
    held = enumerate(arrays.state)
    moments = {i: to_host(x) for i, x in held if part.state[i] == OWN}

    def body(i: jax.Array, carry: Any) -> Any:
        buffers, moments = carry
        grads = [
            buffers[j] if j in buffers and buffers[j].dtype == x.dtype else x
            for j, x in enumerate(arrays.updates)
        ]
        state = [moments.get(j, x) for j, x in enumerate(arrays.state)]
        updates, state = update(at(arrays._replace(updates=grads, state=state), i))
        buffers = {j: put(x, updates[j], i) for j, x in buffers.items()}
        moments = {j: put(x, to_host(state[j]), i) for j, x in moments.items()}
        return buffers, moments

    return lax.fori_loop(0, part.layers, body, (buffers, moments))


def _check_on_device(params: Tree) -> None:
    """Raises ValueError with the paths of parameters in host memory."""
    on_host = [
        path_string(path)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(x, jax.Array) and is_on_host(x)
    ]
    if on_host:
        raise ValueError(
            "`params` must be in device memory. Got arrays in host memory at "
            f"{on_host}. Move them first: jax.device_put(x, jax.memory.Space.Device)."
        )
