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
from .train_groups import AdapterConfig


def read_start(
    config: AdapterConfig, model: BaseModel, adapters: ql.QLoRAConfig
) -> tuple[PyTree, float]:
    """Returns the adapters in `config.path`, and the alpha for the new adapters.

    With this alpha, the new adapters have the same scaling. Raises ValueError unless
    the modules and the rank are those of `adapters`, the settings of the new ones.
    """
    path = str(config.path)
    source = dataclasses.replace(model, adapter=fetch_adapter(path))
    if source.replaces_weights:
        raise ValueError(
            f"`adapter` must not replace weights of the base. Got {path!r}, which does."
        )
    # NumPy arrays can be put on any mesh.
    start = jax.tree.map(np.asarray, source.with_adapter().lora)
    old = ql.leaves_by_path(start)
    new = ql.leaves_by_path(init_shapes(model.base, adapters)[1])
    # Leaves that are trained in full start from their values in the base, so the source
    # does not need them.
    new = {k: x for k, x in new.items() if x.replacement is None}
    if problems := _list_problems(old, new):
        raise ValueError(
            "`adapter` must have the modules and the rank of the adapters to train, "
            "which `target_modules` and `lora_r` set, as plain LoRA. Got other ones in "
            f"{path}: {'; '.join(problems)}."
        )
    scalings = {x.scaling for x in old.values()}
    if len(scalings) > 1 or isinstance(scaling := [*scalings][0], tuple):
        raise ValueError(
            f"`adapter` must have one scaling for all modules. Got {path!r}, which has "
            "several."
        )
    alpha = scaling * config.rank ** (0.5 if config.rank_stabilized else 1)
    if config.alpha is not None and not math.isclose(config.alpha, alpha):
        raise ValueError(
            f"`lora_alpha` must be {alpha:.12g} or left out with `adapter`, whose "
            f"scaling is {scaling:g}. Got {config.alpha}."
        )
    return start, alpha


def _list_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the reasons why training cannot start from the adapters `old`.

    Both arguments have an adapter for each path. Those in `new` have shapes as leaves.
    """
    problems = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old or path not in new:
            problems.append(f"{path} {'is not trained' if path in old else 'has none'}")
            continue
        source, target = old[path], new[path]
        # Training can start from a merge-aware adapter only if the new adapter is
        # merge-aware too, for the same packing.
        packing = getattr(source, "packing", None)
        has_same_packing = packing is not None and packing == getattr(
            target, "packing", None
        )
        if type(source) is not ql.LoRA and not has_same_packing:
            problems.append(f"{path} has another kind, {source.label}")
        elif source.a.shape != target.a.shape or source.b.shape != target.b.shape:
            problems.append(f"{path} has rank {source.rank} instead of {target.rank}")
    return problems


def start_from(lora: PyTree, start: PyTree) -> PyTree:
    """Returns `lora`, with A and B from `start` for every adapter that it has."""
    if isinstance(lora, dict):
        return {
            k: start_from(x, start[k]) if k in start else x for k, x in lora.items()
        }
    arrays = (jnp.asarray(getattr(start, x), lora.a.dtype) for x in ("a", "b"))
    return dataclasses.replace(lora, **dict(zip("ab", arrays, strict=True)))
