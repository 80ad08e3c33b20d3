"""Sharding rules of a decoder's parameters, for axes `data`, `fsdp` and `tensor`.

`data` splits the rows of a batch. `fsdp` splits these rows too, and every kernel;
kernels are gathered where they are used. In attention and in the MLP, `tensor` splits
the outputs of the first kernels and the inputs of the last one, so that attention and
the MLP need only one all-reduce each.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

from .config import DecoderConfig
from .constraints import MESH_AXES, ROW_AXES, select_axes
from .layer import PARTS

# The roles of the axes of kernels, as in `QLoRAConfig`.
Contract = dict[str | re.Pattern[str], str]

# Kernels that `tensor` splits along their outputs, and kernels that it splits along
# their inputs, which is the contracted axis.
_SPLIT_OUTPUTS = {name for part in PARTS for name in part.split_outputs}
_SPLIT_INPUTS = {name for part in PARTS for name in part.split_inputs}


def place_arguments(
    config: DecoderConfig, base: PyTree, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Returns the arguments `rules` and `rows` of `ql.sharding.place` for a decoder.

    - Rows of inputs: `data` and `fsdp` split them.
    - Kernels: `fsdp` splits them along the hidden size if this cuts no quantization
      block, and otherwise along their outputs. `tensor` splits them along the heads or
      the width of the MLP. It does not split the kernels of keys and values if its size
      does not divide the number of key heads.
    - Embedding and head: `fsdp` and `tensor` together split the embedding along the
      hidden size, and the head along the vocabulary, so that neither is ever gathered.
      If the number of parts does not divide this size, only one axis is used, or none.
    - All other parameters, such as norms, biases and routers, are replicated.

    `place` raises an error for kernels, other than the head, that cannot be split.

    Args:
        config: The decoder's config.
        base: The decoder's parameters, in float or packed, or their shapes.
        mesh: A mesh with axes among `data`, `fsdp` and `tensor`.

    Raises:
        ValueError: If the mesh has other axes, or `tensor` does not divide the heads.

    Example:
        >>> import jax
        >>> from qlora_jax.llm.models.checkpoint import abstract_params
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> base = abstract_params(config)
        >>> auto = (jax.sharding.AxisType.Auto,) * 2
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), auto)
        >>> arguments = place_arguments(config, base, mesh)
        >>> tuple(arguments["rules"]["layers/mlp/down_proj/kernel"])
        (None, 'tensor', 'fsdp')
        >>> base, lora = ql.sharding.place(base, {}, mesh, **arguments)
    """
    sizes = _axis_sizes(mesh)
    heads, tensor = config.num_heads, sizes.get("tensor", 1)
    if heads % tensor:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"`tensor` must divide the {heads} heads: it may be "
            f"{', '.join(divisors)}. Got {tensor}."
        )
    rules = {}
    for path, leaf in leaves_by_path(base).items():
        specs = [PartitionSpec(*spec) for spec in _candidate_specs(config, path, sizes)]
        fitting = (spec for spec in specs if _divides(leaf, spec, sizes))
        if specs:  # if none fits, `place` raises an error about the first one
            rules[re.escape(path)] = next(fitting, specs[0])
    return {"rules": rules, "rows": (select_axes(ROW_AXES, sizes),)}


def place_torch_arguments(
    contract: Contract, base: PyTree, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Returns the arguments `rules` and `rows` of `ql.sharding.place` for a model.

    Rows of inputs are split over `data` and `fsdp`. Nothing is known about how the
    kernels of a model follow each other, so all are split alike: `fsdp` splits the
    contracted axis if this cuts no quantization block, and `tensor` the outputs. If the
    contracted axis cannot be split, both split the outputs, or one of them does. Other
    parameters, the embedding and the head are replicated.
    """
    sizes = _axis_sizes(mesh)
    rules = {}
    for path, leaf in leaves_by_path(base).items():
        roles = contract.get(re.escape(path))
        if roles is None:
            continue
        for axes in _torch_axes(sizes):
            stack_axes = [None] * (leaf.ndim - 2)
            spec = PartitionSpec(*stack_axes, *(axes[role] for role in roles[-2:]))
            if _divides(leaf, spec, sizes):
                rules[re.escape(path)] = spec
                break
    return {"rules": rules, "rows": (select_axes(ROW_AXES, sizes),)}


def _torch_axes(sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the mesh axes of contracted axes (k) and outputs (n), the best first."""
    fsdp, tensor = (axis if axis in sizes else None for axis in ("fsdp", "tensor"))
    yield {"k": fsdp, "n": tensor}
    both = tuple(axis for axis in (tensor, fsdp) if axis)
    yield {"k": None, "n": both or None}
    for axis in both:
        yield {"k": None, "n": axis}


def _axis_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    sizes = dict(mesh.shape)
    if unknown := sorted({*sizes} - {*MESH_AXES}):
        raise ValueError(f"`mesh` must have axes among {MESH_AXES}. Got {unknown}.")
    return sizes


def _candidate_specs(
    config: DecoderConfig, path: str, sizes: dict[str, int]
) -> Iterator[tuple]:
    """Yields the specs that may split a leaf, the best one first."""
    *parents, module, name = path.split("/")
    # The leading axes are layers and, in a mixture, experts.
    stack = (None,) * (2 if "experts" in parents else 1)
    fsdp, tensor = (axis if axis in sizes else None for axis in ("fsdp", "tensor"))
    output_axes = tuple(axis for axis in (tensor, fsdp) if axis)
    if name == "embedding" or module == "lm_head":
        for axes in ((fsdp, tensor), (fsdp,), (tensor,), ()):
            yield None, tuple(filter(None, axes)) or None
    elif name == "kernel" and module in _SPLIT_OUTPUTS:
        is_kv = module in ("k_proj", "v_proj")
        counts = {config.heads_of(kind).num_kv_heads for kind in config.layers}
        if is_kv and any(count % sizes.get("tensor", 1) for count in counts):
            tensor, output_axes = None, ((fsdp,) if fsdp else ())
        yield *stack, fsdp, tensor
        yield *stack, None, output_axes
    elif name == "kernel" and module in _SPLIT_INPUTS:
        yield *stack, tensor, fsdp


def _divides(leaf: Any, spec: PartitionSpec, sizes: dict[str, int]) -> bool:
    """Whether a spec splits a leaf evenly, and only between quantization blocks."""
    shape = list(leaf.shape)
    if ql.is_packed(leaf):
        contracted = leaf.geometry.axes("k", len(shape))[0]
        shape[contracted] //= leaf.block_size  # count blocks instead of rows
    for entry, size in zip(spec, shape, strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,)
        if size % math.prod(sizes[axis] for axis in axes if axis):
            return False
    return True
