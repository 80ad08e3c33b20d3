"""Banks: lora trees of one base, of which a batch may use several."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32

from .._jax.arguments import checked_integers
from .._jax.memory import is_concrete
from .._jax.pytree import count_bytes, register
from ..adapters.base import Adapter, replace_arrays, used_ranks, with_dropout
from ..adapters.config import as_dropout
from ..adapters.lora import is_low_rank, with_scaling
from ..adapters.selected import Selected
from .adapters import adapters_by_keys, check_lora_trees
from .paths import (
    KeyPath,
    Tree,
    leaves_by_keys,
    map_by_path,
    nested_by_keys,
    path_string,
    raise_if_any,
)


@dataclass(frozen=True, eq=False)
class Bank:
    """Lora trees of one base, stacked in one tree with room for more; see `ql.bank`.

    Attributes:
        lora: The trained arrays: a lora tree whose arrays have one more axis in front,
            the E places of the bank. Thus `jax.vmap(optimizer.init)(bank.lora)` gives
            each adapter its own state. Smaller ranks are padded with zeros, whose
            gradient is zero.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> init = lambda seed, rank: ql.init(jax.random.key(seed),
        ...     {"kernel": jnp.ones((64, 8))}, ql.QLoRAConfig(rank=rank))[1]
        >>> bank = ql.bank([init(0, 4), init(1, 8)], capacity=3)
        >>> len(bank), bank.lora["kernel"].a.shape, bank[0]["kernel"].rank
        (3, (3, 64, 8), 4)
    """

    lora: Tree

    def __len__(self) -> int:
        return jax.tree.leaves(self.lora)[0].shape[0]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays."""
        return count_bytes(self)

    def __getitem__(self, place: int) -> Tree:
        """Returns the lora tree at a place, without padding, outside jit.

        Raises:
            IndexError: If the bank does not have the place.
            TypeError: If the place is not an integer, or the bank is traced.
        """
        index, arrays = self._checked_index(place), jax.tree.leaves(self)
        if not isinstance(index, int) or not all(map(is_concrete, arrays)):
            raise TypeError(
                "a place of a bank must be read outside jit, since ranks depend on "
                "values. Inside jit, choose adapters with `ql.select`."
            )

        def read_adapter(_: str, stack: Adapter) -> Adapter:
            return _without_padding(replace_arrays(stack, lambda _, x: x[index]))

        # A trace may close over a bank. Without this, the slices would be traced.
        with jax.ensure_compile_time_eval():
            return map_by_path(read_adapter, self.lora)

    def with_adapter(self, place: int | Int[Array, ""], lora: Tree) -> "Bank":
        """Returns the bank with another adapter at a place.

        Shapes stay the same, so functions of a bank are not compiled again.

        Args:
            place: From 0 to `len(bank) - 1`.
            lora: A lora tree of the same base, whose ranks are at most the bank's.

        Raises:
            IndexError: If the bank does not have the place, unless `place` is traced.
            TypeError: If the place is not an integer.
            ValueError: If adapters do not fit the bank; all of them are listed.
        """
        index = self._checked_index(place)
        take_first = functools.partial(jax.tree.map, lambda x: x[0])
        templates = leaves_by_keys(jax.eval_shape(take_first, self.lora))
        new = _stack_adapters([lora], templates, 1)  # a bank with one place
        return jax.tree.map(lambda old, x: old.at[index].set(x[0]), self, new)

    def _checked_index(self, place: int | Int[Array, ""]) -> int | Int32[Array, ""]:
        # An integer, or an array if the place is traced.
        index, value = checked_integers("place", place)
        if index.ndim:
            raise TypeError(f"`place` must be one integer. Got shape {index.shape}.")
        if value is None:
            return index
        if not 0 <= value < len(self):
            raise IndexError(f"the bank has places 0 to {len(self) - 1}. Got {value}.")
        return int(value)


register(Bank, ("lora",), ())


