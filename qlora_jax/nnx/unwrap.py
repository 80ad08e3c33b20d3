"""From a wrapped model back to a float model, or to two parameter trees."""

from typing import Any, TypeVar

from flax import nnx

from ..trees.merge import merge as merge_trees
from ..trees.paths import nested
from .variables import (
    Packed,
    adapted_kernels,
    adapter_of,
    attributes,
    base_of,
    del_attribute,
    join_path,
    set_attribute,
    unpack,
)

M = TypeVar("M", bound=nnx.Module)


def merge(model: M) -> M:
    """Returns a plain float model, the adapters added to their kernels.

    Each kernel gets its dtype, variable type and metadata back, each module its class.
    `qlora_jax.merge` is the same on two trees.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone. A
            model without adapters is copied.

    Returns:
        The float model. Weights are those of `qlora_jax.merge`: `W + scaling * A B`,
        summed in float32 and rounded once to the kernel's dtype.

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
        value = merge_trees(base_of(holder, name), adapter_of(holder, name).lora)
        set_attribute(holder, name, unpack(attributes(holder)[name], value))
        del_attribute(holder, f"{name}_lora")
    for _, module in nnx.iter_modules(model):
        original = getattr(type(module), "qlora_original", None)
        if original is not None:
            object.__setattr__(module, "__class__", original)
    return model


def split(model: nnx.Module) -> tuple[dict, dict]:
    """Returns the parameters as two trees, for `ql.summary`, `ql.merge` and so on.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; it is left alone.

    Returns:
        `base`, nested dicts of the model's parameters with kernels at the targets, and
        `lora`, nested dicts of a `LoRA` at each of those paths.

    Example:
        >>> import qlora_jax as ql
        >>> from flax import nnx
        >>> layer = ql.nnx.QLoRALinear(64, 8, rank=4, rngs=nnx.Rngs(0))
        >>> base, lora = ql.nnx.split(layer)
        >>> sorted(base), lora["kernel"].rank
        (['bias', 'kernel'], 4)
    """
    base: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param | Packed) and not isinstance(node, nnx.LoRAParam):
            base[join_path(path)] = node.get_value()
    for path, holder, name in adapted_kernels(model):
        base[join_path(path)] = base_of(holder, name)
        lora[join_path(path)] = adapter_of(holder, name).lora
    return nested(base), nested(lora)
