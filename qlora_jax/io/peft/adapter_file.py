"""Lists the tensors of a PEFT adapter of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...adapters.base import Adapter
from ...adapters.dora import DoRA
from ...adapters.lora import LoRA
from ...quant.kernel import as_kernel
from ...trees.adapters import adapters_by_path
from ...trees.paths import Tree, leaves_by_path, refuse_listed
from ..files import refuse
from ..named_leaves import NamedLeaf, leaf_of
from ..names import Names
from .adapter_config import PREFIX, PeftConfig
from .module_patterns import is_inside_saved, is_saved, is_targeted, matches_key

# Modules whose weights PEFT stores with their adapters.
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
# PEFT's names of an adapter's arrays.
_KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
_TABLE_KEYS = {"a": "lora_embedding_A", "b": "lora_embedding_B"}


@dataclass(frozen=True)
class Position:
    """The place of a checkpoint's tensor in the base tree: a leaf and a batch index."""

    path: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class NamedBase:
    """The leaves of a base tree by path, and places by name of tensor and of module.

    Float kernels are `FloatKernel`s. `modules` are those that can have an adapter, of
    which `tables` are embeddings, `[V, D]` in both. `is_tied` says whether the
    embedding is the head too. `parameters` are as `Names.parameters` has them.
    """

    leaves: dict[str, Any]
    named: dict[str, NamedLeaf]
    tensors: dict[str, Position]
    modules: dict[str, Position]
    tables: set[str]
    is_tied: bool
    parameters: dict[str, dict[str, list[tuple[int, ...]]]]

    @classmethod
    def of(cls, base: Tree, names: Names) -> "NamedBase":
        """Returns the leaves of a base tree with their names; lists all problems."""
        adapters_by_path(base, {})
        model = cls({}, {}, {}, {}, set(), names.is_ignored(f"{_HEAD}.weight"), {})
        problems = []
        for path, leaf in leaves_by_path(base).items():
            try:
                named = leaf_of(path, tuple(leaf.shape), names)
                model.leaves[path] = _as_named(leaf, named)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                continue
            model.named[path] = named
            for index, name in np.ndenumerate(named.tensors):
                model.tensors[name] = place = Position(path, index)
                module, _, kind = name.rpartition(".")
                is_table = named.geometry is None and len(named.tensor_shape) == 2
                if kind == "weight" and (is_table or named.geometry is not None):
                    model.modules[module] = place
                if kind == "weight" and is_table:
                    model.tables.add(module)
        refuse_listed("`names` must name every leaf of `base`", problems)
        batch_shapes = {path: leaf.tensors.shape for path, leaf in model.named.items()}
        model.parameters.update(names.parameters(batch_shapes))
        return model

    def window(self, module: str) -> tuple[int, ...]:
        """Returns the window of a module that is a convolution; else ()."""
        return self.named[self.modules[module].path].window

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor in the checkpoint."""
        return self.named[self.tensors[name].path].tensor_shape


def _as_named(leaf: Any, named: NamedLeaf) -> Any:
    """Returns a leaf; a kernel as a `Kernel`, whose axes must be those of the table."""
    if named.geometry is None:
        return leaf
    kernel = as_kernel(leaf, named.geometry)
    have, want = (g.roles(kernel.ndim) for g in (kernel.geometry, named.geometry))
    if have != want:
        raise ValueError(
            f"it has axes {have!r} (b batch, k contracted, n output); its names need "
            f"{want!r}. Set `contract` of the config."
        )
    return kernel


@dataclass(frozen=True)
class AdapterTensors:
    """The adapted modules of a file, and the base tensors that it must or may hold.

    `whole` are biases and `modules_to_save`; `repeatable` are weights of embeddings.
    `rows` are the trained rows of embeddings. `parameters` are the adapted parameters
    and the modules that PEFT has for them.
    """

    adapted: Mapping[str, Position]
    parameters: Mapping[str, str]
    whole: tuple[str, ...]
    repeatable: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Returns PEFT's keys of a base tensor; it writes the first and reads all."""
        module, _, kind = name.rpartition(".")
        key = PREFIX + name
        is_wrapped = any(n.rpartition(".")[0] == module for n in self.parameters)
        if module not in self.adapted and not is_wrapped:
            return (key,)
        return (f"{PREFIX}{module}.base_layer.{kind}", key)


def kind_of(config: PeftConfig) -> type[Adapter]:
    """Returns the kind of adapter that PEFT's settings ask for."""
    return DoRA if config.use_dora else LoRA


def array_keys(
    kind: type[Adapter], module: str, is_table: bool = False
) -> dict[str, str]:
    """Returns the keys of a module's arrays, by name. PEFT stores their transposes."""
    keys = _TABLE_KEYS if is_table else _KEYS
    return {name: f"{PREFIX}{module}.{keys[name]}" for name in kind.roles}


def to_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Returns an array of an adapter as PEFT stores it: transposed.

    PEFT has A of a convolution as `[r, K, *window]`, and B as `[N, r, 1, ...]`.
    """
    if window and name == "a":
        return np.moveaxis(x.T.reshape(len(x.T), *window, -1), -1, 1)
    return x.T.reshape(*x.T.shape, *(1 for _ in window))


def from_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Inverts `to_stored`."""
    if window and name == "a":
        x = np.moveaxis(x, 1, -1)
    return x.reshape(len(x), -1).T if window else x.T


