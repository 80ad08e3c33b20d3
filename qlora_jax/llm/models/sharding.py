"""Sharding rules of a decoder's parameters, for axes `data`, `fsdp` and `tensor`.

`data` splits the rows of a batch. `fsdp` splits these rows too, and every kernel;
kernels are gathered where they are used. In attention and in the MLP, `tensor` splits
the outputs of the first kernels and the inputs of the last one, so that attention and
the MLP need only one all-reduce each.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, PyTree

import qlora_jax as ql

from .config import DecoderConfig

ROW_AXES = ("data", "fsdp")
MESH_AXES = (*ROW_AXES, "tensor")
# Kernels that `tensor` splits along their outputs, and kernels that it splits along
# their inputs, which is the contracted axis.
_SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj")
_SPLIT_OUTPUTS += ("gate_up_proj",)
_SPLIT_INPUTS = ("o_proj", "down_proj")


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
        >>> from qlora_jax.llm.models.checkpoint import abstract_params
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
    heads, tensor = config.num_heads, sizes.get("tensor", 1)
    if heads % tensor:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"`tensor` must divide the {heads} heads: it may be "
            f"{', '.join(divisors)}. Got {tensor}."
        )
    rules = {}
    for path, leaf in ql.leaves_by_path(base).items():
        specs = [PartitionSpec(*spec) for spec in _candidate_specs(config, path, sizes)]
        fitting = [spec for spec in specs if _divides(leaf, spec, sizes)]
        # If none fits, `place` raises an error about the first spec.
        if specs:
            rules[re.escape(path)] = [*fitting, specs[0]][0]
    return {"rules": rules, "rows": (_select_axes(ROW_AXES, sizes),)}


def _candidate_specs(
    config: DecoderConfig, path: str, sizes: dict[str, int]
) -> Iterator[tuple]:
    """Yields the specs that may split a leaf, the best one first."""
    *parents, module, name = ("", *path.split("/"))
    # The leading axes are layers and, in a mixture, experts.
    stack = (None,) * (2 if "experts" in parents else 1)
    fsdp, tensor = (axis if axis in sizes else None for axis in ("fsdp", "tensor"))
    output_axes = tuple(axis for axis in (tensor, fsdp) if axis)
    if name == "embedding" or module == "lm_head":
        for axes in ((fsdp, tensor), (fsdp,), (tensor,), ()):
            yield None, tuple(filter(None, axes)) or None
    elif name == "kernel" and module in _SPLIT_OUTPUTS:
        is_kv = module in ("k_proj", "v_proj")
        if is_kv and config.num_kv_heads % sizes.get("tensor", 1):
            tensor, output_axes = None, output_axes[bool(tensor) :]
        yield *stack, fsdp, tensor
        yield *stack, None, output_axes
    elif name == "kernel" and module in _SPLIT_INPUTS:
        yield *stack, tensor, fsdp


def _select_axes(names: Iterable[str], sizes: dict[str, int]) -> tuple[str, ...]:
    return tuple(name for name in names if name in sizes)


def _divides(leaf: Any, spec: PartitionSpec, sizes: dict[str, int]) -> bool:
    """Whether a spec splits a leaf evenly, and only between quantization blocks."""
    shape = list(leaf.shape)
    if ql.is_packed(leaf):
        # Count blocks instead of rows along the contracted axis. If the last block is
        # partial, the count is 1, because the axis then cannot be split.
        blocks, remainder = divmod(shape[-2], leaf.block_size)
        shape[-2] = 1 if remainder else blocks
    for entry, size in zip(spec, shape, strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,)
        if size % math.prod(sizes[axis] for axis in axes if axis):
            return False
    return True


def split_embedded(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Splits embedded tokens by rows, in the same way as the batch."""
    # The embedding is split along D, so the look-up gives each device some columns of
    # all rows. Exchange them, so that each device has all columns of some rows. Without
    # these constraints, an all-reduce would give every device all columns of all rows.
    sizes = _auto_axes()
    rows = _select_axes(ROW_AXES, sizes)
    if not rows or x.shape[0] % _num_parts(rows, sizes):
        return x
    columns = _select_axes(("fsdp", "tensor"), sizes)
    while columns and x.shape[2] % _num_parts(columns, sizes) == 0:
        data = "data" if "data" in sizes else None
        x = lax.with_sharding_constraint(x, PartitionSpec(data, None, columns))
        columns = columns[:-1]  # one axis at a time: XLA is inefficient for several
    return lax.with_sharding_constraint(x, PartitionSpec(rows))


def split_head(embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Splits a tied embedding along the vocabulary, for its use as the head."""
    # The embedding is stored split along D, for look-ups. Here, the devices exchange
    # parts, so that each has all columns of some rows, and none the whole embedding.
    sizes = _auto_axes()
    axes = _select_axes(("fsdp", "tensor"), sizes)
    if not axes or embedding.shape[0] % _num_parts(axes, sizes):
        return embedding
    return lax.with_sharding_constraint(embedding, PartitionSpec(axes))


def split_attention(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps an attention function; each device then computes its rows and heads.

    XLA cannot partition a kernel such as that of `ql.memory.splash_attention`.
    """

    # Query is [B, T, H, Dh], key and value [B, S, K, Dh].
    def attend_split(query: Array, key: Array, value: Array, **settings: Any) -> Array:
        array_names = {"segment_ids", "sinks"} & {*settings}
        arrays = {name: settings.pop(name) for name in array_names}

        def attend_local(query, key, value, arrays):
            return attention(query, key, value, **arrays, **settings)

        if not (sizes := _auto_axes()):
            return attend_local(query, key, value, arrays)
        rows, tensor = _select_axes(ROW_AXES, sizes), sizes.get("tensor", 1)
        if query.shape[0] % _num_parts(rows, sizes):
            rows = ()
        # If `tensor` does not divide the number of key heads, repeat the heads.
        repeats = math.lcm(key.shape[2], tensor) // key.shape[2]
        if repeats > 1:
            key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        heads = "tensor" if tensor > 1 else None
        spec = PartitionSpec(rows or None, None, heads)
        specs = {"segment_ids": PartitionSpec(rows or None)}
        specs["sinks"] = PartitionSpec(heads)
        return jax.shard_map(
            attend_local,
            in_specs=(spec, spec, spec, {name: specs[name] for name in arrays}),
            out_specs=spec,
            check_vma=False,  # kernels do not declare the axes their results vary over
        )(query, key, value, arrays)

    return attend_split


def _auto_axes() -> dict[str, int]:
    """Returns the sizes of the ambient mesh's Auto axes among `MESH_AXES`."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return {}
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, axis_type in axis_types if axis_type == AxisType.Auto}
    return {name: mesh.shape[name] for name in MESH_AXES if name in names}


def _num_parts(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
