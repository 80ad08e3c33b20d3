"""PEFT's adapters, one for each weight, to and from those of a stack of weights.

A stack has one rank. An adapter of a smaller rank is padded with zero columns of A and
zero rows of B, which get no gradient and so stay zero.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...adapters.base import Adapter, replace_arrays
from ...quant.kernel import Kernel


def stack(
    kernel: Kernel, adapters: Mapping[tuple[int, ...], Adapter], dtype: Any
) -> Adapter:
    """Returns the adapter of a kernel from those of its weights.

    Args:
        kernel: The kernel.
        adapters: The adapters by batch index, of NumPy arrays; weights without one get
            zeros.
        dtype: Dtype of the arrays; None for that of the adapters.

    Raises:
        ValueError: If the adapters differ in dtype and none is given.
    """
    *batch, k, n = kernel.geometry.matrix_shape(kernel.shape)
    sizes = {"k": k, "n": n, "r": max(x.rank for x in adapters.values())}
    dtypes = {x.dtype for one in adapters.values() for x in one.arrays.values()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            "A and B of one stack must have one dtype; say which in `dtype`. Got "
            f"{sorted(map(str, dtypes))}."
        )
    dtype = jnp.dtype(dtypes.pop() if dtype is None else dtype)
    first = next(iter(adapters.values()))

    def join(name: str, _: Any) -> Any:
        whole = np.zeros((*batch, *map(sizes.__getitem__, first.roles[name])), dtype)
        for index, one in adapters.items():
            x = one.arrays[name]
            whole[index][tuple(map(slice, x.shape))] = x
        return jnp.asarray(whole)

    # That of a weight without an adapter counts for nothing.
    each = [adapters.get(index, first).scaling for index in np.ndindex(*batch)]
    scaling: Any = first.scaling if len({*each}) == 1 else tuple(each)
    whole = replace_arrays(first, join)
    return whole.replace(scaling=scaling, geometry=kernel.geometry)


def unstack(adapter: Adapter, index: tuple[int, ...], rank: int) -> Adapter:
    """Returns the adapter of one weight of a stack.

    Args:
        adapter: The stack's adapter, of NumPy arrays.
        index: Which weight.
        rank: Its rank; 0 if it has no adapter.

    Raises:
        ValueError: If the stack's rank is smaller, or what is cut off is not zero.
    """
    one = adapter.at(index)
    if rank > one.rank:
        raise ValueError(f"its rank must be at least {rank}. Got {one.rank}.")

    def cut(name: str, x: Any) -> Any:
        place = one.roles[name].find("r")
        if place < 0:
            return x
        kept, rest = np.split(x, [rank], axis=place)
        if rest.any():
            raise ValueError(
                f"A and B must be zero beyond rank {rank}, its rank in the config."
            )
        return kept

    return replace_arrays(one, cut)
