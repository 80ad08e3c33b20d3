"""Finds a model's parameters, and which of them can be targets."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from ..adapters.config import QLoRAConfig, is_table
from .float_kernels import reads
from .rules import RULES, Rule, guess_kinds, kernel_shape
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
    """A float parameter, and the modules that hold it."""

    variable: nnx.Variable
    paths: list[str] = field(default_factory=list)
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
    found: dict[int, Site] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam):
            found[id(node)] = Site(node, [join_path(path)])
    for path, module in nnx.iter_modules(model):
        for inner, holder, name in _held(module):
            site = found.get(id(attributes(holder)[name]))
            if site is not None:
                site.holders.append((module, holder, name))
                if join_path((*path, *inner)) not in site.paths:
                    site.paths.append(join_path((*path, *inner)))
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):
            for _, node in nnx.iter_graph(module.layer_instance):
                if id(node) in found:
                    found[id(node)].normalizer = type(module).__name__
    return {site.paths[0]: site for site in found.values()}


def _held(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], Holder, str]]:
    """Yields path, holder and name of attributes and of linen variables in dicts."""
    for name in vars(module):
        yield (name,), module, name
    pending: list[tuple[tuple[str, ...], Any]] = []
    if runs_linen(module):
        pending = [((name,), value) for name, value in linen_attributes(module).items()]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            for name, inner in value.items():
                yield (*path, name), value, name
                pending.append(((*path, name), inner))


def packed_rule(module: nnx.Module, names: list[str]) -> Rule | None:
    """Returns the rule of a module that can multiply by `names`, or None."""
    rule = RULES.find(type(module))
    if rule is None or names != [rule.kernel(module)] or not rule.supports(module):
        return None
    return rule


def why_not_trained(site: Site) -> str | None:
    """Returns why a parameter cannot have an adapter of any kind, or None."""
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


def _why_not(site: Site, names: list[str], config: QLoRAConfig) -> str | None:
    """Returns why a parameter cannot be a target, or None."""
    if reason := why_not_trained(site):
        return reason
    module, name = site.module, site.name
    shape, own = site.variable.shape, kernel_shape(module, name)
    if own is not None and len(shape) > len(own) and shape[-len(own) :] != own:
        return (
            f"the axes of a stack must come before {own}, the kernel's own (in "
            "nnx.vmap: out_axes=0; in MaxText: param_scan_axis=0). Got shape "
            f"{shape}."
        )
    if packed_rule(module, names) is not None:
        return None
    cls = type(module).__name__
    if name in ("bias", "scale"):  # in a stack they have two axes, as kernels have
        return f"it is the {name} of its module, {cls}: nothing contracts it."
    if runs_linen(module):
        return None
    if not reads(type(module), name):
        return f"no method of its module, {cls}, reads it. Use ql.nnx.register."
    if config.dropout and not is_table(name):
        return (
            f"{cls} reads it itself, so that no dropout can act on the adapter's input."
            " Use ql.nnx.register, or dropout=0."
        )
    return None


def _kinds(site: Site, names: list[str], config: QLoRAConfig) -> str | None:
    """Returns the kinds of the kernel's axes, or None if unknown."""
    rule = packed_rule(site.module, names)
    if rule is not None:
        return rule.kinds(site.module)
    if config.contract_of(site.paths[0]) is not None or runs_linen(site.module):
        return None
    return guess_kinds(site.module, site.name, len(site.variable.shape))


def check_targets(
    targets: dict[str, Site], config: QLoRAConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the targets' kinds of axes, and why some are unfit, by path."""
    by_module: dict[int, list[str]] = {}
    for site in targets.values():
        for module, _, name in site.holders:
            by_module.setdefault(id(module), []).append(name)
    problems, kinds = {}, {}
    for path, site in targets.items():
        names = by_module[id(site.module)] if site.holders else []
        try:
            reason = _why_not(site, names, config)
            found = None if reason else _kinds(site, names, config)
        except ValueError as error:
            reason, found = str(error), None
        if reason is not None:
            problems[path] = reason
        elif found is not None:
            kinds[path] = found
    return kinds, problems
