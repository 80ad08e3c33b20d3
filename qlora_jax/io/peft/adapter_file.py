"""Determines which tensors a PEFT adapter of a model contains."""

from collections.abc import Collection, Iterable, Mapping
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
from ..names import BatchIndex, Names
from .adapter_config import (
    PREFIX,
    PeftConfig,
    is_inside_saved,
    is_saved,
    is_targeted,
    matches_key,
)

# Modules whose weights PEFT may store with their adapters.
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"
# PEFT's names of an adapter's arrays, for linear modules and for embeddings.
_KEYS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING_KEYS = {"a": "lora_embedding_A", "b": "lora_embedding_B"}


@dataclass(frozen=True)
class Position:
    """The position of a checkpoint's tensor in the base tree."""

    path: str
    index: BatchIndex  # along the batch axes of the leaf


@dataclass(frozen=True)
class NamedBase:
    """The leaves of a base tree, and their positions by name of tensor and module."""

    leaves: dict[str, Any]  # by path: kernels as `Kernel`, other leaves as arrays
    named: dict[str, NamedLeaf]  # by path
    tensors: dict[str, Position]  # by name
    modules: dict[str, Position]  # weights that can have an adapter, by module
    tables: set[str]  # the modules that are embeddings, `[V, D]` here and in PEFT
    is_tied: bool  # whether the embedding is also the head
    parameters: dict[str, dict[str, list[BatchIndex]]]  # see `Names.parameters`

    @classmethod
    def of(cls, base: Tree, names: Names) -> "NamedBase":
        """Returns a base tree's leaves with their names; an error lists problems."""
        adapters_by_path(base, {})  # checks the structure of `base`
        model = cls({}, {}, {}, {}, set(), names.is_ignored(f"{_HEAD}.weight"), {})
        problems = []
        for path, leaf in leaves_by_path(base).items():
            try:
                named = leaf_of(path, tuple(leaf.shape), names)
                model.leaves[path] = _with_named_axes(leaf, named)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                continue
            model.named[path] = named
            is_table = named.geometry is None and len(named.tensor_shape) == 2
            for index, name in np.ndenumerate(named.tensors):
                model.tensors[name] = position = Position(path, index)
                module, _, kind = name.rpartition(".")
                if kind == "weight" and (is_table or named.geometry is not None):
                    model.modules[module] = position
                if kind == "weight" and is_table:
                    model.tables.add(module)
        refuse_listed("`names` must name every leaf of `base`", problems)
        batch_shapes = {path: leaf.tensors.shape for path, leaf in model.named.items()}
        model.parameters.update(names.parameters(batch_shapes))
        return model

    def window(self, module: str) -> tuple[int, ...]:
        """Returns the window of a module that is a convolution; otherwise ()."""
        return self.named[self.modules[module].path].window

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor in the checkpoint."""
        return self.named[self.tensors[name].path].tensor_shape


def _with_named_axes(leaf: Any, named: NamedLeaf) -> Any:
    """Returns a kernel as a `Kernel`, after checking its axes; keeps other leaves."""
    if named.geometry is None:
        return leaf
    kernel = as_kernel(leaf, named.geometry)
    # The same axes may have other roles if `contract` differs from the names.
    geometries = kernel.geometry, named.geometry
    roles, named_roles = (geometry.roles(kernel.ndim) for geometry in geometries)
    if roles != named_roles:
        raise ValueError(
            f"it has axes {roles!r} (b batch, k contracted, n output); its names need "
            f"{named_roles!r}. Set `contract` of the config."
        )
    return kernel


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors that an adapter's file must or may hold, and their keys."""

    kind: type[Adapter]  # of the low-rank adapters
    adapted: Mapping[str, Position]  # modules with an adapter
    parameters: Mapping[str, str]  # adapted parameters, and PEFT's modules for them
    saved: tuple[str, ...]  # biases and tensors of `modules_to_save`
    optional: tuple[str, ...]  # weights of tables, which a file may also hold
    rows: Mapping[str, tuple[int, ...]]  # trained rows, by module of the embedding
    tables: Collection[str]  # the modules that are embeddings

    def array_keys(self, module: str) -> dict[str, str]:
        """Returns PEFT's keys for the arrays of a module's adapter, by name."""
        return array_keys(self.kind, module, module in self.tables)

    def rows_key(self, module: str) -> str:
        """Returns PEFT's key for the trained rows of an embedding."""
        return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Returns PEFT's keys for a base tensor. It writes the first, but reads all."""
        module, _, kind = name.rpartition(".")
        key = PREFIX + name
        is_wrapped = any(n.rpartition(".")[0] == module for n in self.parameters)
        if module not in self.adapted and not is_wrapped:
            return (key,)
        return (f"{PREFIX}{module}.base_layer.{kind}", key)


