"""Reads a model's parameters from a checkpoint, and packs them while reading."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ..._jax.progress import progress_bar
from ...adapters.config import QLoRAConfig
from ...quant.formats import Packing, check_dtype
from ...quant.host_codes import to_host
from ...quant.kernel import is_packed
from ...quant.pack import quantize_unchecked
from ...quant.qtensor import QTensor
from ...trees.paths import Tree, leaves_by_path, map_by_path, raise_if_any
from ...trees.targets import find_targets
from ..device_shards import place_leaves
from ..files import CheckpointError, Path
from ..formats.registry import packed_tensors
from ..named_leaves import NamedLeaf, find_leaves, split_experts
from ..names import Names
from ..native import FORMAT
from ..safetensors import open_safetensors
from ..stored_weight import StoredWeight, in_float, packing_of
from ..tensors import Tensors
from .leaves import move_packed_leaf, pack_float_leaf, read_float_leaf

Leaves = Mapping[str, NamedLeaf]
Packings = Mapping[str, Packing | None]  # by path; None for float leaves
Storage = tuple[Packing | None, np.dtype]  # how a tensor is stored


def load(
    source: Path | Mapping[str, Any],
    names: Names,
    like: Tree,
    config: QLoRAConfig | None = None,
    *,
    dtype: DTypeLike | None = None,
    recode: bool = False,
    place: Callable[[Tree], Tree] | None = None,
    progress: bool = True,
) -> Tree:
    """Returns a model's parameters as a tree like `like`, and packs the targets.

    Tensors are read a piece at a time, transposed, stacked and, if `config` targets
    them, packed, so host memory holds the packed model and at most one tensor. Weights
    in the 4-bit formats that `packed_tensors` lists become a `QTensor` with the same
    bytes, even without a config. Embeddings in these formats are decoded to floats.

    Args:
        source: A `.safetensors` file or a folder of them, as in `open_safetensors`; or
            a mapping from names to tensors, which have a shape and a dtype and are read
            when they are indexed by slices.
        names: The names of the leaves' tensors in the checkpoint.
        like: The tree of the model's parameters: arrays or `jax.ShapeDtypeStruct`.
        config: Which kernels to pack, and how.
        dtype: The dtype of the parameters, and of the weights of packed kernels; by
            default, that of each tensor. Weights of bitsandbytes keep their dtype.
            As everywhere in JAX, float64 becomes float32 without `jax_enable_x64`.
        recode: Whether to convert packed weights whose byte layout has no equivalent
            here. A weight whose blocks cross rows is stored in smaller blocks, or in
            float if these would be below 16. Except for the rounding of floats to the
            dtype, this is exact. A target whose settings differ from the config's, or
            whose layout has no equivalent, is packed again, which rounds it once more.
        place: A function that puts shardings on the tree of shapes; devices then read
            their parts: `lambda base: ql.sharding.place(base, {}, mesh, rules)[0]`.
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: If a file is broken or contains NaN or infinity; if tensors are
            missing, unexpected, mis-shaped, or packed in a way that needs `recode`. All
            such tensors are listed.
        TypeError: If `dtype` is not a floating dtype.
        ValueError: If the config does not fit the tree, if `names` has a tensor twice,
            or if `place` returns other leaves than it gets.

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
    if dtype is not None:
        check_dtype("dtype", dtype)
    # 1. Match the tensors with the leaves, and find the form in which to read them.
    opened = source if isinstance(source, Mapping) else open_safetensors(source)
    if isinstance(opened, Tensors) and opened.metadata.get("format") == FORMAT:
        raise CheckpointError(
            f"{source} is a file that ql.io.save wrote. Read it with ql.io.restore."
        )
    tensors = split_experts(packed_tensors(opened), names)
    leaves = find_leaves(tensors, names, like)
    tensors = _convert_packed(tensors, leaves, config, dtype, recode)
    # 2. Check everything and place the leaves, as shapes only.
    base = _abstract_base(tensors, leaves, like, config, dtype)
    base = place_leaves(base, place)
    # 3. Read the values.
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    bar_settings = {"total": total, "unit_scale": True}
    with progress_bar("loading", " weights", progress, **bar_settings) as bar:
        return map_by_path(lambda p, x: _read_leaf(leaves[p], x, tensors, bar), base)


def _read_leaf(
    leaf: NamedLeaf,
    struct: Any,
    tensors: Mapping[str, Any],
    bar: Any,
) -> Array | QTensor:
    if not is_packed(struct):
        return read_float_leaf(leaf, struct, tensors, bar)
    # Codes for host memory are read to the device first, one stack at a time.
    on_device = struct.to_device()
    if packing_of(tensors[leaf.tensor_names.flat[0]]) is not None:
        arrays = move_packed_leaf(leaf, on_device, tensors, bar)
    else:
        arrays = pack_float_leaf(leaf, on_device, tensors, bar)
    q = jax.tree.unflatten(jax.tree.structure(on_device), arrays)
    is_for_host = struct.memory == "host"
    return replace(q, codes=to_host(q.codes, struct.codes)) if is_for_host else q


