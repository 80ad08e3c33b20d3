"""Finds a model's parameters, and which of them can be targets."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from ..adapters.call import is_plain
from ..adapters.config import QLoRAConfig
from ..trees.paths import KeyPath
from .rules import (
    RULES,
    Rule,
    guess_axis_roles,
    kernel_shape,
    registration_misfit,
)
from .subclass import methods_reading
from .variables import (
    Holder,
    adapted_names,
    attributes,
    join_path,
    linen_attributes,
    runs_linen,
)


@dataclass
class Site:
    """A float parameter, and the modules that hold it; several if it is shared."""

    variable: nnx.Variable
    paths: list[str] = field(default_factory=list)
    # The module that reads it, the module or dict that holds it, and its name there.
    holders: list[tuple[nnx.Module, Holder, str]] = field(default_factory=list)
    normalizer: str | None = None  # class that writes normalized weights into it

    @property
    def module(self) -> nnx.Module:
        """The module that reads it."""
        return self.holders[0][0]

    @property
    def holder(self) -> Holder:
        """The module or dict that holds it."""
        return self.holders[0][1]

    @property
    def name(self) -> str:
        """Its name in the holder."""
        return self.holders[0][2]


def find_sites(model: nnx.Module) -> dict[str, Site]:
    """Returns the parameters by path, without adapters."""
    # 1. Find the variables, each at one of its paths.
    sites: dict[int, Site] = {}  # by the id of the variable
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam):
            sites[id(node)] = Site(node, [join_path(path)])
    # 2. Find their holders, and the modules that overwrite them.
    for path, module in nnx.iter_modules(model):
        for inner_path, holder, name in _entries(module):
            site = sites.get(id(attributes(holder)[name]))
            if site is not None:
                site.holders.append((module, holder, name))
                site_path = join_path((*path, *inner_path))
                # `iter_graph` yields a shared variable once, at one of its paths.
                if site_path not in site.paths:
                    site.paths.append(site_path)
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):
            for _, node in nnx.iter_graph(module.layer_instance):
                if id(node) in sites:
                    sites[id(node)].normalizer = type(module).__name__
    return {site.paths[0]: site for site in sites.values()}


def _entries(module: nnx.Module) -> Iterator[tuple[KeyPath, Holder, str]]:
    """Yields the path inside a module, the holder and the name of each attribute."""
    # `iter_modules` does not visit the nested dicts of linen variables, so this does.
    for name in vars(module):
        yield (name,), module, name
    pending: list[tuple[KeyPath, Any]] = []
    if runs_linen(module):
        pending = [((name,), value) for name, value in linen_attributes(module).items()]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                yield (*path, name), value, name
                pending.append(((*path, name), inner))


def packed_rule(module: nnx.Module, target_names: list[str]) -> Rule | None:
    """Returns the rule by which a module computes with its targets, or None."""
    rule = RULES.find(type(module))
    # A rule describes a single kernel. With further targets, the module runs in float.
    if rule is None or target_names != [rule.kernel(module)]:
        return None
    if RULES.is_overridden(type(module)) or not is_plain(module, promote_dtype):
        return None
    return rule


def why_no_adapter(site: Site) -> str | None:
    """Returns why a parameter cannot have an adapter of any kind, or None if it can."""
    if site.normalizer is not None:
        return (
            f"it is inside a {site.normalizer}, which writes normalized weights into "
            "it at each call. Exclude it."
        )
    if len(site.holders) > 1:
        return f"it is shared with {', '.join(site.paths[1:])}."
    if not site.holders:
        return "it is held by a container, not by the module that reads it."
    if adapted := adapted_names(site.holder):
        return (
            f"its module has adapters already, of {', '.join(adapted)}: the model was "
            "wrapped before. Wrap the float model, or ql.nnx.merge this one first."
        )
    if (name := f"{site.name}_lora") in attributes(site.holder):
        return f"its module has an attribute {name}, the name of its adapter."
    return None


def _may_be_registered(site: Site) -> bool:
    # A registered class computes one einsum of its input and its only parameter. The
    # layers of Flax, such as `nnx.Conv`, and their subclasses compute something else.
    module, cls = site.module, type(site.module)
    is_layer_of_flax = any(c.__module__.startswith("flax.nnx.nn.") for c in cls.__mro__)
    params = [x for x in vars(module).values() if isinstance(x, nnx.Param)]
    has_one_input = len(inspect.signature(cls.__call__).parameters) == 2
    return has_one_input and not is_layer_of_flax and len(params) == 1


def _axis_roles(site: Site, target_names: list[str], config: QLoRAConfig) -> str | None:
    """Returns the roles of a target's axes, or raises ValueError for an unfit leaf.

    None leaves the roles to the config or, in a bridge, to a sample call.
    `target_names` are all targets of its module.
    """
    if reason := why_no_adapter(site):
        raise ValueError(reason)
    module, name = site.module, site.name
    # A variable may hold a value that is not an array. `find_targets` rejects it.
    shape = getattr(site.variable.get_value(), "shape", ())
    unstacked = kernel_shape(module, name)
    if unstacked is not None and len(shape) > len(unstacked):
        if shape[-len(unstacked) :] != unstacked:
            raise ValueError(
                f"the axes of a stack must come before {unstacked}, the shape of a "
                "single kernel (in nnx.vmap: out_axes=0; in MaxText: "
                f"param_scan_axis=0). Got shape {shape}."
            )
    # 1. If a rule describes the module, use the roles that it knows.
    if (rule := packed_rule(module, target_names)) is not None:
        with jax.ensure_compile_time_eval():  # a trace may close over the model
            reason = registration_misfit(module, rule)
        if reason:
            raise ValueError(reason)
        return rule.kinds(module)
    cls = type(module).__name__
    # Stacked biases and scales have two axes, like kernels.
    if name in ("bias", "scale"):
        raise ValueError(
            f"it is the {name} of its module, {cls}: no axis of it is contracted."
        )
    if runs_linen(module):
        return None
    register = "Use ql.nnx.register, or e" if _may_be_registered(site) else "E"
    if not methods_reading(type(module), name):
        raise ValueError(
            f"no method of its module, {cls}, reads it. {register}xclude it."
        )
    if config.dropout:
        raise ValueError(
            f"{cls} reads it itself, so that no dropout can act on the adapter's input."
            f" {register}xclude it, or set dropout=0."
        )
    # 2. Otherwise, the config sets the roles. If it does not, guess them.
    is_set = config.contract_of(site.paths[0]) is not None
    return None if is_set else guess_axis_roles(module, name, len(shape))


def check_targets(
    targets: dict[str, Site], config: QLoRAConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the roles of the targets' axes, and why some are unfit, by path."""
    names_by_module: dict[int, list[str]] = {}
    for site in targets.values():
        for module, _, name in site.holders:
            names_by_module.setdefault(id(module), []).append(name)
    axis_roles: dict[str, str] = {}
    problems: dict[str, str] = {}
    for path, site in targets.items():
        names = names_by_module[id(site.module)] if site.holders else []
        try:
            if (roles := _axis_roles(site, names, config)) is not None:
                axis_roles[path] = roles
        except ValueError as error:
            problems[path] = str(error)
    return axis_roles, problems
