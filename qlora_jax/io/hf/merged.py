"""Writes merged models: float checkpoints with the adapters added."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...adapters.base import Adapter, matrix_at, replace_arrays, why_not
from ...adapters.trained import Trained
from ...quant.geometry import Geometry
from ...quant.kernel import FloatKernel
from ...trees.adapters import adapters_by_path, adapters_of
from ...trees.paths import Tree, nested, refuse_listed
from ..files import CheckpointError, Path, refuse_names
from ..model_folder import SHARD_BYTES, write_folder
from ..named_leaves import float_tensors
from ..names import Names
from ..packed.layouts import join_experts, split_experts
from ..packed.readers import DecodedWeight, packed_tensors
from ..packed.weight import packing_of
from ..safetensors import open_safetensors
from ..tensors import DeferredTensor


def save_merged(
    path: Path,
    base: Tree | Path,
    lora: Tree,
    names: Names,
    config: Path | Mapping[str, Any] | None = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a float checkpoint of the model with the adapters added to its kernels.

    Memory holds one merged tensor at a time, besides the trees.

    Args:
        path: The folder to write, new or empty.
        base: A base tree, whose packed kernels are decoded; or the folder of a
            checkpoint, float or 4-bit, whose tensors are read one at a time and keep
            their names. Adapters trained on a packed base fit its decoded weights best.
        lora: The lora tree; {} writes the base alone.
        names: Which leaf is which tensor.
        config: As in `save_bitsandbytes`; by default `base`, if that is a folder.
        dtype: Dtype of the tensors; by default each tensor's.
        max_shard_bytes: Largest size of a file, unless one tensor is larger.
        progress: Whether to show a bar.

    Raises:
        ValueError: If an adapter has no kernel in `base`, or does not fit it; if the
            table lacks a leaf; if `dtype` does not hold a weight; or if the folder is
            not empty.

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
    if isinstance(base, Path):
        found = split_experts(packed_tensors(open_safetensors(base)), names)
        tensors: Mapping[str, Any] = {
            name: DecodedWeight(x) if packing_of(x) else x for name, x in found.items()
        }
        adapters = adapters_of(lora)
        config = base if config is None else config
    else:
        tensors, adapters = float_tensors(base, names), adapters_by_path(base, lora)
    if config is None:
        raise ValueError("`config` must be given beside a tree. Got None.")
    trained = {p: x.value for p, x in adapters.items() if isinstance(x, Trained)}
    adapters = {p: x for p, x in adapters.items() if p not in trained}
    whole = float_tensors(nested(trained), names)
    known = {name: tuple(tensors[name].shape) for name in whole if name in tensors}
    shapes = [
        f"{name} (must be {shape}, is {whole[name].shape})"
        for name, shape in known.items()
        if shape != whole[name].shape
    ]
    refuse_names(missing=whole.keys() - known.keys(), **{"mis-shaped": shapes})
    merged = {n: _cast(n, x, dtype or tensors[n].dtype) for n, x in whole.items()}
    merged |= _merged(tensors, adapters, names, dtype)
    others, changes = tensors, {"quantization_config": None}
    if dtype is not None:
        others = {name: _cast(name, x, dtype) for name, x in tensors.items()}
        changes |= {"dtype": jnp.dtype(dtype).name, "torch_dtype": None}
    write_folder(
        path,
        join_experts({**others, **merged}, names),
        config,
        changes,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _merged(
    tensors: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    names: Names,
    dtype: Any,
) -> dict[str, DeferredTensor]:
    """Returns the tensors that adapters change."""
    found: dict[str, DeferredTensor] = {}
    problems, missing = [], []
    for path, lora in adapters.items():
        try:
            is_table = "k" not in names.roles(path)  # `[V, D]` in both
            of = names.of(path, _batch_shape(path, lora, names, tensors))
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        for index, name in np.ndenumerate(of):
            if name not in tensors:
                missing.append(name)
                continue
            index = (*index[:-1], 0) if lora.is_shared else index
            x, one = tensors[name], matrix_at(lora, index)
            like = jax.ShapeDtypeStruct(x.shape[:: 1 if is_table else -1], x.dtype)
            if reason := why_not(one, like):
                problems.append(f"{path}: {name} of shape {x.shape}: {reason}")
                continue
            own = np.dtype(dtype or x.dtype)
            make = functools.partial(_add, name, x, one, own, is_table)
            found[name] = DeferredTensor(own, x.shape, make)
    refuse_listed("these adapters do not fit the checkpoint", problems)
    refuse_names(missing=missing)
    return found


def _batch_shape(
    path: str, lora: Adapter, names: Names, tensors: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns the batch axes of an adapter's kernel."""
    shape = lora.batch_shape
    while lora.is_shared:  # by as many experts as there are
        more = *shape[:-1], shape[-1] + 1
        if names.of(path, more).flat[-1] not in tensors:
            break
        shape = more
    return shape


def _add(
    name: str, x: Any, lora: Adapter, dtype: np.dtype, is_table: bool
) -> np.ndarray:
    lora = replace_arrays(lora, lambda _, array: np.asarray(array))
    w = np.asarray(x[:, :]).astype(np.float32)
    return _rounded(name, _merge(w, lora, is_table), dtype)


def _cast(name: str, x: Any, dtype: Any) -> DeferredTensor:
    """Returns a tensor that is rounded to a dtype when it is made."""
    make = functools.partial(_rounded, name, x, dtype)
    return DeferredTensor(np.dtype(dtype), tuple(x.shape), make)


def _rounded(name: str, x: Any, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused
        x = np.asarray(x).astype(dtype)
    if not np.isfinite(x.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} must be finite once merged. Got NaN or infinity."
        )
    return x


@functools.partial(jax.jit, static_argnums=2)
def _merge(w: Any, lora: Adapter, is_table: bool) -> Any:
    """Returns a weight `[N, K]`, or a table, in float32 with its adapter merged in."""
    turn = lambda x: x if is_table else x.T
    return turn(lora.merged(FloatKernel(turn(w), Geometry())))
