"""Which tensors make up each leaf of a tree, all checked before one is read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..adapters.config import QLoRAConfig
from ..quant.geometry import Geometry
from ..quant.pack import quantize_checked
from ..quant.settings import FLOAT_DTYPES, Packing
from ..trees.paths import Tree, leaves_by_path, map_by_path
from ..trees.targets import find_targets
from .bitsandbytes.packed import PackedTensor
from .bitsandbytes.recode import ReblockedTensor
from .files import CheckpointError, refuse_names
from .names import Names


@dataclass(frozen=True, eq=False)
class NamedLeaf:
    """A leaf of the tree, and its tensors.

    Attributes:
        path: Its path.
        shape: Its shape.
        geometry: How a kernel's axes map to `[*batch, K, N]`; None for other leaves,
            which have the axes of their tensors behind the batch axes.
        is_vector: Whether a leaf that is no kernel is a vector in its tensors.
        tensors: The names of its tensors, in the shape of its batch axes.
    """

    path: str
    shape: tuple[int, ...]
    geometry: Geometry | None
    is_vector: bool
    tensors: np.ndarray

    @property
    def batch_axes(self) -> list[int]:
        """The positions of its batch axes."""
        if self.geometry is None:
            return list(range(self.tensors.ndim))
        order = self.geometry.axes("b", len(self.shape))
        lead = len(self.shape) - len(self.geometry.kinds)
        return [*range(lead), *order]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        if self.geometry is not None:
            *_, k, n = self.geometry.matrix_shape(self.shape)
            return n, k
        own = self.shape[self.tensors.ndim :]
        return (math.prod(own),) if self.is_vector else own


def find_leaves(
    tensors: Mapping[str, Any], names: Names, like: Tree
) -> dict[str, NamedLeaf]:
    """Returns the leaves of `like` with the tensors that make them up, by path.

    Raises:
        CheckpointError: If tensors are missing, have another shape or no float dtype,
            or belong to no leaf: all of them are listed.
    """
    leaves: dict[str, NamedLeaf] = {}
    unknown, missing, shapes = [], [], []
    used: set[str] = set()
    for path, leaf in leaves_by_path(like).items():
        try:
            leaves[path] = found = leaf_of(path, tuple(leaf.shape), names)
        except ValueError as error:
            unknown.append(f"{path} ({error})")
            continue
        for name in found.tensors.ravel():
            used.add(name)
            if name not in tensors:
                missing.append(name)
                continue
            shape, dtype = tuple(tensors[name].shape), str(tensors[name].dtype)
            if shape != found.tensor_shape:
                shapes.append(f"{name} (must be {found.tensor_shape}, is {shape})")
            elif dtype not in FLOAT_DTYPES:
                shapes.append(f"{name} (must be floating, is {dtype})")
    extra = (n for n in tensors if n not in used and not names.is_ignored(n))
    refuse_names(
        missing=missing, unexpected=extra, **{"mis-shaped": shapes, "no name": unknown}
    )
    return leaves


def leaf_of(path: str, shape: tuple[int, ...], names: Names) -> NamedLeaf:
    """Returns what a table says of a leaf of that shape.

    Raises:
        ValueError: If it has no such leaf, or one with other axes.
    """
    roles = names.roles(path)
    if "k" not in roles:
        batch = shape[: names.num_batch_axes(path)]
        return NamedLeaf(path, shape, None, bool(roles), names.of(path, batch))
    geometry = Geometry.contracting(roles, shape)
    batch = geometry.matrix_shape(shape)[:-2]
    return NamedLeaf(path, shape, geometry, False, names.of(path, batch))


def abstract_base(
    tensors: Mapping[str, Any],
    leaves: Mapping[str, NamedLeaf],
    like: Tree,
    config: QLoRAConfig | None,
    dtype: Any,
) -> Tree:
    """Returns the tree to load, with shapes and dtypes in the place of arrays.

    Raises:
        CheckpointError: If the tensors of a leaf are of different kinds: all such
            leaves are listed.
        ValueError: As `find_targets`.
    """
    packings: dict[str, Packing | None] = {}
    dtypes: dict[str, np.dtype] = {}
    problems: dict[str, str] = {}
    for path, leaf in leaves.items():
        if why := _why_not_packed(leaf, tensors):
            problems[path] = why
            continue
        kinds = {_kind(tensors[name], dtype) for name in leaf.tensors.ravel()}
        if len(kinds) > 1:
            text = ", ".join(sorted(f"{d} {p or 'not packed'}" for p, d in kinds))
            problems[path] = f"its tensors are of different kinds: {text}"
            continue
        packings[path], dtypes[path] = kinds.pop() if kinds else (None, dtype)
    if problems:
        lines = [f"{path}: {why}" for path, why in sorted(problems.items())]
        raise CheckpointError("these leaves cannot be read:\n  " + "\n  ".join(lines))
    shapes = map_by_path(
        lambda path, x: jax.ShapeDtypeStruct(leaves[path].shape, dtypes[path]), like
    )

    def pack(tree: Tree) -> Tree:
        for path, packing in _targets(tree, leaves, config, packings).items():
            packings[path] = packing

        def one(path: str, w: Any) -> Any:
            packing, geometry = packings[path], leaves[path].geometry
            if packing is None or geometry is None:
                return w
            return quantize_checked(w, packing, geometry)

        return map_by_path(one, tree)

    return jax.eval_shape(pack, shapes)


def _why_not_packed(leaf: NamedLeaf, tensors: Mapping[str, Any]) -> str | None:
    """Returns why the packed bytes of a leaf cannot be moved, or None."""
    for name in leaf.tensors.ravel():
        tensor = tensors[name]
        if isinstance(tensor, PackedTensor) and not tensor.is_in_rows:
            return (
                f"{name} has {tensor.shape[1]} inputs and blocks of "
                f"{tensor.packing.block_size}, which cross its rows. Use recode=True"
            )
        if leaf.geometry is None and is_packed(tensor):
            return f"{name} is packed, and the table says that it is no kernel"
    return None


def is_packed(tensor: Any) -> bool:
    """Whether a tensor is packed in the file."""
    return isinstance(tensor, PackedTensor | ReblockedTensor)


def config_packings(
    leaves: Mapping[str, NamedLeaf], config: QLoRAConfig | None
) -> dict[str, Packing | None]:
    """Returns how the config packs its targets' tensors, by name."""
    if config is None:
        return {}
    return {
        name: config.packing if config.freeze_base else None
        for path, leaf in leaves.items()
        if config.is_target(path)
        for name in leaf.tensors.ravel()
    }


def _kind(tensor: Any, dtype: Any) -> tuple[Packing | None, np.dtype]:
    packing = tensor.packing if is_packed(tensor) else None
    own = tensor.dtype if dtype is None or packing else dtype
    return packing, np.dtype(jax.dtypes.canonicalize_dtype(own))


def _targets(
    tree: Tree,
    leaves: Mapping[str, NamedLeaf],
    config: QLoRAConfig | None,
    packings: Mapping[str, Packing | None],
) -> dict[str, Packing]:
    """Returns how the config packs its targets; those that are packed stay so."""
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
    targets = find_targets(tree, config, kinds, problems)
    if config.packing is None or not config.freeze_base:
        return {}
    return dict.fromkeys(targets, config.packing)
