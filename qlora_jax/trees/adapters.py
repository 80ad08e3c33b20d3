"""Checks lora trees against base trees, and combines and splits the two."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import jax

from .._jax.pytree import is_tree_leaf
from ..adapters.base import (
    KINDS,
    AdaptedKernel,
    Adapter,
    is_adapter,
    misfit_reason,
    parts_of,
    replace_arrays,
)
from .paths import (
    KeyPath,
    Leaf,
    Tree,
    leaves_by_keys,
    leaves_by_path,
    map_by_path,
    nested_by_keys,
    raise_if_any,
)

T = TypeVar("T")

# The arrays that every packed kernel has.
PACKED_ARRAYS = frozenset({"codes", "scales"})


def checked_adapters(base: Tree, lora: Tree) -> dict[str, Adapter]:
    """Returns the adapters by path; raises unless each of them fits its kernel."""
    # 1. Both trees must have the right kinds of leaves.
    kernels = leaves_by_path(base)
    if combined := [p for p, x in kernels.items() if parts_of(x)[1] is not None]:
        raise TypeError(
            "`base` must not hold adapters: `split` a combined tree first. Got "
            f"adapters at {combined}."
        )
    check_structure(kernels)
    adapters = adapters_by_path(lora)
    # 2. Each adapter must have a kernel, and fit it.
    if unmatched := [path for path in adapters if path not in kernels]:
        raise ValueError(
            "every adapter of `lora` must have a kernel at its path in `base`. Got "
            f"adapters without a kernel at {unmatched}."
        )
    problems = {path: misfit_reason(x, kernels[path]) for path, x in adapters.items()}
    raise_if_any("these adapters do not fit their kernels", problems)
    return adapters


def check_lora_trees(trees: object) -> None:
    """Raises TypeError unless `adapters` is a collection of lora trees, not a tree."""
    # A loop over a tree would take its keys for trees.
    is_tree = isinstance(trees, Mapping) or is_tree_leaf(trees)
    if is_tree or not isinstance(trees, Collection):
        raise TypeError(
            f"`adapters` must be a list of lora trees. Got {type(trees).__name__}."
        )


def adapters_by_path(lora: Tree) -> dict[str, Adapter]:
    """Returns the adapters of a lora tree by path; raises for any other leaf."""
    leaves = leaves_by_path(lora)
    for kind in KINDS.values():  # LoRA has arrays a and b, DoRA m too
        check_structure(leaves, frozenset(kind.roles))
    if wrong := [path for path, leaf in leaves.items() if not is_adapter(leaf)]:
        raise ValueError(
            f"every leaf of `lora` must be an adapter. Got other leaves at {wrong}."
        )
    return leaves


def adapters_by_keys(lora: Tree) -> dict[KeyPath, Adapter]:
    """Returns the adapters of a lora tree by key path; raises for any other leaf."""
    adapters_by_path(lora)  # raises for other leaves
    return leaves_by_keys(lora)


def with_trained(base: Tree, adapters: Mapping[str, Adapter]) -> Tree:
    """Returns the base tree in which each `Trained` adapter replaces its leaf."""

    def replace_trained(path: str, leaf: Leaf) -> Leaf:
        adapter = adapters.get(path)
        value = None if adapter is None else adapter.replacement
        return leaf if value is None else value

    return map_by_path(replace_trained, base)


def check_structure(
    leaves: Mapping[str, Leaf], array_names: frozenset[str] = PACKED_ARRAYS
) -> None:
    """Raises ValueError where a kernel or adapter became a dict of its arrays."""
    # Checkpoint readers that do not know the classes return such dicts. A dict with all
    # of the names must have been a kernel or an adapter.
    siblings: dict[str, set[str]] = {}  # names of arrays, by the path of their dict
    for path, leaf in leaves.items():
        if not is_tree_leaf(leaf):
            parent, _, name = path.rpartition("/")
            siblings.setdefault(parent, set()).add(name)
    raise_if_any(
        "a tree was restored without its structure. Restore it into the tree of shapes "
        "that jax.eval_shape(lambda: ql.init(key, params, config)) returns, or build "
        "each kernel with ql.QTensor.from_parts. Got",
        [
            f"{parent}: an array for each of {sorted(names)}"
            for parent, names in siblings.items()
            if array_names <= names
        ],
    )


def combine(base: Tree, lora: Tree) -> Tree:
    """Returns a base tree whose adapted kernels are `AdaptedKernel` leaves.

    Args:
        base: The base tree.
        lora: The lora tree.

    Raises:
        TypeError: If `base` is already combined.
        ValueError: If an adapter has no kernel in `base` or does not fit it, or if a
            tree was restored without its structure.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> base2, lora2 = ql.split(ql.combine(base, lora))
        >>> jax.tree.structure(base2) == jax.tree.structure(base)
        True
    """
    adapters = checked_adapters(base, lora)

    def join_adapter(path: str, leaf: Leaf) -> Leaf:
        return AdaptedKernel(leaf, adapters[path]) if path in adapters else leaf

    return map_by_path(join_adapter, base)


def split(tree: Tree) -> tuple[Tree, dict]:
    """Returns the base and the lora tree of a combined tree: the inverse of `combine`.

    Args:
        tree: A combined tree. Without adapters, it is returned as the base tree.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> base, lora = ql.split(tree)
        >>> sorted(base), sorted(lora)
        (['bias', 'kernel'], ['kernel'])
    """
    by_keys = {keys: parts_of(x)[1] for keys, x in leaves_by_keys(tree).items()}
    adapters = {keys: x for keys, x in by_keys.items() if x is not None}
    base = map_by_path(lambda _, leaf: parts_of(leaf)[0], tree)
    return base, nested_by_keys(adapters)


def lora_labels(tree: Tree) -> Tree:
    """Returns a label for each array of a tree, for `optax.partition`.

    The label is "lora" for the trained arrays of adapters, "kernel" in kernels that are
    trained through their quantization (`freeze_base=False`), and "frozen" elsewhere.

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

    def label_arrays(node: Tree) -> Tree:
        label = getattr(node, "trained_as", "frozen")
        if not is_adapter(node):
            return _filled(node, label)
        # The ids of adapters that `select` chose are leaves, too.
        return replace_arrays(_filled(node, "frozen"), lambda _, x: _filled(x, label))

    # Kernels and adapters have a label. An `AdaptedKernel` has none, so the map goes on
    # to its parts.
    return jax.tree.map(label_arrays, tree, is_leaf=lambda x: hasattr(x, "trained_as"))


