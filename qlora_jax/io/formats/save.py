"""Writes packed bases in the 4-bit layouts of other libraries."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ...quant.kernel import is_packed
from ...quant.qtensor import QTensor
from ...trees.paths import Tree, refuse_listed
from ..files import Path
from ..model_folder import SHARD_BYTES, read_config_json, write_folder
from ..named_leaves import NamedLeaf, exported_leaves, float_tensors_of, matrix_of
from ..names import Names
from .file_format import Config, Writer
from .registry import FILE_FORMATS


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
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    _save("bitsandbytes", path, base, names, config, **options)


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
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    _save(layout, path, base, names, config, **options)


def _save(
    layout: str,
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Config,
    **options: Any,
) -> None:
    title, writer = {x.name.lower(): (x.name, x.write) for x in FILE_FORMATS}[layout]
    assert writer is not None
    leaves = exported_leaves(base, names)
    # 1. Check all kernels before anything is written.
    packed = [(leaf, x) for leaf, x in leaves if is_packed(x)]
    problems = {leaf.path: _problem(leaf, q, writer) for leaf, q in packed}
    refuse_listed(f"{title} cannot store these kernels", problems)
    settings = {tuple(getattr(q, name) for name in writer.shared) for _, q in packed}
    if len(settings) != 1:
        message = "`base` must have packed kernels, all with the same settings for "
        raise ValueError(f"{message}{title}. Got {sorted(settings)}.")
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
            tensors |= writer.tensors(name, kernels[name])
    if "lm_head.weight" not in tensors:  # the head shares the weights of the embedding
        float_modules.append("lm_head")
    # 3. Describe the kernels in the config.
    old_config = config if isinstance(config, Mapping) else read_config_json(config)
    changes = writer.config(kernels, float_modules, old_config)
    write_folder(path, tensors, config, changes, **options)


def _problem(leaf: NamedLeaf, q: QTensor, writer: Writer) -> str | None:
    if q.fmt not in writer.formats:
        return f"its format must be {' or '.join(writer.formats)}. Got {q.fmt}"
    for name in leaf.tensors.flat:
        if not name.endswith(".weight"):
            return f"its name must end in .weight. Got {name}"
    return writer.problem(q) if writer.problem else None
