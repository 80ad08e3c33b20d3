"""Writes merged models: float checkpoints with the adapters added to the weights."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter, misfit_reason, replace_arrays
from ...quant.formats import FLOAT_DTYPES, check_dtype
from ...quant.geometry import Geometry
from ...quant.kernel import FloatKernel
from ...trees.adapters import adapters_by_path, checked_adapters
from ...trees.paths import Tree, nested, raise_if_any
from ..files import Path, refuse_names, require
from ..formats.registry import packed_tensors
from ..model_folder import SHARD_BYTES, write_folder
from ..named_leaves import float_tensors, join_experts, split_experts
from ..names import Names
from ..safetensors import open_safetensors
from ..stored_weight import in_float
from ..tensors import DeferredTensor, SliceableTensor, TensorLike

# A requirement for error messages. It excludes float8, whose scales are other tensors.
_FLOAT_REQUIREMENT = "one of " + ", ".join(FLOAT_DTYPES)


def save_merged(
    path: Path,
    base: Tree | Path,
    lora: Tree,
    names: Names,
    config: Path | Mapping[str, Any] | None = None,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a float checkpoint of the model with the adapters added to its kernels.

    Besides the trees, only one merged tensor is in memory at a time.

    Args:
        path: The folder to write, new or empty.
        base: A base tree, whose packed kernels are decoded; or the folder of a
            checkpoint, float or 4-bit, whose tensors are read one at a time and keep
            their names. Adapters trained on a packed base fit its decoded weights best.
        lora: The lora tree; {} writes the base alone.
        names: The names of the leaves' tensors in the checkpoint.
        config: As in `save_bitsandbytes`; by default `base`, if that is a folder.
        dtype: The dtype of the floating-point tensors; by default, that of each tensor.
            Other tensors in the folder, such as integers, are always kept.
        max_shard_bytes: The largest size of a file, unless one tensor is larger.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If `dtype` is not a floating dtype.
        ValueError: If an adapter has no kernel in `base` or does not fit it, if its
            tensors in the folder are not floating-point, if the name table lacks a
            leaf, if `dtype` cannot represent a weight, or if the folder is not empty.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"up": {"kernel": jnp.ones((64, 2))}}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=1))
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_merged(path, base, lora, names, {"model_type": "mine"})
        >>> ql.io.open_safetensors(path)["up.weight"].shape
        (2, 64)
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    # 1. The float tensors of the base, which are computed when they are written.
    tensors: Mapping[str, Any]
    if isinstance(base, Path):
        stored = split_experts(packed_tensors(open_safetensors(base)), names)
        tensors = {name: in_float(x) for name, x in stored.items()}
        adapters = adapters_by_path(lora)
        config = base if config is None else config
    else:
        tensors, adapters = float_tensors(base, names), checked_adapters(base, lora)
    if config is None:
        raise ValueError("`config` must be given if `base` is a tree. Got None.")
    # 2. The tensors that adapters replace or change.
    replacements = {p: x.replacement for p, x in adapters.items()}
    trained = {p: x for p, x in replacements.items() if x is not None}
    adapters = {p: x for p, x in adapters.items() if p not in trained}
    trained_tensors = float_tensors(nested(trained), names)
    _check_trained(trained_tensors, tensors)
    changed = {
        name: _cast_later(name, x, dtype or tensors[name].dtype)
        for name, x in trained_tensors.items()
    }
    changed |= _merged_tensors(tensors, adapters, names, dtype)
    # 3. Write them and all other tensors.
    config_changes: dict[str, Any] = {"quantization_config": None}
    if dtype is not None:
        cast_tensors = {
            name: _cast_later(name, x, dtype)
            for name, x in tensors.items()
            if jnp.issubdtype(x.dtype, jnp.floating)
        }
        tensors = {**tensors, **cast_tensors}
        config_changes |= {"dtype": jnp.dtype(dtype).name, "torch_dtype": None}
    written = join_experts({**tensors, **changed}, names)
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_folder(path, written, config, config_changes, **options)


def _check_trained(
    trained: Mapping[str, TensorLike], tensors: Mapping[str, TensorLike]
) -> None:
    missing = trained.keys() - tensors.keys()
    mismatched = []
    for name in trained.keys() - missing:
        shape, trained_shape = tuple(tensors[name].shape), trained[name].shape
        if shape != trained_shape:
            mismatched.append(f"{name} (must be {shape}, is {trained_shape})")
        elif str(dtype := tensors[name].dtype) not in FLOAT_DTYPES:
            mismatched.append(f"{name} (must be {_FLOAT_REQUIREMENT}, is {dtype})")
    refuse_names({"missing": missing, "mis-shaped": mismatched})


def _merged_tensors(
    tensors: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    names: Names,
    dtype: DTypeLike | None,
) -> dict[str, DeferredTensor]:
    """Returns the adapted tensors, merged; an error lists all that do not fit."""
    merged: dict[str, DeferredTensor] = {}
    problems, missing = [], []
    for path, lora in adapters.items():
        try:
            # An embedding is a table [V, D] in the tree and in the file. A kernel
            # [K, N] is transposed in the file.
            is_table = "k" not in names.roles(path)
            batch_shape = lora.batch_shape
            tensor_names = names.of(path, batch_shape)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        problems += [
            f"{path}: its batch axes are {list(batch_shape)}, so {name} has no adapter."
            for name in _next_names(path, batch_shape, names)
            if name in tensors and not names.is_ignored(name)
        ]
        for index, name in np.ndenumerate(tensor_names):
            if name not in tensors:
                missing.append(name)
                continue
            x = tensors[name]
            if str(x.dtype) not in FLOAT_DTYPES:
                problems.append(
                    f"{path}: {name} must be {_FLOAT_REQUIREMENT}, is {x.dtype}."
                )
                continue
            matrix_lora = lora.at(index)
            kernel_shape = x.shape if is_table else x.shape[::-1]
            kernel = jax.ShapeDtypeStruct(kernel_shape, x.dtype)
            if reason := misfit_reason(matrix_lora, kernel):
                problems.append(f"{path}: {name} of shape {x.shape}: {reason}")
                continue
            out_dtype = np.dtype(dtype or x.dtype)
            merge = functools.partial(
                _merge_tensor, name, x, matrix_lora, out_dtype, is_table
            )
            merged[name] = DeferredTensor(out_dtype, x.shape, merge)
    raise_if_any("these adapters do not fit the checkpoint", problems)
    refuse_names({"missing": missing})
    return merged


def _next_names(path: str, batch_shape: tuple[int, ...], names: Names) -> list[str]:
    """Returns the names that would follow those of a stack, along each of its axes."""
    next_names = []
    for axis in range(len(batch_shape)):
        shape = [n + (i == axis) for i, n in enumerate(batch_shape)]
        # The table may limit the axis (`Entry.numbers`), so that nothing follows.
        with contextlib.suppress(ValueError):
            # One name is enough: the last one is a tensor of the additional index.
            next_names += names.of(path, tuple(shape)).ravel().tolist()[-1:]
    return next_names


def _merge_tensor(
    name: str, x: SliceableTensor, lora: Adapter, dtype: np.dtype, is_table: bool
) -> np.ndarray:
    lora = replace_arrays(lora, lambda _, array: np.asarray(array))
    w = np.asarray(x[:, :]).astype(np.float32)
    return _cast(name, _merge(w, lora, is_table), dtype)


@functools.partial(jax.jit, static_argnums=2)
def _merge(w: Array, lora: Adapter, is_table: bool) -> Array:
    if is_table:
        return lora.merged(FloatKernel(w, Geometry()))
    return lora.merged(FloatKernel(w.T, Geometry())).T  # [N, K] in the file


def _cast_later(name: str, x: TensorLike, dtype: DTypeLike) -> DeferredTensor:
    cast = functools.partial(_cast, name, x, dtype)
    return DeferredTensor(np.dtype(dtype), tuple(x.shape), cast)


def _cast(name: str, x: TensorLike, dtype: DTypeLike) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow raises the error below
        values = np.asarray(x).astype(dtype)
    is_finite = bool(np.isfinite(values.astype(np.float32)).all())
    require(is_finite, f"{name} must be finite after merging. Got NaN or infinity.")
    return values
