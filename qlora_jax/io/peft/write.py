"""Finds the PEFT settings of adapters, and writes adapters as PEFT does."""

import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

import jax
import numpy as np

from ...adapters.base import Adapter, used_ranks
from ...adapters.dora import DoRA
from ...adapters.lora import LowRank, is_low_rank
from ...quant.kernel import is_kernel
from ...trees.adapters import adapters_of_each, with_trained
from ...trees.paths import Tree, refuse_listed
from ..files import new_folder, write_json
from ..names import Names
from ..safetensors import write_safetensors
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from .adapter_file import AdapterTensors, NamedBase, Position, lay_out, to_stored
from .stacked import join_parameter, unstack

N = TypeVar("N", int, float)


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
            transformers 4. This is always done if PEFT could not convert the modules
            to parameters: if the experts have no modules, if only some of their kernels
            have adapters, or if ranks or scalings differ.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If there is no adapter, or if one does not fit its kernel, or if its
            kernel has no name.

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
    # First, separate the adapters that are not low-rank.
    trained = {path for path, x in adapters.items() if x.replacement is not None}
    tables = {m: adapters.get(model.modules[m].path) for m in sorted(model.tables)}
    rows = {m: x.replaced_rows for m, x in tables.items() if x and x.replaced_rows}
    adapters = {path: x for path, x in adapters.items() if is_low_rank(x)}
    # Then find a position for each adapted module and parameter, from which its rank
    # and scaling are read.
    parameters = _adapted_parameters(model, adapters, fused)
    in_parameters = {path for name in parameters for path in model.parameters[name]}
    paths = adapters.keys() - in_parameters
    modules = {m: p for m, p in model.modules.items() if p.path in paths}
    positions = modules | parameters
    if not positions:
        raise ValueError("`lora` must hold an adapter of a kernel. Got none.")
    adapter_of = {name: adapters[position.path] for name, position in positions.items()}
    # A PEFT adapter is either LoRA or DoRA for all modules.
    kinds = {*map(type, adapter_of.values())}
    if len(kinds) > 1:
        kind_names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"adapters must be of one kind. Got {kind_names}.")
    ranks_by_path = {path: _ranks(adapter) for path, adapter in adapters.items()}
    ranks = {m: int(ranks_by_path[p.path][p.index]) for m, p in modules.items()}
    for name in parameters:
        # Each adapted kernel of a parameter may need a block of its rank.
        num_adapted = len(model.parameters[name].keys() & adapters.keys())
        ranks[name] = adapter_of[name].rank * num_adapted
    alphas = {}
    for name, position in positions.items():
        scaling = float(adapter_of[name].scalings[position.index])
        alphas[name] = alpha_of(scaling, ranks[name], use_rslora)
    # Last, find the common values, the exceptions and the shortest ends of names.
    if any(pattern.endswith(r"\..*") for pattern in names.ignored):
        # An ignored part of the checkpoint, such as a vision tower, may have modules
        # with the same last names.
        target_modules, target_parameters = sorted(modules), sorted(parameters)
    else:
        target_modules = _shortest_ends(modules, model.modules, _last)
        target_parameters = _shortest_ends(parameters, model.parameters, _in_layer)
    trained_tensors = [n for n, p in model.tensors.items() if p.path in trained]
    # Biases and modules that are `Trained` must be saved in full.
    biased_modules, saved = _trained_modules(trained_tensors, model.tensors)
    if biased_modules and bias == "none":
        bias = "lora_only" if biased_modules <= modules.keys() else "all"
    rank, alpha = _most_common(ranks), _most_common(alphas)
    source = {"base_model_name_or_path": base_model, "revision": revision}
    source = {key: value for key, value in source.items() if value is not None}
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tuple(target_modules),
        target_parameters=tuple(target_parameters),
        # Adapters of embeddings have no dropout.
        lora_dropout=max(adapter.dropout for adapter in adapter_of.values()),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=kinds == {DoRA},
        modules_to_save=(*modules_to_save, *saved),
        trainable_token_indices=rows or None,
        rank_pattern=pattern_of(ranks, rank),
        alpha_pattern=pattern_of(alphas, alpha),
        extra_settings=source,
    )


def _adapted_parameters(
    model: NamedBase, adapters: Mapping[str, LowRank], fused: bool
) -> dict[str, Position]:
    """Returns a position in each parameter that is adapted instead of its modules."""
    # Adapters of modules are preferred: all versions of transformers can read them.
    if not fused and _can_convert_modules(model, adapters):
        return {}
    parameters = {}
    for name, parts in model.parameters.items():
        for path in [path for path in parts if path in adapters][:1]:
            parameters[name] = Position(path, parts[path][0])
    return parameters


