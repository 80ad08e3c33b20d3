"""Converts between PEFT's adapters of single modules and this library's of stacks.

A stack has one rank. An adapter of a smaller rank is padded with zero columns of A and
zero rows of B. This does not change A B. The gradients of the padding are zero, so it
stays zero in training.

PEFT also has adapters of parameters that hold all experts (`target_parameters`). For E
experts of rank r, A is `[E r, K]`, expert by expert, and B is `[N, r E]`, rank by rank.
The gate and up kernels are the halves of one parameter. If their adapters differ, A has
the vectors of both, one after the other, and B is zero outside two blocks. If only one
of them has an adapter, the other's half of B is zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter, replace_arrays
from ...adapters.lora import LoRA, LowRank, with_scaling
from ...quant.geometry import Geometry
from ...quant.kernel import Kernel, as_kernel
from ...trees.adapters import checked_adapters
from ...trees.paths import Tree, leaves_by_path, raise_if_any
from ..named_leaves import NamedLeaf, leaf_of, refuse_shared_names
from ..names import BatchIndex, Names
from .config import PREFIX

# The modules of the embedding and the head, whose weights PEFT may store too.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# PEFT's names of an adapter's arrays.
_KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}

Arrays = Mapping[str, np.ndarray]  # an adapter's arrays in PEFT's layout, by name


class Position(NamedTuple):
    """The position of a checkpoint's tensor in the base tree."""

    path: str
    batch_index: BatchIndex  # in the leaf


@dataclass(frozen=True)
class NamedBase:
    """The leaves of a base tree, and their positions by name of tensor and module."""

    leaves: dict[str, Any]  # by path: kernels as `Kernel`, other leaves as arrays
    named_leaves: dict[str, NamedLeaf]  # by path
    positions: dict[str, Position]  # of tensors, by name
    modules: dict[str, Position]  # weights that can have an adapter, by module
    tables: set[str]  # the modules that are embeddings, `[V, D]` here and in PEFT
    is_tied: bool  # whether the embedding is also the head
    parameters: dict[str, dict[str, list[BatchIndex]]]  # see `Names.parameters`

    @property
    def parameter_paths(self) -> set[str]:
        """The paths of the leaves that are parts of `parameters`."""
        return {path for kernels in self.parameters.values() for path in kernels}

    @classmethod
    def of(cls, base: Tree, names: Names) -> "NamedBase":
        """Returns a base tree's leaves with their names; an error lists problems."""
        checked_adapters(base, {})  # checks the structure of `base`
        leaves, named_leaves, positions, modules = {}, {}, {}, {}
        tables, problems = set(), []
        for path, leaf in leaves_by_path(base).items():
            try:
                named = leaf_of(path, tuple(leaf.shape), names)
                leaves[path] = _with_named_axes(leaf, named)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                continue
            named_leaves[path] = named
            is_table = named.geometry is None and len(named.tensor_shape) == 2
            for index, name in np.ndenumerate(named.tensor_names):
                positions[name] = position = Position(path, index)
                module, _, kind = name.rpartition(".")
                if kind == "weight" and (is_table or named.geometry is not None):
                    modules[module] = position
                if kind == "weight" and is_table:
                    tables.add(module)
        raise_if_any("`names` must name every leaf of `base`", problems)
        refuse_shared_names(named_leaves.values())
        # The table of a tied model ignores the head, which a file may still have.
        is_tied = names.is_ignored(f"{HEAD}.weight")
        batch_shapes = {path: x.tensor_names.shape for path, x in named_leaves.items()}
        parameters = names.parameters(batch_shapes)
        mappings = leaves, named_leaves, positions, modules
        return cls(*mappings, tables, is_tied, parameters)

    def window(self, module: str) -> tuple[int, ...]:
        """Returns the window of a module that is a convolution; otherwise ()."""
        return self.named_leaves[self.modules[module].path].window

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor in the checkpoint."""
        return self.named_leaves[self.positions[name].path].tensor_shape


def _with_named_axes(leaf: Any, named: NamedLeaf) -> Any:
    """Returns a kernel as a `Kernel`, after checking its axes; keeps other leaves."""
    if named.geometry is None:
        return leaf
    kernel = as_kernel(leaf, named.geometry)
    # The same axes may have other roles if `contract` differs from the names.
    geometries = kernel.geometry, named.geometry
    roles, named_roles = (geometry.roles(kernel.ndim) for geometry in geometries)
    if roles != named_roles:
        raise ValueError(
            f"it has axes {roles!r} (b batch, k contracted, n output); its names need "
            f"{named_roles!r}. Set `contract` of the config."
        )
    return kernel


def array_keys(kind: type[Adapter], module: str) -> dict[str, str]:
    """Returns PEFT's keys for the arrays of a module's adapter, by name."""
    return {name: f"{PREFIX}{module}.{_KEYS[name]}" for name in kind.roles}


def to_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Returns an adapter's array as PEFT stores it: transposed."""
    # A of a convolution is [window * K, r] here and [r, K, *window] in PEFT; B is
    # [r, N] here and [N, r, 1, ...] in PEFT.
    if window and name == "a":
        return np.moveaxis(x.T.reshape(len(x.T), *window, -1), -1, 1)
    return x.T.reshape(*x.T.shape, *(1 for _ in window))


