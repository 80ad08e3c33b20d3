"""Relates PEFT's settings to the adapters of a model, in both directions.

`lay_out` returns what settings require; `peft_config` finds the settings of adapters.
"""

import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ...adapters.base import Adapter
from ...adapters.dora import DoRA
from ...adapters.lora import LoRA, LowRank, is_low_rank
from ...adapters.merge_aware import is_merge_aware
from ...trees.adapters import checked_adapters
from ...trees.paths import Tree, raise_if_any
from ..files import refuse
from ..names import Names
from .config import (
    PREFIX,
    PeftConfig,
    alpha_of,
    last_part,
    module_of,
    split_common,
)
from .matching import (
    ends_of,
    is_excluded_as_saved,
    layers_of,
    match_keys,
    saved_as,
    targeted,
)
from .modules import (
    EMBEDDING,
    HEAD,
    ModuleAdapter,
    NamedBase,
    ParameterAdapter,
    array_keys,
)


@dataclass(frozen=True)
class AdapterLayout:
    """The tensors in the file of an adapter, and where they belong in the model."""

    model: NamedBase
    modules: list[ModuleAdapter]  # of every module outside of adapted parameters
    parameters: list[ParameterAdapter]
    rows: dict[str, tuple[int, ...]]  # trained rows, by module of the embedding
    # PEFT's keys for base tensors, by name. If a tensor has several keys, PEFT writes
    # the first and reads any of them.
    saved: dict[str, tuple[str, ...]]  # biases and tensors of `modules_to_save`
    optional: dict[str, tuple[str, ...]]  # embeddings and heads, which a file may lack

    @property
    def low_rank(self) -> list[ModuleAdapter | ParameterAdapter]:
        """The low-rank adapters."""
        return [*self.modules, *self.parameters]

    def rows_key(self, module: str) -> str:
        """Returns PEFT's key for the trained rows of an embedding."""
        return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"

    def base_keys(self, file: Container[str]) -> dict[str, str]:
        """Returns the keys of base tensors that a file has or must have, by name."""
        base_keys = {}
        for name, keys in (self.saved | self.optional).items():
            present = [key for key in keys if key in file]
            # A missing tensor gets the key that PEFT writes, for the error message.
            if present or name in self.saved:
                base_keys[name] = present[0] if present else keys[0]
        return base_keys

    def shapes(self, base_keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor by key; `base_keys` are of base tensors."""
        shapes = {}
        for adapter in self.low_rank:
            shapes |= {adapter.keys[name]: x for name, x in adapter.shapes().items()}
        # Trained rows are stored as rows of the table, [rows, D].
        for module, rows in self.rows.items():
            width = self.model.tensor_shape(f"{module}.weight")[-1]
            shapes[self.rows_key(module)] = (len(rows), width)
        tensor_shape = self.model.tensor_shape
        return shapes | {key: tensor_shape(name) for name, key in base_keys.items()}


def lay_out(config: PeftConfig, model: NamedBase) -> AdapterLayout:
    """Returns the tensors that settings describe; an error lists what does not fit."""
    problems: list[str] = []
    # First, find the adapters of modules and of parameters that hold all experts.
    adapted = _adapted_modules(config, model, problems)
    parameters = _adapted_parameters(config, model, adapted, problems)
    # Then find the tensors that the file contains in full.
    saved, modules_to_save = [], {*config.modules_to_save}
    saved_modules: set[str] = set()
    for name in model.positions:
        module, _, kind = name.rpartition(".")
        has_bias = config.bias == "all" or config.bias != "none" and module in adapted
        matched = saved_as(name, modules_to_save)
        saved_modules |= {*matched}
        if not (kind == "bias" and has_bias or matched):
            continue
        saved.append(name)
        if model.is_tied and last_part(module) == EMBEDDING:
            problems.append(
                f"`modules_to_save`: {module} is also the head, but PEFT would train a "
                "copy that the head does not use."
            )
    ends = (f".{EMBEDDING}.weight", f".{HEAD}.weight")
    optional = [n for n in model.positions if f".{n}".endswith(ends) and n not in saved]
    rows = _trained_rows(config, model, adapted, problems)
    # Last, report patterns that match nothing, which are probably misspelled.
    pattern_keys = _pattern_keys(config, adapted)
    for module in config.modules_to_save:
        if module not in saved_modules:
            problems.append(f"`modules_to_save`: {module!r} matches no module.")
    names = [*pattern_keys.values(), *parameters]
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, matches in match_keys(
            setting, getattr(config, setting), names
        ).items():
            if not matches:
                problems.append(f"`{setting}`: {key!r} matches no adapted module.")
    refuse("this adapter does not fit the model", problems)
    wrapped = adapted | {module_of(name) for name in parameters}
    in_parameters = {path for name in parameters for path in model.parameters[name]}
    ranks, scalings = config.ranks_of(names), config.scalings_of(names)
    return AdapterLayout(
        model=model,
        modules=[
            _module_adapter(config, model, module, pattern_keys, ranks, scalings)
            for module, position in model.modules.items()
            if position.path not in in_parameters
        ],
        parameters=[
            _parameter_adapter(model, name, module, ranks[name], scalings[name])
            for name, module in parameters.items()
        ],
        rows=rows,
        saved={name: _possible_keys(name, wrapped) for name in saved},
        optional={name: _possible_keys(name, wrapped) for name in optional},
    )


def _possible_keys(name: str, wrapped: Collection[str]) -> tuple[str, ...]:
    # PEFT wraps an adapted module, which becomes the `base_layer` of the wrapper.
    module, _, kind = name.rpartition(".")
    key = PREFIX + name
    return (f"{PREFIX}{module}.base_layer.{kind}", key) if module in wrapped else (key,)


def _module_adapter(
    config: PeftConfig,
    model: NamedBase,
    module: str,
    pattern_keys: Mapping[str, str],
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
) -> ModuleAdapter:
    kind = DoRA if config.use_dora else LoRA
    position, shape = model.modules[module], model.tensor_shape(f"{module}.weight")
    pattern_key = pattern_keys.get(module)
    return ModuleAdapter(
        label=f"{position.path} ({module})",
        keys=array_keys(kind, module) if pattern_key else {},
        rank=ranks[pattern_key] if pattern_key else 0,
        scaling=scalings[pattern_key] if pattern_key else 0.0,
        position=position,
        kind=kind,
        matrix_shape=shape,
        dropout=float(config.lora_dropout),
    )


def _pattern_keys(config: PeftConfig, adapted: Iterable[str]) -> dict[str, str]:
    """Returns the name of each adapted module that PEFT compares with patterns.

    This is the name of its weight if it is adapted as a parameter.
    """
    weights = {module: f"{module}.weight" for module in adapted}
    parameters = targeted(weights.values(), config.target_parameters)
    return {m: weight if weight in parameters else m for m, weight in weights.items()}


def _parameter_adapter(
    model: NamedBase, name: str, module: str, rank: int, scaling: float
) -> ParameterAdapter:
    kernels = model.parameters[name]
    return ParameterAdapter(
        label=name,
        keys=array_keys(LoRA, module),
        rank=rank,
        scaling=scaling,
        kernels=kernels,
        kernel_shapes=[model.named_leaves[path].tensor_shape for path in kernels],
    )


def _adapted_modules(
    config: PeftConfig, model: NamedBase, problems: list[str]
) -> set[str]:
    """Returns the adapted modules; adds the targets that do not fit to `problems`."""
    targets, prefixes = config.target_modules, config.layer_prefixes
    modules_to_save = {*config.modules_to_save}
    # 1. Find the modules that the settings choose and exclude.
    modules = {module_of(n) for n in model.positions if n.endswith(".weight")}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # PEFT leaves out the head.
        linear = {m for m in model.modules if not model.window(m)} - model.tables
        chosen = {m for m in linear if last_part(m) != HEAD}
    else:
        chosen = targeted(
            modules, targets, layers=config.layers, layer_prefixes=prefixes
        )
    # Weights of linear layers may be adapted as parameters; see `_named_like_experts`.
    weights = [f"{module}.weight" for module in _linear_modules(model)]
    chosen |= {module_of(x) for x in targeted(weights, config.target_parameters)}
    excluded = targeted(modules, config.exclude_modules, "exclude_modules")
    # 2. Report settings that PEFT or this library does not support, or match nothing.
    convolutions = {m for m in chosen & {*model.modules} if model.window(m)}
    if convolutions and config.use_dora:
        problems.append(f"`use_dora`: {sorted(convolutions)} must be linear.")
    if tables := sorted(chosen & model.tables):
        problems.append(
            f"`target_modules`: {tables} must be linear. Of embeddings, only trained "
            "rows (`trainable_token_indices`) and tables (`modules_to_save`) are read."
        )
    if not targets and not config.target_parameters:
        problems.append("`target_modules` must name at least one module. Got none.")
    for setting, matched in (("target_modules", chosen), ("exclude_modules", excluded)):
        patterns = getattr(config, setting)
        for pattern in _unmatched(patterns, matched, modules):
            problems.append(f"`{setting}`: {pattern!r} matches no module.")
    # 3. Leave out the modules that get no adapter.
    chosen -= excluded
    chosen -= {m for m in modules if is_excluded_as_saved(m, modules_to_save)}
    if norms := sorted(chosen - set(model.modules)):
        problems.append(f"adapters of norms are not supported: {norms}.")
    if config.layers and modules.isdisjoint(targets):  # full names are in any layer
        numbers = {*layers_of(targeted(modules, targets), prefixes).values()}
        problems += [
            f"`layers_to_transform`: no module in layer {layer}."
            for layer in config.layers
            if layer not in numbers
        ]
    chosen &= set(model.modules)
    # In transformers, the kernels of experts are one parameter, and not modules. If
    # `target_parameters` names it, a name such as "gate_proj" in `target_modules` means
    # other modules: those of a shared expert, or of layers without experts.
    in_parameters = {
        path
        for name in targeted(model.parameters, config.target_parameters)
        for path in model.parameters[name]
    }
    experts = {m for m in chosen if model.modules[m].path in in_parameters}
    other_names = {last_part(m) for m in chosen - experts}
    return chosen - {m for m in experts if last_part(m) in other_names}


def _adapted_parameters(
    config: PeftConfig, model: NamedBase, adapted: set[str], problems: list[str]
) -> dict[str, str]:
    """Returns the module of each parameter's adapter in PEFT; adds to `problems`."""
    targets = config.target_parameters
    weights = [f"{module}.weight" for module in _linear_modules(model)]
    by_module: dict[str, list[str]] = {}
    adapted_paths = {model.modules[module].path for module in adapted}
    targeted_parameters = targeted(model.parameters, targets)
    modules_to_save = {*config.modules_to_save}
    for name, kernels in model.parameters.items():
        if name not in targeted_parameters:
            continue
        by_module.setdefault(module_of(name), []).append(name)
        is_twice = not adapted_paths.isdisjoint(kernels)
        if is_twice or is_excluded_as_saved(name, modules_to_save):
            problems.append(f"`target_parameters`: {name} is adapted or saved twice.")
    for target in _unmatched(targets, (), [*model.parameters, *weights]):
        problems.append(
            f"`target_parameters`: {target!r} matches no parameter of experts and no "
            "weight of a linear layer."
        )
    # PEFT wraps a module once for each of its parameters, the first one innermost.
    return {
        name: module + ".base_layer" * depth
        for module, names in by_module.items()
        for depth, name in enumerate(reversed(names))
    }


def _linear_modules(model: NamedBase) -> set[str]:
    """Returns the linear layers that are modules in transformers, unlike experts."""
    in_parameters = model.parameter_paths
    return {
        module
        for module, position in model.modules.items()
        if position.path not in in_parameters
        and module not in model.tables
        and not model.window(module)
    }


def _trained_rows(
    config: PeftConfig, model: NamedBase, adapted: set[str], problems: list[str]
) -> dict[str, tuple[int, ...]]:
    """Returns the trained rows of each embedding; adds mismatches to `problems`."""
    rows_by_module = {}
    for target, rows in config.trained_tokens.items():
        modules = sorted(targeted(model.tables, (target,)))
        subject = f"`trainable_token_indices`: {target!r}"
        if len(modules) != 1:
            problems.append(f"{subject} must match one embedding. Got {modules}.")
            continue
        (module,) = modules
        num_rows, _ = model.tensor_shape(f"{module}.weight")
        if max(rows) >= num_rows:
            problems.append(f"{subject} has {num_rows} rows. Got row {max(rows)}.")
        is_replaced = is_excluded_as_saved(module, {*config.modules_to_save})
        if module in adapted or is_replaced or module in rows_by_module:
            problems.append(f"{subject} is also adapted or saved in another way.")
        rows_by_module[module] = rows
    return rows_by_module


def _unmatched(
    patterns: str | tuple[str, ...], matched: Collection[str], names: Iterable[str]
) -> list[str]:
    """Returns the patterns that match none of the names."""
    # For a regular expression, `matched` has the names that it matches.
    if isinstance(patterns, str):
        return [] if matched or not patterns else [patterns]
    ends = {end for name in names for end in ends_of(name)}
    return [pattern for pattern in patterns if pattern not in ends]


def peft_config(
    base: Tree,
    lora: Tree,
    names: Names,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    bias: str = "none",
    use_rslora: bool = False,
    modules_to_save: Iterable[str] = (),
    fused: bool = False,
) -> PeftConfig:
    """Returns PEFT's settings for adapters of this library.

    PEFT has one rate of dropout for all adapters, which is the largest one in `lora`.

    Args:
        base: The base tree.
        lora: The lora tree.
        names: The names of the leaves of `base` in the Hugging Face model.
        base_model: Hub id or path of the base model, for programs that load the
            adapter.
        revision: The commit of the base model on the hub, if it was read from there.
        bias: Which biases of `base` to save: "none", "all" or "lora_only". If any are
            `Trained`, "none" becomes "lora_only" or "all".
        use_rslora: Whether PEFT should compute scalings as `alpha / sqrt(r)`.
        modules_to_save: Ends of the names of modules to save, such as "lm_head"; those
            that are `Trained` are added.
        fused: Whether to write the adapters of experts and routers for the parameters
            of transformers 5 (`target_parameters`), instead of for the modules of
            transformers 4. With False, this is still done if PEFT could not convert the
            modules to parameters: if the experts have no modules, if only some of their
            kernels have adapters, or if ranks or scalings differ.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If there is no adapter, or if one does not fit its kernel, or if its
            kernel has no name; or if adapters are merge-aware, all of them listed. Also
            if `modules_to_save` is a single string.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> config = ql.QLoRAConfig(rank=4, alpha=8)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> peft = ql.io.peft_config(base, lora, names)
        >>> peft.target_modules, peft.r, peft.lora_alpha
        (('q_proj',), 4, 8)
    """
    if isinstance(modules_to_save, str):  # its letters would be taken for names
        raise ValueError(
            f"`modules_to_save` must be a list of names. Got {modules_to_save!r}."
        )
    adapters = checked_adapters(base, lora)
    refuse_merge_aware(adapters)
    model = NamedBase.of(base, names)
    # First, separate the adapters that are not low-rank.
    trained = {path for path, x in adapters.items() if x.replacement is not None}
    tables = {m: adapters.get(model.modules[m].path) for m in sorted(model.tables)}
    rows = {m: x.replaced_rows for m, x in tables.items() if x and x.replaced_rows}
    low_rank = {path: x for path, x in adapters.items() if is_low_rank(x)}
    # Then find the adapted modules and parameters, and their common values.
    modules, parameters = _adapters_by_name(model, low_rank, fused)
    kinds = {type(x.adapter) for x in (modules | parameters).values()}
    if kinds == {LoRA}:  # PEFT has no DoRA of parameters
        for module in sorted(_named_like_experts(model) & modules.keys()):
            parameters[f"{module}.weight"] = modules.pop(module)
    adapted = modules | parameters
    if not adapted:
        raise ValueError("`lora` must hold an adapter of a kernel. Got none.")
    # A PEFT adapter is either LoRA or DoRA for all modules.
    if len(kinds) > 1:
        kind_names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"adapters must be of one kind. Got {kind_names}.")
    ranks = {name: x.rank for name, x in adapted.items()}
    alphas = {
        name: alpha_of(x.adapter.scaling, x.rank, use_rslora)
        for name, x in adapted.items()
    }
    rank, rank_pattern = split_common(ranks)
    alpha, alpha_pattern = split_common(alphas)
    # Last, find the biases and modules that are `Trained`, which are saved in full.
    biased_modules, saved = _trained_modules(model, trained)
    if biased_modules and bias == "none":
        bias = "lora_only" if biased_modules <= modules.keys() else "all"
    weights = (f"{module}.weight" for module in _linear_modules(model))
    all_parameters = [*model.parameters, *weights]
    source = {"base_model_name_or_path": base_model, "revision": revision}
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_ends(modules, model.modules, names, last_part),
        target_parameters=_ends(parameters, all_parameters, names, _after_numbers),
        lora_dropout=max(x.adapter.dropout for x in adapted.values()),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=kinds == {DoRA},
        modules_to_save=(*modules_to_save, *saved),
        trainable_token_indices=rows or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        extra_settings={key: x for key, x in source.items() if x is not None},
    )


