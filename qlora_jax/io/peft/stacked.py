"""Converts between PEFT's adapters, one for each weight, and those of stacks here.

A stack has one rank. An adapter of a smaller rank is padded with zero columns of A and
zero rows of B: A B is unchanged, and their gradients are zero, so they stay zero.

PEFT also has adapters of parameters that hold all experts (`target_parameters`). For E
experts of rank r, A is `[E r, K]`, expert by expert, and B is `[N, r E]`, rank by rank.
Gate and up are halves of one parameter. If their adapters differ, A has the columns of
both, and B is zero outside two blocks. If one has no adapter, its half of B is zero.
"""

import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter, matrix_at, replace_arrays, scaling_at
from ...adapters.lora import LoRA
from ...quant.geometry import Geometry
from ...quant.kernel import Kernel
from ..names import BatchIndex
from .adapter_file import NamedBase, Position


def stack(
    kernel: Kernel, adapters: Mapping[BatchIndex, Adapter], dtype: DTypeLike | None
) -> Adapter:
    """Returns a kernel's adapter from those of its weights, by batch index.

    `dtype` None keeps the dtypes. Magnitudes are at least float32.
    """
    *batch_shape, k, n = kernel.geometry.matrix_shape(kernel.shape)
    sizes = {"k": k, "n": n, "r": max(x.rank for x in adapters.values())}
    first = next(iter(adapters.values()))
    if len(adapters) < math.prod(batch_shape):
        _check_can_be_zero(first)
    factors = [name for name, roles in first.roles.items() if "r" in roles]
    dtypes = {x.arrays[name].dtype for x in adapters.values() for name in factors}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            "A and B of one stack must have one dtype; choose it with `dtype`. Got "
            f"{sorted(map(str, dtypes))}."
        )

    def stack_arrays(name: str, x: Array) -> Array:
        stacked_dtype = x.dtype if dtype is None else jnp.dtype(dtype)
        if dtype is not None and name not in factors:
            stacked_dtype = jnp.promote_types(stacked_dtype, jnp.float32)
        shape = (*batch_shape, *(sizes[role] for role in first.roles[name]))
        stacked = np.zeros(shape, stacked_dtype)
        for index, adapter in adapters.items():
            array = adapter.arrays[name]
            stacked[index][tuple(map(slice, array.shape))] = array
        return jnp.asarray(stacked)

    # Weights without an adapter have zero factors, so any scaling will do.
    indices = np.ndindex(*batch_shape)
    scalings = tuple(scaling_at(adapters.get(index, first), ()) for index in indices)
    scaling = first.scaling if len({*scalings}) == 1 else scalings
    settings = {"scaling": scaling, "geometry": kernel.geometry}
    return replace_arrays(first, stack_arrays, **settings)


def _check_can_be_zero(adapter: Adapter) -> None:
    # With LoRA, zeros leave a weight unchanged. With DoRA, a weight without an adapter
    # would need magnitudes, which would then be trained.
    if not all("r" in roles for roles in adapter.roles.values()):
        raise ValueError(
            "every weight of a stack must have an adapter if one has an adapter of type"
            f" {type(adapter).__name__}, whose magnitudes are trained. Got some "
            "without."
        )


def unstack(adapter: Adapter, index: BatchIndex, rank: int) -> Adapter:
    """Returns the adapter of one weight, cut to `rank`; the part cut off must be 0."""
    matrix = matrix_at(adapter, index)
    if rank == 0:
        _check_can_be_zero(matrix)
    if rank > matrix.rank:
        raise ValueError(f"its rank must be at least {rank}. Got {matrix.rank}.")

    def cut(name: str, x: Array) -> Array | np.ndarray:
        axis = matrix.roles[name].find("r")
        if axis < 0:
            return x
        remaining, removed = np.split(x, [rank], axis=axis)
        if removed.any():
            raise ValueError(f"A and B must be zero beyond rank {rank} of the config.")
        return remaining

    return replace_arrays(matrix, cut)


