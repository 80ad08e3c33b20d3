"""Computes the shapes and dtypes of the tree that a checkpoint is loaded as."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ...adapters.config import QLoRAConfig
from ...quant.formats import Packing
from ...quant.pack import quantize_checked
from ...trees.paths import Tree, leaves_by_path, map_by_path, refuse_listed
from ...trees.targets import find_targets
from ..files import CheckpointError
from ..named_leaves import NamedLeaf
from ..packed.weight import packing_of


def abstract_base(
    tensors: Mapping[str, Any],
    leaves: Mapping[str, NamedLeaf],
    like: Tree,
    config: QLoRAConfig | None,
    dtype: Any,
) -> Tree:
    """Returns the tree to load, of shapes; lists leaves of tensors of several kinds."""
    packings: dict[str, Packing | None] = {}
    dtypes: dict[str, np.dtype] = {}
    problems = []
    for path, leaf in sorted(leaves.items()):
        found = {name: tensors[name] for name in leaf.tensors.ravel()}
        kinds = {_kind(x, dtype) for x in found.values()}
        packings[path], dtypes[path] = next(iter(kinds), (None, dtype))
        reasons = ((name, x.problem) for name, x in found.items() if packing_of(x))
        whys = (f"{name} {why}. Use recode=True" for name, why in reasons if why)
        why = next(whys, None)
        if why is None and len(kinds) > 1:
            text = ", ".join(sorted(f"{d} {p or 'not packed'}" for p, d in kinds))
            why = f"its tensors are of different kinds: {text}"
        problems += [f"{path}: {why}"] if why else []
    refuse_listed("these leaves cannot be read", problems, CheckpointError)
    shapes = map_by_path(
        lambda path, x: jax.ShapeDtypeStruct(leaves[path].shape, dtypes[path]), like
    )

    def pack(tree: Tree) -> Tree:
        chosen = packings | _targets(tree, leaves, config, packings)

        def one(path: str, w: Any) -> Any:
            packing, geometry = chosen[path], leaves[path].geometry
            if packing is None or geometry is None:
                return w
            return quantize_checked(w, packing, geometry)

        return map_by_path(one, tree)

    return jax.eval_shape(pack, shapes)


def config_packings(
    leaves: Mapping[str, NamedLeaf], config: QLoRAConfig | None
) -> dict[str, Packing | None]:
    """Returns the packing of the config's targets, by tensor name; None for float."""
    if config is None:
        return {}
    return {
        name: config.packing if config.freeze_base else None
        for path, leaf in leaves.items()
        if config.is_target(path)
        for name in leaf.tensors.ravel()
    }


def _kind(tensor: Any, dtype: Any) -> tuple[Packing | None, np.dtype]:
    packing = packing_of(tensor)
    keeps = packing is not None and tensor.keeps_dtype
    own = tensor.dtype if dtype is None or keeps else dtype
    return packing, np.dtype(jax.dtypes.canonicalize_dtype(own))


def _targets(
    tree: Tree,
    leaves: Mapping[str, NamedLeaf],
    config: QLoRAConfig | None,
    packings: Mapping[str, Packing | None],
) -> dict[str, Packing]:
    """Returns the packing of the config's targets; packed ones have one."""
    if config is None:
        return {}
    kinds, problems = {}, {}
    for path, leaf in leaves.items():
        if leaf.geometry is not None:
            kinds[path] = leaf.geometry.kinds
        elif config.is_target(path):
            problems[path] = "the table of names says that it is no kernel."
        packing = packings[path]
        if config.is_target(path) and packing not in (None, config.packing):
            problems[path] = (
                f"it is packed in {packing}; the config has {config.packing}. "
                "recode=True packs it again, with one more rounding."
            )
    targets = find_targets(leaves_by_path(tree), config, kinds, problems)
    if config.packing is None or not config.freeze_base:
        return {}
    return dict.fromkeys(targets, config.packing)
