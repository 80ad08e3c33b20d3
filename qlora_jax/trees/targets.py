"""Which leaves of a tree are targeted, and what forbids it."""

import re
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp

from .._jax.memory import is_device_array, memory_of
from .._jax.pytree import is_tree_leaf
from ..adapters.config import QLoRAConfig
from ..quant.geometry import Geometry
from ..quant.quantize import check_finite, check_kernel
from ..quant.straight_through import StraightThrough
from .paths import Tree, leaves_by_path, refuse_listed, unbox


def find_targets(
    params: Tree,
    config: QLoRAConfig,
    kinds: Mapping[str, str] | None = None,
    problems: Mapping[str, str] | None = None,
    *,
    trained: bool = False,
) -> dict[str, Geometry]:
    """Returns the geometry of each targeted kernel, having checked all of them.

    Args:
        params: The parameter tree.
        config: What to target.
        kinds: The kinds of axes (see `Geometry`) of kernels by path, where a door knows
            them; they take the place of `config.contract`.
        problems: Why leaves cannot be targets, by path, where a door knows more.
        trained: Whether kernels that are trained through their quantization can be
            targets, in the settings of the config: to pack them.

    Raises:
        ValueError: If a pattern matches nothing, or some leaves that match cannot be
            targets: all of those are named with the reason.
    """
    leaves = leaves_by_path(params)
    targets = {path: unbox(x) for path, x in leaves.items() if config.is_target(path)}
    if not targets:
        raise ValueError(
            f"`targets` must match at least one leaf. Got targets={config.targets!r}, "
            f"exclude={config.exclude!r}, which match none of {sorted(leaves)}."
        )
    if unmatched := _unmatched((*config.targets, *config.exclude), leaves):
        raise ValueError(
            "every pattern of `targets` and `exclude` must match a leaf. Got "
            f"{unmatched}, which match none of {sorted(leaves)}."
        )
    if unmatched := _unmatched(config.pattern_settings(), targets):
        raise ValueError(
            "patterns of `rank_pattern`, `alpha_pattern` and `contract` must match a "
            f"target. Got {unmatched}, which match none of {sorted(targets)}."
        )
    geometries, found = {}, dict(problems or {})
    for path, leaf in targets.items():
        try:
            if trained and isinstance(leaf, StraightThrough):
                geometries[path] = _trained_geometry(leaf, config)
                continue
            geometries[path] = _geometry(path, leaf, config, (kinds or {}).get(path))
        except (TypeError, ValueError) as error:
            found.setdefault(path, str(error))
    listed = [f"{path}: {why}" for path, why in sorted(found.items())]
    refuse_listed("these leaves cannot be targets", listed)
    return geometries


def _unmatched(patterns, paths):
    is_alone = lambda pattern: not any(re.fullmatch(pattern, path) for path in paths)
    return [pattern for pattern in patterns if is_alone(pattern)]


def _geometry(path, leaf, config, kinds):
    if is_tree_leaf(leaf):
        raise TypeError(f"it is already a {type(leaf).__name__}.")
    check_kernel(leaf)
    if kinds is not None:
        geometry = Geometry.of(kinds, leaf.shape)
    else:
        geometry = Geometry.contracting(config.contracted_axes_of(path), leaf.shape)
    if config.fmt is not None:
        check_finite(leaf)
    return geometry


def _trained_geometry(leaf, config):
    if leaf.packing != config.packing:
        raise ValueError(
            f"it is trained through {leaf.packing}; the config has {config.packing}."
        )
    check_finite(leaf.kernel)
    return leaf.geometry


def check_donated(tree: Tree, paths: Container[str]) -> None:
    """Refuses to donate what would be used again.

    Args:
        tree: The tree.
        paths: Where float arrays are to be deleted.

    Raises:
        ValueError: If such an array stands elsewhere too; the paths are named.
    """
    owners: dict = {}
    for path, leaf in leaves_by_path(tree).items():
        for array in jax.tree.leaves(unbox(leaf)):
            if is_device_array(array) and jnp.issubdtype(array.dtype, jnp.floating):
                owners.setdefault(memory_of(array), []).append(path)
    shared = [
        found
        for found in owners.values()
        if len(found) > 1 and any(path in paths for path in found)
    ]
    if shared:
        raise ValueError(
            "`donate` must be False where leaves share an array, which would be "
            f"deleted for both. Got {shared}. Copy one of each first."
        )