def lora_mask(tree: Tree) -> Tree:
    """Returns a bool for each array: whether it is trained, for `optax.masked`.

    For the other arrays, `optax.masked` returns the *raw gradients* as updates. Those
    of `value_and_grad` change nothing there, and `optax.partition` with
    `optax.set_to_zero` returns zeros.

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


@jax.tree_util.register_static
@dataclass(frozen=True)
class NoGradient:
    """The gradient of a frozen leaf: a node without arrays.

    Transformations of a whole tree, such as clipping by its norm, do not see it. If it
    is added to the leaf, the result is the leaf itself, as `optax.apply_updates` needs.
    A transformation that reads the leaf too, such as weight decay, raises an error.
    """

    trained_as = "frozen"
    __array_ufunc__ = None  # so that NumPy's arrays leave `+`, `-` and `*` to it

    def __radd__(self, leaf: T) -> T:
        return leaf

    __rsub__ = __radd__

    def __rmul__(self, rate: object) -> Self:
        return self


def _filled(tree: Tree, label: str) -> Tree:
    return jax.tree.map(
        lambda _: label, tree, is_leaf=lambda x: isinstance(x, NoGradient)
    )


def value_and_grad(
    fun: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """Returns `jax.value_and_grad(fun)` for the trained leaves of a combined tree.

    Each array of a frozen leaf gets an empty node, which `optax.apply_updates` accepts
    and transformations of the whole tree skip. `jax.grad` rejects packed codes ("grad
    requires real- or complex-valued inputs").

    Args:
        fun: A scalar function of a combined tree and other arguments.
        has_aux: Whether `fun` returns a pair of its value and auxiliary data.

    Raises:
        TypeError: When the returned function is called, if `fun` does not return a
            scalar.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> def loss(tree, x):
        ...     base, lora = ql.split(tree)
        ...     return jnp.sum(ql.apply(base, lora, x))
        >>> value, grads = ql.value_and_grad(loss)(tree, jnp.ones((2, 64)))
        >>> float(abs(grads["kernel"].lora.b).max()) > 0, grads["bias"]
        (True, NoGradient())
    """

    def wrapped(tree: Tree, *args: object, **kwargs: object) -> tuple[Any, Tree]:
        # Frozen leaves become None, so that `jax.grad` does not see their dtypes.
        mask = lora_mask(tree)
        trained = jax.tree.map(lambda x, keep: x if keep else None, tree, mask)

        def fill_frozen(trained: Tree, frozen_value: Callable[[Any], Any]) -> Tree:
            return jax.tree.map(
                lambda x, new: frozen_value(x) if new is None else new, tree, trained
            )

        def fun_of_trained(trained: Tree) -> Tree:
            return fun(fill_frozen(trained, lambda x: x), *args, **kwargs)

        value, grads = jax.value_and_grad(fun_of_trained, has_aux=has_aux)(trained)
        return value, fill_frozen(grads, lambda _: NoGradient())

    return wrapped
