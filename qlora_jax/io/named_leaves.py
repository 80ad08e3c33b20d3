"""Matches the leaves of a tree with the tensors of a checkpoint."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .._jax.pytree import is_tree_leaf
from ..quant.formats import FLOAT_DTYPES
from ..quant.geometry import Geometry
from ..quant.kernel import is_packed
from ..quant.qtensor import QTensor
from ..trees.paths import Tree, leaves_by_path, raise_if_any
from .files import refuse_names
from .names import Names
from .tensors import (
    DeferredTensor,
    TensorLike,
    equal_parts,
    matrix_in_stack,
    transposed,
)


@dataclass(frozen=True, eq=False)
class NamedLeaf:
    """A leaf of the tree, and the names of its tensors in the checkpoint."""

    path: str
    shape: tuple[int, ...]
    # None if the leaf is not a kernel. Its axes are then the batch axes, followed by
    # the axes of its tensors.
    geometry: Geometry | None
    is_vector: bool  # a bias of several axes, which is a vector in the checkpoint
    tensor_names: np.ndarray  # in the shape of the batch axes
    window: tuple[int, ...] = ()  # of a convolution, whose tensors are [N, K, *window]

    @property
    def batch_axes(self) -> list[int]:
        """The positions of the batch axes."""
        if self.geometry is None:
            return list(range(self.tensor_names.ndim))
        roles = self.geometry.roles(len(self.shape))
        return [axis for axis, role in enumerate(roles) if role == "b"]

    def check_is_matrix(self) -> None:
        """Raises ValueError for a convolution, which only PEFT adapters support."""
        if self.window:
            raise ValueError("convolutions cannot be loaded or saved")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of the leaf's tensors."""
        if self.geometry is not None:
            # The axes of the window are contracted, too: K here is K * prod(window).
            *_, k, n = self.geometry.matrix_shape(self.shape)
            return n, k // math.prod(self.window), *self.window
        shape = self.shape[self.tensor_names.ndim :]
        return (math.prod(shape),) if self.is_vector else shape


def leaf_of(path: str, shape: tuple[int, ...], names: Names) -> NamedLeaf:
    """Returns the leaf at a path; raises ValueError if the name table lacks it."""
    roles = names.roles(path)
    if "k" not in roles:  # not a kernel
        batch_shape = shape[: names.num_batch_axes(path)]
        tensor_names = names.of(path, batch_shape)
        is_vector = roles != ""  # such as "nn"; see `Entry.roles`
        return NamedLeaf(path, shape, None, is_vector, tensor_names)
    # A convolution contracts its window, so w counts as k: a kernel "wwkn" of shape
    # [3, 3, K, N] has matrices [9 K, N].
    geometry = Geometry.contracting(roles.replace("w", "k"), shape)
    tensor_names = names.of(path, geometry.matrix_shape(shape)[:-2])
    # Roles describe the trailing axes, so they are aligned from the right.
    role_sizes = zip(roles[::-1], shape[::-1], strict=False)
    window = tuple(size for role, size in role_sizes if role == "w")[::-1]
    return NamedLeaf(path, shape, geometry, False, tensor_names, window)


def refuse_shared_names(leaves: Iterable[NamedLeaf]) -> None:
    """Raises ValueError if two leaves have a tensor of the same name."""
    # `Names` cannot detect this. For example, `x.1` is one of the names `x.{layer}` if
    # the leaf has more than one layer.
    path_of: dict[str, str] = {}
    problems = []
    for leaf in leaves:
        for name in leaf.tensor_names.flat:
            if (path := path_of.setdefault(name, leaf.path)) != leaf.path:
                problems.append(f"{name}: it belongs to {path} and to {leaf.path}")
    raise_if_any("each name must belong to one leaf", problems)