def rows_key(module: str) -> str:
    """Returns the key of the trained rows of an embedding."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def lay_out(config: PeftConfig, model: NamedBase) -> AdapterTensors:
    """Returns the tensors of an adapter with these settings; lists all mismatches."""
    problems: list[str] = []
    adapted = _adapted(config, model, problems)
    parameters = _parameters(config, model, adapted, problems)
    whole = []
    for name in model.tensors:
        module, _, kind = name.rpartition(".")
        is_in = {"all": True, "lora_only": module in adapted, "none": False}
        has_bias = kind == "bias" and is_in[config.bias]
        if has_bias or is_saved(name, config.modules_to_save):
            whole.append(name)
        if whole[-1:] == [name] and model.is_tied and _last(name, 2) == _EMBEDDING:
            problems.append(
                f"`modules_to_save`: {module} is the head too, of which PEFT trains "
                "a copy that is not."
            )
    for saved in config.modules_to_save:
        if not any(is_saved(name, [saved]) for name in model.tensors):
            problems.append(f"`modules_to_save`: {saved!r} matches no module.")
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(matches_key(key, name) for name in (*adapted, *parameters)):
                problems.append(f"`{setting}`: {key!r} matches no adapted module.")
    embeddings = [n for n in model.tensors if _last(n, 2) in (_EMBEDDING, _HEAD)]
    repeatable = [n for n in embeddings if n.endswith(".weight") and n not in whole]
    rows = _rows(config, model, adapted, problems)
    refuse("this adapter is not one for this model", problems)
    return AdapterTensors(adapted, parameters, tuple(whole), tuple(repeatable), rows)


def _parameters(
    config: PeftConfig,
    model: NamedBase,
    adapted: Mapping[str, Position],
    problems: list[str],
) -> dict[str, str]:
    """Returns PEFT's modules of adapted parameters; adds what does not fit."""
    targets, every = config.target_parameters, {*model.parameters}
    by_module: dict[str, list[str]] = {}
    paths = {place.path for place in adapted.values()}
    for name, parts in model.parameters.items():
        if not is_targeted(name, targets):
            continue
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
        if is_inside_saved(name, config.modules_to_save) or paths & {*parts}:
            problems.append(f"`target_parameters`: {name} is adapted or saved twice.")
    listed = _unmatched("target_parameters", targets, every, every)
    problems += [text.replace("module", "parameter of experts") for text in listed]
    # PEFT wraps a module once for each of its parameters, the first one innermost.
    return {
        name: module + ".base_layer" * depth
        for module, names in by_module.items()
        for depth, name in enumerate(reversed(names))
    }


def _rows(
    config: PeftConfig,
    model: NamedBase,
    adapted: Mapping[str, Position],
    problems: list[str],
) -> dict[str, tuple[int, ...]]:
    """Returns the trained rows of each embedding; adds what does not fit."""
    found = {}
    for end, rows in config.trained_tokens.items():
        modules = [m for m in model.tables if is_targeted(m, (end,))]
        said = f"`trainable_token_indices`: {end!r} "
        if len(modules) != 1:
            problems.append(f"{said}must match one embedding. Got {modules}.")
            continue
        (module,) = modules
        size, _ = model.tensor_shape(f"{module}.weight")
        if max(rows) >= size:
            problems.append(f"{said}has {size} rows. Got {max(rows)}.")
        is_saved = is_inside_saved(module, config.modules_to_save)
        if module in adapted or is_saved or module in found:
            problems.append(f"{said}is adapted or saved in other ways, too.")
        found[module] = rows
    return found


def _last(name: str, place: int) -> str:
    return ("." + name).split(".")[-place]


def _adapted(
    config: PeftConfig, model: NamedBase, problems: list[str]
) -> dict[str, Position]:
    """Returns the adapted modules, and adds to `problems` targets that do not match."""
    targets = config.target_modules
    every = {n.rpartition(".")[0] for n in model.tensors if n.endswith(".weight")}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = {m for m in model.modules if not model.window(m)} - model.tables
        chosen = {m for m in linear if _last(m, 1) != _HEAD}
    else:
        chosen = {m for m in every if _is_chosen(m, config, config.layers)}
    excluded = {m for m in every if is_targeted(m, config.exclude_modules)}
    convolutions = {m for m in chosen & {*model.modules} if model.window(m)}
    if convolutions and config.use_dora:
        problems.append(f"`use_dora`: {sorted(convolutions)} must be linear.")
    tables = chosen & model.tables
    if tables and (model.is_tied or config.use_dora):
        what = "a DoRA" if config.use_dora else "the head too: PEFT adapts one alone"
        problems.append(f"`target_modules`: {sorted(tables)} cannot be {what}.")
    if not targets and not config.target_parameters:
        problems.append("`target_modules` must name at least one module. Got none.")
    problems += _unmatched("target_modules", targets, chosen, every)
    problems += _unmatched("exclude_modules", config.exclude_modules, excluded, every)
    chosen -= excluded
    chosen -= {m for m in every if is_inside_saved(m, config.modules_to_save)}
    if other := sorted(chosen - set(model.modules)):
        problems.append(f"adapters of norms are not supported: {other}.")
    for layer in config.layers or ():
        if not any(_is_chosen(m, config, (layer,)) for m in every):
            problems.append(f"`layers_to_transform`: no module in layer {layer}.")
    return {m: place for m, place in model.modules.items() if m in chosen}


def _is_chosen(module: str, config: PeftConfig, layers: tuple[int, ...] | None) -> bool:
    return is_targeted(module, config.target_modules, layers, config.layer_prefixes)


def _unmatched(
    setting: str, patterns: str | tuple[str, ...], found: set[str], every: set[str]
) -> list[str]:
    """Returns a problem for each pattern that matches no module."""
    if isinstance(patterns, str):
        listed = [] if found or not patterns else [patterns]
    else:
        listed = [p for p in patterns if not any(is_targeted(m, (p,)) for m in every)]
    return [f"`{setting}`: {pattern!r} matches no module." for pattern in listed]