def _can_convert_modules(model: NamedBase, adapters: Mapping[str, LowRank]) -> bool:
    # When PEFT loads adapters of experts' modules, it converts them to adapters of
    # parameters. This drops patterns of ranks and alphas, and if only some kernels of a
    # layer's experts have adapters, PEFT silently ignores the adapters.
    module_paths = {position.path for position in model.modules.values()}
    kernels: dict[str, set[str]] = {}
    for name, parts in model.parameters.items():
        kernels.setdefault(name.rpartition(".")[0], set()).update(parts)
    have_modules = all(paths <= module_paths for paths in kernels.values())
    are_complete = all(
        paths <= adapters.keys() or not paths & adapters.keys()
        for paths in kernels.values()
    )
    # A parameter has one scaling, so kernels whose experts have different scalings can
    # only be written as modules. PEFT raises an error when it converts these, which is
    # better than other scalings.
    need_modules = any(isinstance(x.scaling, tuple) for x in adapters.values())
    are_uniform = len({(x.rank, x.scaling) for x in adapters.values()}) == 1
    return have_modules and are_complete and (need_modules or are_uniform)


def _ranks(adapter: LowRank) -> np.ndarray:
    """Returns the rank of each matrix. If scalings differ, padding does not count."""
    # Matrices with different scalings may have different ranks, padded with zeros.
    ranks = np.zeros(adapter.batch_shape, int)
    arrays = adapter.arrays.values()
    has_values = not any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
    if isinstance(adapter.scaling, tuple) and has_values:
        ranks = used_ranks(adapter)
    # An adapter that is all zeros keeps the full rank.
    return np.where(ranks, ranks, adapter.rank)


def alpha_of(scaling: float, rank: int, use_rslora: bool = False) -> float:
    """Returns the alpha that gives a scaling, as an integer if possible."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    # PEFT declares `lora_alpha` as an integer, but not every scaling has one.
    return round(alpha) if round(alpha) / divisor == scaling else alpha


def _most_common(values: Mapping[str, N]) -> N:
    return Counter(values.values()).most_common(1)[0][0]


def pattern_of(values: Mapping[str, N], common: N) -> dict[str, N]:
    """Returns the values that differ from `common`, by name or by the end of a name."""
    # The last part of a name is enough if all modules with it have the same value.
    values_by_end: dict[str, set[N]] = {}
    for module, value in values.items():
        values_by_end.setdefault(_last(module), set()).add(value)
    return {
        _last(module) if len(values_by_end[_last(module)]) == 1 else module: value
        for module, value in values.items()
        if value != common
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _in_layer(name: str) -> str:
    """Returns the part of a name after its layer's number."""
    return re.sub(r".*\.\d+\.", "", name)


def _shortest_ends(
    adapted: Collection[str], names: Iterable[str], end_of: Callable[[str], str]
) -> list[str]:
    """Returns the ends of the adapted names; a full name if its end matches others."""
    other_ends = {end_of(name) for name in names if name not in adapted}
    ends = {name: end_of(name) for name in adapted}
    return sorted({name if end in other_ends else end for name, end in ends.items()})


def _trained_modules(
    trained: Collection[str], tensors: Iterable[str]
) -> tuple[set[str], list[str]]:
    """Returns the modules of trained biases, and name ends of other trained modules."""
    biases = {name for name in trained if _last(name) == "bias"}
    saved = {name.rpartition(".")[0] for name in trained if name not in biases}
    modules = {name.rpartition(".")[0] for name in tensors}

    def matches_saved_only(end: str) -> bool:
        # PEFT compares ends without a dot: "norm" also matches "input_layernorm".
        return {module for module in modules if module.endswith(end)} <= saved

    ends = {_last(m) if matches_saved_only(_last(m)) else m for m in saved}
    return {name.rpartition(".")[0] for name in biases}, sorted(ends)


