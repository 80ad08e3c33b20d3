"""Functions for wrapped models: merge, split, join, place and `disable_adapters`."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._jax.specs import SpecEntry
from ..adapters.base import Adapter, is_adapter, misfit_reason
from ..quant.kernel import as_kernel
from ..trees.merge import merge as merge_trees
from ..trees.paths import Leaf, Tree, leaves_by_path, nested, raise_if_any
from ..trees.sharding import place as place_trees
from ..trees.sharding import spec_of_names
from .variables import (
    Frozen,
    Packed,
    UntrainedLeaves,
    adapted_kernels,
    adapter_of,
    base_of,
    check_module,
    del_attribute,
    float_variable,
    join_path,
    set_attribute,
    variable_of,
)

M = TypeVar("M", bound=nnx.Module)


def merge(model: M) -> M:
    """Returns a float model with merged adapters, as `qlora_jax.merge` does for trees.

    Kernels get their dtype, variable type and metadata back, and modules their class.

    Args:
        model: A wrapped model, which does not change.
            A model without adapters is copied.

    Raises:
        TypeError: If `model` is not an nnx module.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> wrapped = ql.nnx.wrap(model, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> type(ql.nnx.merge(wrapped)).__name__
        'Linear'
    """
    check_module(model)
    model = nnx.clone(model)
    for _, holder, name in adapted_kernels(model):
        value = merge_trees(base_of(holder, name), adapter_of(holder, name).adapter)
        set_attribute(holder, name, float_variable(variable_of(holder, name), value))
        del_attribute(holder, f"{name}_lora")
    for _, module in nnx.iter_modules(model):
        original = getattr(type(module), "qlora_original", None)  # before `wrap`
        if original is not None:
            object.__setattr__(module, "__class__", original)
    return model


def split(model: nnx.Module) -> tuple[dict, dict]:
    """Returns the base and the lora tree of a model, as nested dicts.

    Args:
        model: A wrapped model, which does not change.

    Raises:
        TypeError: If `model` is not an nnx module.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> layer = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> base, lora = ql.nnx.split(layer)
        >>> sorted(base), lora["kernel"].rank
        (['bias', 'kernel'], 4)
    """
    check_module(model)
    base = {path: x.get_value() for path, x in _base_variables(model).items()}
    kernels = {join_path(path): (x, name) for path, x, name in adapted_kernels(model)}
    # The base of a kernel that is trained through its quantizer is a `StraightThrough`.
    base |= {path: base_of(*kernel) for path, kernel in kernels.items()}
    lora = {path: adapter_of(*kernel).adapter for path, kernel in kernels.items()}
    return nested(base), nested(lora)


def join(model: M, base: Tree, lora: Tree) -> M:
    """Returns a new model with the parameters of two trees: the inverse of `split`.

    Use it to load adapters from a file into a wrapped model. Their ranks may differ.

    Args:
        model: A wrapped model, which does not change.
        base: A base tree with the same leaves as the one that `split` returns.
        lora: A lora tree with adapters at the same paths as in the one that `split`
            returns. The dropout rates of the model do not change.

    Raises:
        TypeError: If `model` is not an nnx module.
        ValueError: If leaves are missing, unexpected, or differ in type or shape from
            those of the model; if adapters do not fit; or if a `Trained` would replace
            an adapter of another kind, or the reverse. All are listed.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> layer, rngs = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), nnx.Rngs(1)
        >>> other = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=2), rngs=rngs)
        >>> layer = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=4), rngs=rngs)
        >>> joined = ql.nnx.join(layer, *ql.nnx.split(other))
        >>> ql.nnx.split(joined)[1]["kernel"].rank
        2
    """
    check_module(model)
    model = nnx.clone(model)
    leaves, adapters = leaves_by_path(base), leaves_by_path(lora)
    old_leaves, old_adapters = map(leaves_by_path, split(model))
    # Check everything before the first variable changes.
    problems = []
    for kind, new_tree, old_tree in [
        ("leaf", leaves, old_leaves),
        ("adapter", adapters, old_adapters),
    ]:
        missing, unexpected = old_tree.keys() - new_tree, new_tree.keys() - old_tree
        problems += [f"{path}: no {kind}." for path in missing]
        problems += [f"{path}: no such {kind}." for path in unexpected]
    for path in leaves.keys() & old_leaves.keys():
        reason = _leaf_misfit(leaves[path], old_leaves[path])
        problems += [f"{path}: {reason}"] if reason else []
    for path in adapters.keys() & old_adapters.keys():
        reason = _adapter_misfit(adapters[path], old_adapters[path], leaves.get(path))
        problems += [f"{path}: {reason}"] if reason else []
    raise_if_any("these are not the parameters of the model", sorted(problems))
    for path, variable in _base_variables(model).items():
        # The `value` of a packed kernel is the QTensor; that of others is an array.
        variable.set_value(as_kernel(leaves[path]).value)
    for path, holder, name in adapted_kernels(model):
        adapter, path = adapter_of(holder, name), join_path(path)
        adapter.set(adapters[path])
    return model


def _leaf_misfit(leaf: Leaf, old_leaf: Leaf) -> str | None:
    if not hasattr(leaf, "shape"):  # such as an adapter
        return f"it must be a kernel or an array. Got {type(leaf).__name__}."
    new, old = as_kernel(leaf), as_kernel(old_leaf)
    if (type(new), new.shape) == (type(old), old.shape):
        return None
    return (
        f"it must be of type {type(old).__name__} and shape {old.shape}. Got "
        f"{type(new).__name__} and {new.shape}."
    )


def _adapter_misfit(lora: object, old_lora: Adapter, leaf: Leaf) -> str | None:
    if not is_adapter(lora):
        return f"it must be an adapter. Got {type(lora).__name__}."
    # `wrap` chose by the kind of adapter which variable the module reads: a kernel, or
    # the array that replaces a leaf.
    if (lora.replacement is None) != (old_lora.replacement is None):
        kinds = type(old_lora).__name__, type(lora).__name__
        return "its adapter must be a {}, as in the model. Got a {}.".format(*kinds)
    return misfit_reason(lora, leaf)


def _base_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the variables that hold the leaves of the base tree, by path."""
    of_adapters = nnx.LoRAParam | UntrainedLeaves | Frozen
    variables: dict[str, nnx.Variable] = {
        join_path(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | Packed) and not isinstance(node, of_adapters)
    }
    # A leaf that is trained in full is in the `frozen` of its adapter.
    for path, holder, name in adapted_kernels(model):
        if (frozen := adapter_of(holder, name).frozen) is not None:
            variables[join_path(path)] = frozen
    return variables


