"""Reads a PEFT adapter."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...adapters.base import SETTINGS, Adapter
from ...adapters.lora import LoRA
from ...adapters.trained import new_trained
from ...adapters.trained_rows import TrainedRows
from ...quant.formats import FLOAT_DTYPES
from ...quant.geometry import Geometry
from ...quant.kernel import Kernel, as_kernel
from ...trees.paths import Tree, map_by_path, nested
from ..files import CheckpointError, member, refuse
from ..names import Names
from ..safetensors import open_safetensors
from ..tensors import Tensors
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from .adapter_file import (
    AdapterTensors,
    NamedBase,
    Position,
    array_keys,
    from_stored,
    kind_of,
    lay_out,
    rows_key,
)
from .plain import PlainLoRA
from .stacked import (
    parameter_shapes,
    split_parameter,
    stack,  # x
)

# JAX would read float64 as float32.
_STORED = ("bfloat16", "float16", "float32")


def load_peft(
    path: str | pathlib.Path | PlainLoRA, base: Tree, names: Names, *, dtype: Any = None
) -> tuple[Tree, dict, PeftConfig]:
    """Returns a base tree, a lora tree and the settings of a LoRA that PEFT wrote.

    Every target, pattern and tensor must belong to the model, and every tensor that the
    settings ask for must be there. Adapters of a stack of weights whose ranks differ
    are padded with zeros, which stay zero in training; if their scalings differ,
    `LoRA.scaling` has one for each. Biases and modules that the adapter holds are
    `Trained` leaves of the lora tree; but if they are some of the layers of a stack,
    they replace those of `base`.

    Args:
        path: A folder with `adapter_config.json` and `adapter_model.safetensors`; or
            the adapters of another file, as `read_mlx` returns them.
        base: The base tree that the adapter is for: float, packed or partly packed.
        names: The names of the leaves of `base` in the Hugging Face model.
        dtype: Dtype of A and B; by default that of the file, as those of `Trained`
            leaves are at least.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If `names` does not fit `base`.
        CheckpointError: A ValueError, if the files are not those of a LoRA adapter for
            this model. It names all that is wrong.

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
    if dtype is not None and jnp.dtype(dtype).name not in FLOAT_DTYPES:
        raise TypeError(f"`dtype` must be one of {FLOAT_DTYPES}. Got {dtype!r}.")
    config, file = path.to_peft() if isinstance(path, PlainLoRA) else _open(path)
    model = NamedBase.of(base, names)
    layout = lay_out(config, model)
    whole = _check_tensors(file, config, model, layout)
    arrays = {key: tensor[...] for key, tensor in file.items()}
    bad = [key for key, x in arrays.items() if not np.isfinite(x).all()]
    refuse("these tensors of the adapter must be finite", bad)
    by_place: dict[Position, Adapter] = {
        place: _adapter(arrays, module, config, model)
        for module, place in layout.adapted.items()
    }
    for name, module in layout.parameters.items():
        a, b = (arrays[key] for key in array_keys(LoRA, module).values())
        settings = config.scaling_of(name), config.rank_of(name)
        by_place |= split_parameter(name, model, a, b, *settings)
    adapters = _stack_all(model, by_place, dtype)
    for module, rows in layout.rows.items():
        x = arrays[rows_key(module)][np.argsort(rows)]
        x = jnp.asarray(x, jnp.promote_types(dtype or x.dtype, x.dtype))
        new = TrainedRows(x, 1.0, 0.0, Geometry(), tuple(sorted(rows)))
        adapters[model.modules[module].path] = new
    tensors = {name: arrays[key] for name, key in whole.items()}
    base, trained = _replace(base, model, layout, tensors, dtype)
    repeated = tuple(name for name in layout.optional if name in whole)
    config = dataclasses.replace(config, saved_base_weights=repeated)
    return base, nested(adapters | trained), config


def _open(path: str | pathlib.Path) -> tuple[PeftConfig, Tensors]:
    folder = pathlib.Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            pickled = (folder / "adapter_model.bin").exists()
            why = " adapter_model.bin is a pickle, which can run code." * pickled
            raise CheckpointError(
                f"`path` must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. Got "
                f"{str(folder)!r}, which has no {name}.{why}"
            )
    config = PeftConfig.read(folder)
    return config, open_safetensors(member(folder, WEIGHTS_FILE))