def _convert_packed(
    tensors: Mapping[str, Any],
    leaves: Leaves,
    config: QLoRAConfig | None,
    dtype: DTypeLike | None,
    recode: bool,
) -> dict[str, Any]:
    """Returns the tensors, with packed weights in a form that can be read."""
    result, mixed = dict(tensors), []
    for path, leaf in leaves.items():
        names = list(leaf.tensor_names.ravel())
        floats = {name: in_float(tensors[name], dtype) for name in names}
        if leaf.geometry is None:  # only kernels can be packed
            result |= floats
        elif recode:
            target = config if config is not None and config.is_target(path) else None
            recoded = {n: _recode(tensors[n], floats[n], target) for n in names}
            # If the tensors of a stack are packed differently, all are read in float.
            is_mixed = len({packing_of(x) for x in recoded.values()}) > 1
            result |= floats if is_mixed else recoded
            if is_mixed and target is None:  # floats of a target are packed again
                mixed.append(path)
    if mixed:
        warnings.warn(
            "Some layers of these kernels are in another format than the others. All "
            f"layers are read in float, which takes more memory: {', '.join(mixed)}. "
            "To pack all layers alike, pass a config that packs them.",
            stacklevel=3,
        )
    return result


def _recode(tensor: Any, floats: Any, target: QLoRAConfig | None) -> Any:
    """Returns a kernel's tensor, re-blocked or as floats if necessary.

    `target` is the config if the kernel is one of its targets, and otherwise None.
    """
    if not isinstance(tensor, StoredWeight):
        return tensor
    if target is None:
        return (tensor.reblocked() or floats) if tensor.problem else tensor
    # A target is decoded if the config packs it with other settings, or trains it.
    keeps_packing = target.freeze_base and target.packing == tensor.packing
    return tensor if keeps_packing and not tensor.problem else floats


def _abstract_base(
    tensors: Mapping[str, Any],
    leaves: Leaves,
    like: Tree,
    config: QLoRAConfig | None,
    dtype: DTypeLike | None,
) -> Tree:
    """Returns the tree to load, as shapes; an error lists all unreadable leaves."""
    # 1. Find the packing and dtype of each leaf, which all of its tensors must share.
    stored_packings: dict[str, Packing | None] = {}
    dtypes: dict[str, Any] = {}
    problems: dict[str, str | None] = {}
    for path, leaf in leaves.items():
        stored = {name: tensors[name] for name in leaf.tensor_names.ravel()}
        storages = {(packing_of(x), _leaf_dtype(x, dtype)) for x in stored.values()}
        # A stack of no layers has no tensors.
        stored_packings[path], dtypes[path] = next(iter(storages), (None, dtype))
        problems[path] = _stack_problem(stored, storages)
    raise_if_any("these leaves cannot be read", problems, CheckpointError)
    shapes = map_by_path(
        lambda path, x: jax.ShapeDtypeStruct(leaves[path].shape, dtypes[path]), like
    )

    # 2. Build the packed tree. `eval_shape` gives the functions that check targets and
    # pack kernels abstract arrays, so that nothing is computed.
    def pack(tree: Tree) -> Tree:
        targets = _check_targets(tree, leaves, config, stored_packings)
        packings = stored_packings | targets

        def pack_leaf(path: str, w: Array) -> Array | QTensor:
            packing, geometry = packings[path], leaves[path].geometry
            if packing is None or geometry is None:
                return w
            return quantize_unchecked(w, packing, geometry)

        return map_by_path(pack_leaf, tree)

    return jax.eval_shape(pack, shapes)


def _leaf_dtype(tensor: Any, dtype: DTypeLike | None) -> np.dtype:
    keeps_dtype = isinstance(tensor, StoredWeight) and tensor.keeps_dtype
    leaf_dtype = tensor.dtype if dtype is None or keeps_dtype else dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(leaf_dtype))


def _stack_problem(stored: Mapping[str, Any], storages: set[Storage]) -> str | None:
    """Returns why tensors cannot form one leaf, or None if they can."""
    for name, tensor in stored.items():
        if isinstance(tensor, StoredWeight) and tensor.problem:
            return f"{name} {tensor.problem}. Use recode=True to convert it"
    if len(storages) > 1:
        kinds = [f"{dtype} {packing or 'not packed'}" for packing, dtype in storages]
        problem = f"its tensors are of different kinds: {', '.join(sorted(kinds))}"
        has_packed = any(packing is not None for packing, _ in storages)
        advice = ". Use recode=True to read all of them in float" if has_packed else ""
        return problem + advice
    return None


def _check_targets(
    tree: Tree, leaves: Leaves, config: QLoRAConfig | None, packings: Packings
) -> dict[str, Packing]:
    """Checks the targets of the config, and returns the packing of those to pack."""
    if config is None:
        return {}
    axis_roles, problems = {}, {}
    for path, leaf in leaves.items():
        if leaf.geometry is not None:
            axis_roles[path] = leaf.geometry.kinds
        elif config.is_target(path):
            problems[path] = "the name table says that it is not a kernel."
        packing = packings[path]
        if config.is_target(path) and packing not in (None, config.packing):
            problems[path] = (
                f"it is packed as {packing}, but the config asks for {config.packing}. "
                "recode=True packs it again, which rounds it once more."
            )
    targets = find_targets(leaves_by_path(tree), config, axis_roles, problems)
    # With `freeze_base=False`, targets stay in float, because they are trained.
    if config.packing is None or not config.freeze_base:
        return {}
    return dict.fromkeys(targets, config.packing)
