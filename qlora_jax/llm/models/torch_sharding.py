"""Sharding rules of models in PyTorch's code, for axes `data`, `fsdp` and `tensor`."""

import re
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

import qlora_jax as ql

from .constraints import MESH_AXES, ROW_AXES, select_axes
from .sharding import divides

Contract = dict[str | re.Pattern[str], str]


def place_torch_arguments(
    contract: Contract, base: PyTree, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Returns the arguments `rules` and `rows` of `ql.sharding.place` for a model.

    Rows of inputs are split over `data` and `fsdp`. Nothing is known about how the
    kernels of a model follow each other, so all are split alike: `fsdp` splits the
    contracted axis if this cuts no quantization block, and `tensor` the outputs. If the
    contracted axis cannot be split, both split the outputs, or one of them does. Other
    parameters, the embedding and the head are replicated.

    Args:
        contract: The roles of the axes of kernels, as in `QLoRAConfig`.
        base: Its parameters, in float or packed, or their shapes.
        mesh: A mesh with axes among `data`, `fsdp` and `tensor`.

    Raises:
        ValueError: If the mesh has other axes.
    """
    sizes = dict(mesh.shape)
    if unknown := sorted({*sizes} - {*MESH_AXES}):
        raise ValueError(f"`mesh` must have axes among {MESH_AXES}. Got {unknown}.")
    rules = {}
    for path, leaf in ql.leaves_by_path(base).items():
        roles = contract.get(re.escape(path))
        if roles is None:
            continue
        for axes in _candidate_axes(sizes):
            stack_axes = [None] * (leaf.ndim - 2)
            spec = PartitionSpec(*stack_axes, *(axes[role] for role in roles[-2:]))
            if divides(leaf, spec, sizes):
                rules[re.escape(path)] = spec
                break
    return {"rules": rules, "rows": (select_axes(ROW_AXES, sizes),)}


def _candidate_axes(sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the mesh axes of contracted axes (k) and outputs (n), the best first."""
    fsdp, tensor = (axis if axis in sizes else None for axis in ("fsdp", "tensor"))
    yield {"k": fsdp, "n": tensor}
    both = tuple(axis for axis in (tensor, fsdp) if axis)
    yield {"k": None, "n": both or None}
    for axis in both:
        yield {"k": None, "n": axis}