def _check_tensors(
    file: Mapping[str, Any],
    config: PeftConfig,
    model: NamedBase,
    layout: AdapterTensors,
) -> dict[str, str]:
    """Checks the file's tensors; returns the keys of base tensors by name."""
    kind = kind_of(config)
    wanted: dict[str, tuple[int, ...]] = {}
    for module in layout.adapted:
        n, k, *window = model.tensor_shape(f"{module}.weight")
        if is_table := module in model.tables:
            n, k = k, n
        sizes = {"k": k, "n": n, "r": config.rank_of(module)}
        for name, key in array_keys(kind, module, is_table).items():
            shape = tuple(sizes[role] for role in reversed(kind.roles[name]))
            wanted[key] = (*shape, *(size if name == "a" else 1 for size in window))
    for name, module in layout.parameters.items():
        shapes = parameter_shapes(name, model, config.rank_of(name))
        keys = array_keys(LoRA, module)
        wanted |= {keys[role]: shape for role, shape in shapes.items()}
    for module, rows in layout.rows.items():
        size = model.tensor_shape(f"{module}.weight")[-1]
        wanted[rows_key(module)] = (len(rows), size)
    whole: dict[str, str] = {}
    problems = []
    for name in (*layout.saved, *layout.optional):
        keys = [key for key in layout.keys_of(name) if key in file]
        if keys:
            whole[name] = keys[0]
            wanted[keys[0]] = model.tensor_shape(name)
        elif name in layout.saved:
            problems.append(f"{layout.keys_of(name)[0]}: missing")
    for key, shape in wanted.items():
        if key not in file:
            problems.append(f"{key}: missing")
        elif file[key].shape != shape:
            problems.append(f"{key}: shape must be {shape}. Got {file[key].shape}")
        elif file[key].dtype.name not in _STORED:
            got = file[key].dtype
            problems.append(f"{key}: dtype must be one of {_STORED}. Got {got}")
    problems += [f"{key}: unexpected" for key in file.keys() - wanted.keys()]
    refuse("these are not the tensors of this adapter for this model", sorted(problems))
    return whole


def _adapter(
    arrays: Mapping[str, np.ndarray], module: str, config: PeftConfig, model: NamedBase
) -> Adapter:
    kind, is_table = kind_of(config), module in model.tables
    keys = array_keys(kind, module, is_table)
    window = model.window(module)
    own = {name: from_stored(name, arrays[key], window) for name, key in keys.items()}
    dropout = 0.0 if is_table else float(config.lora_dropout)
    settings = (config.scaling_of(module), dropout, Geometry())
    return kind(**own, **dict(zip(SETTINGS, settings, strict=True)))


def _stack_all(
    model: NamedBase, by_place: Mapping[Position, Adapter], dtype: Any
) -> dict[str, Any]:
    """Returns the adapters by path, stacked as their kernels are."""
    by_path: dict[str, dict[tuple[int, ...], Adapter]] = {}
    for place, adapter in by_place.items():
        by_path.setdefault(place.path, {})[place.index] = adapter
    adapters, problems = {}, []
    for path, group in by_path.items():
        try:
            adapters[path] = stack(as_kernel(model.leaves[path]), group, dtype)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    refuse("these adapters cannot be stacked", problems)
    return adapters


def _replace(
    base: Tree,
    model: NamedBase,
    layout: AdapterTensors,
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
) -> tuple[Tree, dict[str, Any]]:
    """Returns the base tree with tensors replaced, and the leaves trained in full.

    A stack of which some layers were trained stays in the base.
    """
    by_path: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, x in tensors.items():
        place = model.tensors[name]
        by_path.setdefault(place.path, {})[place.index] = x
    new, trained = {}, {}
    for path, own in by_path.items():
        leaf = _replaced(model.leaves[path], own, model.named[path].window)
        if {*model.named[path].tensors.flat} <= {*layout.saved}:
            trained[path] = new_trained(leaf, dtype or leaf.dtype)
        else:
            new[path] = leaf
    return map_by_path(lambda path, leaf: new.get(path, leaf), base), trained


def _replaced(
    leaf: Any, tensors: Mapping[tuple[int, ...], np.ndarray], window: tuple[int, ...]
) -> Any:
    """Returns a leaf in float with some of its tensors replaced."""
    is_kernel = isinstance(leaf, Kernel)
    matrix = np.asarray(leaf.dequantize_matrix() if is_kernel else leaf)
    dtype = jnp.result_type(*(x.dtype for x in tensors.values()))
    # Weights that stay must fit the dtype too.
    if len(tensors) < np.prod(matrix.shape[: len(next(iter(tensors)))]):
        dtype = jnp.promote_types(dtype, matrix.dtype)
    matrix = matrix.astype(dtype)
    for index, tensor in tensors.items():
        tensor = from_stored("a", tensor, window) if is_kernel else tensor
        matrix[index] = tensor.reshape(matrix[index].shape)
    matrix = jnp.asarray(matrix)
    return leaf.geometry.from_matrix(matrix) if is_kernel else matrix
