"""Lazily converts a base tree to checkpoint tensors."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from .._jax.pytree import is_tree_leaf
from ..quant.geometry import Geometry
from ..quant.kernel import is_packed
from ..quant.qtensor import QTensor
from ..trees.paths import Tree, leaves_by_path, refuse_listed
from .named_leaves import NamedLeaf, leaf_of
from .names import Names
from .tensors import DeferredTensor


def exported_leaves(base: Tree, names: Names) -> list[tuple[NamedLeaf, Any]]:
    """Returns the leaves of a base tree with their tensors; lists all problems."""
    found, problems = [], []
    for path, x in leaves_by_path(base).items():
        if is_tree_leaf(x) and not is_packed(x):
            raise TypeError(
                "`base` must hold arrays and packed kernels: `split` a combined tree, "
                f"`quantize` kernels that are trained. Got {type(x).__name__} at "
                f"{path}."
            )
        arrays = [a for a in jax.tree.leaves(x) if isinstance(a, jax.Array)]
        if not all(a.is_fully_addressable for a in arrays):
            raise ValueError(f"{path} must be on the devices of this process.")
        try:
            leaf = leaf_of(path, tuple(x.shape), names)
            leaf.check_is_matrix()
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if is_packed(x):
            roles = x.geometry.roles(x.ndim)
            wanted = leaf.geometry and leaf.geometry.roles(x.ndim)
            if roles != wanted:
                problems.append(f"{path}: it is packed with {roles!r}, not {wanted!r}")
        found.append((leaf, x))
    refuse_listed("these leaves cannot be written", problems)
    return found


def float_tensors(base: Tree, names: Names) -> dict[str, DeferredTensor]:
    """Returns the float tensors of a base tree, by name; packed kernels are decoded."""
    each = (float_tensors_of(leaf, x) for leaf, x in exported_leaves(base, names))
    return {name: tensor for tensors in each for name, tensor in tensors.items()}


def float_tensors_of(leaf: NamedLeaf, x: Any) -> dict[str, DeferredTensor]:
    """Returns the float tensors of one leaf, by name."""
    return {
        name: DeferredTensor(
            x.dtype, leaf.tensor_shape, functools.partial(_tensor, leaf, x, index)
        )
        for index, name in np.ndenumerate(leaf.tensors)
    }


def _tensor(leaf: NamedLeaf, x: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns one tensor of a leaf, in the checkpoint's layout."""
    if is_packed(x):
        one = jax.tree.map(lambda part: part.make(), matrix_of(x, index))
        return np.asarray(one.dequantize_matrix()).T
    at: list[Any] = [slice(None)] * len(leaf.shape)
    for axis, place in zip(leaf.batch_axes, index, strict=True):
        at[axis] = place
    x = np.asarray(x[tuple(at)])
    if leaf.geometry is None:
        return x.reshape(leaf.tensor_shape)
    # K and N may be several axes each: to `[*N, *K]`, then `[N, K]`.
    kinds = leaf.geometry.kinds.replace("b", "")
    order = [a for kind in "nk" for a, c in enumerate(kinds) if c == kind]
    return x.transpose(order).reshape(leaf.tensor_shape)


def matrix_of(q: QTensor, index: tuple[int, ...]) -> QTensor:
    """Returns one `[K, N]` kernel of a stack, whose arrays are made when needed."""
    part = lambda x: DeferredTensor(x.dtype, x.shape[len(index) :], lambda: x[index])
    arrays = {name: part(getattr(q, name)) for name in q.packing.arrays}
    return dataclasses.replace(q, **arrays, geometry=Geometry(), placement=None)