def refuse_merge_aware(adapters: Mapping[str, Adapter]) -> None:
    """Raises ValueError if adapters were trained through the packing of their sum."""
    raise_if_any(
        "these adapters cannot be written beside their base. They were trained through "
        "the packing of the merged kernels, and PEFT would add them to kernels without "
        "packing the sum. Write the weights of `merge(base, lora, requantize=True)`",
        sorted(path for path, x in adapters.items() if is_merge_aware(x)),
    )


class _NamedAdapter(NamedTuple):
    """An adapter of a stack, and the rank of one of its parts in PEFT."""

    adapter: LowRank
    rank: int


def _adapters_by_name(
    model: NamedBase, adapters: Mapping[str, LowRank], fused: bool
) -> tuple[dict[str, _NamedAdapter], dict[str, _NamedAdapter]]:
    """Returns the adapters of modules and those of parameters, by name."""
    modules, parameters, in_parameters = {}, {}, set()
    # Adapters of modules are preferred: all versions of transformers can read them.
    if fused or not _should_write_modules(model, adapters):
        for name, kernels in model.parameters.items():
            if paths := [path for path in kernels if path in adapters]:
                adapter = adapters[paths[0]]
                # Each adapted kernel of a parameter may need a block of its rank.
                parameters[name] = _NamedAdapter(adapter, adapter.rank * len(paths))
                in_parameters |= {*paths}
    for module, (path, _) in model.modules.items():
        if path in adapters and path not in in_parameters:
            modules[module] = _NamedAdapter(adapters[path], adapters[path].rank)
    return modules, parameters


