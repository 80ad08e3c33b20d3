"""Reads a PEFT adapter."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ...adapters.base import Adapter
from ...adapters.lora import SETTINGS
from ...adapters.trained import TrainedRows, new_trained
from ...quant.formats import FLOAT_DTYPES
from ...quant.geometry import Geometry
from ...quant.kernel import Kernel, as_kernel, is_kernel
from ...trees.paths import Tree, map_by_path, nested
from ..files import CheckpointError, member, refuse
from ..names import BatchIndex, Names
from ..safetensors import open_safetensors
from ..tensors import LazyTensor, Tensors
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from .adapter_file import AdapterTensors, NamedBase, Position, from_stored, lay_out
from .server_adapters import PlainLoRA
from .stacked import parameter_shapes, split_parameter, stack

T = TypeVar("T")

# float64 is rejected, because JAX would silently read it as float32.
_STORED_DTYPES = ("bfloat16", "float16", "float32")


def load_peft(
    path: str | pathlib.Path | PlainLoRA,
    base: Tree,
    names: Names,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[Tree, dict, PeftConfig]:
    """Returns a base tree, a lora tree and the settings of a LoRA that PEFT wrote.

    Every target, pattern and tensor must belong to the model, and every tensor that the
    settings require must be in the file. If the adapters of a stack have different
    ranks, they are padded with zeros, which stay zero in training. If they have
    different scalings, `LoRA.scaling` is a tuple with one for each. Biases and modules
    in the file become `Trained` leaves of the lora tree; if the file has only some
    layers of a stack, these replace the layers of `base` instead.

    Args:
        path: A folder with `adapter_config.json` and `adapter_model.safetensors`; or
            the adapters of another file, as `read_mlx` returns them.
        base: The base tree that the adapter is for: float, packed or partly packed.
        names: The names of the leaves of `base` in the Hugging Face model.
        dtype: The dtype of A and B; by default, that of the file. `Trained` leaves have
            at least this precision.

    Raises:
        TypeError: If `base` is a combined tree.
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
    if dtype is not None and jnp.dtype(dtype).name not in FLOAT_DTYPES:
        raise TypeError(f"`dtype` must be one of {FLOAT_DTYPES}. Got {dtype!r}.")
    # Check the settings and the headers of the files before values are read.
    config, file = path.to_peft() if isinstance(path, PlainLoRA) else _open(path)
    model = NamedBase.of(base, names)
    layout = lay_out(config, model)
    base_keys = _base_keys(file, layout)
    _check_tensors(file, _expected_shapes(config, model, layout, base_keys))
    arrays = {key: tensor[...] for key, tensor in file.items()}
    not_finite = [key for key, x in arrays.items() if not np.isfinite(x).all()]
    refuse("these tensors of the adapter must be finite", not_finite)
    # Build the adapters: low-rank ones, then trained rows, then fully trained leaves.
    by_position: dict[Position, Adapter] = {
        position: _module_adapter(arrays, module, config, model, layout)
        for module, position in layout.adapted.items()
    }
    for name, module in layout.parameters.items():
        a, b = (arrays[key] for key in layout.array_keys(module).values())
        settings = config.scaling_of(name), config.rank_of(name)
        by_position |= split_parameter(name, model, a, b, *settings)
    adapters = _stack_all(model, by_position, dtype)
    for module, rows in layout.rows.items():
        # `TrainedRows` has its rows in the order of their tokens.
        x = arrays[layout.rows_key(module)][np.argsort(rows)]
        x = jnp.asarray(x, jnp.promote_types(dtype or x.dtype, x.dtype))
        trained_rows = TrainedRows(x, tuple(sorted(rows)))
        adapters[model.modules[module].path] = trained_rows
    tensors = {name: arrays[key] for name, key in base_keys.items()}
    base, trained = _replace(base, model, layout, tensors, dtype)
    saved_base_weights = tuple(name for name in layout.optional if name in base_keys)
    config = dataclasses.replace(config, saved_base_weights=saved_base_weights)
    return base, nested(adapters | trained), config


def _open(path: str | pathlib.Path) -> tuple[PeftConfig, Tensors]:
    folder = pathlib.Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            # Older versions of PEFT wrote pickles by default. They are never read here.
            is_pickled = (folder / "adapter_model.bin").exists()
            hint = " adapter_model.bin is a pickle, which can run code." * is_pickled
            raise CheckpointError(
                f"`path` must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}. Got "
                f"{str(folder)!r}, which has no {name}.{hint}"
            )
    config = PeftConfig.read(folder)
    return config, open_safetensors(member(folder, WEIGHTS_FILE))


def _base_keys(
    file: Mapping[str, LazyTensor | np.ndarray], layout: AdapterTensors
) -> dict[str, str]:
    """Returns the keys of base tensors that the file has or must have, by name."""
    base_keys = {}
    for name in (*layout.saved, *layout.optional):
        keys = layout.keys_of(name)
        present = [key for key in keys if key in file]
        # A missing tensor gets the key that PEFT writes, for the error message.
        if present or name in layout.saved:
            base_keys[name] = (*present, keys[0])[0]
    return base_keys


