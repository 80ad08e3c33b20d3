"""Reads a model's parameters from a checkpoint, and packs them as it reads."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax

from ..._jax.progress import progress_bar
from ...adapters.config import QLoRAConfig
from ...quant.host_codes import to_host
from ...quant.kernel import is_packed
from ...trees.paths import Tree, map_by_path
from ..files import Path
from ..named_leaves import NamedLeaf, find_leaves
from ..names import Names
from ..packed.layouts import split_experts
from ..packed.readers import packed_tensors, recode_all
from ..packed.weight import packing_of
from ..safetensors import open_safetensors
from .abstract_base import abstract_base, config_packings
from .float_leaves import fill_float
from .packed_leaves import fill_packed, move_packed


def load(
    source: Path | Mapping[str, Any],
    names: Names,
    like: Tree,
    config: QLoRAConfig | None = None,
    *,
    dtype: Any = None,
    recode: bool = False,
    place: Callable[[Tree], Tree] | None = None,
    progress: bool = True,
) -> Tree:
    """Returns a model's parameters, a tree like `like`, packed where `config` says.

    Tensors are read a piece at a time, transposed, stacked and, if `config` targets
    them, packed: host memory holds the packed model and at most one tensor. Weights in
    the 4-bit formats that `packed_tensors` lists become a `QTensor` of the same bytes,
    without a config; those of embeddings are read in float.

    Args:
        source: A `.safetensors` file or a folder of them, as in `open_safetensors`; or
            a mapping from names to tensors, which have a shape and a dtype and are read
            when they are indexed by slices.
        names: Which leaf is which tensor.
        like: The tree of the model's parameters: arrays or `jax.ShapeDtypeStruct`.
        config: Which kernels to pack, and how.
        dtype: Dtype of the parameters, and of the packed kernels' weights; by default
            each tensor's. Weights of bitsandbytes keep their dtype.
        recode: Read packed weights even if their bytes cannot be moved. A weight whose
            blocks cross its rows is stored in smaller blocks, or in float if those
            would be below 16; one with zero points or an order of its inputs, in float:
            all are exact. A target whose settings differ from the config's, or whose
            bytes cannot be moved, is packed again, with one more rounding.
        place: A function that puts shardings on the tree of shapes; devices then read
            their parts: `lambda base: ql.sharding.place(base, {}, mesh, rules)[0]`.
        progress: Whether to show a bar.

    Raises:
        CheckpointError: If a file is broken or holds NaN or infinity; if tensors are
            missing, unexpected, mis-shaped, or packed otherwise. All are listed.
        ValueError: If the config does not fit the tree.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> w = jnp.arange(128.0).reshape(2, 64)  # [out, in], as it is in a checkpoint
        >>> like = {"up": {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> ql.io.load({"up.weight": w}, names, like)["up"]["kernel"].shape
        (64, 2)
        >>> ql.io.load({"up.weight": w}, names, like, ql.QLoRAConfig())["up"]["kernel"]
        QTensor(nf4, float32[64,2], block_size=64, double_quant, 4.625 bits)
    """
    found = source if isinstance(source, Mapping) else open_safetensors(source)
    tensors = split_experts(packed_tensors(found), names)
    leaves = find_leaves(tensors, names, like)
    targets = config_packings(leaves, config)
    tensors = recode_all(tensors, leaves, targets, dtype, recode)
    base = abstract_base(tensors, leaves, like, config, dtype)
    base = base if place is None else place(base)
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    scaled: Any = dict(total=total, unit_scale=True)
    with progress_bar("loading", " weights", progress, **scaled) as bar:
        done = bar.update
        return map_by_path(lambda path, x: _read(leaves[path], x, tensors, done), base)


def _read(
    leaf: NamedLeaf, struct: Any, tensors: Mapping[str, Any], done: Callable
) -> Any:
    if not is_packed(struct):
        return fill_float(leaf, struct, tensors, done)
    fill = move_packed if packing_of(tensors[leaf.tensors.flat[0]]) else fill_packed
    # A stack that is to be in host memory passes through the device, one at a time.
    own = struct.to_device()
    arrays = fill(leaf, own, tensors, done)
    q = jax.tree.unflatten(jax.tree.structure(own), arrays)
    return q if own is struct else replace(q, codes=to_host(q.codes, struct.codes))
