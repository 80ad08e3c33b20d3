"""Derives PEFT's settings from adapters."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ...adapters.base import Adapter, scaling_at, used_ranks
from ...adapters.dora import DoRA
from ...adapters.trained import Trained
from ...adapters.trained_rows import TrainedRows
from ...trees.adapters import adapters_of_each
from ...trees.paths import Tree
from ..names import Names
from .adapter_config import PeftConfig
from .adapter_file import NamedBase, Position


def peft_config(
    base: Tree,
    lora: Tree,
    names: Names,
    *,
    base_model: str | None = None,
    bias: str = "none",
    use_rslora: bool = False,
    modules_to_save: Iterable[str] = (),
    fused: bool = False,
) -> PeftConfig:
    """Returns PEFT's settings for adapters of this library.

    Args:
        base: The base tree.
        lora: The lora tree.
        names: The names of the leaves of `base` in the Hugging Face model.
        base_model: Hub id or path of the base model, for whoever loads the adapter.
        bias: Which biases of `base` to save: "none", "all" or "lora_only"; and at least
            those that are `Trained`.
        use_rslora: Whether to write alphas for PEFT's `alpha / sqrt(r)`.
        modules_to_save: Ends of the names of modules to save, such as "lm_head", and
            those that are `Trained` as well.
        fused: Whether to write the adapters of experts and routers as those of the
            parameters of transformers 5 (`target_parameters`), and not as those of the
            modules of transformers 4. They always are if PEFT would not turn the
            modules into the parameters: if the experts have no modules, if only some
            of their kernels have adapters, or if ranks or scalings differ.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If there is no adapter, one does not fit, or its kernel has no name.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> config = ql.QLoRAConfig(rank=4, alpha=8)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> found = ql.io.peft_config(base, lora, names)
        >>> found.target_modules, found.r, found.lora_alpha
        (('q_proj',), 4, 8)
    """
    adapters = adapters_of_each(base, lora)
    model = NamedBase.of(base, names)
    modules = model.modules
    trained = {path for path, x in adapters.items() if isinstance(x, Trained)}
    rows = {m: adapters.get(modules[m].path) for m in sorted(model.tables)}
    rows = {m: x.indices for m, x in rows.items() if isinstance(x, TrainedRows)}
    others = trained | {modules[module].path for module in rows}
    adapters = {path: x for path, x in adapters.items() if path not in others}
    parameters = _parameters(model, adapters, fused)
    held = {path for name in parameters for path in model.parameters[name]}
    adapted = {m: p for m, p in modules.items() if p.path in adapters.keys() - held}
    used = {path: _ranks(adapter) for path, adapter in adapters.items()}
    ranks = {m: int(used[place.path][place.index]) for m, place in adapted.items()}
    places = adapted | parameters
    for name, place in parameters.items():
        count = len(model.parameters[name].keys() & adapters.keys())
        ranks[name] = adapters[place.path].rank * count
    scaling = lambda name: scaling_at(adapters[places[name].path], places[name].index)
    alphas = {name: alpha_of(scaling(name), ranks[name], use_rslora) for name in ranks}
    # Ignored parts of a checkpoint may have modules of the same last names.
    has_others = any(pattern.endswith(r"\..*") for pattern in names.ignored)
    shortest = (lambda chosen, *_: sorted(chosen)) if has_others else _shortest
    targets = shortest({*adapted}, {*modules}, _last)
    of_parameters = shortest({*parameters}, {*model.parameters}, _in_layer)
    common = lambda values: Counter(values.values()).most_common(1)[0][0]
    if not ranks:
        raise ValueError("`lora` must hold an adapter of a kernel. Got none.")
    every = [adapters[place.path] for place in places.values()]
    kinds = {*map(type, every)}
    if len(kinds) > 1:
        names_of_kinds = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"adapters must be of one kind. Got {names_of_kinds}.")
    rank, alpha = common(ranks), common(alphas)
    tensors = [name for name, p in model.tensors.items() if p.path in trained]
    biased, whole = _trained_modules(tensors, model.tensors)
    if biased and bias == "none":
        bias = "lora_only" if biased <= {*adapted} else "all"
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(targets),
        target_parameters=tuple(of_parameters),
        lora_dropout=max(x.dropout for x in every),  # tables have none
        bias=bias,
        use_rslora=use_rslora,
        use_dora=kinds == {DoRA},
        modules_to_save=(*modules_to_save, *whole),
        trainable_token_indices=rows or None,
        rank_pattern=pattern_of(ranks, rank),
        alpha_pattern=pattern_of(alphas, alpha),
        extra_settings={}
        if base_model is None
        else {"base_model_name_or_path": base_model},
    )


def _parameters(
    model: NamedBase, adapters: Mapping[str, Any], fused: bool
) -> dict[str, Position]:
    """Returns one adapted place of each parameter whose adapter is written as its own.

    There are none if the adapters are written as those of modules.
    """
    if not fused and _become_parameters(model, adapters):
        return {}
    return {
        name: Position(path, own[path][0])
        for name, own in model.parameters.items()
        for path in [p for p in own if p in adapters][:1]
    }


def _become_parameters(model: NamedBase, adapters: Mapping[str, Any]) -> bool:
    """Whether PEFT turns adapters of experts' modules into those of parameters.

    With some kernels of a layer's experts alone it loads the file and computes the
    bare model, and it drops patterns of ranks and alphas.
    """
    modules = {place.path for place in model.modules.values()}
    kernels: dict[str, set[str]] = {}
    for name, parts in model.parameters.items():
        kernels.setdefault(name.rpartition(".")[0], set()).update(parts)
    have_modules = all(paths <= modules for paths in kernels.values())
    is_whole = all(
        paths <= adapters.keys() or not paths & adapters.keys()
        for paths in kernels.values()
    )
    ranks_and_scalings = {(x.rank, x.scaling) for x in adapters.values()}
    # Experts of one kernel that differ have no form as a parameter: PEFT raises.
    have_no_form = any(isinstance(x.scaling, tuple) for x in adapters.values())
    is_uniform = have_no_form or len(ranks_and_scalings) == 1
    return have_modules and is_whole and is_uniform


def _ranks(adapter: Adapter) -> np.ndarray:
    """Returns the rank of each matrix; what it uses, if scalings differ."""
    ranks = np.zeros(adapter.batch_shape, int)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    is_known = not any(map(is_shape, adapter.arrays.values()))
    if isinstance(adapter.scaling, tuple) and is_known:
        ranks = used_ranks(adapter)
    return np.where(ranks, ranks, adapter.rank)


def _in_layer(name: str) -> str:
    """Returns the end of a name after the number of a layer."""
    return re.sub(r".*\.\d+\.", "", name)


def _trained_modules(
    tensors: Iterable[str], every: Iterable[str]
) -> tuple[set[str], list[str]]:
    """Returns the modules of trained biases, and ends of the names of other modules."""
    modules_of = lambda names: {name.rpartition(".")[0] for name in names}
    biases = {name for name in tensors if _last(name) == "bias"}
    others, modules = modules_of({*tensors} - biases), modules_of(every)
    # PEFT compares ends without a dot: "norm" is an "input_layernorm" too.
    is_end = lambda end: {m for m in modules if m.endswith(end)} <= others
    ends = {_last(m) if is_end(_last(m)) else m for m in others}
    return modules_of(biases), sorted(ends)


def alpha_of(scaling: float, rank: int, use_rslora: bool = False) -> float:
    """Returns the alpha that gives a scaling, as a whole number if one does.

    Example:
        >>> alpha_of(2.0, 8), alpha_of(0.3, 8)
        (16, 2.4)
    """
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    # PEFT's `lora_alpha` is an int by its type; not all scalings have one.
    return round(alpha) if round(alpha) / divisor == scaling else alpha


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _shortest(
    adapted: set[str], names: set[str], end: Callable[[str], str]
) -> list[str]:
    """Returns the ends of names that match the adapted ones and no others."""
    others = {end(name) for name in names - adapted}
    return sorted({name if end(name) in others else end(name) for name in adapted})


def pattern_of(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Returns the settings that differ from the common one, by end of name."""
    by_end: dict[str, set] = {}
    for module, value in values.items():
        by_end.setdefault(_last(module), set()).add(value)
    found = {}
    for module, value in values.items():
        key = _last(module) if len(by_end[_last(module)]) == 1 else module
        if value != common:
            found[key] = value
    return found
