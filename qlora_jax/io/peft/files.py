"""Reads and writes PEFT adapters."""

import pathlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter
from ...adapters.lora import LowRank, is_low_rank
from ...adapters.trained import TrainedRows, new_trained
from ...quant.formats import check_dtype
from ...quant.kernel import Kernel, as_kernel, is_kernel, is_packed
from ...trees.adapters import checked_adapters, with_trained
from ...trees.paths import Tree, map_by_path, nested, raise_if_any
from ..files import CheckpointError, Path, member, new_folder, refuse, write_json
from ..names import BatchIndex, Names
from ..safetensors import open_safetensors, write_safetensors
from ..tensors import LazyTensor
from .config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from .modules import NamedBase, from_stored, stack, to_stored
from .settings import AdapterLayout, lay_out, peft_config, refuse_merge_aware

# float64 is rejected, because JAX would silently read it as float32.
_STORED_DTYPES = ("bfloat16", "float16", "float32")


def load_peft(
    path: Path,
    base: Tree,
    names: Names,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[Tree, dict, PeftConfig]:
    """Returns a base tree, a lora tree and the settings of a LoRA that PEFT wrote.

    Every target, pattern and tensor must belong to the model, and every tensor that the
    settings require must be in the file. If the adapters of a stack have different
    ranks, they are padded with zeros, which stay zero in training. If they have
    different scalings, they get the largest one, B is multiplied by the ratio, and the
    default of `dtype` is at least float32. Biases and modules
    in the file become `Trained` leaves of the lora tree; if the file has only some
    layers of a stack, these replace the layers of `base` instead.

    Args:
        path: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base tree that the adapter is for: float, packed or partly packed.
        names: The names of the leaves of `base` in the Hugging Face model.
        dtype: The dtype of A and B; by default, that of the file. `Trained` leaves have
            at least this precision.

    Raises:
        TypeError: If `base` is a combined tree, or `dtype` is not a floating dtype.
        ValueError: If `names` does not fit `base`.
        CheckpointError: A ValueError, if the files are not those of a LoRA adapter for
            this model. It lists all problems.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql, tempfile
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_peft(folder, base, lora, names)
        ...     base, lora, config = ql.io.load_peft(folder, base, names)
        >>> lora["q_proj"]["kernel"].a.shape, config.target_modules
        ((64, 4), ('q_proj',))
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    # Check the settings and the headers of the files before values are read.
    config, file = _open(path)
    model = NamedBase.of(base, names)
    layout = lay_out(config, model)
    base_keys = layout.base_keys(file)
    _check_tensors(file, layout.shapes(base_keys))
    arrays = {key: tensor[...] for key, tensor in file.items()}
    not_finite = [key for key, x in arrays.items() if not np.isfinite(x).all()]
    refuse("these tensors of the adapter must be finite", not_finite)
    # Build the adapters: low-rank ones, then trained rows, then fully trained leaves.
    adapters = _low_rank_adapters(arrays, layout, dtype)
    for module, rows in layout.rows.items():
        # `TrainedRows` has its rows in the order of their tokens.
        x = arrays[layout.rows_key(module)][np.argsort(rows)]
        x = jnp.asarray(x, jnp.promote_types(dtype or x.dtype, x.dtype))
        trained_rows = TrainedRows(x, tuple(sorted(rows)))
        adapters[model.modules[module].path] = trained_rows
    tensors = {name: arrays[key] for name, key in base_keys.items()}
    base, trained = _replace_tensors(base, layout, tensors, dtype)
    saved_base_weights = tuple(name for name in layout.optional if name in base_keys)
    config = replace(config, saved_base_weights=saved_base_weights)
    return base, nested(adapters | trained), config


def _open(path: Path) -> tuple[PeftConfig, Mapping[str, LazyTensor]]:
    folder = pathlib.Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            # Older versions of PEFT wrote pickles by default. They are never read here.
            is_pickled = (folder / "adapter_model.bin").exists()
            hint = " adapter_model.bin is a pickle, which can run code." * is_pickled
            if (folder / "adapters.safetensors").exists():
                hint = " It is of mlx-lm: add it to its model with mlx_lm.fuse."
            raise CheckpointError(
                f"`path` must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. Got "
                f"{str(folder)!r}, which has no {name}.{hint}"
            )
    config = PeftConfig.read(folder)
    return config, open_safetensors(member(folder, WEIGHTS_FILE))


def _check_tensors(
    file: Mapping[str, LazyTensor | np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"{key}: unexpected" for key in file.keys() - shapes.keys()]
    for key, shape in shapes.items():
        if key not in file:
            problems.append(f"{key}: missing")
        elif file[key].shape != shape:
            problems.append(f"{key}: shape must be {shape}. Got {file[key].shape}")
        elif (dtype := file[key].dtype).name not in _STORED_DTYPES:
            problems.append(
                f"{key}: dtype must be one of {_STORED_DTYPES}. Got {dtype}"
            )
    refuse("the tensors of this adapter do not match the model", sorted(problems))


def _low_rank_adapters(
    arrays: Mapping[str, np.ndarray], layout: AdapterLayout, dtype: DTypeLike | None
) -> dict[str, Adapter]:
    """Returns the low-rank adapters by path, stacked as their kernels are."""
    by_path: dict[str, dict[BatchIndex, LowRank]] = defaultdict(dict)
    for adapter in layout.low_rank:
        adapter_arrays = {name: arrays[key] for name, key in adapter.keys.items()}
        for (path, index), matrix in adapter.read(adapter_arrays).items():
            by_path[path][index] = matrix
    adapters, problems = {}, []
    for path, matrices in by_path.items():
        try:
            kernel = as_kernel(layout.model.leaves[path])
            adapters[path] = stack(kernel, matrices, dtype)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    refuse("these adapters cannot be stacked", problems)
    return adapters


def _replace_tensors(
    base: Tree,
    layout: AdapterLayout,
    tensors: Mapping[str, np.ndarray],
    dtype: DTypeLike | None,
) -> tuple[Tree, dict[str, Adapter]]:
    """Returns the base tree with replaced tensors, and the fully trained leaves."""
    model = layout.model
    by_path: dict[str, dict[BatchIndex, np.ndarray]] = defaultdict(dict)
    for name, x in tensors.items():
        path, index = model.positions[name]
        by_path[path][index] = x
    changed, trained = {}, {}
    for path, parts in by_path.items():
        leaf = _updated_leaf(model.leaves[path], parts, model.named_leaves[path].window)
        # If the file has only some layers of a stack, the stack stays in the base.
        if {*model.named_leaves[path].tensor_names.flat} <= {*layout.saved}:
            trained[path] = new_trained(leaf, dtype or leaf.dtype)
        else:
            changed[path] = leaf
    return map_by_path(lambda path, leaf: changed.get(path, leaf), base), trained


def _updated_leaf(
    leaf: Kernel | Any,
    tensors: Mapping[BatchIndex, np.ndarray],
    window: tuple[int, ...],
) -> Array:
    """Returns a leaf in float with some of its tensors replaced."""
    is_matrix_stack = is_kernel(leaf)
    # [*batch, K, N] for a kernel; other leaves are [*batch, *tensor].
    values = np.asarray(leaf.dequantize_matrix() if is_matrix_stack else leaf)
    dtype = jnp.result_type(*(x.dtype for x in tensors.values()))
    num_batch_axes = len(next(iter(tensors)))
    if len(tensors) < np.prod(values.shape[:num_batch_axes]):
        # The dtype must also represent the weights that stay.
        dtype = jnp.promote_types(dtype, values.dtype)
    values = values.astype(dtype)
    for index, tensor in tensors.items():
        # A kernel [K, N] is stored in the same layout as an adapter's A [K, r].
        tensor = from_stored("a", tensor, window) if is_matrix_stack else tensor
        values[index] = tensor.reshape(values[index].shape)
    array = jnp.asarray(values)
    return leaf.geometry.from_matrix(array) if is_matrix_stack else array


def save_peft(
    path: Path,
    base: Tree,
    lora: Tree,
    names: Names,
    config: PeftConfig | None = None,
) -> None:
    """Saves adapters as PEFT does, for `PeftModel.from_pretrained`.

    An adapter that `load_peft` read is written with the same bytes.

    Args:
        path: The folder to write, new or empty.
        base: The base tree.
        lora: The lora tree.
        names: The names of the leaves of `base` in the Hugging Face model.
        config: The settings: from `load_peft`, or by default from `peft_config`.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: Before anything is written: if adapters differ from the settings, do
            not fit their kernels, are not finite, or are merge-aware. The error lists
            all of them.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql, tempfile, pathlib
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_peft(folder, base, lora, names)
        ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if config is None:
        config = peft_config(base, lora, names)
    # All checks come before the first byte is written.
    tensors = adapter_tensors(base, lora, names, config)
    with new_folder(path) as folder:
        write_safetensors(folder / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, config.to_json())


def adapter_tensors(
    base: Tree, lora: Tree, names: Names, config: PeftConfig
) -> dict[str, np.ndarray]:
    """Returns the tensors that PEFT stores for adapters with these settings, by key."""
    adapters = checked_adapters(base, lora)
    refuse_merge_aware(adapters)
    adapters = jax.tree.map(np.asarray, adapters)
    # Leaves that are `Trained` replace those of the base, so that they are written.
    model = NamedBase.of(with_trained(base, adapters), names)
    layout = lay_out(config, model)
    low_rank = {path: x for path, x in adapters.items() if is_low_rank(x)}
    full_rank = adapters.keys() - low_rank.keys()
    trained = {name for name, x in model.positions.items() if x.path in full_rank}
    written = {*layout.saved, *(f"{module}.weight" for module in layout.rows)}
    raise_if_any(
        "`bias`, `modules_to_save` and `trainable_token_indices` must include all "
        "tensors that are trained in full. Missing",
        sorted(trained - written),
    )
    tensors = _low_rank_tensors(low_rank, layout)
    for module, rows in layout.rows.items():
        adapter = adapters.get(model.modules[module].path)
        if adapter is None or adapter.replaced_rows != tuple(sorted(rows)):
            raise ValueError(
                f"{module} must have the trained rows {rows} of `config`. Got others."
            )
        # The rows here are sorted by token; those of PEFT are in the order of `rows`.
        order = np.searchsorted(adapter.replaced_rows, rows)
        tensors[layout.rows_key(module)] = np.asarray(adapter.arrays["rows"])[order]
    keys = layout.saved | layout.optional
    raise_if_any(
        "`saved_base_weights` must have the names of weights that PEFT may save. Got "
        "others",
        [name for name in config.saved_base_weights if name not in keys],
    )
    saved_leaves = {
        name: model.leaves[model.positions[name].path]
        for name in config.saved_base_weights
    }
    raise_if_any(
        "`base` must have the weights in `saved_base_weights` in float, as `load_peft` "
        "returns them. Got packed ones",
        [name for name, leaf in saved_leaves.items() if is_packed(leaf)],
    )
    for name in (*layout.saved, *config.saved_base_weights):
        tensors[keys[name][0]] = _base_tensor(model, name)
    not_finite = [key for key, x in tensors.items() if not np.isfinite(x).all()]
    raise_if_any("these tensors of the adapter must be finite", not_finite)
    return tensors


def _low_rank_tensors(
    adapters: Mapping[str, LowRank], layout: AdapterLayout
) -> dict[str, np.ndarray]:
    """Returns the arrays of the low-rank adapters by key; an error lists problems."""
    required = {x.position.path for x in layout.modules if x.rank}
    problems = [f"{path}: it has no adapter." for path in required - set(adapters)]
    tensors: dict[str, np.ndarray] = {}
    for adapter in layout.low_rank:
        try:
            arrays = adapter.write(adapters)
        except ValueError as error:
            problems.append(f"{adapter.label}: {error}")
            continue
        for name, x in arrays.items():
            tensors[adapter.keys[name]] = np.ascontiguousarray(x)
    # Last, report adapters of weights that PEFT cannot adapt, such as norms.
    named = {x.position.path for x in layout.modules}
    named |= {path for x in layout.parameters for path in x.kernels}
    unnamed = adapters.keys() - named
    problems += [f"{path}: PEFT cannot adapt such weights." for path in unnamed]
    raise_if_any("these adapters do not match `config`", sorted(problems))
    return tensors


def _base_tensor(model: NamedBase, name: str) -> np.ndarray:
    """Returns a tensor of the base tree in the checkpoint's layout."""
    path, index = model.positions[name]
    leaf = model.leaves[path]
    if is_kernel(leaf):
        # A kernel [K, N] is stored in the same layout as an adapter's A [K, r].
        matrix = np.asarray(leaf.dequantize_matrix())[index]
        tensor = to_stored("a", matrix, model.named_leaves[path].window)
    else:
        tensor = np.asarray(leaf)[index].reshape(model.tensor_shape(name))
    return np.ascontiguousarray(tensor)
