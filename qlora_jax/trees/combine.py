"""Combined trees: kernels joined with their adapters."""

import jax

from ..adapters.base import AdaptedKernel, parts_of
from .adapters import adapters_by_path
from .paths import Tree, leaves_by_keys, map_by_path, nested_by_keys


def combine(base: Tree, lora: Tree) -> Tree:
    """Joins kernels and their adapters in one tree, for `optax.partition` and masks.

    Args:
        base: The base tree.
        lora: The lora tree.

    Returns:
        The base tree with an `AdaptedKernel` for each kernel that has an adapter.

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
    """Inverts `combine`: separates the adapters from their kernels.

    Args:
        tree: A combined tree; without adapters, it is the base tree.

    Returns:
        The base tree, and the lora tree: a nested dict with the adapter of each kernel
        that has one, at the kernel's path.

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
    """Labels every array of a tree for `optax.partition`.

    Args:
        tree: A combined tree, or a base or lora tree.

    Returns:
        The same structure: "lora" in adapters, "kernel" for kernels that are trained
        through their quantization (`freeze_base=False`), "frozen" elsewhere.

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
    """Marks every array that is trained, for `optax.masked`.

    `optax.masked` passes on the *raw gradients* of other arrays. `value_and_grad` gives
    zeros there, and `optax.partition` sets them to zero.

    Args:
        tree: A combined tree, or a base or lora tree.

    Returns:
        The same structure with a bool for each array: whether `lora_labels` gives it
        another label than "frozen".

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> ql.lora_mask(tree)["bias"], ql.lora_mask(tree)["kernel"].lora.a
        (False, True)
    """
    return jax.tree.map(lambda label: label != "frozen", lora_labels(tree))
