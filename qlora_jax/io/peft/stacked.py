"""Stacks PEFT's adapters, one for each weight, and takes them apart.

A stack has one rank. An adapter of a smaller rank is padded with zero columns of A and
zero rows of B: A B is unchanged, and their gradients are zero, so they stay zero.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...adapters.base import Adapter, matrix_at, replace_arrays
from ...quant.kernel import Kernel


def stack(
    kernel: Kernel, adapters: Mapping[tuple[int, ...], Adapter], dtype: Any
) -> Adapter:
    """Returns a kernel's adapter from those of its weights, by batch index.

    `dtype` None keeps the dtypes. Magnitudes, which multiply, are at least float32.
    """
    *batch, k, n = kernel.geometry.matrix_shape(kernel.shape)
    sizes = {"k": k, "n": n, "r": max(x.rank for x in adapters.values())}
    first = next(iter(adapters.values()))
    if len(adapters) < math.prod(batch):
        _check_padded(first)
    is_factor = lambda name: "r" in first.roles[name]
    every = [pair for one in adapters.values() for pair in one.arrays.items()]
    dtypes = {x.dtype for name, x in every if is_factor(name)}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            "A and B of one stack must have one dtype; say which in `dtype`. Got "
            f"{sorted(map(str, dtypes))}."
        )

    def join(name: str, x: Any) -> Any:
        own = x.dtype if dtype is None else jnp.dtype(dtype)
        if dtype is not None and not is_factor(name):
            own = jnp.promote_types(own, jnp.float32)
        whole = np.zeros((*batch, *map(sizes.__getitem__, first.roles[name])), own)
        for index, one in adapters.items():
            x = one.arrays[name]
            whole[index][tuple(map(slice, x.shape))] = x
        return jnp.asarray(whole)

    # That of a weight without an adapter counts for nothing.
    each = [adapters.get(index, first).scaling for index in np.ndindex(*batch)]
    scaling: Any = first.scaling if len({*each}) == 1 else tuple(each)
    return replace_arrays(first, join, scaling=scaling, geometry=kernel.geometry)


def _check_padded(adapter: Adapter) -> None:
    """Refuses to pad adapters of which zeros change the weight."""
    if not all("r" in roles for roles in adapter.roles.values()):
        raise ValueError(
            f"each weight of a stack must have an adapter if one is of type "
            f"{type(adapter).__name__}: magnitudes of others would be trained too. Got "
            "some without."
        )


def unstack(adapter: Adapter, index: tuple[int, ...], rank: int) -> Adapter:
    """Returns the adapter of one weight, cut to `rank`; what is cut must be zero."""
    one = matrix_at(adapter, index)
    if rank == 0:
        _check_padded(one)
    if rank > one.rank:
        raise ValueError(f"its rank must be at least {rank}. Got {one.rank}.")

    def cut(name: str, x: Any) -> Any:
        place = one.roles[name].find("r")
        if place < 0:
            return x
        kept, rest = np.split(x, [rank], axis=place)
        if rest.any():
            raise ValueError(f"A and B must be zero beyond rank {rank} of the config.")
        return kept

    return replace_arrays(one, cut)
