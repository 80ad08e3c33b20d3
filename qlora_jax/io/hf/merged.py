"""Writes merged models: a plain float checkpoint with the adapters added."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...adapters.lora import LoRA
from ...adapters.product import effective_kernel
from ...quant.geometry import Geometry
from ...quant.kernel import FloatKernel
from ...trees.adapters import adapters_by_path
from ...trees.paths import Tree, leaves_by_path, refuse_listed
from ..bitsandbytes.packed import PackedTensor, packed_tensors
from ..bitsandbytes.recode import DecodedTensor
from ..export import DeferredTensor, float_tensors, in_dtype
from ..files import CheckpointError, Path, refuse_names
from ..model_folder import SHARD_BYTES, write_folder
from ..names import Names
from ..safetensors.reader import open_safetensors


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

    Tensor by tensor: memory holds one merged tensor beside what is given.

    Args:
        path: The folder to write, new or empty.
        base: What the adapters are added to: a base tree, whose packed kernels are
            decoded; or the folder of a checkpoint, float or 4-bit, whose tensors are
            read one at a time and keep their names. Adapters trained on a packed base
            fit its decoded weights best.
        lora: The lora tree; {} writes the base alone.
        names: Which leaf is which tensor.
        config: As in `save_bitsandbytes`; where `base` is a folder, that folder by
            default.
        dtype: Dtype of the tensors; their own where not given.
        max_shard_bytes: The size that files stay below, if no tensor is larger.
        progress: Whether to show a bar.

    Raises:
        ValueError: If an adapter has no kernel in `base`, or does not fit it; if the
            table lacks a leaf; or if the folder is not empty.

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
        found = packed_tensors(open_safetensors(base))
        tensors: Mapping[str, Any] = {
            name: DecodedTensor(x) if isinstance(x, PackedTensor) else x
            for name, x in found.items()
        }
        adapters = leaves_by_path(lora)
        config = base if config is None else config
    else:
        tensors, adapters = float_tensors(base, names), adapters_by_path(base, lora)
    if config is None:
        raise ValueError("`config` must be given beside a tree. Got None.")
    merged = _merged(tensors, adapters, names, dtype)
    changes = {"quantization_config": None}
    if dtype is not None:
        changes |= {"dtype": jnp.dtype(dtype).name, "torch_dtype": None}
    write_folder(
        path,
        {**in_dtype(tensors, dtype), **merged},
        config,
        changes,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _merged(
    tensors: Mapping[str, Any], adapters: Mapping[str, Any], names: Names, dtype: Any
) -> dict[str, DeferredTensor]:
    """Returns the tensors that adapters change, with what they add."""
    found: dict[str, DeferredTensor] = {}
    problems, missing = [], []
    for path, lora in adapters.items():
        if not isinstance(lora, LoRA):
            problems.append(f"{path}: it must be a LoRA. Got {type(lora).__name__}")
            continue
        *batch, k, _ = lora.a.shape
        n = lora.b.shape[-1]
        try:
            of = names.of(path, tuple(batch))
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        for index, name in np.ndenumerate(of):
            if name not in tensors:
                missing.append(name)
                continue
            x = tensors[name]
            if tuple(x.shape) != (n, k):
                problems.append(
                    f"{path}: {name} must be {(n, k)}. Got {tuple(x.shape)}"
                )
                continue
            own = np.dtype(dtype or x.dtype)
            make = functools.partial(_add, name, x, lora, index, own)
            found[name] = DeferredTensor(own, (n, k), make)
    refuse_listed("these adapters do not fit the checkpoint", problems)
    refuse_names(missing=missing)
    return found


def _add(
    name: str, x: Any, lora: LoRA, index: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    a, b = np.asarray(lora.a[index]), np.asarray(lora.b[index])
    w = np.asarray(x[:, :]).astype(np.float32)
    w = np.asarray(_merge(w, a, b, lora.scaling_at(index))).astype(dtype)
    if not np.isfinite(w.astype(np.float32)).all():
        raise CheckpointError(
            f"{name} must be finite once merged. Got NaN or infinity."
        )
    return w


@functools.partial(jax.jit, static_argnums=3)
def _merge(w: Any, a: Any, b: Any, scaling: float) -> Any:
    """Returns the float32 sum of a weight `[N, K]` and what an adapter adds."""
    lora = LoRA(a, b, scaling, 0.0, Geometry())
    return effective_kernel(FloatKernel(w.T, Geometry()), lora).T
