"""`wrap` replaces kernels of an nnx model, and the classes of their modules."""

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array

from .._jax.memory import check_donated
from ..adapters.base import Adapter
from ..adapters.config import QLoRAConfig, check_config
from ..quant.kernel import as_kernel
from ..trees.init import init_targets
from ..trees.paths import Leaf, leaves_by_path
from ..trees.targets import find_targets, refuse_tables
from .bridge import linen_axis_roles, packed_linen
from .sites import Site, check_targets, find_sites, packed_rule, why_no_adapter
from .subclass import materializing, packed
from .variables import (
    AdapterModule,
    Frozen,
    Holder,
    adapted_kernels,
    attributes,
    check_module,
    join_path,
    packed_variable,
    runs_linen,
    set_attribute,
)

M = TypeVar("M", bound=nnx.Module)


def wrap(
    model: M,
    config: QLoRAConfig,
    *args: object,
    rngs: nnx.Rngs,
    donate: bool = False,
    **kwargs: object,
) -> M:
    """Returns a model whose targeted kernels are packed, each with an adapter.

    `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and registered classes compute with
    the packed kernel. Other modules get a float kernel during each call (the adapter
    merged in, rounded to the kernel's dtype), which the backward pass decodes again. In
    these modules, `jax.lax.ragged_dot` multiplies by packed experts directly
    (`ql.ragged_dot`). Stacks made by `nnx.vmap` stay stacks. Each module with a target
    gets a subclass of its class.

    The initialized linen module inside an `nnx.bridge.ToNNX` runs as in
    `ql.linen.wrap`. If its kernels have more than two axes, an abstract trace of a
    sample call finds the contracted axes.

    Packed kernels are `ql.nnx.Packed`, and the adapter of a kernel `name` is the
    attribute `name_lora` of the same module, with A `[*batch, K, r]` in `a` and B
    `[*batch, r, N]` in `b`. Train with `wrt=nnx.LoRAParam`, in the gradient and in the
    optimizer. Kernels trained through their quantization (`freeze_base=False`) stay
    `nnx.Param`.

    Args:
        model: The model. It does not change, unless `donate` is set.
        config: The targets, by path ("layers/0/q_proj/kernel"), and how to adapt them.
        *args: Arguments of a sample call, for linen modules inside; arrays may be
            shapes.
        rngs: Streams of keys: `params` for A and, if the config has dropout, `dropout`
            for the masks.
        donate: Change the model in place, and free each kernel once it is packed.
        **kwargs: Keyword arguments of the sample call.

    Raises:
        TypeError: If `model` is not an nnx module, `config` is not a `QLoRAConfig`, or
            `rngs` is not an `nnx.Rngs`; or if the model cannot be called with the
            arguments of the sample call.
        ValueError: Before any work, if a pattern matches nothing; if parameters that
            match cannot be targets (not floating-point, shared, held by a container,
            not read by any method, already adapted, a bias or scale, or stacked along
            an axis other than the first), which are all listed with the reason; if
            `rngs` lacks a stream; or if a donated target shares its array with another
            variable.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> model = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
        >>> model = ql.nnx.wrap(model, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> model.query.kernel.get_value()
        QTensor(nf4, float32[64,4,16], block_size=64, double_quant, 4.141 bits)
        >>> model(jnp.ones((1, 5, 64))).shape
        (1, 5, 64)
    """
    check_module(model)
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"`rngs` must be an nnx.Rngs. Got {type(rngs).__name__}.")
    check_config(config)
    if not donate:
        model = nnx.clone(model)
    # 1. Find the targets, and the parameters that are trained in full or by rows.
    sites = find_sites(model)
    values = {path: site.variable.get_value() for path, site in sites.items()}
    targets = {path: s for path, s in sites.items() if config.is_target(path)}
    rows = {path: s for path, s in sites.items() if config.rows_of(path)}
    trained = {path: s for path, s in sites.items() if config.is_trained(path)}
    if not targets:
        # Packed kernels are not among the sites, so `targets` may match only those.
        _refuse_wrapped(model, config)
    # 2. Check them, and find the contracted axes of the targets.
    axis_roles, problems = check_targets(targets, config)
    # Calls determine the roles in linen modules, so run those in a sample call.
    in_linen = [p for p, s in targets.items() if s.holders and runs_linen(s.module)]
    linen_roles, linen_problems, not_run = {}, {}, in_linen
    if args or kwargs:
        _check_call(model, args, kwargs)
        if in_linen:
            linen_roles, linen_problems, not_run = linen_axis_roles(
                model, config, in_linen, args, kwargs
            )
    axis_roles |= linen_roles
    problems = _unknown_axes(not_run, values, config) | linen_problems | problems
    for path, site in (trained | rows).items():
        if reason := why_no_adapter(site):
            problems.setdefault(path, reason)
    geometries = find_targets(values, config, axis_roles, problems)
    refuse_tables(geometries)
    _check_streams(rngs, targets, config)
    if donate and config.fmt is not None and config.freeze_base:
        check_donated(leaves_by_path(nnx.to_pure_dict(nnx.state(model))), targets)
    # 3. Pack the kernels, and replace variables and classes.
    base, lora = init_targets(rngs.params(), values, config, geometries, donate=donate)
    adapters = leaves_by_path(lora)
    adapted = targets | trained | rows
    for path, site in adapted.items():
        adapt(site.holder, site.name, path, base[path], adapters[path], rngs)
    by_module: dict[int, list[Site]] = {}  # by id: modules may not be hashable
    for path, site in adapted.items():
        # A module reads a leaf that is trained in full as before, and keeps its class.
        # A bridge does not, because it must not pass the adapter to its linen module.
        if path in targets or path in rows or runs_linen(site.module):
            by_module.setdefault(id(site.module), []).append(site)
    for group in by_module.values():
        _change_class(group[0].module, [site.name for site in group])
    return model


