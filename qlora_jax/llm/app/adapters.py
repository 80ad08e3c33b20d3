"""The adapters of a run: their `QLoRAConfig`, and adapters to start from."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from ..models.jax_engine import LAYERS
from ..train.target_modules import ALL_LINEAR, find_target_paths
from .merge_aware import target_settings
from .open_model import OpenModel, fetch_adapter
from .train_config import TrainConfig


def packing_config_for(
    settings: TrainConfig, model: OpenModel, default_fmt: str = "none"
) -> ql.QLoRAConfig | None:
    """Returns how training packs the layers; None if they are used as stored."""
    return model.packing_config(
        settings.fmt or default_fmt,
        settings.block_size,
        settings.double_quant,
    )


def init_shapes(base: PyTree, config: ql.QLoRAConfig) -> tuple[PyTree, PyTree]:
    """Returns the base and the lora tree that `ql.init` would make, as shapes."""
    return jax.eval_shape(lambda base: ql.init(jax.random.key(0), base, config), base)


def lora_config_for(
    config: TrainConfig,
    model: OpenModel,
    packing_config: ql.QLoRAConfig | None,
) -> ql.QLoRAConfig:
    """Returns the settings of the adapters that a run trains.

    `packing_config` says how the base is packed, as `OpenModel.packing_config` returns
    it. Only merge-aware adapters depend on it.
    """
    params, engine = model.base, model.engine
    if config.target_modules == ALL_LINEAR:
        # A vision part is only adapted if its modules are named.
        params = engine.language_params(params)
    targets = find_target_paths(
        config.target_modules, params, model.names, head=engine.head_module
    )
    settings: dict[str, Any] = {"fmt": None}  # reading the model packs its kernels
    if config.merge_aware:
        packings = (
            {packing_config.packing} if packing_config else {*model.stored_packings}
        )
        unadapted = [
            path
            for path in leaves_by_path(model.base)
            if re.fullmatch(LAYERS, path)
            and (path not in targets or _is_trained_in_full(config, path))
        ]
        settings |= target_settings(config, packings, unadapted)
    return ql.QLoRAConfig(
        rank=config.rank,
        rank_pattern=_find_small_kernels(config, model, targets),
        alpha=config.lora_alpha,
        targets=tuple(map(re.escape, targets)),
        trainable=config.trainable or (),
        contract=model.contract_of([*map(re.escape, targets)]),
        dropout=config.lora_dropout,
        rank_stabilized=config.use_rslora,
        use_dora=config.use_dora,
        **settings,
    )


def _is_trained_in_full(config: TrainConfig, path: str) -> bool:
    """Returns whether a leaf is trained itself, so that it gets no LoRA."""
    return bool(config.trainable and re.fullmatch(config.trainable, path))


def _find_small_kernels(
    config: TrainConfig, model: OpenModel, targets: Sequence[str]
) -> dict[str | re.Pattern, int]:
    """Returns patterns of kernels that are smaller than their adapters, and the rank.

    One of them is the gate of a shared expert, which has one output. Unless these
    patterns are in `rank_pattern`, `ql.init` rejects such adapters, because wrong axes
    are the usual cause. Here, the axes are known, and PEFT has these adapters too.
    """
    leaves = leaves_by_path(model.base)
    ranks: dict[str | re.Pattern, int] = {}
    for path in targets:
        k, n = leaves[path].shape[-2:]
        is_small = config.rank * (k + n) > k * n
        if is_small and not _is_trained_in_full(config, path):
            ranks[re.escape(path)] = config.rank
    return ranks


def read_initial_lora(
    config: TrainConfig, model: OpenModel, lora_config: ql.QLoRAConfig
) -> tuple[PyTree, float]:
    """Returns the adapters in `config.adapter`, and the alpha for the new adapters.

    With this alpha, the new adapters have the same scaling. Raises ValueError unless
    the adapters have the modules and the rank of the new ones, which `lora_config`
    describes.
    """
    path = str(config.adapter)
    source = dataclasses.replace(model, adapter_path=fetch_adapter(path))
    if source.replaces_weights:
        raise ValueError(
            f"`adapter` must not replace weights of the base. Got {path!r}, which does."
        )
    # NumPy arrays can be put on any mesh.
    initial_lora = jax.tree.map(np.asarray, source.read_adapter().lora)
    old = leaves_by_path(initial_lora)
    new = leaves_by_path(init_shapes(model.base, lora_config)[1])
    # Leaves that are trained in full start from their values in the base, so the source
    # does not need them.
    new = {k: x for k, x in new.items() if x.replacement is None}
    if problems := _list_problems(old, new):
        raise ValueError(
            "`adapter` must have the modules and the rank of the adapters to train, "
            "which `target_modules` and `rank` set, as plain LoRA. Got other ones in "
            f"{path}: {'; '.join(problems)}."
        )
    scaling, *different = {x.scaling for x in old.values()}
    if different:
        raise ValueError(
            f"`adapter` must have one scaling for all modules. Got {path!r}, which has "
            "several."
        )
    alpha = scaling * config.rank ** (0.5 if config.use_rslora else 1)
    if config.lora_alpha is not None and not math.isclose(config.lora_alpha, alpha):
        raise ValueError(
            f"`lora_alpha` must be {alpha:.12g} or left out with `adapter`, whose "
            f"scaling is {scaling:g}. Got {config.lora_alpha}."
        )
    return initial_lora, alpha


def _list_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the reasons why training cannot start from the adapters `old`.

    Both arguments have an adapter for each path. Those in `new` have shapes as leaves.
    """
    problems = []
    for path in sorted(old.keys() | new.keys()):
        source, target = old.get(path), new.get(path)
        # Training can start from a merge-aware adapter only if the new adapter is
        # merge-aware too, for the same packing.
        packing, new_packing = (getattr(x, "packing", None) for x in (source, target))
        has_same_packing = packing is not None and packing == new_packing
        if target is None:
            problems.append(f"{path} is not trained")
        elif source is None:
            problems.append(f"{path} is missing")
        elif type(source) is not ql.LoRA and not has_same_packing:
            problems.append(f"{path} has another kind, {source.label}")
        elif source.a.shape != target.a.shape or source.b.shape != target.b.shape:
            problems.append(f"{path} has rank {source.rank} instead of {target.rank}")
    return problems


def copy_weights(lora: PyTree, source: PyTree) -> PyTree:
    """Returns `lora`, with A and B of the adapters that `source` has too."""
    if isinstance(lora, dict):
        return {
            k: copy_weights(x, source[k]) if k in source else x for k, x in lora.items()
        }
    a, b = (jnp.asarray(x, lora.a.dtype) for x in (source.a, source.b))
    return dataclasses.replace(lora, a=a, b=b)