def array_keys(
    kind: type[Adapter], module: str, is_table: bool = False
) -> dict[str, str]:
    """Returns PEFT's keys for the arrays of a module's adapter, by name."""
    keys = _EMBEDDING_KEYS if is_table else _KEYS
    return {name: f"{PREFIX}{module}.{keys[name]}" for name in kind.roles}


def to_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Returns an adapter's array as PEFT stores it: transposed."""
    # A of a convolution is [window * K, r] here and [r, K, *window] in PEFT; B is
    # [r, N] here and [N, r, 1, ...] in PEFT.
    if window and name == "a":
        return np.moveaxis(x.T.reshape(len(x.T), *window, -1), -1, 1)
    return x.T.reshape(*x.T.shape, *(1 for _ in window))


def from_stored(name: str, x: np.ndarray, window: tuple[int, ...]) -> np.ndarray:
    """Inverts `to_stored`."""
    if window and name == "a":
        x = np.moveaxis(x, 1, -1)
    return x.reshape(len(x), -1).T if window else x.T


def lay_out(config: PeftConfig, model: NamedBase) -> AdapterTensors:
    """Returns the tensors that settings describe; an error lists what does not fit."""
    problems: list[str] = []
    # First, find the adapters of modules and of parameters that hold all experts.
    adapted = _adapted_modules(config, model, problems)
    parameters = _adapted_parameters(config, model, adapted, problems)
    # Then find the tensors that the file contains in full.
    saved = []
    for name in model.tensors:
        module, _, kind = name.rpartition(".")
        has_bias = config.bias == "all" or config.bias != "none" and module in adapted
        if not (kind == "bias" and has_bias or is_saved(name, config.modules_to_save)):
            continue
        saved.append(name)
        if model.is_tied and _nth_last(2, name) == _EMBEDDING:
            problems.append(
                f"`modules_to_save`: {module} is also the head, but PEFT would train a "
                "copy that the head does not use."
            )
    embeddings = [n for n in model.tensors if _nth_last(2, n) in (_EMBEDDING, _HEAD)]
    optional = [n for n in embeddings if n.endswith(".weight") and n not in saved]
    rows = _trained_rows(config, model, adapted, problems)
    # Last, report patterns that match nothing, which are probably misspelled.
    for module in config.modules_to_save:
        if not any(is_saved(name, [module]) for name in model.tensors):
            problems.append(f"`modules_to_save`: {module!r} matches no module.")
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(matches_key(key, name) for name in (*adapted, *parameters)):
                problems.append(f"`{setting}`: {key!r} matches no adapted module.")
    refuse("this adapter does not fit the model", problems)
    kind = DoRA if config.use_dora else LoRA
    return AdapterTensors(
        kind, adapted, parameters, tuple(saved), tuple(optional), rows, model.tables
    )


def _nth_last(n: int, name: str) -> str:
    # The parts of a name are between dots.
    return ("." + name).split(".")[-n]