def _named_like_experts(model: NamedBase) -> set[str]:
    """Returns the linear layers that share a name with a kernel of experts.

    If a file has one module for each kernel of an expert, transformers 5 joins them
    into parameters. PEFT then replaces every target such as "gate_proj" with the
    parameter of the experts, even if a shared expert or a layer without experts is
    meant. That layer would have no adapter. PEFT can adapt its weight as a parameter.
    """
    paths = model.parameter_paths
    experts = {m for m, position in model.modules.items() if position.path in paths}
    names = {last_part(module) for module in experts}
    return {module for module in _linear_modules(model) if last_part(module) in names}


def _should_write_modules(model: NamedBase, adapters: Mapping[str, LowRank]) -> bool:
    """Returns whether adapters of experts are written for modules, not parameters."""
    # When PEFT loads adapters of experts' modules, it converts them to adapters of
    # parameters. This drops patterns of ranks and alphas, and if only some kernels of a
    # layer's experts have adapters, PEFT silently ignores the adapters.
    module_paths = {position.path for position in model.modules.values()}
    kernels: dict[str, set[str]] = {}
    for name, parts in model.parameters.items():
        kernels.setdefault(module_of(name), set()).update(parts)
    have_modules = all(paths <= module_paths for paths in kernels.values())
    are_complete = all(
        paths <= adapters.keys() or not paths & adapters.keys()
        for paths in kernels.values()
    )
    are_uniform = len({(x.rank, x.scaling) for x in adapters.values()}) == 1
    return have_modules and are_complete and are_uniform