def from_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Inverts `to_stored`."""
    if window and name == "a":
        x = np.moveaxis(x, 1, -1)
    return x.reshape(len(x), -1).T if window else x.T


@dataclass(frozen=True)
class FileAdapter:
    """A low-rank adapter in a file."""

    label: str  # its name in error messages
    keys: dict[str, str]  # of its arrays in the file, by the arrays' names
    rank: int  # 0 for a module without an adapter, which has no arrays in the file
    scaling: float


@dataclass(frozen=True)
class ModuleAdapter(FileAdapter):
    """The adapter of one module, which is one matrix of a stack."""

    position: Position
    kind: type[LowRank]
    matrix_shape: tuple[int, ...]  # [N, K], or [N, K, *window] for a convolution
    dropout: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arrays in PEFT's layout, by name."""
        n, k, *window = self.matrix_shape
        sizes = {"k": k * math.prod(window), "n": n, "r": self.rank}
        shapes = {}
        for name in self.keys:
            shape = [sizes[role] for role in self.kind.roles[name]]
            view = np.broadcast_to(False, shape)  # takes no memory
            shapes[name] = to_stored(name, view, (*window,)).shape
        return shapes

    def read(self, arrays: Arrays) -> dict[Position, LowRank]:
        """Returns the adapter of one matrix [K, N], without the kernel's axes."""
        if self.rank == 0:
            return {}
        window = self.matrix_shape[2:]
        matrices = {name: from_stored(name, x, window) for name, x in arrays.items()}
        settings = {"scaling": self.scaling, "dropout": self.dropout}
        kwargs: Any = {**matrices, **settings, "geometry": Geometry()}
        return {self.position: self.kind(**kwargs)}

    def write(self, adapters: Mapping[str, LowRank]) -> Arrays:
        """Inverts `read`, for the adapters of stacks; raises ValueError otherwise."""
        adapter = adapters.get(self.position.path)
        if adapter is None:  # the caller reports a missing adapter once for each stack
            return {}
        if type(adapter) is not self.kind:
            raise ValueError(
                f"its type must be {self.kind.__name__}, from `use_dora`. Got "
                f"{type(adapter).__name__}."
            )
        # A module without an adapter may be in a stack with modules that have one. The
        # rank 0 requires that its part of the stack is zero.
        adapter = unstack(adapter, self.position.batch_index, self.rank)
        if self.rank:
            adapter = with_scaling(adapter, self.scaling)
        arrays = {name: np.asarray(adapter.arrays[name]) for name in self.keys}
        window = self.matrix_shape[2:]
        return {name: to_stored(name, x, window) for name, x in arrays.items()}


