"""Converts a wrapped model to a float model or to two trees."""

from typing import Any, TypeVar

from flax import nnx

from ..adapters.base import why_not
from ..quant.kernel import as_kernel
from ..trees.merge import merge as merge_trees
from ..trees.paths import Tree, leaves_by_path, nested, refuse_listed
from .variables import (
    adapted_kernels,
    adapter_of,
    base_of,
    del_attribute,
    is_base,
    join_path,
    set_attribute,
    unpack,
    variable_of,
)

M = TypeVar("M", bound=nnx.Module)


def merge(model: M) -> M:
    """Returns a plain float model, the adapters added as by `qlora_jax.merge`.

    Kernels get their dtype, variable type and metadata back, modules their class.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone. A
            model without adapters is copied.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> wrapped = ql.nnx.wrap(model, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> type(ql.nnx.merge(wrapped)).__name__
        'Linear'
    """
    model = nnx.clone(model)
    for _, holder, name in adapted_kernels(model):
        value = merge_trees(base_of(holder, name), adapter_of(holder, name).adapter)
        set_attribute(holder, name, unpack(variable_of(holder, name), value))
        del_attribute(holder, f"{name}_lora")
    for _, module in nnx.iter_modules(model):
        original = getattr(type(module), "qlora_original", None)
        if original is not None:
            object.__setattr__(module, "__class__", original)
    return model


def split(model: nnx.Module) -> tuple[dict, dict]:
    """Returns the base and the lora tree of a model, as nested dicts.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> layer = ql.nnx.QLoRALinear(64, 8, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(0))
        >>> base, lora = ql.nnx.split(layer)
        >>> sorted(base), lora["kernel"].rank
        (['bias', 'kernel'], 4)
    """
    base: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    for path, node in nnx.iter_graph(model):
        if is_base(node):
            base[join_path(path)] = node.get_value()
    for path, holder, name in adapted_kernels(model):
        base[join_path(path)] = base_of(holder, name)
        lora[join_path(path)] = adapter_of(holder, name).adapter
    return nested(base), nested(lora)


def join(model: M, base: Tree, lora: Tree) -> M:
    """Returns a new model with the parameters of two trees; inverts `split`.

    So a wrapped model takes adapters from a file, also of other ranks.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone.
        base: A base tree with the leaves that `split` gives.
        lora: A lora tree with adapters at the paths that `split` gives. Dropout stays
            that of the model.

    Raises:
        ValueError: If leaves are missing or left over, are of another kind or shape
            than the model's, or adapters do not fit; all are listed.

    Example:
        >>> import qlora_jax as ql
        >>> layer = ql.nnx.QLoRALinear(64, 8, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(0))
        >>> other = ql.nnx.QLoRALinear(64, 8, ql.QLoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> joined = ql.nnx.join(layer, *ql.nnx.split(other))
        >>> ql.nnx.split(joined)[1]["kernel"].rank
        2
    """
    model = nnx.clone(model)
    leaves, adapters = leaves_by_path(base), leaves_by_path(lora)
    old_leaves, old_adapters = map(leaves_by_path, split(model))
    problems = []
    for kind, new, old in [
        ("leaf", leaves, old_leaves),
        ("adapter", adapters, old_adapters),
    ]:
        problems += [f"{path}: no {kind}." for path in old.keys() - new.keys()]
        problems += [f"{path}: no such {kind}." for path in new.keys() - old.keys()]
    for path in leaves.keys() & old_leaves.keys():
        new, old = as_kernel(leaves[path]), as_kernel(old_leaves[path])
        if (type(new), new.shape) != (type(old), old.shape):
            problems.append(
                f"{path}: it must be of type {type(old).__name__} and shape "
                f"{old.shape}. Got {type(new).__name__} and {new.shape}."
            )
        adapter = adapters.get(path)
        reason = None if adapter is None else why_not(adapter, leaves[path])
        problems += [f"{path}: {reason}"] * (reason is not None)
    refuse_listed("these are not the parameters of the model", sorted(problems))
    for path, node in list(nnx.iter_graph(model)):
        if is_base(node):
            node.set_value(as_kernel(leaves[join_path(path)]).value)
    for path, holder, name in adapted_kernels(model):
        adapter, path = adapter_of(holder, name), join_path(path)
        adapter.set(adapters[path])
        if adapter.frozen is not None:
            adapter.frozen.set_value(leaves[path])
    return model