def _refuse_wrapped(model: nnx.Module, config: QLoRAConfig) -> None:
    paths = [join_path(path) for path, *_ in adapted_kernels(model)]
    if wrapped := [path for path in paths if config.is_target(path)]:
        raise ValueError(
            "`model` must not be wrapped already. Got a model with adapters at "
            f"{wrapped}. Wrap the float model, or ql.nnx.merge this one first."
        )


def _check_call(model: nnx.Module, args: tuple, kwargs: dict) -> None:
    # Without this check, an option that `wrap` does not have would be an argument of
    # the sample call, and ignored if no linen module needs the call.
    try:
        inspect.signature(type(model).__call__).bind_partial(model, *args, **kwargs)
    except TypeError as error:
        raise TypeError(
            "the arguments of the sample call must fit "
            f"{type(model).__name__}.__call__: {error}. Got {len(args)} positional "
            f"arguments and {[*kwargs]}."
        ) from error


def _check_streams(rngs: nnx.Rngs, paths: Iterable[str], config: QLoRAConfig) -> None:
    streams = ["params", "dropout"] if config.dropout > 0 else ["params"]
    # A default stream replaces those that are missing.
    if not all(hasattr(rngs, stream) for stream in streams):
        raise ValueError(
            f"`rngs` must have the streams {streams}, or a default. Got {[*rngs]}."
        )


def _unknown_axes(
    paths: list[str], values: dict[str, Array], config: QLoRAConfig
) -> dict[str, str]:
    # Linen kernels of two axes are [K, N].
    reason = (
        "only its linen module knows which of its {} axes are contracted. Pass the "
        "arguments of a sample call that runs it to ql.nnx.wrap, or set "
        "config.contract."
    )
    return {
        path: reason.format(values[path].ndim)
        for path in paths
        if values[path].ndim > 2 and config.contract_of(path) is None
    }


def adapt(
    holder: Holder, name: str, path: str, base: Leaf, lora: Adapter, rngs: nnx.Rngs
) -> None:
    """Replaces a float kernel by a frozen kernel and its adapter."""
    # If a leaf is trained in full, its module reads the variable of the adapter.
    if lora.replacement is not None:
        frozen = packed_variable(attributes(holder)[name], base, path, Frozen)
        module = AdapterModule(lora, None, path=path, frozen=frozen)
        set_attribute(holder, f"{name}_lora", module)
        set_attribute(holder, name, module.variables["value"])
        return
    stream, kernel = None, as_kernel(base)
    if lora.dropout:
        # Scans slice a stack of NNX modules, so each layer gets a stream of its own. A
        # bridge reads a whole stack at once, and splits one key for its layers.
        stack_shape = base.shape[: len(base.shape) - len(lora.geometry.kinds)]
        in_linen = isinstance(holder, dict) or runs_linen(holder)
        is_split = len(stack_shape) > 0 and not in_linen
        stream = rngs.dropout.split(stack_shape) if is_split else rngs.dropout.fork()
    # Kernels in float, and those trained through their quantizer, keep their variable.
    if kernel.is_packed:
        variable = packed_variable(attributes(holder)[name], base, path)
        set_attribute(holder, name, variable)
    packing = kernel.packing if kernel.is_trained else None
    set_attribute(holder, f"{name}_lora", AdapterModule(lora, stream, packing, path))


def _change_class(module: nnx.Module, names: list[str]) -> None:
    cls: Any = type(module)
    if runs_linen(module):
        # A bridge that was wrapped before, for other targets, has its class already.
        new_class = cls if hasattr(cls, "qlora_original") else packed_linen(cls)
    elif (rule := packed_rule(module, names)) is None or rule.has_float_methods:
        new_class = materializing(cls, tuple(sorted(names)), rule is not None)
    else:
        new_class = packed(cls)
    object.__setattr__(module, "__class__", new_class)
