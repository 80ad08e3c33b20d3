"""Writes packed bases in the 4-bit layouts of other libraries."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ...quant.kernel import is_packed
from ...quant.qtensor import QTensor
from ...quant.schemes import DYNAMIC_MAP, SCALES_PER_BLOCK
from ...trees.paths import Tree, fused_with, refuse_listed
from ..files import Path
from ..model_folder import SHARD_BYTES, read_config_json, write_folder
from ..named_leaves import NamedLeaf, exported_leaves, float_tensors_of, matrix_of
from ..names import Names
from ..tensors import DeferredTensor

Kernels = Mapping[str, QTensor]  # `[K, N]`, by the names of their weights
Config = Mapping[str, Any]  # the content of `config.json`

_INT4_FORMATS = ("int4_f16", "q4_0")
_INT32 = np.dtype("<i4")
_SMALLEST_BITSANDBYTES_BLOCK = 32
# The output whose code is in each nibble of AWQ's words, from the lowest nibble on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def save_bitsandbytes(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Config,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Packed kernels keep their codes and scales to the byte; others stay in float.

    Args:
        path: The folder to write, new or empty.
        base: The base tree, with packed kernels.
        names: The names of the leaves' tensors in the checkpoint.
        config: A folder with the float model's `config.json` and tokenizer files, which
            are copied; or the content of that `config.json`.
        max_shard_bytes: The largest size of a file, unless one tensor is larger.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If bitsandbytes has no format for a packed kernel (all are listed),
            if no kernel is packed or their formats differ, or if the folder is not
            empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 2)), "nf4")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_bitsandbytes(path, base, names, {"model_type": "mine"})
        >>> sorted(ql.io.open_safetensors(path))[:2]
        ['up.weight', 'up.weight.absmax']
    """
    tensors, changes = _convert(base, names, config, _BITSANDBYTES)
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_folder(path, tensors, config, changes, **options)


def save_packed(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Config,
    layout: Literal["awq", "compressed-tensors"],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that vLLM and transformers load.

    Packed kernels keep their codes and the exact values of their scales; others stay
    in float.

    Args:
        path: The folder to write, as in `save_bitsandbytes`.
        base: The base tree. Packed kernels must be `int4_f16` or `q4_0`; for
            compressed-tensors, `mxfp4` and `nvfp4` are also possible.
        names: The names of the leaves' tensors in the checkpoint.
        config: As in `save_bitsandbytes`.
        layout: The layout of packed kernels in the files.
        max_shard_bytes: The largest size of a file, unless one tensor is larger.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the layout cannot hold a packed kernel (all are listed), if no
            kernel is packed or their settings differ, or if the folder is not empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((128, 8)), "int4_f16")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_packed(path, base, names, {"model_type": "mine"}, "awq")
        >>> list(ql.io.open_safetensors(path))
        ['up.qweight', 'up.qzeros', 'up.scales']
    """
    tensors, changes = _convert(base, names, config, _LAYOUTS[layout])
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_folder(path, tensors, config, changes, **options)


@dataclass(frozen=True)
class PackedLayout:
    """The layout in which a library stores packed kernels."""

    name: str  # for error messages
    formats: tuple[str, ...]
    # Returns the tensors of a kernel `[K, N]` whose weight has a name `module.weight`.
    tensors: Callable[[str, QTensor], dict[str, Any]]
    # Returns the `quantization_config`, from the kernels and the modules in float.
    config: Callable[[Kernels, list[str]], dict[str, Any]]
    # Returns why the layout cannot hold a kernel of its formats, or None if it can.
    problem: Callable[[QTensor], str | None]
    # The attributes of a QTensor that must be equal in all kernels.
    shared: tuple[str, ...] = ("fmt", "block_size")
    sets_dtype: bool = True  # whether the model gets the dtype of `_model_dtype`


def _convert(
    base: Tree, names: Names, config: Path | Config, layout: PackedLayout
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the tensors of a layout, and the changes to the model's config."""
    leaves = exported_leaves(base, names)
    # 1. Check all kernels before anything is written.
    packed = [(leaf, x) for leaf, x in leaves if is_packed(x)]
    problems = {leaf.path: _problem(leaf, q, layout) for leaf, q in packed}
    refuse_listed(f"{layout.name} cannot store these kernels", problems)
    settings = {tuple(getattr(q, name) for name in layout.shared) for _, q in packed}
    if len(settings) != 1:
        message = "`base` must have packed kernels, all with the same settings for "
        raise ValueError(f"{message}{layout.name}. Got {sorted(settings)}.")
    # 2. List the tensors of all leaves. Their values are computed when written.
    tensors: dict[str, Any] = {}
    kernels: dict[str, QTensor] = {}
    float_modules = []
    for leaf, x in leaves:
        if not is_packed(x):
            tensors |= float_tensors_of(leaf, x)
            modules = [name.removesuffix(".weight") for name in leaf.tensors.flat]
            float_modules += modules if leaf.geometry is not None else []
            continue
        for index, name in np.ndenumerate(leaf.tensors):
            kernels[name] = matrix_of(x, index)
            tensors |= layout.tensors(name, kernels[name])
    if "lm_head.weight" not in tensors:  # the head shares the weights of the embedding
        float_modules.append("lm_head")
    # 3. Describe the kernels in the config.
    changes: dict[str, Any] = {
        "quantization_config": layout.config(kernels, float_modules)
    }
    if layout.sets_dtype:
        old_config = config if isinstance(config, Mapping) else read_config_json(config)
        changes |= _model_dtype(kernels, old_config)
    return tensors, changes


