"""Gradients of a combined tree; a lora tree needs none of this."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .combine import lora_mask
from .paths import Tree


def value_and_grad(
    fun: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """Like `jax.value_and_grad`, for the trained leaves of a combined tree.

    Frozen leaves get zeros. `jax.grad` refuses packed codes ("grad requires real- or
    complex-valued inputs [...] but got uint8"), or gives them `float0` gradients that
    `optax.apply_updates` refuses; and `optax.masked` would update frozen leaves.

    Args:
        fun: A scalar function of a combined tree and other arguments.
        has_aux: Whether `fun` returns a pair, the second being auxiliary.

    Returns:
        A function of the same arguments that returns the value (with `has_aux`, the
        pair) and its gradient, which has the structure, shapes and dtypes of the tree.

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
        trained = jax.tree.leaves(lora_mask(tree))

        def of_trained(some: list) -> Any:
            found = iter(some)
            merged = [
                next(found) if is_trained else leaf
                for leaf, is_trained in zip(leaves, trained, strict=True)
            ]
            return fun(jax.tree.unflatten(treedef, merged), *args, **kwargs)

        some = [leaf for leaf, t in zip(leaves, trained, strict=True) if t]
        value, grads = jax.value_and_grad(of_trained, has_aux=has_aux)(some)
        found = iter(grads)
        full = [
            next(found) if is_trained else jnp.zeros_like(leaf)
            for leaf, is_trained in zip(leaves, trained, strict=True)
        ]
        return value, jax.tree.unflatten(treedef, full)

    return wrapped