def find_leaves(
    tensors: Mapping[str, TensorLike], names: Names, like: Tree
) -> dict[str, NamedLeaf]:
    """Returns the leaves of `like` by path; an error lists all mismatched tensors."""
    leaves: dict[str, NamedLeaf] = {}
    unnamed, missing, mismatched, not_float = [], [], [], []
    used: set[str] = set()
    # Check the leaves, and record which tensors they use.
    for path, array in leaves_by_path(like).items():
        try:
            leaves[path] = leaf = leaf_of(path, tuple(array.shape), names)
            leaf.check_is_matrix()
        except ValueError as error:
            unnamed.append(f"{path} ({error})")
            continue
        for name in leaf.tensor_names.ravel():
            used.add(name)
            if name not in tensors:
                missing.append(name)
                continue
            shape, dtype = tuple(tensors[name].shape), str(tensors[name].dtype)
            if shape != leaf.tensor_shape:
                mismatched.append(f"{name} (must be {leaf.tensor_shape}, is {shape})")
            elif dtype not in FLOAT_DTYPES:
                not_float.append(f"{name} ({dtype})")
    # The table must ignore every other tensor.
    unexpected = [
        name for name in tensors if name not in used and not names.is_ignored(name)
    ]
    refuse_shared_names(leaves.values())
    problems = {"missing": missing, "unexpected": unexpected}
    dtypes = f"not {', '.join(FLOAT_DTYPES)}"
    problems |= {"mis-shaped": mismatched, dtypes: not_float, "no name": unnamed}
    refuse_names(problems)
    return leaves


def exported_leaves(base: Tree, names: Names) -> list[tuple[NamedLeaf, Any]]:
    """Returns a base tree's named leaves with their values; an error lists problems."""
    leaves, problems = [], []
    for path, value in leaves_by_path(base).items():
        if is_tree_leaf(value) and not is_packed(value):
            raise TypeError(
                "`base` must contain arrays and packed kernels. Use `split` on a "
                "combined tree, and `quantize` on trained kernels. Got "
                f"{type(value).__name__} at {path}."
            )
        # Parts of the arrays on the devices of other processes cannot be read here.
        arrays = [a for a in jax.tree.leaves(value) if isinstance(a, jax.Array)]
        if not all(a.is_fully_addressable for a in arrays):
            raise ValueError(f"{path} must be on the devices of this process.")
        try:
            leaf = leaf_of(path, tuple(value.shape), names)
            leaf.check_is_matrix()
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if is_packed(value):
            # Blocks run along the contracted axes, so a kernel that was packed along
            # other axes cannot be written without packing it again.
            roles = value.geometry.roles(value.ndim)
            named_roles = leaf.geometry and leaf.geometry.roles(value.ndim)
            if roles != named_roles:
                problems.append(
                    f"{path}: it is packed with axes {roles!r}, but its names need "
                    f"{named_roles!r}"
                )
        leaves.append((leaf, value))
    raise_if_any("these leaves cannot be written", problems)
    refuse_shared_names(leaf for leaf, _ in leaves)
    return leaves


def float_tensors(base: Tree, names: Names) -> dict[str, DeferredTensor]:
    """Returns the float tensors of a base tree by name; packed kernels are decoded."""
    tensors: dict[str, DeferredTensor] = {}
    for leaf, value in exported_leaves(base, names):
        tensors |= float_tensors_of(leaf, value)
    return tensors


def float_tensors_of(leaf: NamedLeaf, value: Any) -> dict[str, DeferredTensor]:
    """Returns the float tensors of one leaf by name, which are computed when needed."""
    return {
        name: DeferredTensor(
            value.dtype,
            leaf.tensor_shape,
            functools.partial(_float_tensor, leaf, value, index),
        )
        for index, name in np.ndenumerate(leaf.tensor_names)
    }