def bank(
    adapters: Sequence[Tree],
    *,
    capacity: int | None = None,
    dropout: float | None = None,
) -> Bank:
    """Returns a bank of lora trees of one base, of which a batch may use several.

    `select` chooses from the bank. If a tree lacks a path that others have, it gets
    zeros there, which add nothing.

    Args:
        adapters: Lora trees of one base. Their ranks, scalings and targets may differ.
            A path has one scaling in the bank: if an adapter has another one, its B is
            multiplied by the ratio. Adapters that are placed on a mesh keep their
            placement.
        capacity: The number of places, with room for adapters that come later
            (`Bank.with_adapter`); by default the number of adapters. A place without an
            adapter adds nothing.
        dropout: The dropout rate. By default, all adapters must have the same rate.

    Raises:
        TypeError: If `adapters` is a single tree or not a sequence, or `capacity` is
            not an integer.
        ValueError: If there are no adapters or more adapters than places, if `dropout`
            is out of range, or if two adapters differ in kind, kernel or dropout at a
            path; all such paths are listed.

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
    check_lora_trees(adapters)
    try:
        num_places = len(adapters) if capacity is None else operator.index(capacity)
    except TypeError:
        raise TypeError(f"`capacity` must be an integer. Got {capacity!r}.") from None
    if not 0 < len(adapters) <= num_places:
        raise ValueError(
            "`adapters` must have at least one adapter, and at most `capacity`. Got "
            f"{len(adapters)} adapters and a capacity of {capacity}."
        )
    if dropout is not None:
        rate = as_dropout(dropout)

        def set_dropout(_: str, adapter: Adapter) -> Adapter:
            # Kinds without a dropout rate cannot be in a bank, and are rejected later.
            return with_dropout(adapter, rate) if adapter.can_be_in_bank else adapter

        adapters = [map_by_path(set_dropout, tree) for tree in adapters]
    # The template of a path has the shapes and dtypes that fit all of its adapters.
    templates: dict[KeyPath, Adapter] = {}
    for tree in map(adapters_by_keys, adapters):
        for keys, adapter in tree.items():
            templates[keys] = _common_template(templates.get(keys, adapter), adapter)
    if not templates:
        raise ValueError("the trees of `adapters` must have an adapter. Got none.")
    return _stack_adapters(adapters, templates, num_places)


def select(bank: Bank, ids: Int[Array, "..."] | int) -> Tree:
    """Returns a lora tree that applies the chosen adapters of a bank.

    A batch may use several adapters: the kernel is decoded once for all of them, and `x
    A` and `(x A) B` are computed with each row's A and B. Differentiable in
    `bank.lora`: each row contributes to the gradient of the adapter that it uses.

    Args:
        bank: The bank.
        ids: Places in the bank: one for all rows, or `[R]`, one for each row of the
            first axis of the kernels' inputs. -1 selects the base alone. Out-of-range
            ids return NaN if they are traced.

    Raises:
        TypeError: If `bank` is not a Bank, or `ids` are not integers.
        ValueError: If `ids` have more than one axis, or are not traced and out of
            range.

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
            f"`bank` must be a Bank, as `ql.bank` returns. Got {type(bank).__name__}."
        )
    places, values = checked_integers("ids", ids)  # `values` is None if traced
    if places.ndim > 1:
        raise ValueError(f"`ids` must have at most one axis. Got shape {places.shape}.")
    if values is not None and not np.all((values >= -1) & (values < len(bank))):
        raise ValueError(
            f"`ids` must be from -1 to {len(bank) - 1}, for a bank of {len(bank)}. Got "
            f"{values.tolist()}."
        )

    def select_adapter(_: str, stack: Adapter) -> Adapter:
        # Scans over layers slice the first axis of every array, so the batch axes go in
        # front of the axis of places, and each layer gets a copy of the ids.
        batch = stack.batch_shape[1:]
        move_places = functools.partial(jnp.moveaxis, source=0, destination=len(batch))
        ids = jnp.broadcast_to(places, (*batch, *places.shape))  # [*batch, R]
        return Selected(jax.tree.map(move_places, stack), ids)

    return map_by_path(select_adapter, bank.lora)


