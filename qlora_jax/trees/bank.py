"""Banks of adapters of one base."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from .._jax.arguments import checked_integers
from .._jax.memory import is_concrete
from .._jax.pytree import register
from ..adapters.base import Adapter, replace_arrays, used_ranks
from ..adapters.selected import SELECTED
from .adapters import adapters_by_keys
from .paths import (
    Tree,
    leaves_by_keys,
    map_by_path,
    nested_by_keys,
    path_string,
    refuse_listed,
)


@dataclass(frozen=True, eq=False)
class Bank:
    """Adapters of one base in one tree, with places for more; made by `ql.bank`.

    Attributes:
        lora: What is trained: a tree whose arrays have one more axis in front, the E
            places of the bank. So `jax.vmap(optimizer.init)(bank.lora)` gives each
            adapter an optimizer of its own. Ranks are padded with zeros, which add
            nothing and get no gradient.
        scaling: The scalings by path, float32 `[E, *batch]`: not trained.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> init = lambda seed, rank: ql.init(jax.random.key(seed),
        ...     {"kernel": jnp.ones((64, 8))}, ql.QLoRAConfig(rank=rank))[1]
        >>> bank = ql.bank([init(0, 4), init(1, 8)], capacity=3)
        >>> len(bank), bank.lora["kernel"].a.shape, bank[0]["kernel"].rank
        (3, (3, 64, 8), 4)
    """

    lora: Tree
    scaling: dict[str, Float[Array, "..."]]

    def __len__(self) -> int:
        return next(iter(self.scaling.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    def __getitem__(self, place: int) -> Tree:
        """Returns the lora tree of a place, without padding, outside jit.

        Raises:
            IndexError: If the bank does not have the place.
            TypeError: If the place is not an integer, or if a trace does not know the
                values of the bank, of which ranks are a part.
        """
        index = self._checked_place(place)
        if not isinstance(index, int) or not all(
            map(is_concrete, jax.tree.leaves(self))
        ):
            raise TypeError(
                "a place of a bank must be read outside jit, since ranks depend on "
                "values. Inside, choose adapters by `ql.select`."
            )

        def read_adapter(path: str, stack: Adapter) -> Adapter:
            scaling = np.asarray(self.scaling[path][index]).ravel().tolist()
            same = scaling[0] if len({*scaling}) == 1 else tuple(scaling)
            adapter = replace_arrays(stack, lambda _, x: x[index], scaling=same)
            return _without_padding(adapter)

        with jax.ensure_compile_time_eval():  # a trace may close over a bank
            return map_by_path(read_adapter, self.lora)

    def with_adapter(self, place: int | Int[Array, ""], lora: Tree) -> "Bank":
        """Returns the bank with another adapter at a place.

        Shapes stay, so functions of a bank are not compiled again.

        Args:
            place: From 0 to `len(bank) - 1`.
            lora: A lora tree of the same base, with ranks of at most those of the bank.

        Raises:
            IndexError: If the bank does not have the place, where it is known.
            TypeError: If the place is not an integer.
            ValueError: If adapters do not fit; all are listed.
        """
        index = self._checked_place(place)
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)
        like = leaves_by_keys(jax.eval_shape(first, self.lora))
        new = _stacked([lora], like, 1)
        return jax.tree.map(lambda old, x: old.at[index].set(x[0]), self, new)

    def _checked_place(self, place: Any) -> int | Int32[Array, ""]:
        """Returns the number of a place, or an array where it is not known."""
        index, value = checked_integers("place", place)
        if index.ndim:
            raise TypeError(f"`place` must be one integer. Got shape {index.shape}.")
        if value is None:
            return index
        if not 0 <= value < len(self):
            raise IndexError(f"the bank has places 0 to {len(self) - 1}. Got {value}.")
        return int(value)


register(Bank, ("lora", "scaling"), ())


def bank(
    adapters: Sequence[Tree],
    *,
    capacity: int | None = None,
    dropout: float | None = None,
) -> Bank:
    """Returns a bank of adapters of one base, which share it in one batch.

    `select` chooses from it. A path that a LoRA lacks gets zeros, which add nothing.

    Args:
        adapters: Lora trees of one base. Their ranks, scalings and targets may differ.
            Those that are placed on a mesh stay so.
        capacity: The number of places, for adapters that come later
            (`Bank.with_adapter`); by default as many as there are adapters. The others
            hold zeros.
        dropout: The rate of dropout; by default theirs, which must be equal.

    Raises:
        ValueError: If there are no adapters or more than places, or if two have another
            kind, kernel or dropout at a path; all are listed.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> other = jax.tree.map(lambda x: x + 1, lora)
        >>> bank, x = ql.bank([lora, other]), jnp.ones((3, 64))
        >>> y = ql.apply(base, ql.select(bank, jnp.array([0, 1, -1])), x)
        >>> bool(jnp.allclose(y[1], ql.apply(base, other, x)[1]))
        True
    """
    size = len(adapters) if capacity is None else capacity
    if not 0 < len(adapters) <= size:
        raise ValueError(
            f"`adapters` must be at least one, and at most `capacity`. Got "
            f"{len(adapters)} and {capacity}."
        )
    if dropout is not None:
        put = lambda _, x: replace_arrays(x, lambda _, a: a, dropout=dropout)
        adapters = [map_by_path(put, tree) for tree in adapters]
    like: dict[tuple, Adapter] = {}
    for tree in map(adapters_by_keys, adapters):
        for keys, adapter in tree.items():
            like[keys] = _larger(like.get(keys, adapter), adapter)
    return _stacked(adapters, like, size)


def select(bank: Bank, ids: Int[Array, "..."] | int) -> Tree:
    """Returns a lora tree that applies the chosen adapters of a bank.

    It goes wherever a lora tree goes. A batch may use several adapters: the kernel is
    decoded once for all, and `x A` and `(x A) B` are computed with each row's A and B.
    Differentiable in `bank.lora`: rows give gradients to the adapters that they use.

    Args:
        bank: The bank.
        ids: Places in it: one for all, or `[R]`, one for each row of the first axis of
            the inputs of kernels. -1 is the base alone. Where only the program knows
            the values, others that the bank does not have give NaN.

    Raises:
        TypeError: If `bank` is not a Bank, or `ids` are not integers.
        ValueError: If `ids` have more than one axis, or are known and not in the bank.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> chosen = ql.select(ql.bank([lora]), 0)
        >>> ql.apply(base, chosen, jnp.ones((3, 64))).shape
        (3, 8)
    """
    if not isinstance(bank, Bank):
        raise TypeError(
            "`bank` must be a Bank, which `ql.bank` makes of lora trees. Got "
            f"{type(bank).__name__}."
        )
    places, values = checked_integers("ids", ids)
    if places.ndim > 1:
        raise ValueError(f"`ids` must have at most one axis. Got shape {places.shape}.")
    if values is not None and not np.all((values >= -1) & (values < len(bank))):
        raise ValueError(
            f"`ids` must be from -1 to {len(bank) - 1}, for a bank of {len(bank)}. Got "
            f"{values.tolist()}."
        )

    def select_adapter(path: str, stack: Adapter) -> Adapter:
        # Scans over layers slice the first axis of all arrays.
        scaling = bank.scaling[path]
        batch = scaling.shape[1:]
        inner = lambda x: jnp.moveaxis(x, 0, len(batch))
        return SELECTED[type(stack)](
            **{name: inner(x) for name, x in stack.arrays.items()},
            scaling=inner(scaling),
            ids=jnp.broadcast_to(places, (*batch, *places.shape)),
            dropout=stack.dropout,
            geometry=stack.geometry,
        )

    return map_by_path(select_adapter, bank.lora)


def _larger(one: Adapter, other: Adapter) -> Adapter:
    """Returns the shapes of the adapter of larger rank, in a dtype that holds both."""
    larger, other = (other, one) if other.rank > one.rank else (one, other)

    def shape(name: str, x: Any) -> jax.ShapeDtypeStruct:
        dtype = other.arrays.get(name, x).dtype
        return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, dtype))

    return replace_arrays(larger, shape)


def _stacked(
    adapters: Sequence[Tree], like: Mapping[tuple, Adapter], size: int
) -> Bank:
    """Returns a bank whose adapters have the paths, shapes and dtypes of `like`."""
    trees = [adapters_by_keys(tree) for tree in adapters]
    problems = [
        f"{path_string(keys)}, adapter {place}: {reason}"
        for place, tree in enumerate(trees)
        for keys in dict.fromkeys([*like, *tree])
        if (reason := _why_not(tree.get(keys), like.get(keys))) is not None
    ]
    refuse_listed("these adapters cannot be in one bank", problems)
    lora, scaling = {}, {}
    for keys, own in like.items():
        each = [tree.get(keys) for tree in trees] + [None] * (size - len(trees))
        padded = [_padded(adapter, own) for adapter in each]
        lora[keys] = jax.tree.map(lambda *x: jnp.stack(x), *padded)
        factors = [_scaling(adapter, own.batch_shape) for adapter in each]
        scaling[path_string(keys)] = jnp.asarray(factors, jnp.float32)
    return Bank(nested_by_keys(lora), scaling)


def _why_not(adapter: Adapter | None, like: Adapter | None) -> str | None:
    """Returns why an adapter cannot be in a bank, or None if it can."""
    if like is None:
        return "the bank has no adapter there."
    if adapter is None:
        is_zero = all("r" in roles for roles in like.roles.values())
        return None if is_zero else f"it must be there: zeros change a {like.label}."
    if type(adapter) not in SELECTED:
        return f"a {adapter.label} cannot be in a bank."
    facts = lambda x: (x.label, *x.matrix_shape, x.geometry, x.dropout)
    if facts(adapter) != facts(like):
        said = lambda x: (
            f"a {x.label} of {[*x.matrix_shape]}, kernel axes {x.geometry.kinds!r} and "
            f"dropout {x.dropout}"
        )
        return f"it must be {said(like)}. Got {said(adapter)}."
    if adapter.rank > like.rank:
        return f"its rank must be at most {like.rank}. Got {adapter.rank}."
    for name, x in adapter.arrays.items():
        dtype = like.arrays[name].dtype
        if jnp.promote_types(x.dtype, dtype) != dtype:
            return f"{name.upper()} must fit the bank's dtype {dtype}. Got {x.dtype}."
    return None


def _padded(adapter: Adapter | None, like: Adapter) -> Adapter:
    """Returns an adapter with zeros up to a rank; all zeros for None."""

    def pad(name: str, own: Any) -> Array:
        if adapter is None:
            return jnp.zeros(own.shape, own.dtype)
        x = adapter.arrays[name]
        more = [(0, a - b) for a, b in zip(own.shape, x.shape, strict=True)]
        return jnp.pad(x.astype(own.dtype), more)

    return replace_arrays(like, pad, scaling=1.0)


def _scaling(adapter: Adapter | None, batch: tuple[int, ...]) -> np.ndarray:
    """Returns the scalings of a stack, `[*batch]`; 1 for None."""
    scaling = 1.0 if adapter is None else adapter.scaling
    return np.broadcast_to(
        np.reshape(scaling, batch if np.ndim(scaling) else ()), batch
    )


def _without_padding(adapter: Adapter) -> Adapter:
    """Returns an adapter without the last columns of A and rows of B that are zero."""
    rank = max(int(used_ranks(adapter).max()), 1)

    def cut(name: str, x: Array) -> Array:
        roles = adapter.roles[name]
        at = x.ndim - len(roles) + roles.find("r")
        return lax.slice_in_dim(x, 0, rank, axis=at) if "r" in roles else x

    return replace_arrays(adapter, cut)
