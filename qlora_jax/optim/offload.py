"""Optimizer state in host memory between steps (QLoRA's paged optimizer)."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.memory import is_concrete
from ..trees.paths import Tree, paths_where
from .layerwise import NotByLayers, by_layers
from .paging import is_on_host, to_device, to_host
from .skippable import skippable
from .stacked_arrays import stack_sizes, state_sizes


# Dettmers et al. 2023, section 3. Host memory is part of the type of an array here
# (`jax.memory.Space.Host`), and the compiler places and moves the arrays.
def offload(
    tx: optax.GradientTransformation,
    *,
    stacks: str | Sequence[str] = (),
    layerwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose state is in host memory between steps.

    Arrays are moved; scalars, such as the count, stay on the device, and the structure
    of the state does not change. Call `update` under `jax.jit` with the state donated
    (`donate_argnums`): the host's arrays are then updated in place. Donate the
    parameters of a step too, or the updates of `jax.jit(tx.update)`: JAX gives donated
    memory to the first result of the same shape, and a process on CPUs ends where that
    is an array on the device (JAX 0.10.2 to 0.12.0.1).

    Stacks are made and updated layer by layer, with the moments of one layer on the
    device: adapters with a batch axis, such kernels that are trained through their
    quantization, and the arrays that `stacks` names. Results agree within rounding.
    This holds where `tx` treats layers alike, as most do. If it mixes them, as
    adafactor or clipping by global norm do, all of the state is updated at once, on the
    device. Put such a part outside, and `optax.MultiSteps` inside: around `offload` it
    selects between two states, and the TPU compiler refuses to donate them.

    `update` takes `skip`, as in `ql.optim.skippable`.

    Args:
        tx: The transformation whose state is kept in host memory.
        stacks: Pattern, or several, of the paths of other arrays whose first axis is an
            axis of layers, such as `"layers/.*/bias"` of a scanned model.
        layerwise: Whether stacks are updated layer by layer. None: where the result is
            the same. True: always, and an error where it is not the same. False: never.

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

    def first_state(params: Tree) -> Tree:
        return jax.tree.map(to_host, tx.init(params))

    def init(params: Tree) -> Tree:
        _check_on_device(params)
        sizes = stack_sizes(params, stacks) if layerwise is not False else []
        if any(sizes):
            with contextlib.suppress(NotByLayers):
                return _init_by_layers(first_state, params, sizes)
        return first_state(params)

    def update(
        updates: Tree, state: Tree, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, Tree]:
        def whole(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            new, state = tx.update(updates, to_device(state), params, **extra_args)
            return new, jax.tree.map(to_host, state)

        sizes = stack_sizes(updates, stacks) if layerwise is not False else []
        if any(sizes):
            try:
                return _update_by_layers(whole, tx, (updates, state, params), sizes)
            except NotByLayers as error:
                if layerwise:
                    raise ValueError(
                        "`layerwise` must be None or False where `tx` does not treat "
                        f"each layer of a stack alike. Got True, but {error}. Put that "
                        "part of `tx` outside `offload`."
                    ) from None
        return whole(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_by_layers(
    whole: Callable[..., tuple[Tree, Tree]],
    tx: optax.GradientTransformationExtraArgs,
    arguments: tuple[Tree, Tree, Tree | None],
    sizes: Sequence[int],
) -> tuple[Tree, Tree]:
    updates, state, params = arguments
    given = updates if params is None else params
    if jax.tree.structure(given) != jax.tree.structure(updates):
        raise NotByLayers("`params` and `updates` differ in structure")
    shapes, layers, state_def = state_sizes(tx.init, given, sizes)
    held, held_def = jax.tree.flatten(state)
    if held_def != state_def or shapes != [x.shape for x in held]:
        raise NotByLayers("`state` is not what `init` gives for these parameters")
    state = jax.tree.map(to_host, state)
    leaves, treedef = jax.tree.flatten((updates, state, params))
    results_def = jax.tree.structure((updates, state))

    def flat(*leaves: Any) -> list[Any]:
        found, found_def = jax.tree.flatten(whole(*treedef.unflatten(leaves)))
        if found_def != results_def:
            raise NotByLayers("the update changes the structure of its arguments")
        return found

    results = [*sizes, *layers]
    every = [*results, *(sizes if params is not None else [])]
    names = paths_where(lambda _: True, updates)
    done = by_layers(flat, leaves, every, results, names=names, in_place=True)
    return results_def.unflatten(done)


def _init_by_layers(
    init: Callable[[Tree], Tree], params: Tree, sizes: Sequence[int]
) -> Tree:
    """Makes a state layer by layer: it may be larger than device memory."""
    leaves, treedef = jax.tree.flatten(params)
    flat = lambda *leaves: jax.tree.leaves(init(treedef.unflatten(leaves)))
    has_values = all(map(is_concrete, leaves))
    is_on_mesh = lambda x: isinstance(getattr(x, "sharding", None), NamedSharding)
    on_mesh = [x for x in leaves if has_values and is_on_mesh(x)]
    shardings = None
    if on_mesh:
        # Layers on different devices are not taken apart. In Auto mode a program does
        # not say how it splits arrays: the state of one layer does.
        is_split = lambda x: any(getattr(x.sharding, "spec", ())[:1])
        sizes = [0 if is_split(x) else n for x, n in zip(leaves, sizes, strict=True)]
        one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype, device=x.sharding)
        mesh = on_mesh[0].sharding.mesh
        with jax.ensure_compile_time_eval():  # a trace may close over the parameters
            small = [one(x) if n else x for x, n in zip(leaves, sizes, strict=True)]
            shardings = [_on_mesh(x.sharding, mesh) for x in flat(*small)]
    if not any(sizes):
        return init(params)
    _, layers, state_def = state_sizes(init, params, sizes)
    make = lambda leaves: by_layers(flat, leaves, sizes, layers)
    if has_values:
        make = jax.jit(make, keep_unused=True, out_shardings=shardings)
    return state_def.unflatten(make(leaves))


def _on_mesh(sharding: Any, mesh: Any) -> NamedSharding:
    spec = getattr(sharding, "spec", PartitionSpec())
    return NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)


def _check_on_device(params: Tree) -> None:
    """Raises ValueError with the paths of parameters in host memory."""
    is_wrong = lambda x: isinstance(x, jax.Array) and is_on_host(x)
    if on_host := paths_where(is_wrong, params):
        raise ValueError(
            "`params` must be in device memory. Got arrays in host memory at "
            f"{on_host}. Move them first: jax.device_put(x, jax.memory.Space.Device)."
        )
