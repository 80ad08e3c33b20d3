"""Writes a PEFT adapter."""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from ...adapters.base import Adapter
from ...adapters.lora import LoRA
from ...adapters.trained import Trained
from ...adapters.trained_rows import TrainedRows
from ...quant.kernel import Kernel
from ...trees.adapters import adapters_of_each, with_trained
from ...trees.paths import Tree, refuse_listed
from ..files import new_folder, write_json
from ..names import Names
from ..safetensors import write_safetensors
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from .adapter_file import (
    AdapterTensors,
    NamedBase,
    array_keys,
    kind_of,
    lay_out,
    rows_key,
    to_stored,
)
from .describe import peft_config
from .stacked import join_parameter, unstack


def save_peft(
    path: str | pathlib.Path,
    base: Tree,
    lora: Tree,
    names: Names,
    config: PeftConfig | None = None,
) -> None:
    """Saves adapters as PEFT would, for `PeftModel.from_pretrained`.

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
            not fit their kernels, or are not finite; all are named.

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
    tensors = adapter_tensors(base, lora, names, config)
    with new_folder(path) as folder:
        write_safetensors(folder / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, config.to_json())


def adapter_tensors(
    base: Tree, lora: Tree, names: Names, config: PeftConfig
) -> dict[str, np.ndarray]:
    """Returns what PEFT stores of adapters with these settings, by key."""
    adapters = jax.tree.map(np.asarray, adapters_of_each(base, lora))
    model = NamedBase.of(with_trained(base, adapters), names)
    layout = lay_out(config, model)
    tensors = _factors(_not_trained(adapters, model, layout), model, layout, config)
    for module, rows in layout.rows.items():
        found = adapters.get(model.modules[module].path)
        if not isinstance(found, TrainedRows) or found.indices != tuple(sorted(rows)):
            raise ValueError(
                f"{module} must have the trained rows of `config`, {rows}. Got others."
            )
        tensors[rows_key(module)] = found.rows[np.searchsorted(found.indices, rows)]
    for name in (*layout.saved, *config.saved_base_weights):
        tensors[layout.keys_of(name)[0]] = _tensor(model, name)
    bad = [key for key, x in tensors.items() if not np.isfinite(x).all()]
    refuse_listed("these tensors of the adapter must be finite", bad)
    return tensors


def _not_trained(
    adapters: Mapping[str, Adapter], model: NamedBase, layout: AdapterTensors
) -> dict[str, Adapter]:
    """Returns the low-rank adapters; refuses to leave out what is trained in full."""
    kinds = Trained | TrainedRows
    others = {p: x for p, x in adapters.items() if not isinstance(x, kinds)}
    trained = adapters.keys() - others.keys()
    held = {*layout.saved, *(f"{module}.weight" for module in layout.rows)}
    places = model.tensors.items()
    left = sorted(n for n, p in places if p.path in trained and n not in held)
    refuse_listed(
        "`bias`, `modules_to_save` and `trainable_token_indices` must hold all that is "
        "trained in full. Without",
        left,
    )
    return others


def _factors(
    adapters: Mapping[str, Adapter],
    model: NamedBase,
    layout: AdapterTensors,
    config: PeftConfig,
) -> dict[str, np.ndarray]:
    """Returns the arrays of each module's adapter by key; refuses other settings."""
    wanted, kind = {place.path for place in layout.adapted.values()}, kind_of(config)
    held = {path for name in layout.parameters for path in model.parameters[name]}
    problems = [f"{path}: it has no adapter." for path in wanted - set(adapters)]
    tensors: dict[str, np.ndarray] = {}
    for module, place in model.modules.items():
        adapter = adapters.get(place.path)
        if adapter is None or place.path in held:
            continue
        rank = config.rank_of(module) if module in layout.adapted else 0
        scaling = config.scaling_of(module)
        try:
            if type(adapter) is not kind:
                got = type(adapter).__name__
                raise ValueError(
                    f"its type must be {kind.__name__}, by `use_dora`. Got {got}."
                )
            one = unstack(adapter, place.index, rank)
            if rank and np.float32(one.scaling) != np.float32(scaling):
                raise ValueError(f"its scaling must be {scaling}. Got {one.scaling}.")
        except ValueError as error:
            problems.append(f"{place.path} ({module}): {error}")
            continue
        if rank:
            keys = array_keys(type(one), module, module in model.tables)
            for name, key in keys.items():
                x = to_stored(name, one.arrays[name], model.window(module))
                tensors[key] = np.ascontiguousarray(x)
    for name, module in layout.parameters.items():
        settings = config.scaling_of(name), config.rank_of(name)
        try:
            arrays = join_parameter(name, model, adapters, *settings)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        tensors |= {key: arrays[x] for x, key in array_keys(LoRA, module).items()}
    places = {place.path for place in model.modules.values()} | held
    unnamed = set(adapters) - places
    problems += [f"{path}: PEFT has no adapters of such weights." for path in unnamed]
    refuse_listed("these adapters are not those of `config`", sorted(problems))
    return tensors


def _tensor(model: NamedBase, name: str) -> np.ndarray:
    """Returns a tensor of the base tree in the checkpoint's layout."""
    place = model.tensors[name]
    leaf = model.leaves[place.path]
    if isinstance(leaf, Kernel):
        w = np.asarray(leaf.dequantize_matrix())[place.index]
        tensor = to_stored("a", w, model.named[place.path].window)
    else:
        tensor = np.asarray(leaf)[place.index].reshape(model.tensor_shape(name))
    return np.ascontiguousarray(tensor)
