"""Sharding rules of a decoder's parameters, for axes `data`, `fsdp` and `tensor`.

`data` splits the rows of a batch. `fsdp` splits them and every kernel, which is
gathered where it is used. `tensor` splits the outputs of the first kernels of attention
and MLP and the inputs of the last ones: one all-reduce each.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

import qlora_jax as ql

from .config import DecoderConfig

ROW_AXES = ("data", "fsdp")
MESH_AXES = (*ROW_AXES, "tensor")
_OUT = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj")
_OUT += ("gate_up_proj",)  # their outputs are split over `tensor`
_IN = ("o_proj", "down_proj")  # what these contract is


def place_arguments(
    config: DecoderConfig, base: Any, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Returns the arguments `rules` and `rows` of `ql.sharding.place` for a decoder.

    The rows of inputs are split over `data` and `fsdp`. A kernel is split over `fsdp`
    along the hidden size, if quantization blocks divide, or along its outputs; and over
    `tensor` along heads or the width of the MLP. The kernels of keys and values are not
    split over `tensor` if it does not divide their heads. The embedding is split along
    the hidden size over both axes, the head along the vocabulary: neither is ever
    gathered. Axes that do not divide are not split; norms and biases are replicated.

    Args:
        config: The decoder's config.
        base: Its parameters, in float or packed, or their shapes.
        mesh: A mesh with axes among `data`, `fsdp` and `tensor`.

    Raises:
        ValueError: If the mesh has other axes, or `tensor` does not divide the heads.

    Example:
        >>> from qlora_jax.models.checkpoint import abstract_params
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> base = abstract_params(config)
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
        >>> arguments = place_arguments(config, base, mesh)
        >>> tuple(arguments["rules"]["layers/mlp/down_proj/kernel"])
        (None, 'tensor', 'fsdp')
        >>> base, lora = ql.sharding.place(base, {}, mesh, **arguments)
    """
    sizes = dict(mesh.shape)
    if unknown := sorted({*sizes} - {*MESH_AXES}):
        raise ValueError(f"`mesh` must have axes among {MESH_AXES}. Got {unknown}.")
    tensor = sizes.get("tensor", 1)
    if config.num_heads % tensor:
        fit = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ValueError(
            f"`tensor` must divide the {config.num_heads} heads: it may be "
            f"{', '.join(map(str, fit))}. Got {tensor}."
        )
    rules = {}
    for path, leaf in ql.leaves_by_path(base).items():
        specs = [PartitionSpec(*spec) for spec in _specs(config, path, sizes)]
        fit = [spec for spec in specs if _divides(leaf, spec, sizes)]
        if found := [*fit, *specs[:1]]:
            rules[re.escape(path)] = found[0]
    return {"rules": rules, "rows": (_among(ROW_AXES, sizes),)}


def _specs(config: DecoderConfig, path: str, sizes: dict[str, int]) -> Iterator[tuple]:
    """Yields the specs that may split a leaf, the best one first."""
    *outer, module, name = ("", *path.split("/"))
    stack = (None,) * (2 if "experts" in outer else 1)  # layers, and their experts
    fsdp, tensor = (axis if axis in sizes else None for axis in ("fsdp", "tensor"))
    both = tuple(axis for axis in (tensor, fsdp) if axis)
    if name == "embedding" or module == "lm_head":
        for axes in ((fsdp, tensor), (fsdp,), (tensor,), ()):
            yield None, tuple(filter(None, axes)) or None
    elif name == "kernel" and module in _OUT:
        ways = sizes.get("tensor", 1)
        if module in ("k_proj", "v_proj") and config.num_kv_heads % ways:
            tensor, both = None, both[bool(tensor) :]
        yield *stack, fsdp, tensor
        yield *stack, None, both
    elif name == "kernel" and module in _IN:
        yield *stack, tensor, fsdp


def _among(names: Iterable[str], sizes: dict[str, int]) -> tuple[str, ...]:
    """Returns those of the mesh axes that a mesh has."""
    return tuple(name for name in names if name in sizes)


def _divides(leaf: Any, spec: PartitionSpec, sizes: dict[str, int]) -> bool:
    """Whether a spec splits a leaf between quantization blocks only."""
    shape = list(leaf.shape)
    if isinstance(leaf, ql.QTensor):
        blocks, rest = divmod(shape[-2], leaf.block_size)
        shape[-2] = 1 if rest else blocks
    for entry, size in zip(spec, shape, strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,)
        if size % math.prod(sizes[axis] for axis in axes if axis):
            return False
    return True


def split_embedded(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns embedded tokens, split by rows as the ambient mesh splits a batch."""
    # The embedding is split along D, so the look-up gives columns of all rows. Left
    # alone, XLA would sum the rows of all devices on each of them.
    sizes = _auto_sizes()
    rows = _among(ROW_AXES, sizes)
    if not rows or x.shape[0] % _ways(rows, sizes):
        return x
    columns = _among(("fsdp", "tensor"), sizes)
    while columns and x.shape[2] % _ways(columns, sizes) == 0:
        lead = "data" if "data" in sizes else None
        x = lax.with_sharding_constraint(x, PartitionSpec(lead, None, columns))
        columns = columns[:-1]  # what XLA does not do well at once
    return lax.with_sharding_constraint(x, PartitionSpec(rows))


def split_head(embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Returns an embedding that is the head, split along the vocabulary."""
    # It is stored split along D, for look-ups. Each device sends the others its columns
    # of their words: nothing is gathered.
    sizes = _auto_sizes()
    axes = _among(("fsdp", "tensor"), sizes)
    if not axes or embedding.shape[0] % _ways(axes, sizes):
        return embedding
    return lax.with_sharding_constraint(embedding, PartitionSpec(axes))


def split_attention(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Returns an attention that each device computes on its rows and heads."""

    # XLA does not partition a kernel such as that of `ql.memory.splash_attention`. Key
    # heads that `tensor` does not divide are repeated until it does.
    def split(query: Array, key: Array, value: Array, **settings: Any) -> Array:
        names = {"segment_ids", "sinks"} & {*settings}
        arrays = {name: settings.pop(name) for name in names}
        run = lambda q, k, v, arrays: attention(q, k, v, **arrays, **settings)
        if not (sizes := _auto_sizes()):
            return run(query, key, value, arrays)
        rows, tensor = _among(ROW_AXES, sizes), sizes.get("tensor", 1)
        if query.shape[0] % _ways(rows, sizes):
            rows = ()
        heads = math.lcm(key.shape[2], tensor)
        if heads > key.shape[2]:
            repeat = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)
            key, value = repeat(key), repeat(value)
        by_heads = "tensor" if tensor > 1 else None
        spec = PartitionSpec(rows or None, None, by_heads)
        of_rows, of_heads = PartitionSpec(rows or None), PartitionSpec(by_heads)
        specs = {"segment_ids": of_rows, "sinks": of_heads}
        return jax.shard_map(
            run,
            in_specs=(spec, spec, spec, {name: specs[name] for name in arrays}),
            out_specs=spec,
            check_vma=False,  # kernels do not say over which axes their results vary
        )(query, key, value, arrays)

    return split


def _auto_sizes() -> dict[str, int]:
    """Returns the sizes of the ambient mesh's Auto axes among `MESH_AXES`."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, kind in kinds if kind == AxisType.Auto}
    return {name: mesh.shape[name] for name in MESH_AXES if name in names}


def _ways(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
