"""Converts PEFT's adapters of single weights to adapters of stacks, and back.

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

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter, replace_arrays
from ...adapters.lora import LoRA
from ...quant.geometry import Geometry
from ...quant.kernel import Kernel
from ..names import BatchIndex
from .adapter_file import NamedBase, Position


def stack(
    kernel: Kernel, adapters: Mapping[BatchIndex, Adapter], dtype: DTypeLike | None
) -> Adapter:
    """Returns a kernel's adapter, stacked from its weights' adapters by batch index.

    If `dtype` is None, the dtypes are kept. Magnitudes are at least float32.
    """
    *batch_shape, k, n = kernel.geometry.matrix_shape(kernel.shape)
    sizes = {"k": k, "n": n, "r": max(x.rank for x in adapters.values())}
    first = next(iter(adapters.values()))
    if len(adapters) < math.prod(batch_shape):
        _check_can_be_zero(first)
    # Factors can be padded to the rank of the stack; magnitudes have no rank.
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
            array = adapter.arrays[name]  # may have a smaller rank than the stack
            stacked[index][tuple(map(slice, array.shape))] = array
        return jnp.asarray(stacked)

    # Weights without an adapter have zero factors, so their scaling has no effect.
    indices = np.ndindex(*batch_shape)
    scalings = np.array([adapters.get(index, first).scalings for index in indices])
    stacked = replace_arrays(first, stack_arrays, geometry=kernel.geometry)
    return stacked.with_scalings(scalings)


def _check_can_be_zero(adapter: Adapter) -> None:
    # With LoRA, zeros leave a weight unchanged. With DoRA, a weight without an adapter
    # would need magnitudes, which would then be trained.
    if not all("r" in roles for roles in adapter.roles.values()):
        raise ValueError(
            "every weight of a stack must have an adapter if one adapter has trained "
            f"magnitudes ({type(adapter).__name__}). Got weights without an adapter."
        )


def unstack(adapter: Adapter, index: BatchIndex, rank: int) -> Adapter:
    """Returns the adapter of one weight, cut to `rank`; the part cut off must be 0."""
    matrix = adapter.at(index)
    if rank == 0:
        _check_can_be_zero(matrix)
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


def _columns(name: str, model: NamedBase) -> dict[str, slice]:
    """Returns the range of N of each kernel of a parameter, by path."""
    columns, start = {}, 0
    for path in model.parameters[name]:
        stop = start + model.named[path].tensor_shape[0]
        columns[path] = slice(start, stop)
        start = stop
    return columns


def _blocks(rank: int, count: int) -> list[slice]:
    """Returns equal slices of a rank, one for each kernel of a parameter."""
    size = rank // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def parameter_shapes(
    name: str, model: NamedBase, rank: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of PEFT's A and B for a parameter that holds all experts."""
    path, indices = next(iter(model.parameters[name].items()))
    _, k = model.named[path].tensor_shape
    n = max(columns.stop for columns in _columns(name, model).values())
    return {"a": (rank * len(indices), k), "b": (n, rank * len(indices))}


def split_parameter(
    name: str, model: NamedBase, a: np.ndarray, b: np.ndarray, scaling: float, rank: int
) -> dict[Position, LoRA]:
    """Returns the adapters of all experts, for each kernel that the parameter holds."""
    parts = model.parameters[name]
    a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)  # [E, K, r]
    b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)  # [E, r, N]
    kernel_bs = [b[..., columns] for columns in _columns(name, model).values()]
    # If each kernel's B is zero outside the kernel's block of the rank, each kernel
    # gets its block. Otherwise every kernel gets a copy of A, with the full rank.
    blocks = _blocks(rank, len(parts))
    is_block_diagonal = (
        rank % len(parts) == 0
        and b.any()
        and not any(
            np.delete(kernel_b, block, axis=1).any()
            for kernel_b, block in zip(kernel_bs, blocks, strict=True)
        )
    )
    if not is_block_diagonal:
        blocks = [slice(rank)] * len(parts)
    settings = {"scaling": scaling, "dropout": 0.0, "geometry": Geometry()}
    adapters = {}
    for path, kernel_b, block in zip(parts, kernel_bs, blocks, strict=True):
        for expert, index in enumerate(parts[path]):
            factors = a[expert][:, block], kernel_b[expert][block]  # [K, r], [r, N]
            adapters[Position(path, index)] = LoRA(*factors, **settings)
    return adapters


def join_parameter(
    name: str,
    model: NamedBase,
    adapters: Mapping[str, Adapter],
    scaling: float,
    rank: int,
) -> dict[str, np.ndarray]:
    """Inverts `split_parameter`; raises ValueError if that is not possible."""
    parts = model.parameters[name]
    adapted = {path: indices for path, indices in parts.items() if path in adapters}
    # A parameter has one scaling, and no magnitudes.
    for path, indices in adapted.items():
        if not (adapter := adapters[path]).is_linear:
            raise ValueError(f"its type must be LoRA. Got {type(adapter).__name__}.")
        for actual in (adapter.scalings[index] for index in indices):
            if np.float32(actual) != np.float32(scaling):
                raise ValueError(f"its scalings must be {scaling}. Got {actual}.")
    a, kernel_bs, blocks = _factors_and_blocks(adapted, adapters, rank)
    # Kernels without an adapter have columns of zeros.
    columns = _columns(name, model)
    n = max(part.stop for part in columns.values())
    b = np.zeros((len(a), rank, n), np.result_type(*kernel_bs))
    for path, kernel_b, block in zip(adapted, kernel_bs, blocks, strict=True):
        b[:, block, columns[path]] = kernel_b
    # To PEFT's layout: from [E, K, r] to [E r, K], and from [E, r, N] to [N, r E].
    a = a.swapaxes(1, 2).reshape(-1, a.shape[1])
    b = b.transpose(2, 1, 0).reshape(n, -1)
    return {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}


def _factors_and_blocks(
    adapted: Mapping[str, list[BatchIndex]], adapters: Mapping[str, Adapter], rank: int
) -> tuple[np.ndarray, list[np.ndarray], list[slice]]:
    """Returns a parameter's A, and each kernel's B and block of the rank."""

    def cut_factors(rank: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        # A [E, K, r] and B [E, r, N] of each kernel, cut to a rank.
        kernels = [
            [unstack(adapters[path], index, rank).arrays for index in indices]
            for path, indices in adapted.items()
        ]
        a = [np.stack([arrays["a"] for arrays in experts]) for experts in kernels]
        b = [np.stack([arrays["b"] for arrays in experts]) for experts in kernels]
        return a, b

    # Kernels that share A, as PEFT trains them, use the full rank together.
    if len(adapted) == 1 or min(adapters[path].rank for path in adapted) >= rank:
        a, b = cut_factors(rank)
        if all(np.array_equal(x, a[0]) for x in a):
            return a[0], b, [slice(rank)] * len(b)
    # Otherwise each kernel needs a block of the rank for its own A.
    if rank % len(adapted):
        raise ValueError(
            f"its kernels must share one A, because the rank {rank} cannot be divided "
            f"by {len(adapted)}."
        )
    try:
        a, b = cut_factors(rank // len(adapted))
    except ValueError as error:
        raise ValueError(f"its kernels have different A matrices. {error}") from error
    return np.concatenate(a, axis=2), b, _blocks(rank, len(b))