def _adapted_modules(
    config: PeftConfig, model: NamedBase, problems: list[str]
) -> dict[str, Position]:
    """Returns the adapted modules; adds the targets that do not fit to `problems`."""

    def is_chosen(module: str, layers: tuple[int, ...] | None) -> bool:
        return is_targeted(module, targets, layers, config.layer_prefixes)

    targets = config.target_modules
    modules = {n.rpartition(".")[0] for n in model.tensors if n.endswith(".weight")}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # PEFT leaves out the head.
        linear = {m for m in model.modules if not model.window(m)} - model.tables
        chosen = {m for m in linear if _nth_last(1, m) != _HEAD}
    else:
        chosen = {m for m in modules if is_chosen(m, config.layers)}
    excluded = {m for m in modules if is_targeted(m, config.exclude_modules)}
    convolutions = {m for m in chosen & {*model.modules} if model.window(m)}
    if convolutions and config.use_dora:
        problems.append(f"`use_dora`: {sorted(convolutions)} must be linear.")
    tables = sorted(chosen & model.tables)
    if tables and config.use_dora:
        problems.append(f"`target_modules`: {tables} cannot have DoRA adapters.")
    elif tables and model.is_tied:
        problems.append(
            f"`target_modules`: {tables} cannot also be the head, because PEFT would "
            "adapt only one of the two."
        )
    if not targets and not config.target_parameters:
        problems.append("`target_modules` must name at least one module. Got none.")
    for setting, matched in (("target_modules", chosen), ("exclude_modules", excluded)):
        patterns = getattr(config, setting)
        for pattern in _unmatched(patterns, matched, modules):
            problems.append(f"`{setting}`: {pattern!r} matches no module.")
    chosen -= excluded
    chosen -= {m for m in modules if is_inside_saved(m, config.modules_to_save)}
    if norms := sorted(chosen - set(model.modules)):
        problems.append(f"adapters of norms are not supported: {norms}.")
    for layer in config.layers or ():
        if not any(is_chosen(m, (layer,)) for m in modules):
            problems.append(f"`layers_to_transform`: no module in layer {layer}.")
    return {m: position for m, position in model.modules.items() if m in chosen}


def _adapted_parameters(
    config: PeftConfig,
    model: NamedBase,
    adapted: Mapping[str, Position],
    problems: list[str],
) -> dict[str, str]:
    """Returns PEFT's modules of adapted parameters; adds mismatches to `problems`."""
    targets = config.target_parameters
    by_module: dict[str, list[str]] = {}
    adapted_paths = {position.path for position in adapted.values()}
    for name, parts in model.parameters.items():
        if not is_targeted(name, targets):
            continue
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
        if is_inside_saved(name, config.modules_to_save) or adapted_paths & {*parts}:
            problems.append(f"`target_parameters`: {name} is adapted or saved twice.")
    for target in _unmatched(targets, (), model.parameters):
        problems.append(
            f"`target_parameters`: {target!r} matches no parameter of experts."
        )
    # PEFT wraps a module once for each of its parameters, the first one innermost.
    return {
        name: module + ".base_layer" * depth
        for module, names in by_module.items()
        for depth, name in enumerate(reversed(names))
    }


def _trained_rows(
    config: PeftConfig,
    model: NamedBase,
    adapted: Mapping[str, Position],
    problems: list[str],
) -> dict[str, tuple[int, ...]]:
    """Returns the trained rows of each embedding; adds mismatches to `problems`."""
    rows_by_module = {}
    for target, rows in config.trained_tokens.items():
        modules = [m for m in model.tables if is_targeted(m, (target,))]
        subject = f"`trainable_token_indices`: {target!r}"
        if len(modules) != 1:
            problems.append(f"{subject} must match one embedding. Got {modules}.")
            continue
        (module,) = modules
        num_rows, _ = model.tensor_shape(f"{module}.weight")
        if max(rows) >= num_rows:
            problems.append(f"{subject} has {num_rows} rows. Got row {max(rows)}.")
        is_replaced = is_inside_saved(module, config.modules_to_save)
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
    return [p for p in patterns if not any(is_targeted(name, (p,)) for name in names)]
