"""Resolves rules, specs or box names to PartitionSpecs."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from .._jax.pytree import is_box
from .._jax.specs import Axes, axes_of
from ..adapters.patterns import first_match, unmatched_by
from .paths import Tree, boxed_by_path


def specs_by_path(
    base: Tree,
    rules: Mapping[str, PartitionSpec] | None,
    specs: Tree | None,
    logical_axes: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the spec of each leaf that has one."""
    if rules is not None and specs is not None:
        raise ValueError("`rules` and `specs` must not both be given. Got both.")
    leaves = boxed_by_path(base)
    if rules is not None:
        if alone := unmatched_by(rules, leaves):
            raise ValueError(
                f"every rule must match a leaf. Got {alone}, which match none of "
                f"{sorted(leaves)}."
            )
        return {path: first_match(rules, path, ()) for path in leaves}
    found: dict[str, Any] = {}
    given = leaves if specs is None else boxed_by_path(specs)
    if unknown := sorted(set(given) - set(leaves)):
        raise ValueError(f"`specs` must be a tree like `base`. Got also {unknown}.")
    for path, leaf in given.items():
        if isinstance(leaf, PartitionSpec):
            found[path] = leaf
        elif is_box(leaf) and (names := getattr(leaf, "names", None)) is not None:
            found[path] = spec_of_names(names, logical_axes)
    return found


def spec_of_names(names: Sequence, logical_axes: Mapping[str, Any]) -> PartitionSpec:
    """Returns the spec of an array whose axes have these names."""
    return PartitionSpec(*(_on_mesh(name, logical_axes) for name in names))


def _on_mesh(name: Any, logical_axes: Mapping[str, Any]) -> Any:
    """Returns the mesh axes of a name in a box, or of several."""
    if isinstance(name, tuple | list):
        return tuple(a for n in name for a in axes_of(_on_mesh(n, logical_axes)))
    return logical_axes.get(name, name)


def axes_on_mesh(mesh: Mesh, spec: Sequence, leaf: Any) -> tuple[Axes, ...]:
    """Returns the mesh axes of each axis of a leaf; checks that the spec fits."""
    ndim = len(leaf.shape)
    axes = tuple(axes_of(entry) for entry in spec)
    names = [name for entry in axes for name in entry]
    if unknown := sorted({*names} - {*mesh.axis_names}):
        raise ValueError(f"the mesh has axes {mesh.axis_names}. Got {unknown}.")
    if len({*names}) < len(names):
        raise ValueError(f"each mesh axis must split one axis. Got {tuple(spec)}.")
    if len(axes) > ndim:
        raise ValueError(f"a spec must have at most {ndim} entries. Got {tuple(spec)}.")
    return axes + ((),) * (ndim - len(axes))