def _common_template(first: Adapter, second: Adapter) -> Adapter:
    # The larger rank and the promoted dtype have room for both adapters.
    larger, smaller = first, second
    if second.rank > first.rank:
        larger, smaller = second, first

    def shape_of(name: str, x: Array) -> jax.ShapeDtypeStruct:
        # Adapters of different kinds, which have other arrays, are rejected later.
        dtype = smaller.arrays.get(name, x).dtype
        return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, dtype))

    return replace_arrays(larger, shape_of)


def _stack_adapters(
    lora_trees: Sequence[Tree], templates: Mapping[KeyPath, Adapter], num_places: int
) -> Bank:
    trees = [adapters_by_keys(tree) for tree in lora_trees]
    problems = [
        f"{path_string(keys)}, adapter {place}: {reason}"
        for place, tree in enumerate(trees)
        for keys in dict.fromkeys([*templates, *tree])
        if (reason := _misfit_reason(tree.get(keys), templates.get(keys))) is not None
    ]
    raise_if_any("these adapters cannot be in one bank", problems)
    lora = {}
    for keys, template in templates.items():
        # None stands for an adapter that lacks the path, and for an unused place.
        loras = [tree.get(keys) for tree in trees] + [None] * (num_places - len(trees))
        padded = [_pad(adapter, template) for adapter in loras]
        lora[keys] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *padded)
    return Bank(nested_by_keys(lora))


def _misfit_reason(adapter: Adapter | None, template: Adapter | None) -> str | None:
    if template is None:
        return "the bank has no adapter there."
    if adapter is None:
        return None
    if not adapter.can_be_in_bank:
        return f"a {adapter.label} cannot be in a bank."
    names = "label", "matrix_shape", *_equal_settings(template)
    if any(getattr(adapter, name) != getattr(template, name) for name in names):
        return f"it must be {_describe(template)}. Got {_describe(adapter)}."
    if adapter.rank > template.rank:
        return f"its rank must be at most {template.rank}. Got {adapter.rank}."
    for name, x in adapter.arrays.items():
        dtype = template.arrays[name].dtype
        if jnp.promote_types(x.dtype, dtype) != dtype:
            return f"{name.upper()} must fit the bank's dtype {dtype}. Got {x.dtype}."
    return None


def _equal_settings(template: Adapter) -> list[str]:
    """Returns the names of the settings that are equal in all places of a bank."""
    return [name for name in template.settings if name != "scaling"]


def _describe(adapter: Adapter) -> str:
    names = [name for name in _equal_settings(adapter) if name != "geometry"]
    settings_text = "".join(f" and {name} {getattr(adapter, name)}" for name in names)
    return (
        f"a {adapter.label} of {[*adapter.matrix_shape]}, kernel axes "
        f"{adapter.geometry.kinds!r}{settings_text}"
    )


def _pad(adapter: Adapter | None, template: Adapter) -> Adapter:
    # Zeros in A and B add nothing, and their gradient is zero.
    if is_low_rank(adapter) and is_low_rank(template):
        adapter = with_scaling(adapter, template.scaling)

    def pad_array(name: str, target: Array) -> Array:
        if adapter is None:
            return jnp.zeros(target.shape, target.dtype)
        x = adapter.arrays[name]
        sizes = zip(target.shape, x.shape, strict=True)
        return jnp.pad(x.astype(target.dtype), [(0, to - size) for to, size in sizes])

    return replace_arrays(template, pad_array)


def _without_padding(adapter: Adapter) -> Adapter:
    # The matrices of a stack may have different ranks, so keep the largest rank. An
    # adapter of zeros, in an unused place, keeps rank 1.
    rank = max(int(used_ranks(adapter).max()), 1)

    def cut_rank(name: str, x: Array) -> Array:
        roles = adapter.roles[name]
        axis = x.ndim - len(roles) + roles.find("r")
        return lax.slice_in_dim(x, 0, rank, axis=axis) if "r" in roles else x

    return replace_arrays(adapter, cut_rank)