def parameter_shapes(
    name: str, model: NamedBase, rank: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of PEFT's A and B for a parameter that holds all experts."""
    parts = model.parameters[name]
    num_experts = len(next(iter(parts.values())))
    (_, k), *_ = (model.named[path].tensor_shape for path in parts)
    n = sum(_widths(name, model).values())
    return {"a": (rank * num_experts, k), "b": (n, rank * num_experts)}


def _widths(name: str, model: NamedBase) -> dict[str, int]:
    """Returns the N of each kernel that a parameter holds, by path."""
    return {path: model.named[path].tensor_shape[0] for path in model.parameters[name]}


def split_parameter(
    name: str, model: NamedBase, a: np.ndarray, b: np.ndarray, scaling: float, rank: int
) -> dict[Position, LoRA]:
    """Returns the adapters of all experts, for each kernel that the parameter holds."""
    parts = model.parameters[name]
    a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)  # [E, K, r]
    b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)  # [E, r, N]
    ends = np.cumsum([*_widths(name, model).values()])
    b_parts = np.split(b, ends[:-1], axis=2)
    # If B is zero outside blocks, each kernel has its part of the rank; otherwise all
    # kernels share one A of the full rank.
    block_of_rank = np.arange(rank) * len(parts) // rank
    is_block = rank % len(parts) == 0 and b.any()
    if is_block and not any(
        x[:, block_of_rank != i].any() for i, x in enumerate(b_parts)
    ):
        masks = [block_of_rank == i for i in range(len(parts))]
    else:
        masks = [np.ones(rank, bool) for _ in parts]
    settings = {"scaling": scaling, "dropout": 0.0, "geometry": Geometry()}
    return {
        Position(path, index): LoRA(a[i][:, mask], b_part[i][mask], **settings)
        for (path, indices), b_part, mask in zip(
            parts.items(), b_parts, masks, strict=True
        )
        for i, index in enumerate(indices)
    }


def join_parameter(
    name: str,
    model: NamedBase,
    adapters: Mapping[str, Adapter],
    scaling: float,
    rank: int,
) -> dict[str, np.ndarray]:
    """Inverts `split_parameter`; raises ValueError if the adapters have no such form.

    The kernels' adapters must have one scaling. If they share one A, the parameter has
    their rank; otherwise each kernel gets an equal part of `rank`.
    """
    parts = model.parameters[name]
    adapted = {path: indices for path, indices in parts.items() if path in adapters}
    for path, indices in adapted.items():
        if not isinstance(adapter := adapters[path], LoRA):
            raise ValueError(f"its type must be LoRA. Got {type(adapter).__name__}.")
        for expert_scaling in (scaling_at(adapter, index) for index in indices):
            if np.float32(expert_scaling) != np.float32(scaling):
                raise ValueError(
                    f"its scalings must be {scaling}. Got {expert_scaling}."
                )
    # First try: one A for all kernels.
    if len(adapted) == 1 or min(adapters[path].rank for path in adapted) >= rank:
        a, b = _factors(adapted, adapters, rank)
        if all(np.array_equal(x, a[0]) for x in a):
            return _stored(a[0], _side_by_side(name, model, adapted, b))
    if rank % len(adapted):
        raise ValueError(
            f"its kernels must share one A, because the rank {rank} cannot be divided "
            f"by {len(adapted)}."
        )
    # Second try: a block of the rank for each kernel.
    try:
        a, b = _factors(adapted, adapters, rank // len(adapted))
    except ValueError as error:
        raise ValueError(f"its kernels have several A. {error}") from error
    blocks = [np.zeros((len(x), rank, x.shape[2]), x.dtype) for x in b]
    ranks = np.split(np.arange(rank), len(b))
    for block, block_ranks, x in zip(blocks, ranks, b, strict=True):
        block[:, block_ranks] = x
    joined_b = _side_by_side(name, model, adapted, blocks)
    return _stored(np.concatenate(a, axis=2), joined_b)


def _side_by_side(
    name: str, model: NamedBase, adapted: Iterable[str], factors: list[np.ndarray]
) -> np.ndarray:
    """Returns B `[E, r, N]` of a parameter; zero where a kernel has no adapter."""
    by_path = dict(zip(adapted, factors, strict=True))
    num_experts, rank, _ = factors[0].shape
    columns = [
        by_path[path]
        if path in by_path
        else np.zeros((num_experts, rank, width), factors[0].dtype)
        for path, width in _widths(name, model).items()
    ]
    return np.concatenate(columns, axis=2)


def _factors(
    parts: Mapping[str, list[BatchIndex]], adapters: Mapping[str, Adapter], rank: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns A `[E, K, r]` and B `[E, r, N]` of each kernel, cut to a rank."""
    kernels = [
        [unstack(adapters[path], index, rank).arrays for index in indices]
        for path, indices in parts.items()
    ]
    a = [np.stack([arrays["a"] for arrays in experts]) for experts in kernels]
    b = [np.stack([arrays["b"] for arrays in experts]) for experts in kernels]
    return a, b


def _stored(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    a, b = a.swapaxes(1, 2), b.transpose(2, 1, 0)  # [E, r, K] and [N, r, E]
    factors = {"a": a.reshape(-1, a.shape[2]), "b": b.reshape(len(b), -1)}
    return {name: np.ascontiguousarray(x) for name, x in factors.items()}