def _problem(leaf: NamedLeaf, q: QTensor, layout: PackedLayout) -> str | None:
    if q.fmt not in layout.formats:
        return f"its format must be {' or '.join(layout.formats)}. Got {q.fmt}"
    for name in leaf.tensors.flat:
        if not name.endswith(".weight"):
            return f"its name must end in .weight. Got {name}"
    return layout.problem(q)


# bitsandbytes. packed/bitsandbytes.py describes the tensors.


def _bitsandbytes_problem(q: QTensor) -> str | None:
    smallest, k = _SMALLEST_BITSANDBYTES_BLOCK, q.matrix_shape[-2]
    if q.block_size < smallest:
        return f"its block size must be at least {smallest}. Got {q.block_size}"
    reason = (
        f"its {k} inputs must be a multiple of the block size, or blocks of "
        f"bitsandbytes would cross rows. Got block size {q.block_size}. Pack it with a "
        "block size that divides the inputs, or leave it in float"
    )
    return reason if k % q.block_size else None


def _bitsandbytes_tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    # bitsandbytes stores [N, K], row by row. Each of our bytes has two codes along K.
    codes = DeferredTensor(
        np.dtype(np.uint8),
        (n * k // 2, 1),
        lambda: np.asarray(q.codes).T.reshape(-1, 1),
    )
    scales = DeferredTensor(
        np.dtype(q.scales.dtype),
        (k // q.block_size * n,),
        lambda: np.asarray(q.scales).T.reshape(-1),
    )
    state: dict[str, Any] = {"quant_type": q.fmt, "blocksize": q.block_size}
    state |= {"dtype": q.dtype_name, "shape": [n, k]}
    tensors: dict[str, Any] = {name: codes, f"{name}.absmax": scales}
    tensors[f"{name}.quant_map"] = q.packing.format.table
    if q.double_quant:
        tensors[f"{name}.nested_absmax"] = np.asarray(q.scale_scales)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
        state |= dict(nested_blocksize=SCALES_PER_BLOCK, nested_dtype="float32")
        state["nested_offset"] = float(np.asarray(q.scale_offset))
    state_bytes = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{q.fmt}"] = state_bytes
    return tensors


def _bitsandbytes_config(kernels: Kernels, float_modules: list[str]) -> dict[str, Any]:
    q = next(iter(kernels.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": q.dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": q.fmt,
        "bnb_4bit_use_double_quant": q.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": float_modules,
        "llm_int8_threshold": 6.0,
    }


_BITSANDBYTES = PackedLayout(
    "bitsandbytes",
    ("nf4", "fp4"),
    _bitsandbytes_tensors,
    _bitsandbytes_config,
    _bitsandbytes_problem,
    ("fmt", "double_quant"),  # each weight stores its own block size
    sets_dtype=False,
)


# AWQ and compressed-tensors. packed/layouts.py describes the tensors.


def _awq_problem(q: QTensor) -> str | None:
    n = q.matrix_shape[-1]
    return f"its outputs must be a multiple of 8. Got {n}" if n % 8 else None


def _awq_tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    num_blocks = k // q.block_size
    # Our formats have a zero point of 8 for every weight.
    zeros = np.full((num_blocks, n // 2), 0x88, np.uint8).view(_INT32)

    def words() -> np.ndarray:
        packed = np.asarray(q.codes)
        # [K / 2, N] bytes -> [K / 2, 2, N] -> [K, N / 8, 8] codes, in AWQ's order
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(k, n // 8, 8)
        codes = codes[..., _AWQ_ORDER]
        pairs = np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)
        return pairs.view(_INT32)[..., 0]

    scales = DeferredTensor(np.dtype(np.float16), (num_blocks, n), q.scales.__array__)
    module = name.removesuffix("weight")
    return {
        f"{module}qweight": DeferredTensor(_INT32, (k, n // 8), words),
        f"{module}qzeros": zeros,
        f"{module}scales": scales,
    }


def _awq_config(kernels: Kernels, float_modules: list[str]) -> dict[str, Any]:
    size = next(iter(kernels.values())).block_size
    settings = dict(quant_method="awq", version="gemm", bits=4, group_size=size)
    return settings | dict(zero_point=True, modules_to_not_convert=float_modules)


def _compressed_tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    is_int = q.fmt in _INT4_FORMATS
    word = _INT32 if is_int else np.dtype(np.uint8)
    scale_dtype = _integer_scale_dtype(q) if is_int else np.dtype(q.scales.dtype)

    def words() -> np.ndarray:
        # [K / 2, N] -> [N, K / 2], with the first code of each byte in the low bits
        packed = np.asarray(q.codes).T
        return np.ascontiguousarray(packed >> 4 | packed << 4).view(word)

    scales = DeferredTensor(
        scale_dtype,
        (n, k // q.block_size),
        lambda: np.asarray(q.scales).T.astype(scale_dtype),
    )
    codes = DeferredTensor(word, (n, k // 2 // word.itemsize), words)
    tensors: dict[str, Any] = {f"{name}_packed": codes, f"{name}_scale": scales}
    if is_int:
        tensors[f"{name}_shape"] = np.array([n, k])
    if q.fmt == "nvfp4":
        factor, divisor = np.asarray(q.scale_scales)
        tensors[f"{name}_global_scale"] = (divisor / factor)[None]
    return tensors


# For each of our formats: its name in compressed-tensors, the type of the values, the
# dtype of the scales, and the strategy.
_INTEGERS = ("pack-quantized", "int", None, "group")
_COMPRESSED_FORMATS = {
    **dict.fromkeys(_INT4_FORMATS, _INTEGERS),
    "mxfp4": ("mxfp4-pack-quantized", "float", "torch.uint8", "group"),
    "nvfp4": ("nvfp4-pack-quantized", "float", "torch.float8_e4m3fn", "tensor_group"),
}


def _compressed_config(kernels: Kernels, float_modules: list[str]) -> dict[str, Any]:
    q = next(iter(kernels.values()))
    if q.fmt == "nvfp4":
        _check_fused_factors(kernels)
    format_name, value_type, scale_dtype, strategy = _COMPRESSED_FORMATS[q.fmt]
    weights = dict(num_bits=4, type=value_type, symmetric=True, strategy=strategy)
    weights |= dict(group_size=q.block_size, dynamic=False, scale_dtype=scale_dtype)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format_name}
    settings |= {"quantization_status": "compressed", "ignore": float_modules}
    return settings | {"config_groups": {"group_0": group}}


def _check_fused_factors(kernels: Kernels) -> None:
    """Raises if weights that vLLM fuses, such as q, k and v, have different factors."""
    factors = {name: tuple(np.asarray(q.scale_scales)) for name, q in kernels.items()}
    pairs = [(a, b) for a in factors for b in fused_with(a) if b in factors]
    differing = [f"{a}, {b}" for a, b in pairs if factors[a] != factors[b]]
    title = "vLLM uses one float32 factor for both of these weights, but theirs "
    refuse_listed(title + "differ: pack them as one tree", differing)


def _integer_scale_dtype(q: QTensor) -> np.dtype:
    """Returns bfloat16 if the weights are bfloat16 and it holds all scales exactly."""
    scales = np.asarray(q.scales)
    is_exact = (scales.astype(ml_dtypes.bfloat16).astype(scales.dtype) == scales).all()
    is_bfloat16 = q.dtype_name == "bfloat16" and is_exact
    return np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else scales.dtype)


def _model_dtype(kernels: Kernels, old_config: Config) -> dict[str, Any]:
    """Returns the dtype of the model, to which servers cast scales and activations."""
    # vLLM does not support MXFP4 in float16, and transformers supports E2M1 only in
    # bfloat16. Gemma overflows in float16, so its dtype is kept.
    is_int = next(iter(kernels.values())).fmt in _INT4_FORMATS
    if is_int and str(old_config.get("model_type")).startswith("gemma"):
        return {}
    dtypes = [_integer_scale_dtype(q).name for q in kernels.values()] if is_int else []
    # "float16" sorts last: one kernel whose scales need float16 decides for the model.
    return {"dtype": max(dtypes, default="bfloat16"), "torch_dtype": None}


_LAYOUTS = {
    "awq": PackedLayout("AWQ", _INT4_FORMATS, _awq_tensors, _awq_config, _awq_problem),
    "compressed-tensors": PackedLayout(
        "compressed-tensors",
        tuple(_COMPRESSED_FORMATS),
        _compressed_tensors,
        _compressed_config,
        lambda q: None,
    ),
}
