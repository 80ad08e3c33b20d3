"""Writes a model's folder with packed kernels, as a program stores them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...quant.kernel import is_packed
from ...quant.qtensor import QTensor
from ...trees.paths import Tree, refuse_listed
from ..files import Path
from ..model_folder import read_config_json, write_folder
from ..named_leaves import (
    NamedLeaf,
    exported_leaves,
    float_tensors_of,
    matrix_of,
)
from ..names import Names

Kernels = Mapping[str, QTensor]  # `[K, N]`, by the names of their weights


@dataclass(frozen=True)
class PackedLayout:
    """The form in which a program stores packed kernels."""

    name: str  # in errors
    formats: tuple[str, ...]  # that it has
    # The tensors of a kernel, by the name of its weight, `module.weight`.
    tensors: Callable[[str, QTensor], dict[str, Any]]
    # The changes to `config.json`, from the kernels, the names of modules in float, and
    # what it says.
    config: Callable[[Kernels, list[str], Mapping[str, Any]], dict[str, Any]]
    # Why it cannot hold a kernel of its formats, or None.
    refusal: Callable[[QTensor], str | None]
    # What all kernels must have in common.
    settings: Callable[[QTensor], tuple] = lambda q: (q.fmt, q.block_size)


def write_packed(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Mapping[str, Any],
    layout: PackedLayout,
    **options: Any,
) -> None:
    """Writes a base tree; lists the kernels that the layout cannot hold."""
    leaves = exported_leaves(base, names)
    packed = [(leaf, x) for leaf, x in leaves if is_packed(x)]
    problems = {leaf.path: _refusal(leaf, q, layout) for leaf, q in packed}
    refuse_listed(f"these kernels have no {layout.name} format", problems)
    kinds = {layout.settings(q) for _, q in packed}
    if len(kinds) != 1:
        raise ValueError(
            "`base` must have packed kernels, all of the same settings for "
            f"{layout.name}. Got {sorted(kinds)}."
        )
    tensors: dict[str, Any] = {}
    kernels: dict[str, QTensor] = {}
    in_float = []
    for leaf, x in leaves:
        if is_packed(x):
            for index, name in np.ndenumerate(leaf.tensors):
                kernels[name] = matrix_of(x, index)
                tensors |= layout.tensors(name, kernels[name])
            continue
        tensors |= float_tensors_of(leaf, x)
        if leaf.geometry is not None:
            in_float += [name.removesuffix(".weight") for name in leaf.tensors.flat]
    if "lm_head.weight" not in tensors:  # it is the embedding
        in_float.append("lm_head")
    own = config if isinstance(config, Mapping) else read_config_json(config)
    write_folder(
        path, tensors, config, layout.config(kernels, in_float, own), **options
    )


def _refusal(leaf: NamedLeaf, q: QTensor, layout: PackedLayout) -> str | None:
    if q.fmt not in layout.formats:
        return f"its format must be {' or '.join(layout.formats)}. Got {q.fmt}"
    if odd := [n for n in leaf.tensors.ravel() if not n.endswith(".weight")]:
        return f"its name must end in .weight. Got {odd[0]}"
    return layout.refusal(q)