def _expected_shapes(
    config: PeftConfig,
    model: NamedBase,
    layout: AdapterTensors,
    base_keys: Mapping[str, str],
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the file, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in layout.adapted:
        # [N, K] for a linear module, [N, K, *window] for a convolution, and [V, D] for
        # an embedding, where V is K.
        n, k, *window = model.tensor_shape(f"{module}.weight")
        if module in model.tables:
            n, k = k, n
        sizes = {"k": k, "n": n, "r": config.rank_of(module)}
        for name, key in layout.array_keys(module).items():
            # PEFT stores transposes; see `to_stored` for convolutions.
            shape = (sizes[role] for role in reversed(layout.kind.roles[name]))
            shapes[key] = (*shape, *(size if name == "a" else 1 for size in window))
    for name, module in layout.parameters.items():
        factor_shapes = parameter_shapes(name, model, config.rank_of(name))
        keys = layout.array_keys(module)
        shapes |= {keys[factor]: shape for factor, shape in factor_shapes.items()}
    # Trained rows are stored as rows of the table, [rows, D].
    for module, rows in layout.rows.items():
        width = model.tensor_shape(f"{module}.weight")[-1]
        shapes[layout.rows_key(module)] = (len(rows), width)
    return shapes | {key: model.tensor_shape(name) for name, key in base_keys.items()}


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


def _module_adapter(
    arrays: Mapping[str, np.ndarray],
    module: str,
    config: PeftConfig,
    model: NamedBase,
    layout: AdapterTensors,
) -> Adapter:
    window = model.window(module)
    module_arrays = {
        name: from_stored(name, arrays[key], window)
        for name, key in layout.array_keys(module).items()
    }
    # Embeddings have no dropout: their input is one token.
    dropout = 0.0 if module in model.tables else float(config.lora_dropout)
    # The adapter of one matrix [K, N]; `_stack_all` gives it the kernel's axes.
    settings = (config.scaling_of(module), dropout, Geometry())
    return layout.kind(**module_arrays, **dict(zip(SETTINGS, settings, strict=True)))


def _by_path(by_position: Mapping[Position, T]) -> dict[str, dict[BatchIndex, T]]:
    """Returns the values of each leaf by batch index, by the leaf's path."""
    by_path: dict[str, dict[BatchIndex, T]] = {}
    for position, value in by_position.items():
        by_path.setdefault(position.path, {})[position.index] = value
    return by_path


def _stack_all(
    model: NamedBase, by_position: Mapping[Position, Adapter], dtype: DTypeLike | None
) -> dict[str, Adapter]:
    """Returns the adapters by path, stacked as their kernels are."""
    adapters, problems = {}, []
    for path, parts in _by_path(by_position).items():
        try:
            adapters[path] = stack(as_kernel(model.leaves[path]), parts, dtype)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    refuse("these adapters cannot be stacked", problems)
    return adapters


def _replace(
    base: Tree,
    model: NamedBase,
    layout: AdapterTensors,
    tensors: Mapping[str, np.ndarray],
    dtype: DTypeLike | None,
) -> tuple[Tree, dict[str, Adapter]]:
    """Returns the base tree with replaced tensors, and the fully trained leaves."""
    by_position = {model.tensors[name]: x for name, x in tensors.items()}
    changed, trained = {}, {}
    for path, parts in _by_path(by_position).items():
        leaf = _replaced(model.leaves[path], parts, model.named[path].window)
        # If the file has only some layers of a stack, the stack stays in the base.
        if {*model.named[path].tensors.flat} <= {*layout.saved}:
            trained[path] = new_trained(leaf, dtype or leaf.dtype)
        else:
            changed[path] = leaf
    return map_by_path(lambda path, leaf: changed.get(path, leaf), base), trained


def _replaced(
    leaf: Kernel | Any,
    tensors: Mapping[BatchIndex, np.ndarray],
    window: tuple[int, ...],
) -> Array:
    """Returns a leaf in float with some of its tensors replaced."""
    has_axes = is_kernel(leaf)
    # [*batch, K, N] for a kernel; other leaves are [*batch, *tensor].
    matrix = np.asarray(leaf.dequantize_matrix() if has_axes else leaf)
    dtype = jnp.result_type(*(x.dtype for x in tensors.values()))
    num_tensors = np.prod(matrix.shape[: len(next(iter(tensors)))])
    if len(tensors) < num_tensors:
        # The dtype must also represent the weights that stay.
        dtype = jnp.promote_types(dtype, matrix.dtype)
    matrix = matrix.astype(dtype)
    for index, tensor in tensors.items():
        tensor = from_stored("a", tensor, window) if has_axes else tensor
        matrix[index] = tensor.reshape(matrix[index].shape)
    array = jnp.asarray(matrix)
    return leaf.geometry.from_matrix(array) if has_axes else array
