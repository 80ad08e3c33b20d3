"""Writes checkpoints in bitsandbytes' 4-bit format, which transformers loads."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quant.qtensor import QTensor
from ...quant.schemes import DYNAMIC_MAP, SCALES_PER_BLOCK
from ...trees.paths import Tree
from ..files import Path
from ..model_folder import SHARD_BYTES
from ..names import Names
from ..packed.layout import Kernels, PackedLayout, write_packed
from ..tensors import DeferredTensor

# The smallest block that bitsandbytes reads.
SMALLEST_BLOCK = 32


def save_bitsandbytes(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Mapping[str, Any],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Codes and scales are written byte for byte; other kernels stay in float.

    Args:
        path: The folder to write, new or empty.
        base: The base tree, with packed kernels.
        names: Which leaf is which tensor.
        config: A folder with the float model's `config.json` and tokenizer files, which
            are copied; or the content of that `config.json`.
        max_shard_bytes: Largest size of a file, unless one tensor is larger.
        progress: Whether to show a bar.

    Raises:
        ValueError: If bitsandbytes has no format for a packed kernel (all are listed),
            if there are none or of several formats, or if the folder is not empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 2)), "nf4")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_bitsandbytes(path, base, names, {"model_type": "mine"})
        >>> sorted(ql.io.open_safetensors(path))[:2]
        ['up.weight', 'up.weight.absmax']
    """
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_packed(path, base, names, config, _LAYOUT, **options)


def _refusal(q: QTensor) -> str | None:
    if q.block_size < SMALLEST_BLOCK:
        return f"its block size must be at least {SMALLEST_BLOCK}. Got {q.block_size}"
    k = q.matrix_shape[-2]
    if k % q.block_size:
        return (
            f"its {k} inputs must be whole blocks, since theirs cross rows otherwise. "
            f"Got block size {q.block_size}. Pack it in a size that divides them, or "
            "leave it in float"
        )
    return None


def _tensors(name: str, q: QTensor) -> dict[str, DeferredTensor]:
    """Returns the tensors that bitsandbytes stores for a kernel `[K, N]`."""
    k, n = q.matrix_shape
    blocks = k // q.block_size * n
    codes = lambda: np.asarray(q.codes).T.reshape(-1, 1)
    scales = lambda: np.asarray(q.scales).T.reshape(-1)
    state: dict[str, Any] = {
        "quant_type": q.fmt,
        "blocksize": q.block_size,
        "dtype": q.dtype_name,
        "shape": [n, k],
    }
    tensors: dict[str, Any] = {
        name: DeferredTensor(np.dtype(np.uint8), (n * k // 2, 1), codes),
        f"{name}.absmax": DeferredTensor(np.dtype(q.scales.dtype), (blocks,), scales),
        f"{name}.quant_map": q.packing.format.table,
    }
    if q.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(q.scale_scales)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
        state |= {
            "nested_blocksize": SCALES_PER_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(q.scale_offset)),
        }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{q.fmt}"] = text
    return tensors


def _config(kernels: Kernels, in_float: list[str], own: Any) -> dict[str, Any]:
    del own
    q = next(iter(kernels.values()))
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": q.dtype_name,  # in which it multiplies
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": q.fmt,
        "bnb_4bit_use_double_quant": q.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": in_float,
        "llm_int8_threshold": 6.0,
    }
    return {"quantization_config": settings}


_LAYOUT = PackedLayout(
    "bitsandbytes",
    ("nf4", "fp4"),
    _tensors,
    _config,
    _refusal,
    lambda q: (q.fmt, q.double_quant),
)
