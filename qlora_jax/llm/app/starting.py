"""Starts the training of adapters from another adapter."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import qlora_jax as ql

from .base_model import BaseModel, fetch_adapter, init_shapes
from .train_config import TrainConfig


def read_initial_lora(
    config: TrainConfig, model: BaseModel, lora_config: ql.QLoRAConfig
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
    old = ql.leaves_by_path(initial_lora)
    new = ql.leaves_by_path(init_shapes(model.base, lora_config)[1])
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