def save_peft(
    path: str | pathlib.Path,
    base: Tree,
    lora: Tree,
    names: Names,
    config: PeftConfig | None = None,
) -> None:
    """Saves adapters as PEFT does, for `PeftModel.from_pretrained`.

    An adapter that `load_peft` read is written with the same bytes.

    Args:
        path: The folder to write, new or empty.
        base: The base tree.
        lora: The lora tree.
        names: The names of the leaves of `base` in the Hugging Face model.
        config: The settings: from `load_peft`, or by default from `peft_config`.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: Before anything is written: if adapters differ from the settings, do
            not fit their kernels, or are not finite. The error lists all of them.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql, tempfile, pathlib
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_peft(folder, base, lora, names)
        ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if config is None:
        config = peft_config(base, lora, names)
    # All checks come before the first byte is written.
    tensors = adapter_tensors(base, lora, names, config)
    with new_folder(path) as folder:
        write_safetensors(folder / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, config.to_json())


def adapter_tensors(
    base: Tree, lora: Tree, names: Names, config: PeftConfig
) -> dict[str, np.ndarray]:
    """Returns the tensors that PEFT stores for adapters with these settings, by key."""
    adapters = jax.tree.map(np.asarray, adapters_of_each(base, lora))
    # Leaves that are `Trained` replace those of the base, so that they are written.
    model = NamedBase.of(with_trained(base, adapters), names)
    layout = lay_out(config, model)
    low_rank = _low_rank_adapters(adapters, model, layout)
    tensors = _low_rank_tensors(low_rank, model, layout, config)
    for module, rows in layout.rows.items():
        adapter = adapters.get(model.modules[module].path)
        if adapter is None or adapter.replaced_rows != tuple(sorted(rows)):
            raise ValueError(
                f"{module} must have the trained rows {rows} of `config`. Got others."
            )
        # The rows here are sorted by token; those of PEFT are in the order of `rows`.
        order = np.searchsorted(adapter.replaced_rows, rows)
        tensors[layout.rows_key(module)] = np.asarray(adapter.arrays["rows"])[order]
    for name in (*layout.saved, *config.saved_base_weights):
        tensors[layout.keys_of(name)[0]] = _base_tensor(model, name)
    not_finite = [key for key, x in tensors.items() if not np.isfinite(x).all()]
    refuse_listed("these tensors of the adapter must be finite", not_finite)
    return tensors


def _low_rank_adapters(
    adapters: Mapping[str, Adapter], model: NamedBase, layout: AdapterTensors
) -> dict[str, LowRank]:
    """Returns the low-rank adapters, after checking that all others are saved."""
    low_rank = {path: x for path, x in adapters.items() if is_low_rank(x)}
    trained = adapters.keys() - low_rank.keys()
    written = {*layout.saved, *(f"{module}.weight" for module in layout.rows)}
    positions = model.tensors.items()
    refuse_listed(
        "`bias`, `modules_to_save` and `trainable_token_indices` must include all "
        "tensors that are trained in full. Missing",
        sorted(n for n, p in positions if p.path in trained and n not in written),
    )
    return low_rank


def _low_rank_tensors(
    adapters: Mapping[str, Adapter],
    model: NamedBase,
    layout: AdapterTensors,
    config: PeftConfig,
) -> dict[str, np.ndarray]:
    """Returns the arrays of the low-rank adapters by key; an error lists problems."""
    in_parameters = {path for n in layout.parameters for path in model.parameters[n]}
    adapted = {position.path for position in layout.adapted.values()}
    problems = [f"{path}: it has no adapter." for path in adapted - set(adapters)]
    tensors: dict[str, np.ndarray] = {}
    for module, position in model.modules.items():
        adapter = adapters.get(position.path)
        if adapter is None or position.path in in_parameters:
            continue
        # A module without an adapter may be in a stack with other modules that have
        # one. The rank 0 requires that its part of the stack is zero.
        rank = config.rank_of(module) if module in layout.adapted else 0
        try:
            if type(adapter) is not layout.kind:
                raise ValueError(
                    f"its type must be {layout.kind.__name__}, from `use_dora`. Got "
                    f"{type(adapter).__name__}."
                )
            adapter = unstack(adapter, position.index, rank)
            scaling, expected = float(adapter.scalings), config.scaling_of(module)
            # Scalings must be equal up to the rounding to float32.
            if rank and np.float32(scaling) != np.float32(expected):
                raise ValueError(f"its scaling must be {expected}. Got {scaling}.")
        except ValueError as error:
            problems.append(f"{position.path} ({module}): {error}")
            continue
        for name, key in layout.array_keys(module).items() if rank else ():
            x = to_stored(name, np.asarray(adapter.arrays[name]), model.window(module))
            tensors[key] = np.ascontiguousarray(x)
    for name, module in layout.parameters.items():
        settings = config.scaling_of(name), config.rank_of(name)
        try:
            arrays = join_parameter(name, model, adapters, *settings)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        tensors |= {key: arrays[x] for x, key in layout.array_keys(module).items()}
    # Last, report adapters of weights that PEFT cannot adapt, such as norms.
    named = {position.path for position in model.modules.values()} | in_parameters
    unnamed = set(adapters) - named
    problems += [f"{path}: PEFT cannot adapt such weights." for path in unnamed]
    refuse_listed("these adapters do not match `config`", sorted(problems))
    return tensors


def _base_tensor(model: NamedBase, name: str) -> np.ndarray:
    """Returns a tensor of the base tree in the checkpoint's layout."""
    position = model.tensors[name]
    leaf = model.leaves[position.path]
    if is_kernel(leaf):
        # Kernels [K, N] are stored as A is: transposed, with the window moved.
        matrix = np.asarray(leaf.dequantize_matrix())[position.index]
        tensor = to_stored("a", matrix, model.named[position.path].window)
    else:
        tensor = np.asarray(leaf)[position.index].reshape(model.tensor_shape(name))
    return np.ascontiguousarray(tensor)
