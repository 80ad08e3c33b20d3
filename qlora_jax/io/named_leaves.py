"""Finds the tensors that make up each leaf of a tree."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quant.geometry import Geometry
from ..quant.settings import FLOAT_DTYPES
from ..trees.paths import Tree, leaves_by_path
from .files import refuse_names
from .names import Names
from .packed.readers import packing_of


@dataclass(frozen=True, eq=False)
class NamedLeaf:
    """A leaf of the tree, and the names of its tensors."""

    path: str
    shape: tuple[int, ...]
    geometry: Geometry | None  # None for no kernel: batch axes, then the tensors' axes
    is_vector: bool  # no kernel, and its tensors have one axis for those
    tensors: np.ndarray  # names, in the shape of its batch axes
    window: tuple[int, ...] = ()  # of a convolution, whose tensors are [N, K, *window]

    @property
    def batch_axes(self) -> list[int]:
        """The positions of its batch axes."""
        if self.geometry is None:
            return list(range(self.tensors.ndim))
        roles = self.geometry.roles(len(self.shape))
        return [axis for axis, role in enumerate(roles) if role == "b"]

    def check_is_matrix(self) -> None:
        """Raises ValueError for a convolution: only PEFT's adapters have those."""
        if self.window:
            raise ValueError("convolutions are not read or written")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        if self.geometry is not None:
            *_, k, n = self.geometry.matrix_shape(self.shape)
            return n, k // math.prod(self.window), *self.window
        own = self.shape[self.tensors.ndim :]
        return (math.prod(own),) if self.is_vector else own


def find_leaves(
    tensors: Mapping[str, Any], names: Names, like: Tree
) -> dict[str, NamedLeaf]:
    """Returns the leaves of `like` by path; lists tensors that do not fit."""
    leaves: dict[str, NamedLeaf] = {}
    unknown, missing, shapes = [], [], []
    used: set[str] = set()
    for path, leaf in leaves_by_path(like).items():
        try:
            leaves[path] = found = leaf_of(path, tuple(leaf.shape), names)
            found.check_is_matrix()
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
    others = (n for n in tensors if n not in used and not names.is_ignored(n))
    extra = [name for name in others if not _is_no_bias(name, tensors)]
    refuse_names(
        missing=missing, unexpected=extra, **{"mis-shaped": shapes, "no name": unknown}
    )
    return leaves


def _is_no_bias(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a tensor is a bias of zeros of a packed weight, as in old GPTQ files."""
    stem, _, end = name.rpartition(".")
    is_packed = end == "bias" and packing_of(tensors.get(f"{stem}.weight")) is not None
    return is_packed and not np.asarray(tensors[name][...]).any()


def leaf_of(path: str, shape: tuple[int, ...], names: Names) -> NamedLeaf:
    """Returns the leaf of that path and shape; refuses one that the table lacks."""
    roles = names.roles(path)
    if "k" not in roles:
        batch = shape[: names.num_batch_axes(path)]
        return NamedLeaf(path, shape, None, bool(roles), names.of(path, batch))
    geometry = Geometry.contracting(roles.replace("w", "k"), shape)
    batch = geometry.matrix_shape(shape)[:-2]
    sizes = zip(roles[::-1], shape[::-1], strict=False)
    window = tuple(size for role, size in sizes if role == "w")[::-1]
    return NamedLeaf(path, shape, geometry, False, names.of(path, batch), window)