def _after_numbers(name: str) -> str:
    """Returns the part of a name after its last number, which is that of its layer."""
    return re.sub(r".*\.\d+\.", "", name)


def _ends(
    adapted: Collection[str],
    candidates: Iterable[str],
    names: Names,
    end_of: Callable[[str], str],
) -> tuple[str, ...]:
    """Returns the ends of the adapted names; full names if their ends match others."""
    # A pattern with this end ignores a part of the checkpoint, such as a vision tower,
    # in which modules may have the same ends.
    if any(pattern.endswith(r"\..*") for pattern in names.ignored):
        return tuple(sorted(adapted))
    other_ends = {end_of(name) for name in candidates if name not in adapted}
    ends = {name: end_of(name) for name in adapted}
    shortest = {name if end in other_ends else end for name, end in ends.items()}
    return tuple(sorted(shortest))


def _trained_modules(
    model: NamedBase, paths: Collection[str]
) -> tuple[set[str], list[str]]:
    """Returns the modules of trained biases, and name ends of other trained modules."""
    trained = {name for name, x in model.positions.items() if x.path in paths}
    biases = {name for name in trained if last_part(name) == "bias"}
    saved = {module_of(name) for name in trained - biases}
    modules = {module_of(name) for name in model.positions}

    def matches_saved_only(end: str) -> bool:
        # PEFT compares ends without a dot: "norm" also matches "input_layernorm".
        return {module for module in modules if module.endswith(end)} <= saved

    ends = {last_part(m) if matches_saved_only(last_part(m)) else m for m in saved}
    return {module_of(name) for name in biases}, sorted(ends)
