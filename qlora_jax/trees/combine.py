"""Combined trees: kernels joined with their adapters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..adapters.base import AdaptedKernel, parts_of
from .adapters import adapters_by_path
from .paths import Tree, leaves_by_keys, map_by_path, nested_by_keys


def combine(base: Tree, lora: Tree) -> Tree:
    """Returns a base tree whose adapted kernels are `AdaptedKernel` leaves.

    Args:
        base: The base tree.
        lora: The lora tree.

    Raises:
        TypeError: If `base` is combined already.
        ValueError: If an adapter has no kernel in `base`, or does not fit it, or if a
            tree was restored without its structure.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> base2, lora2 = ql.split(ql.combine(base, lora))
        >>> jax.tree.structure(base2) == jax.tree.structure(base)
        True
    """
    adapters = adapters_by_path(base, lora)
    pair = lambda path, x: AdaptedKernel(x, adapters[path]) if path in adapters else x
    return map_by_path(pair, base)


def split(tree: Tree) -> tuple[Tree, dict]:
    """Returns the base and the lora tree of a combined one: inverts `combine`.

    Args:
        tree: A combined tree; without adapters, it is the base tree.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> base, lora = ql.split(tree)
        >>> sorted(base), sorted(lora)
        (['bias', 'kernel'], ['kernel'])
    """
    found = {keys: parts_of(x)[1] for keys, x in leaves_by_keys(tree).items()}
    adapters = {keys: adapter for keys, adapter in found.items() if adapter is not None}
    base = map_by_path(lambda _, x: parts_of(x)[0], tree)
    return base, nested_by_keys(adapters)


def lora_labels(tree: Tree) -> Tree:
    """Returns a label for each array of a tree, for `optax.partition`.

    "lora" in adapters, "kernel" for kernels that are trained through their quantization
    (`freeze_base=False`), "frozen" elsewhere.

    Args:
        tree: A combined tree, or a base or lora tree.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> labels = ql.lora_labels(tree)
        >>> labels["bias"], labels["kernel"].lora.a, labels["kernel"].base.codes
        ('frozen', 'lora', 'frozen')
    """
    known = lambda node: getattr(node, "trained_as", None)
    label = lambda node: jax.tree.map(lambda _: known(node) or "frozen", node)
    return jax.tree.map(label, tree, is_leaf=lambda x: known(x) is not None)


def lora_mask(tree: Tree) -> Tree:
    """Returns a bool for each array: whether it is trained, for `optax.masked`.

    `optax.masked` passes on the *raw gradients* of other arrays. `value_and_grad` gives
    zeros there, and `optax.partition` sets them to zero.

    Args:
        tree: A combined tree, or a base or lora tree.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> ql.lora_mask(tree)["bias"], ql.lora_mask(tree)["kernel"].lora.a
        (False, True)
    """
    return jax.tree.map(lambda label: label != "frozen", lora_labels(tree))


def value_and_grad(
    fun: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """Returns `jax.value_and_grad(fun)` for the trained leaves of a combined tree.

    Frozen leaves get zeros. `jax.grad` refuses packed codes ("grad requires real- or
    complex-valued inputs"), and `optax.masked` would update frozen leaves.

    Args:
        fun: A scalar function of a combined tree and other arguments.
        has_aux: Whether `fun` returns a pair, the second being auxiliary.

    Raises:
        TypeError: When the returned function is called, as `jax.value_and_grad`: if
            `fun` does not return a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> def loss(tree, x):
        ...     base, lora = ql.split(tree)
        ...     return jnp.sum(ql.apply(base, lora, x))
        >>> value, grads = ql.value_and_grad(loss)(tree, jnp.ones((2, 64)))
        >>> float(abs(grads["kernel"].lora.b).max()) > 0, float(grads["bias"].max())
        (True, 0.0)
    """

    def wrapped(tree: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        leaves, treedef = jax.tree.flatten(tree)
        mask = jax.tree.leaves(lora_mask(tree))

        def whole(trained: list, other: Callable[[Any], Any]) -> Tree:
            found, pairs = iter(trained), zip(leaves, mask, strict=True)
            return treedef.unflatten(next(found) if t else other(x) for x, t in pairs)

        def of_trained(trained: list) -> Any:
            return fun(whole(trained, lambda x: x), *args, **kwargs)

        trained = [x for x, t in zip(leaves, mask, strict=True) if t]
        value, grads = jax.value_and_grad(of_trained, has_aux=has_aux)(trained)
        return value, whole(grads, jnp.zeros_like)

    return wrapped
