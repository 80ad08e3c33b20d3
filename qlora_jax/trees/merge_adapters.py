"""Merges several adapters into one."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .._jax.arguments import known_values
from ..adapters.base import Adapter, replace_arrays
from ..adapters.config import as_rank
from ..adapters.lora import LoRA
from .adapters import adapters_by_keys
from .paths import Tree, nested_by_keys, path_string, refuse_listed


def merge_adapters(
    adapters: Sequence[Tree],
    weights: Sequence[float],
    *,
    method: Literal["cat", "svd", "linear"] = "cat",
    rank: int | None = None,
) -> Tree:
    """Returns one lora tree for a weighted sum of adapters of one base.

    The methods are those of PEFT's `add_weighted_adapter`. The scaling of the result is
    1: the weights and the adapters' scalings are in A, or in A and B. Its dtype is one
    that holds those of all adapters.

    Args:
        adapters: Lora trees of one base; a path that one lacks is left out of the sum.
        weights: The weight of each, finite; negative ones subtract.
        method: "cat" is the exact sum, of a rank that is the sum of ranks. "svd" is its
            best approximation of a rank, in the Frobenius norm. "linear" adds the
            adapters' A and B, each times the square root of its weight and scaling,
            which is not the sum of their products (it has products of one adapter's A
            with another's B); ranks must be equal.
        rank: The rank of "svd"; by default the largest of the adapters'. None for the
            other methods, whose ranks follow from those of the adapters.

    Raises:
        ValueError: If there are no adapters, not one finite weight for each, or another
            method; if `rank` is not a positive integer, or is given for a method other
            than "svd"; or if an adapter is not a `LoRA`, or two at a path differ in
            shape or dropout: all are listed.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> other = jax.tree.map(lambda x: x + 1, lora)
        >>> ql.merge_adapters([lora, other], [0.5, 0.5])["kernel"].rank
        8
        >>> ql.merge_adapters([lora, other], [1, -1], method="svd")["kernel"].rank
        4
    """
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {[*_METHODS]}. Got {method!r}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            "`weights` must have one weight for each adapter, of at least one. Got "
            f"{len(weights)} weights for {len(adapters)} adapters."
        )
    if not all(map(_is_finite_number, weights)):
        raise ValueError(f"`weights` must be finite numbers. Got {[*weights]}.")
    if rank is not None and method != "svd":
        raise ValueError(f"`rank` must be None for method {method!r}. Got {rank!r}.")
    rank = None if rank is None else as_rank(rank)
    found: dict[tuple, list[tuple[Any, float]]] = {}
    for tree, weight in zip(adapters, weights, strict=True):
        for keys, adapter in adapters_by_keys(tree).items():
            found.setdefault(keys, []).append((adapter, weight))
    problems = {path_string(k): _why_not(pairs, method) for k, pairs in found.items()}
    refuse_listed("these adapters cannot be merged", problems)

    def merged(pairs: list[tuple[Any, float]]) -> Adapter:
        parts = [_factors(*pair) for pair in pairs]
        largest = max(adapter.rank for adapter, _ in pairs)
        a, b = _METHODS[method](parts, largest if rank is None else rank)
        dtype = jnp.result_type(*(x for lora, _ in pairs for x in (lora.a, lora.b)))
        new = {"a": a.astype(dtype), "b": b.astype(dtype)}
        return replace_arrays(pairs[0][0], lambda name, _: new[name], scaling=1.0)

    return nested_by_keys({keys: merged(pairs) for keys, pairs in found.items()})


def _is_finite_number(weight: Any) -> bool:
    """Whether a weight is a number that float32 holds, as far as a trace knows it."""
    value = known_values(weight)
    if value is None:
        return True
    is_real = any(jnp.issubdtype(value.dtype, x) for x in (jnp.integer, jnp.floating))
    is_number = is_real and not value.ndim
    return is_number and abs(float(value)) <= float(np.finfo(np.float32).max)


class _Part(NamedTuple):
    a: Array  # float32 [*batch, K, r]
    b: Array  # float32 [*batch, r, N]
    factor: Array  # weight * scaling, [*batch, 1, 1] or []


def _factors(adapter: Any, weight: float) -> _Part:
    scaling = np.asarray(adapter.scaling, np.float64) * weight
    if scaling.ndim:
        scaling = scaling.reshape(*adapter.batch_shape, 1, 1)
    a, b = (x.astype(jnp.float32) for x in (adapter.a, adapter.b))
    return _Part(a, b, jnp.asarray(scaling, jnp.float32))


def _cat(parts: list[_Part], _: int) -> tuple[Array, Array]:
    a = jnp.concatenate([part.a * part.factor for part in parts], -1)
    return a, jnp.concatenate([part.b for part in parts], -2)


def _linear(parts: list[_Part], _: int) -> tuple[Array, Array]:
    roots = [jnp.sqrt(jnp.abs(part.factor)) for part in parts]
    pairs = list(zip(parts, roots, strict=True))
    a = sum(jnp.sign(part.factor) * root * part.a for part, root in pairs)
    return jnp.asarray(a), jnp.asarray(sum(root * part.b for part, root in pairs))


def _svd(parts: list[_Part], rank: int) -> tuple[Array, Array]:
    # A B = Q (R L) P^T, with orthogonal Q and P: only R L, of the summed ranks, is
    # decomposed, and no matrix is as large as the kernel.
    a, b = _cat(parts, rank)
    q, r = jnp.linalg.qr(a)
    p, left = jnp.linalg.qr(b.swapaxes(-1, -2))
    inner = jnp.matmul(r, left.swapaxes(-1, -2), precision=lax.Precision.HIGHEST)
    u, s, vt = jnp.linalg.svd(inner, full_matrices=False)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return product(q, u), product(s[..., None] * vt, p.swapaxes(-1, -2))


_METHODS = {"cat": _cat, "svd": _svd, "linear": _linear}


def _why_not(pairs: list[tuple[Any, float]], method: str) -> str | None:
    """Returns why the adapters of a kernel cannot be merged, or None if they can."""
    first, others = pairs[0][0], [adapter for adapter, _ in pairs]
    if others_of := [x.label for x in others if type(x) is not LoRA]:
        return f"each must be a lora. Got {others_of}."
    facts = lambda x: (x.matrix_shape, x.geometry)
    if any(facts(x) != facts(first) for x in others):
        return f"each must be of one kernel. Got {[x.matrix_shape for x in others]}."
    if len(rates := {x.dropout for x in others}) > 1:
        return f"dropout must be equal. Got {sorted(rates)}."
    ranks = [x.rank for x in others]
    if method == "linear" and len({*ranks}) > 1:
        return f"ranks must be equal for `method` linear. Got {ranks}."
    return None