def place(
    model: M,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    logical_axes: Mapping[str, SpecEntry] | None = None,
    rows: Sequence[SpecEntry] = (),
    memory: Literal["device", "host"] = "device",
) -> M:
    """Returns a wrapped model on a mesh, as `qlora_jax.sharding.place` does for trees.

    Codes and scales are split as the float kernel would be, A along K and B along N.
    All other variables are replicated.

    Args:
        model: A wrapped model, which does not change.
        mesh: The mesh, with Auto axes, Explicit axes or both.
        rules: Specs of float kernels and other parameters, by path pattern; by default
            the sharding metadata of the model's variables (`out_sharding`).
        logical_axes: Maps names in that metadata that are not mesh axes to mesh axes.
        rows: The mesh axes that split the row axes of inputs.
        memory: Where the codes of packed stacks are stored, as in
            `qlora_jax.sharding.place`.

    Raises:
        TypeError: If `model` is not an nnx module, or as `qlora_jax.sharding.place`.
        ValueError: As `qlora_jax.sharding.place`.

    Example:
        >>> import jax, qlora_jax as ql
        >>> from flax import nnx
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> layer = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> layer = ql.nnx.place(layer, mesh, {"kernel": P("fsdp")}, rows=["fsdp"])
        >>> tuple(layer.kernel.get_value().codes.sharding.spec)
        ('fsdp', None)
    """
    check_module(model)
    options: dict[str, Any] = {"rows": rows, "memory": memory}
    if rules is not None:
        options |= {"rules": rules, "logical_axes": logical_axes}
    else:
        by_path = {
            path: spec_of_names(path, _axis_names(variable), logical_axes or {})
            for path, variable in _base_variables(model).items()
        }
        options["specs"] = nested(by_path)  # a tree like the base tree
    model = join(model, *place_trees(*split(model), mesh, **options))
    # Replicate the variables that are in neither tree, such as batch statistics.
    placed = {id(variable) for variable in _base_variables(model).values()}
    for _, holder, name in adapted_kernels(model):
        placed.update(map(id, adapter_of(holder, name).variables.values()))
    replicated = NamedSharding(mesh, PartitionSpec())
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and id(node) not in placed:
            node.set_value(jax.device_put(node.get_value(), replicated))
    return model


def _axis_names(variable: nnx.Variable) -> Sequence[SpecEntry]:
    metadata = variable.get_metadata()
    # A packed variable keeps the metadata of the float one that it replaced.
    if isinstance(variable, Packed):
        metadata = dict(variable.get_metadata("float_metadata"))
    return metadata.get("out_sharding") or ()


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """A context in which a wrapped model computes without its adapters.

    Like PEFT's `disable_adapter`, it is for outputs of the base model, such as the
    reference of a preference loss. No product of an adapter is computed, and no dropout
    is drawn. `merge` and `split` still include the adapters.

    Like `model.eval()`, this changes the graph definition: it works inside and outside
    of `nnx.jit`, `nnx.grad` and `nnx.scan`, and `nnx.jit` compiles a second program.
    Earlier results of `nnx.split` and `nnx.cached_partial` keep their definition.

    Args:
        model: A wrapped model, or a part of one.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model has no adapters.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> layer, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
        >>> layer = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> layer.kernel_lora.b[...] += 1  # as training does
        >>> with ql.nnx.disable_adapters(layer):
        ...     y = layer(x)
        >>> bool(jnp.allclose(y, x @ ql.dequantize(layer.kernel.get_value())))
        True
        >>> bool(jnp.allclose(y, layer(x)))
        False
    """
    kernels = [(holder, name) for _, holder, name in adapted_kernels(model)]
    adapters = [adapter_of(*kernel) for kernel in kernels]
    if not adapters:
        raise ValueError(
            "`model` must have adapters: wrap it first. Got "
            f"{type(model).__name__} without any."
        )
    was_enabled = [adapter.enabled for adapter in adapters]  # contexts may be nested

    def enable(flags: list[bool]) -> None:
        for (holder, name), adapter, flag in zip(kernels, adapters, flags, strict=True):
            adapter.enabled = flag
            # A leaf that is trained in full is replaced, since its module reads it.
            if adapter.frozen is not None:
                variable = adapter.variables["value"] if flag else adapter.frozen
                set_attribute(holder, name, variable)

    try:
        enable([False] * len(adapters))
        yield
    finally:
        enable(was_enabled)