def _float_tensor(leaf: NamedLeaf, value: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns one tensor of a leaf in the checkpoint's layout, `[N, K]`."""
    if is_packed(value):
        # Only one decoded matrix [K, N] is in memory at a time.
        matrix = jax.tree.map(lambda part: part.compute(), matrix_of(value, index))
        return np.asarray(matrix.dequantize_matrix()).T
    slices: list[int | slice] = [slice(None)] * len(leaf.shape)
    for axis, i in zip(leaf.batch_axes, index, strict=True):
        slices[axis] = i
    x = np.asarray(value[tuple(slices)])
    if leaf.geometry is None:
        return x.reshape(leaf.tensor_shape)
    # K and N may be several axes each: transpose to [*N, *K], then reshape to [N, K].
    roles = leaf.geometry.kinds.replace("b", "")
    order = [axis for role in "nk" for axis, r in enumerate(roles) if r == role]
    return x.transpose(order).reshape(leaf.tensor_shape)


def matrix_of(q: QTensor, index: tuple[int, ...]) -> QTensor:
    """Returns one `[K, N]` kernel of a stack, whose arrays are sliced when needed."""

    def slice_later(x: jax.Array) -> DeferredTensor:
        return DeferredTensor(x.dtype, x.shape[len(index) :], lambda: x[index])

    arrays: dict[str, Any] = {
        name: slice_later(getattr(q, name)) for name in q.packing.array_names
    }
    return dataclasses.replace(q, **arrays, geometry=Geometry(), placement=None)


# Some models store all experts of a layer as one tensor, in one of two ways:
# - A tensor `NAME` has one kernel of each expert. It is [E, K, N] in gpt-oss, and
#   [E, N, K] in Gemma 4 and many PyTorch modules (`Entry.stack_roles`).
# - A parameter of transformers (`Entry.parameter`) is [E, N, K] and has several kernels
#   of each expert. N are first the outputs of gate and then those of up, for example.
# Name tables have a name for each kernel of each expert, and these functions convert
# the tensors to such matrices [N, K] and back.


def split_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Splits float stacks of experts into matrices `[N, K]`.

    A stack `NAME` becomes `NAME.0`, `NAME.1` and so on. A parameter becomes the tensors
    that the table names instead. Raises CheckpointError if these exist already.
    """
    split: dict[str, Any] = {}
    duplicates = []

    def add_tensor(name: str, x: Any) -> None:
        if name in split:
            duplicates.append(name)
        split[name] = x

    for name, x in tensors.items():
        if len(x.shape) != 3:
            add_tensor(name, x)
            continue
        experts = [matrix_in_stack(x, i) for i in range(x.shape[0])]
        templates = names.parts_of_parameter(name)
        if (roles := names.stack_roles(name)) is not None:
            for i, matrix in enumerate(experts):
                add_tensor(
                    f"{name}.{i}", transposed(matrix) if roles == "kn" else matrix
                )
        elif templates and x.shape[1] % len(templates) == 0:
            for i, matrix in enumerate(experts):
                kernels = equal_parts(matrix, len(templates))
                for template, kernel in zip(templates, kernels, strict=True):
                    add_tensor(template.format(expert=i), kernel)
        else:
            add_tensor(name, x)
    refuse_names({"stored alone and also in a stack": duplicates})
    return split


def join_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Stacks `NAME.0`, `NAME.1` ... as `NAME` again; does not restore parameters.

    Tensors that do not form a stack, because a number is missing, stay as they are.
    """
    stack_names: dict[str, str] = {}  # the name of the stack of each part
    stacks: dict[str, dict[int, Any]] = {}  # the parts of each stack by number
    for name, x in tensors.items():
        match = re.fullmatch(r"(.*)\.(0|[1-9][0-9]{0,8})", name)
        if match and len(x.shape) == 2 and names.is_stack(match[1]):
            stack_names[name] = match[1]
            stacks.setdefault(match[1], {})[int(match[2])] = x
    stacks = {
        name: parts
        for name, parts in stacks.items()
        if name not in tensors and {*parts} == {*range(len(parts))}
    }
    joined: dict[str, Any] = {}
    for name, x in tensors.items():
        stack_name = stack_names.get(name, "")
        if stack_name not in stacks:
            joined[name] = x
        elif stack_name not in joined:
            # Files list names in alphabetical order, in which 10 comes before 2.
            parts = stacks[stack_name]
            experts = [parts[i] for i in range(len(parts))]
            joined[stack_name] = _stack_experts(experts, names.stack_roles(stack_name))
    return joined


def _stack_experts(experts: list[Any], roles: str | None) -> DeferredTensor:
    is_transposed = roles == "kn"
    shape = experts[0].shape[::-1] if is_transposed else experts[0].shape

    def stack_matrices() -> np.ndarray:
        matrices = [np.asarray(x[:, :]) for x in experts]
        return np.stack([x.T for x in matrices] if is_transposed else matrices)

    return DeferredTensor(experts[0].dtype, (len(experts), *shape), stack_matrices)
