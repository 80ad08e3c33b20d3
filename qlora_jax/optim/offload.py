"""Keeps optimizer state in host memory between steps (QLoRA's paged optimizer)."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._jax.memory import is_concrete
from .._jax.specs import AnyMesh
from ..trees.paths import Tree, paths_where
from .layerwise import NotByLayers, by_layers, find_state_stacks, stack_depths
from .paging import is_on_host, to_device, to_host
from .skippable import skippable


# This is the paged optimizer of Dettmers et al. 2023, section 3. Here, host memory is
# part of the type of an array (`jax.memory.Space.Host`), and the compiler schedules the
# copies.
def offload(
    tx: optax.GradientTransformation,
    *,
    stacks: str | Sequence[str] = (),
    layerwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose state is in host memory between steps.

    Arrays are moved to the host. Scalars, such as the count, stay on the device, and
    the structure of the state does not change. Call `update` under `jax.jit` with the
    state donated (`donate_argnums`), so that the host's arrays are updated in place.
    Also donate arrays on the device that have the same shapes as arrays of the state:
    the parameters of a step, or the updates if `tx.update` itself is jitted. JAX gives
    donated memory to the first result of the same shape, and a process on CPUs crashes
    if host memory is given to a result on the device (JAX 0.10.2 to 0.12.0.1).

    Stacks are created and updated layer by layer, with the moments of one layer on the
    device at a time. Stacks are adapters with a batch axis, kernels with a batch axis
    that are trained through their quantizer, and the arrays that `stacks` names.
    Results equal those of `tx` up to rounding. Layers are updated one by one only if
    `tx` treats each layer separately, as most transformations do. If it mixes layers,
    as Adafactor or clipping by global norm do, the whole state is updated at once, on
    the device. Put such a part outside `offload`. Put `optax.MultiSteps` inside: around
    `offload`, it selects between two states, and the TPU compiler refuses to donate
    them.

    `update` takes `skip`, as in `ql.optim.skippable`.

    Args:
        tx: The transformation whose state is kept in host memory.
        stacks: One or several patterns for the paths of other arrays whose first axis
            is an axis of layers, such as `"layers/.*/bias"` of a scanned model.
        layerwise: Whether stacks are updated layer by layer. By default (None), they
            are if this does not change the result. With True, it is an error if this
            would change the result. With False, they never are.

    Raises:
        TypeError: If `tx` is not a gradient transformation.
        ValueError: From `init`, if parameters are in host memory, or if a pattern of
            `stacks` matches no path. From `update`, if `layerwise` is True and `tx`
            mixes layers. The message lists the arrays and the operations that mix them.

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

    def first_state(params: Tree) -> Tree:
        return jax.tree.map(to_host, tx.init(params))

    def init(params: Tree) -> Tree:
        _check_on_device(params)
        depths = stack_depths(params, stacks) if layerwise is not False else []
        if any(depths):
            with contextlib.suppress(NotByLayers):
                return _init_by_layers(first_state, params, depths)
        return first_state(params)

    def update(
        updates: Tree, state: Tree, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, Tree]:
        def update_at_once(
            updates: Tree, state: Tree, params: Tree | None
        ) -> tuple[Tree, Tree]:
            state = jax.tree.map(to_device, state)
            new_updates, state = tx.update(updates, state, params, **extra_args)
            return new_updates, jax.tree.map(to_host, state)

        depths = stack_depths(updates, stacks) if layerwise is not False else []
        if any(depths):
            try:
                return _update_by_layers(
                    update_at_once, tx.init, (updates, state, params), depths
                )
            except NotByLayers as error:
                if layerwise:
                    raise ValueError(
                        "`layerwise` must be None or False if `tx` does not treat each "
                        f"layer of a stack separately. Got True, but {error}. Put that "
                        "part of `tx` outside `offload`."
                    ) from None
        return update_at_once(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_by_layers(
    update_at_once: Callable[[Tree, Tree, Tree | None], tuple[Tree, Tree]],
    init: Callable[[Tree], Tree],
    arguments: tuple[Tree, Tree, Tree | None],
    param_depths: Sequence[int],
) -> tuple[Tree, Tree]:
    updates, state, params = arguments
    like_params = updates if params is None else params
    if jax.tree.structure(like_params) != jax.tree.structure(updates):
        raise NotByLayers("`params` and `updates` differ in structure")
    expected_shapes, state_depths, expected_def = find_state_stacks(
        init, like_params, param_depths
    )
    state_leaves, state_def = jax.tree.flatten(state)
    shapes = [x.shape for x in state_leaves]
    if state_def != expected_def or shapes != expected_shapes:
        raise NotByLayers("`state` does not come from `init` with these parameters")
    state = jax.tree.map(to_host, state)
    leaves, treedef = jax.tree.flatten((updates, state, params))
    results_def = jax.tree.structure((updates, state))

    def update_leaves(*leaves: Array) -> list[Array]:
        results, structure = jax.tree.flatten(
            update_at_once(*treedef.unflatten(leaves))
        )
        if structure != results_def:
            raise NotByLayers("the update changes the structure of its arguments")
        return results

    result_depths = [*param_depths, *state_depths]
    argument_depths = [*result_depths, *(param_depths if params is not None else [])]
    results = by_layers(
        update_leaves,
        leaves,
        argument_depths,
        result_depths,
        names=paths_where(lambda _: True, updates),
    )
    return results_def.unflatten(results)


def _init_by_layers(
    init: Callable[[Tree], Tree], params: Tree, param_depths: Sequence[int]
) -> Tree:
    """Creates a state layer by layer, because it may be larger than device memory."""
    leaves, treedef = jax.tree.flatten(params)

    def init_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(init(treedef.unflatten(leaves)))

    has_values, out_shardings = all(map(is_concrete, leaves)), None
    shardings = [getattr(x, "sharding", None) for x in leaves] if has_values else []
    meshes = [x.mesh for x in shardings if isinstance(x, NamedSharding)]
    if meshes:
        # Stacks whose layers are on different devices are initialized at once.
        is_split = [any(getattr(x, "spec", ())[:1]) for x in shardings]
        param_depths = [
            0 if split else n for n, split in zip(param_depths, is_split, strict=True)
        ]
        # In Auto mode, a program does not declare how its results are split. This reads
        # it from the state of a single layer, created outside `jit`. The parameters may
        # be closed over by a trace, hence `ensure_compile_time_eval`.
        with jax.ensure_compile_time_eval():
            one_layer_leaves = [
                jnp.zeros((1, *x.shape[1:]), x.dtype, device=x.sharding) if n else x
                for x, n in zip(leaves, param_depths, strict=True)
            ]
            states = init_leaves(*one_layer_leaves)
            out_shardings = [_on_mesh(x.sharding, meshes[0]) for x in states]
    if not any(param_depths):
        return init(params)
    _, state_depths, state_def = find_state_stacks(init, params, param_depths)

    def init_stacks(leaves: list[Array]) -> list[Array]:
        return by_layers(init_leaves, leaves, param_depths, state_depths)

    if has_values:
        # `init` may read only the shapes of parameters, but without arguments, results
        # would be on the default device.
        init_stacks = jax.jit(
            init_stacks, keep_unused=True, out_shardings=out_shardings
        )
    return state_def.unflatten(init_stacks(leaves))


def _on_mesh(sharding: Sharding, mesh: AnyMesh) -> NamedSharding:
    spec = getattr(sharding, "spec", PartitionSpec())
    return NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)


def _check_on_device(params: Tree) -> None:
    on_host = paths_where(lambda x: isinstance(x, Array) and is_on_host(x), params)
    if on_host:
        raise ValueError(
            "`params` must be in device memory. Got arrays in host memory at "
            f"{on_host}. Move them first: jax.device_put(x, jax.memory.Space.Device)."
        )