@dataclass(frozen=True)
class ParameterAdapter(FileAdapter):
    """The adapter of a parameter that holds the kernels of all experts."""

    kernels: Mapping[str, list[BatchIndex]]  # the experts' kernels, by path
    kernel_shapes: list[tuple[int, ...]]  # [N, K] of one expert, for each path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A and B in PEFT's layout, by name."""
        num_vectors = self.rank * len(next(iter(self.kernels.values())))
        n, k = sum(n for n, _ in self.kernel_shapes), self.kernel_shapes[0][1]
        return {"a": (num_vectors, k), "b": (n, num_vectors)}

    def _split_columns(self, b: np.ndarray) -> dict[str, np.ndarray]:
        """Returns views of each kernel's columns of B, by path."""
        ends = np.cumsum([n for n, _ in self.kernel_shapes])
        return dict(zip(self.kernels, np.split(b, ends[:-1], axis=2), strict=True))

    def _blocks(self, count: int) -> list[slice]:
        """Returns equal slices of the rank, one for each of `count` kernels."""
        size = self.rank // count
        return [slice(i * size, (i + 1) * size) for i in range(count)]

    def read(self, arrays: Arrays) -> dict[Position, LowRank]:
        """Returns the adapters of all experts, for each kernel of the parameter."""
        a, b, rank = arrays["a"], arrays["b"], self.rank
        a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)  # [E, K, r]
        b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)  # [E, r, N]
        kernel_bs = self._split_columns(b)
        # If each kernel's B is zero outside the kernel's block of the rank, each kernel
        # gets its block. Otherwise, and if B is still all zeros, as in a new adapter,
        # every kernel gets a copy of A, with the full rank.
        blocks = self._blocks(len(kernel_bs))
        is_block_diagonal = (
            rank % len(blocks) == 0
            and b.any()
            and not any(
                np.delete(kernel_b, block, axis=1).any()
                for kernel_b, block in zip(kernel_bs.values(), blocks, strict=True)
            )
        )
        if not is_block_diagonal:
            blocks = [slice(rank)] * len(blocks)
        settings = {"scaling": self.scaling, "dropout": 0.0, "geometry": Geometry()}
        adapters: dict[Position, LowRank] = {}
        for (path, kernel_b), block in zip(kernel_bs.items(), blocks, strict=True):
            for expert, index in enumerate(self.kernels[path]):
                factors = a[expert][:, block], kernel_b[expert][block]  # [K, r], [r, N]
                adapters[Position(path, index)] = LoRA(*factors, **settings)
        return adapters

    def write(self, adapters: Mapping[str, LowRank]) -> Arrays:
        """Inverts `read`; raises ValueError if that is not possible."""
        adapted = {path: adapters[path] for path in self.kernels if path in adapters}
        if not adapted:
            raise ValueError("it has no adapter.")
        # A parameter has no magnitudes.
        for path, adapter in adapted.items():
            if not adapter.is_linear:
                name = type(adapter).__name__
                raise ValueError(f"its type must be LoRA. Got {name}.")
            adapted[path] = with_scaling(adapter, self.scaling)
        a, kernel_bs, blocks = self._factors_and_blocks(adapted)
        n = sum(n for n, _ in self.kernel_shapes)
        b = np.zeros((len(a), self.rank, n), np.result_type(*kernel_bs))
        columns = self._split_columns(b)  # zeros for kernels without an adapter
        for path, kernel_b, block in zip(adapted, kernel_bs, blocks, strict=True):
            columns[path][:, block] = kernel_b
        # To PEFT's layout: from [E, K, r] to [E r, K], and from [E, r, N] to [N, r E].
        a = a.swapaxes(1, 2).reshape(-1, a.shape[1])
        return {"a": a, "b": b.transpose(2, 1, 0).reshape(b.shape[2], -1)}

    def _factors_and_blocks(
        self, adapted: Mapping[str, LowRank]
    ) -> tuple[np.ndarray, list[np.ndarray], list[slice]]:
        """Returns the parameter's A, and each kernel's B and block of the rank."""

        def cut_factors(rank: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
            # Returns A [E, K, r] of each kernel and B [E, r, N] of each, cut to a rank.
            kernel_as, kernel_bs = [], []
            for path, adapter in adapted.items():
                experts = [unstack(adapter, i, rank).arrays for i in self.kernels[path]]
                kernel_as.append(np.stack([arrays["a"] for arrays in experts]))
                kernel_bs.append(np.stack([arrays["b"] for arrays in experts]))
            return kernel_as, kernel_bs

        # Kernels that share A, as PEFT trains them, use the full rank together.
        count, rank = len(adapted), self.rank
        if count == 1 or min(adapter.rank for adapter in adapted.values()) >= rank:
            a, b = cut_factors(rank)
            if all(np.array_equal(x, a[0]) for x in a):
                return a[0], b, [slice(rank)] * count
        # Otherwise each kernel needs a block of the rank for its own A.
        if rank % count:
            raise ValueError(
                f"its kernels must share one A, because the rank {rank} cannot be "
                f"divided by {count}."
            )
        try:
            a, b = cut_factors(rank // count)
        except ValueError as error:
            message = f"its kernels have different A matrices. {error}"
            raise ValueError(message) from error
        return np.concatenate(a, axis=2), b, self._blocks(count)


def stack(
    kernel: Kernel, adapters: Mapping[BatchIndex, LowRank], dtype: DTypeLike | None
) -> LowRank:
    """Returns a kernel's adapter, stacked from its weights' adapters by batch index.

    If `dtype` is None, the dtypes are kept. Magnitudes are at least float32.
    """
    *batch_shape, k, n = kernel.geometry.matrix_shape(kernel.shape)
    sizes = {"k": k, "n": n, "r": max(x.rank for x in adapters.values())}
    first = next(iter(adapters.values()))
    if len(adapters) < math.prod(batch_shape):
        _check_has_no_magnitudes(first)
    # Factors can be padded to the rank of the stack; magnitudes have no rank.
    factors = [name for name, roles in first.roles.items() if "r" in roles]
    dtypes = {x.arrays[name].dtype for x in adapters.values() for name in factors}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            "A and B of one stack must have one dtype; choose it with `dtype`. Got "
            f"{sorted(map(str, dtypes))}."
        )

    # A stack has one scaling. If those of its weights differ, the B of each weight is
    # multiplied by the ratio, in float32 or a wider dtype.
    scaling = max(x.scaling for x in adapters.values())
    if any(x.scaling != scaling for x in adapters.values()):
        adapters = {i: _widened(x, scaling) for i, x in adapters.items()}
        first = next(iter(adapters.values()))

    def stack_arrays(name: str, x: Array) -> Array:
        stacked_dtype = x.dtype if dtype is None else jnp.dtype(dtype)
        if dtype is not None and name not in factors:
            stacked_dtype = jnp.promote_types(stacked_dtype, jnp.float32)
        shape = (*batch_shape, *(sizes[role] for role in first.roles[name]))
        stacked = np.zeros(shape, stacked_dtype)
        for index, adapter in adapters.items():
            array = adapter.arrays[name]  # may have a smaller rank than the stack
            stacked[index][tuple(map(slice, array.shape))] = array
        return jnp.asarray(stacked)

    return replace_arrays(first, stack_arrays, geometry=kernel.geometry)


def _widened(adapter: LowRank, scaling: float) -> LowRank:
    """Returns an equal adapter of another scaling, in float32 or a wider dtype."""

    def widen(_: str, x: Array) -> Array:
        return x.astype(np.promote_types(x.dtype, np.float32))

    return with_scaling(replace_arrays(adapter, widen), scaling)


def unstack(adapter: LowRank, index: BatchIndex, rank: int) -> LowRank:
    """Returns the adapter of one weight, cut to `rank`; the part cut off must be 0."""
    matrix = adapter.at(index)
    if rank == 0:
        _check_has_no_magnitudes(matrix)
    if rank > matrix.rank:
        raise ValueError(f"its rank must be at least {rank}. Got {matrix.rank}.")

    def cut(name: str, x: Array) -> Array | np.ndarray:
        axis = matrix.roles[name].find("r")
        if axis < 0:  # magnitudes
            return x
        remaining, removed = np.split(x, [rank], axis=axis)
        if removed.any():
            raise ValueError(f"A and B must be zero beyond rank {rank}.")
        return remaining

    return replace_arrays(matrix, cut)


def _check_has_no_magnitudes(adapter: Adapter) -> None:
    # With LoRA, zeros leave a weight unchanged. With DoRA, a weight without an adapter
    # would need magnitudes, which would then be trained.
    if not all("r" in roles for roles in adapter.roles.values()):
        raise ValueError(
            "every weight of a stack must have an adapter if one adapter has trained "
            f"magnitudes ({type(adapter).__name__}). Got weights without an adapter."
        )
