"""Wraps a model: replaces kernels, and the classes of the modules that hold them."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from flax import nnx

from ..adapters.config import QLoRAConfig, matches
from ..adapters.lora import LoRA
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough
from ..trees.init import init
from ..trees.paths import leaves_by_path
from ..trees.targets import check_donated, find_targets
from .float_kernels import materializing, reads
from .rules import Rule, guess_kinds, kernel_shape, rule_of
from .subclass import packed
from .variables import Adapter, adapted_names, join_path, pack

M = TypeVar("M", bound=nnx.Module)


@dataclass
class _Site:
    """A float parameter of the model, and the modules that hold it."""

    variable: nnx.Variable
    paths: list[str] = field(default_factory=list)
    holders: list[tuple[nnx.Module, str]] = field(default_factory=list)

    @property
    def module(self) -> nnx.Module:
        return self.holders[0][0]

    @property
    def name(self) -> str:
        return self.holders[0][1]


def _sites(model: nnx.Module) -> dict[str, _Site]:
    """Returns the parameters by path, without those that are LoRA already."""
    found: dict[int, _Site] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam):
            found[id(node)] = _Site(node, [join_path(path)])
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            site = found.get(id(value))
            if site is not None:
                site.holders.append((module, name))
                if join_path((*path, name)) not in site.paths:
                    site.paths.append(join_path((*path, name)))
    return {site.paths[0]: site for site in found.values()}


def _packed_rule(module: nnx.Module, names: list[str]) -> Rule | None:
    """The rule, if the module can multiply by its packed kernels `names`, or None."""
    rule = rule_of(module)
    return rule if rule is not None and names == [rule.kernel] else None


def _why_not(site: _Site, names: list[str], config: QLoRAConfig) -> str | None:
    """The reason why a parameter cannot be a target, or None."""
    if len(site.holders) > 1:
        return f"it is shared with {', '.join(site.paths[1:])}."
    if not site.holders:
        return "it is held by a container, not by the module that reads it."
    module, name = site.module, site.name
    if adapted_names(module) or hasattr(module, f"{name}_lora"):
        return f"its module has adapters already, or an attribute {name}_lora."
    shape, own = site.variable.shape, kernel_shape(module, name)
    if own is not None and len(shape) > len(own) and shape[-len(own) :] != own:
        return (
            f"the axes of a stack must stand in front of {own}, the kernel's own (in "
            f"nnx.vmap: out_axes=0). Got shape {shape}."
        )
    if _packed_rule(module, names) is not None:
        return None
    cls = type(module).__name__
    if name in ("bias", "scale"):  # in a stack they have two axes, as kernels have
        return f"it is the {name} of its module, {cls}: nothing contracts it."
    if not reads(type(module), name):
        return f"no method of its module, {cls}, reads it. Use ql.nnx.register."
    if config.dropout:
        return (
            f"{cls} reads it itself, so that no dropout can act on the adapter's input."
            " Use ql.nnx.register, or dropout=0."
        )
    return None


def _kinds(site: _Site, names: list[str], config: QLoRAConfig) -> str | None:
    """The kinds of the kernel's axes, if its module tells.

    Raises:
        ValueError: If the module's equation is not a product with the kernel.
    """
    rule = _packed_rule(site.module, names)
    if rule is not None:
        return rule.kinds(site.module)
    if matches(tuple(config.contract), site.paths[0]):
        return None
    return guess_kinds(site.module, site.name, len(site.variable.shape))


def _targets(
    model: nnx.Module, config: QLoRAConfig
) -> tuple[dict[str, _Site], dict[str, _Site], dict[str, str]]:
    """Returns all sites, the targets, and their kinds, having checked all targets."""
    sites = _sites(model)
    targets = {path: s for path, s in sites.items() if config.is_target(path)}
    by_module: dict[int, list[str]] = {}
    for site in targets.values():
        for module, name in site.holders:
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
    find_targets(_values(sites), config, kinds, problems)
    return sites, targets, kinds


def _values(sites: dict[str, _Site]) -> dict[str, Any]:
    return {path: site.variable.get_value() for path, site in sites.items()}


def wrap(model: M, config: QLoRAConfig, *, rngs: nnx.Rngs, donate: bool = False) -> M:
    """Packs the targeted kernels of a model and gives each a LoRA.

    `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and classes that are registered
    compute with the packed kernel. Any other module that reads a targeted kernel gets
    it in float during each call (rounded to the kernel's dtype, the adapter merged in),
    and it is not kept for the backward pass. Stacks made by `nnx.vmap` stay stacks.
    Modules keep their attributes; their classes become subclasses of what they were.

    The adapters are `nnx.LoRAParam`. Train them with `wrt=nnx.LoRAParam`, in the
    gradient (`nnx.DiffState(0, nnx.LoRAParam)`) and in the optimizer: that type is a
    subclass of `nnx.Param`, so `wrt=nnx.Param` would train biases, norms and embeddings
    too. Kernels trained through their quantization (`freeze_base=False`) stay
    `nnx.Param`.

    Args:
        model: The model. It is left alone, unless `donate` is set.
        config: What to target, by path ("layers/0/q_proj/kernel"), and how.
        rngs: For A (`params`) and, if the config has dropout, the masks (`dropout`).
        donate: Change the model itself, and free each float kernel once it is packed.

    Returns:
        The wrapped model.

    Raises:
        ValueError: Before any work, if a pattern matches nothing, or if parameters that
            match cannot be targets (not floating-point, shared, held by a container,
            read by no method, adapted already, a bias or scale, stacked along another
            axis than the first): all of those are named, with the reason. Likewise
            if `donate` is set and a target shares its array with another variable of
            the model.

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
    if not donate:
        model = nnx.clone(model)
    sites, targets, kinds = _targets(model, config)
    if donate and config.fmt is not None and config.freeze_base:
        check_donated(nnx.to_pure_dict(nnx.state(model)), targets)
    base, lora = init(rngs.params(), _values(sites), config, kinds=kinds, donate=donate)
    adapters = leaves_by_path(lora)
    by_module: dict[int, list[_Site]] = {}
    for path, site in targets.items():
        adapt(site.module, site.name, base[path], adapters[path], rngs)
        by_module.setdefault(id(site.module), []).append(site)
    for group in by_module.values():
        _change_class(group[0].module, [site.name for site in group])
    return model


def adapt(module: nnx.Module, name: str, base: Any, lora: LoRA, rngs: nnx.Rngs) -> None:
    """Replaces a module's float kernel by a frozen kernel and its adapter."""
    stream, trained = None, None
    if lora.dropout:
        stack = base.shape[: len(base.shape) - len(lora.geometry.kinds)]
        stream = rngs.dropout.split(stack) if stack else rngs.dropout.fork()
    if isinstance(base, QTensor):
        setattr(module, name, pack(getattr(module, name), base))
    elif isinstance(base, StraightThrough):
        trained = base.packing
    setattr(module, f"{name}_lora", Adapter(lora, stream, trained))


def _change_class(module: nnx.Module, names: list[str]) -> None:
    cls = type(module)
    if _packed_rule(module, names) is not None:
        new = packed(cls)
    else:
        new = materializing(cls, tuple(sorted(names)))
    object.__setattr__(module, "__class__", new)
