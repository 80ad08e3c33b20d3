"""Puts a wrapped model on a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..trees.sharding import spec_of_names
from ..trees.paths import nested
from ..trees.sharding import place as place_trees
from .unwrap import join, split
from .variables import Packed, adapted_kernels, adapter_of, is_base, join_path

M = TypeVar("M", bound=nnx.Module)


def place(
    model: M,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    logical_axes: Mapping[str, str | Sequence[str] | None] | None = None,
    rows: Sequence[str | Sequence[str] | None] = (),
    memory: Literal["device", "host"] = "device",
) -> M:
    """Returns a wrapped model on a mesh, as `qlora_jax.sharding.place` two trees.

    Codes and scales are split as the float kernel would be, A along K and B along N.
    Variables of which nothing is said are replicated.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone.
        mesh: The mesh, with Auto axes, Explicit axes or both.
        rules: Specs of float kernels and other parameters, by path pattern. By default
            the sharding metadata of the model's variables (`out_sharding`).
        logical_axes: Mesh axes of the names in that metadata that are not mesh axes.
        rows: The mesh axes that split the row axes of inputs.
        memory: Where the codes of packed stacks are between products, as in
            `qlora_jax.sharding.place`.

    Raises:
        ValueError: As `qlora_jax.sharding.place`.

    Example:
        >>> import jax, qlora_jax as ql
        >>> from flax import nnx
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> layer = ql.nnx.QLoRALinear(64, 8, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(0))
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> layer = ql.nnx.place(layer, mesh, {"kernel": P("fsdp")}, rows=["fsdp"])
        >>> tuple(layer.kernel.get_value().codes.sharding.spec)
        ('fsdp', None)
    """
    specs = None
    if rules is None:
        axes = logical_axes or {}
        names = {path: _names(v) for path, v in _variables(model).items()}
        specs = nested({path: spec_of_names(n, axes) for path, n in names.items()})
    trees = split(model)
    trees = place_trees(*trees, mesh, rules, specs=specs, rows=rows, memory=memory)
    model = join(model, *trees)
    done = {id(variable) for variable in _variables(model).values()}
    for _, holder, name in adapted_kernels(model):
        done.update(map(id, adapter_of(holder, name).variables.values()))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and id(node) not in done:
            put = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec()))
            node.set_value(jax.tree.map(put, node.get_value()))
    return model


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the variables of the base tree, by path."""
    found = nnx.iter_graph(model)
    return {join_path(path): node for path, node in found if is_base(node)}


def _names(variable: nnx.Variable) -> Sequence[Any]:
    """Names of the axes in a variable's metadata, or in that of the packed one."""
    metadata = variable.get_metadata()
    if isinstance(variable, Packed):
        metadata = dict(variable.get_metadata("float_metadata"))
    return metadata.get("out_sharding") or ()
