"""The first state of an optimizer, made in host memory layer by layer.

A state may be larger than the device's memory: it is not made there first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._jax.memory import HOST_KIND, is_concrete
from .._jax.modes import explicit_mesh
from ..trees.paths import Tree
from .host import is_paged, to_host
from .layerwise import split_init
from .parts import OWN, Part, zeros
from .update import NotInParts, Update


def init_on_host(
    tx: optax.GradientTransformationExtraArgs, params: Tree, sizes: Sequence[int]
) -> Tree:
    """Returns `tx.init(params)` with its arrays in host memory.

    Moments of stacks are made one layer at a time where that gives the same. Otherwise
    the whole state is made on the device, and moved.

    Args:
        tx: The transformation.
        params: The parameters, in device memory.
        sizes: The layers of each parameter, 0 for one that is no stack.
    """
    mesh = _mesh_of(params)
    if any(sizes) and mesh is not None:
        pairs = zip(sizes, jax.tree.leaves(params), strict=True)
        sizes = [0 if _is_split_by_layer(x) else n for n, x in pairs]
    parts = _split(tx, params, sizes) if any(sizes) else []
    if not parts:
        return jax.tree.map(to_host, tx.init(params))
    make = lambda params: _init_in_parts(tx, params, parts)
    if not all(map(is_concrete, jax.tree.leaves(params))):
        return make(params)
    if mesh is None:  # The arguments say on which device.
        return jax.jit(make, keep_unused=True)(params)
    shardings = _shardings(tx, params, sizes, mesh)
    return jax.jit(make, out_shardings=shardings)(params)


def _split(
    tx: optax.GradientTransformationExtraArgs, params: Tree, sizes: Sequence[int]
) -> list[Part]:
    """Returns the parts in which a state can be made; none if it cannot."""
    state = jax.eval_shape(tx.init, params)
    try:
        return split_init(Update(tx, params, state, params, {}), sizes)
    except NotInParts:
        return []


def _init_in_parts(
    tx: optax.GradientTransformationExtraArgs, params: Tree, parts: Sequence[Part]
) -> Tree:
    leaves, treedef = jax.tree.flatten(params)
    init = lambda leaves: jax.tree.flatten(tx.init(treedef.unflatten(leaves)))
    *stacked, rest = parts
    found, state_def = init(rest.choose(leaves, lambda x: x, zeros))
    found = [to_host(x) for x in found]
    for part in stacked:
        made = _init_layers(lambda leaves: init(leaves)[0], leaves, part)
        found = [made.get(i, x) for i, x in enumerate(found)]
    return state_def.unflatten(found)


def _init_layers(
    init: Callable[[list[Any]], list[Any]], params: list[Any], part: Part
) -> dict[int, jax.Array]:
    """Makes the moments of stacks in a loop that puts one layer after another."""

    def layer(i: Any) -> dict[int, jax.Array]:
        one = lambda x: lax.dynamic_slice_in_dim(x, i, 1)
        made = enumerate(init(part.choose(params, one, zeros)))
        return {j: x for j, x in made if part.state[j] == OWN}

    def body(i: jax.Array, held: dict[int, jax.Array]) -> dict[int, jax.Array]:
        put = lambda x, new: lax.dynamic_update_slice_in_dim(x, to_host(new), i, 0)
        return jax.tree.map(put, held, layer(i))

    empty = lambda x: _empty_stack(part.layers, x)
    held = jax.tree.map(empty, jax.eval_shape(layer, 0))
    return lax.fori_loop(0, part.layers, body, held)


def _empty_stack(layers: int, like: Any) -> jax.Array:
    """Returns an array in host memory whose values do not matter."""
    sharding = like.sharding if explicit_mesh(like) is not None else None
    shape = (layers, *like.shape[1:])
    return to_host(lax.empty(shape, like.dtype, out_sharding=sharding))


def _shardings(
    tx: optax.GradientTransformationExtraArgs,
    params: Tree,
    sizes: Sequence[int],
    mesh: Mesh,
) -> Tree:
    """Returns the shardings of a state: those of the state of one layer.

    In Auto mode, only arrays that have values have shardings.
    """
    leaves, treedef = jax.tree.flatten(params)
    one = lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype, device=x.sharding)
    small = [one(x) if n else x for n, x in zip(sizes, leaves, strict=True)]

    def sharding(x: Any) -> NamedSharding:
        spec = getattr(x.sharding, "spec", PartitionSpec())
        kind = HOST_KIND if is_paged(x) else "device"
        return NamedSharding(mesh, spec, memory_kind=kind)

    return jax.tree.map(sharding, tx.init(treedef.unflatten(small)))


def _mesh_of(params: Tree) -> Mesh | None:
    """Returns the mesh that arrays with values are on."""
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None) if is_concrete(x) else None
        if isinstance(sharding, NamedSharding):
            return sharding.mesh  # pyright: ignore[reportReturnType]
    return None


def _is_split_by_layer(x: Any) -> bool:
    spec = getattr(getattr(x, "sharding", None), "spec", ())
    return bool(spec) and spec[0] is not None
