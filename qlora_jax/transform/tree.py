"""Parameter trees: find leaves by path, and what is targeted among them.

A *kernel* is whatever stands at a target: a float array, a `QTensor`, a
`StraightThrough` or, in a combined tree, an `AdaptedKernel`. The *base* tree mirrors
the parameters with frozen kernels at the targets; the *lora* tree is a nested dict that
holds a `LoRA` at each target's path and nothing else.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..lora.adapter import AdaptedKernel, LoRA
from ..lora.config import QLoRAConfig
from ..quant.geometry import Geometry
from ..quant.kernel import check_finite, check_kernel, is_concrete
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough

Tree = Any


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a box around an array, such as Flax's `nn.Partitioned`."""
    return hasattr(leaf, "unbox") and hasattr(leaf, "replace_boxed")


def is_kernel(leaf: Any) -> bool:
    """Whether a node is one of this library's kernels or adapters."""
    return isinstance(leaf, QTensor | StraightThrough | AdaptedKernel | LoRA)


def _is_leaf(node):
    return is_kernel(node) or is_box(node)


def path_string(path: tuple) -> str:
    """Returns a key path as patterns see it: `"layers/0/q_proj/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Returns the tree's leaves by path; kernels, adapters and boxes are leaves."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    return {path_string(path): leaf for path, leaf in flat}


def map_by_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `fn(path, leaf)` over the leaves that `leaves_by_path` lists."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_string(path), leaf), tree, is_leaf=_is_leaf
    )


def nested(by_path: Mapping[str, Any]) -> dict:
    """Returns a nested dict with each leaf at its path."""
    tree: dict = {}
    for path, leaf in by_path.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def unbox(leaf: Any) -> Any:
    """Takes an array out of its box, if it has one."""
    if not is_box(leaf):
        return leaf
    try:
        return leaf.unbox(apply_constraint=False)
    except TypeError:
        return leaf.unbox()


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


def refuse_listed(title: str, problems: Sequence[str]) -> None:
    """Raises ValueError with all problems under a title, if there are any."""
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{title}:\n  {listing}")


def _geometry(path, leaf, config, kinds):
    if is_kernel(leaf):
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
    settings = leaf.fmt, leaf.block_size, leaf.double_quant
    wanted = config.fmt, config.block_size, config.double_quant
    if settings != wanted:
        raise ValueError(
            "it is trained through (fmt, block_size, double_quant) = "
            f"{settings}; the config has {wanted}."
        )
    check_finite(leaf.kernel)
    return leaf.geometry


def is_device_array(x: Any) -> bool:
    """Whether `x` holds memory of JAX's that can be freed now."""
    return isinstance(x, jax.Array) and is_concrete(x)


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
                owners.setdefault(_memory(array), []).append(path)
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


def _memory(array):
    """What tells memory apart: `device_put` gives one buffer to two arrays."""
    shards = array.addressable_shards
    if not (array.size and shards):
        return id(array)
    return shards[0].device, shards[0].data.unsafe_buffer_pointer()


def adapters_by_path(base: Tree, lora: Tree) -> dict[str, LoRA]:
    """Returns the adapters by path.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If one has no kernel in `base`, or is not a LoRA.
    """
    adapters = leaves_by_path(lora)
    kernels = leaves_by_path(base)
    combined = [p for p, x in kernels.items() if isinstance(x, AdaptedKernel)]
    if combined:
        raise TypeError(
            "`base` must hold no adapters: `partition` a combined tree first. Got some "
            f"at {combined}."
        )
    bad = [
        path
        for path, adapter in adapters.items()
        if path not in kernels or not isinstance(adapter, LoRA)
    ]
    if bad:
        raise ValueError(
            "every leaf of `lora` must be a LoRA at the path of a kernel of `base`. "
            f"Got others at {bad}."
        )
    return adapters
