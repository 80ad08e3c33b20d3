"""The format of this library: packed kernels and adapters in one safetensors file."""

# The metadata in the header contains the name and the version of the format, a
# description of each leaf as JSON, the config, and a checksum of the file.

import hashlib
import json
import operator
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from .._jax.pytree import is_tree_leaf
from ..adapters.base import KINDS, Adapter, is_adapter, misfit_reason
from ..adapters.config import QLoRAConfig, check_config
from ..adapters.lora import SETTINGS
from ..quant.formats import FLOAT_DTYPES, Packing
from ..quant.geometry import Geometry
from ..quant.kernel import is_packed
from ..quant.qtensor import QTensor
from ..trees.paths import Tree, leaves_by_keys, path_string, raise_if_any
from .device_shards import place_leaves, put
from .files import CheckpointError, Path, new_path, parse_json
from .safetensors import make_header, open_safetensors, write_tensors
from .tensors import TensorLike, Tensors

FORMAT = "qlora_jax"
VERSION = "1"
CHECKSUM_PLACEHOLDER = "0" * 64  # in the header that the checksum is computed from
_CHUNK_BYTES = 8 << 20

LeafJson = dict[str, Any]  # describes a leaf

# The errors that may occur while reading a description that `save` did not write.
_DESCRIPTION_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError)
_DESCRIPTION_ERRORS += (TypeError, ValueError)
_PATTERN_LISTS = ("targets", "exclude", "trainable")
_PATTERN_DICTS = ("rank_pattern", "alpha_pattern", "contract", "trainable_rows")
_FLAGS = {"a": re.A, "i": re.I, "m": re.M, "s": re.S, "x": re.X}
_PACKING = ("fmt", "block_size", "double_quant")  # in the order of `Packing`'s fields


class Restored(NamedTuple):
    """The content of a file that `save` wrote.

    Attributes:
        tree: The tree, of nested dicts and lists.
        config: The config that was saved with it, or None.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.save(path, {"kernel": jnp.ones((4, 2))}, ql.QLoRAConfig(rank=2))
        >>> ql.io.restore(path).config.rank
        2
    """

    tree: Tree
    config: QLoRAConfig | None


def save(path: Path, tree: Tree, config: QLoRAConfig | None = None) -> None:
    """Writes a tree to one file, atomically.

    Args:
        path: The file, which is replaced if it exists.
        tree: A base tree, a lora tree, or both as `{"base": base, "lora": lora}`, in
            dicts and lists; tuples are restored as lists. Empty lists, dicts without
            arrays and None are not stored, nor are boxes such as `nn.Partitioned`:
            after `restore`, pass rules or specs to `qlora_jax.sharding.place`.
        config: A config to store with the tree.

    Raises:
        TypeError: If `config` is not a `QLoRAConfig`; or if the tree has nodes or
            leaves of other types, or lists with items that hold no array. All of them
            are listed.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=2)
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
        >>> ql.io.save(path, lora, config)
        >>> ql.io.restore(path).tree["kernel"].a.shape
        (64, 2)
    """
    if config is not None:
        check_config(config)
    entries, arrays = [], {}
    problems = [
        f"{path_string(keys)}: an item of a list must hold an array. Got none."
        for keys in _empty_items(tree)
    ]
    for keys, leaf in leaves_by_keys(tree).items():
        try:
            entry, leaf_arrays = describe(keys, leaf)
        except TypeError as error:
            problems.append(f"{path_string(keys)}: {error}")
            continue
        if "__metadata__" in leaf_arrays:
            problems.append("__metadata__: the format uses this name for metadata.")
        if leaf_arrays.keys() & arrays.keys():
            problems.append(f"{path_string(keys)}: another leaf has the same path.")
        entries.append(entry)
        arrays |= leaf_arrays
    raise_if_any("these leaves cannot be saved", problems, TypeError)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": CHECKSUM_PLACEHOLDER,
        "leaves": json.dumps(entries),
        "config": json.dumps(None if config is None else _config_to_json(config)),
    }
    header, order = make_header(arrays, metadata)
    with new_path(path) as new, new.open("wb") as file:
        hasher = hashlib.sha256()

        def write_hashed(data: Any) -> None:
            hasher.update(data)
            file.write(data)

        write_hashed(header)
        write_tensors(write_hashed, arrays, order)
        # The checksum is filled in last, so that each tensor is computed only once.
        file.seek(header.index(CHECKSUM_PLACEHOLDER.encode()))
        file.write(hasher.hexdigest().encode())


def restore(path: Path, *, place: Callable[[Tree], Tree] | None = None) -> Restored:
    """Returns the tree and the config that `save` wrote.

    Args:
        path: The file.
        place: A function that puts shardings on the tree of shapes, as in `load`. Each
            device then reads only its part.

    Raises:
        CheckpointError: If `save` did not write the file, if it has another version, if
            its bytes have changed, or if it does not hold the tree that it describes.
        ValueError: If `place` returns other leaves than it gets.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/base.safetensors"
        >>> ql.io.save(path, {"up": {"kernel": ql.quantize(jnp.ones((64, 8)))}})
        >>> ql.io.restore(path).tree["up"]["kernel"].fmt
        'nf4'
    """
    if pathlib.Path(path).is_dir():
        raise CheckpointError(f"`path` must be a file. Got the folder {str(path)!r}.")
    tensors = open_safetensors(path)
    metadata = tensors.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a file that qlora_jax.io.save wrote. Its format is "
            f"{metadata.get('format')!r}."
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} must have version {VERSION}. Got {metadata.get('version')!r}."
        )
    _check_checksum(pathlib.Path(path), metadata.get("checksum", ""))
    entries = parse_json(metadata.get("leaves", "").encode(), f"`leaves` of {path}")
    stored = parse_json(metadata.get("config", "").encode(), f"`config` of {path}")
    try:
        shapes, names = _trees_of(entries, tensors)
        config = None if stored is None else _config_from_json(stored)
    except _DESCRIPTION_ERRORS as error:
        reason = f"{path} must describe a tree of qlora_jax. {str(error)[:300]}"
        raise CheckpointError(reason) from error
    structs, treedef = jax.tree.flatten(place_leaves(shapes, place))
    pairs = zip(jax.tree.leaves(names), structs, strict=True)
    arrays = [put(tensors[name], struct) for name, struct in pairs]
    return Restored(jax.tree.unflatten(treedef, arrays), config)


def _empty_items(node: Tree, keys: tuple = ()) -> Iterator[tuple]:
    """Yields the keys of list items without arrays, which a file cannot represent."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _empty_items(value, (*keys, DictKey(key)))
    elif isinstance(node, list | tuple):
        for i, item in enumerate(node):
            item_keys = *keys, SequenceKey(i)
            if jax.tree.leaves(item):
                yield from _empty_items(item, item_keys)
            else:
                yield item_keys


def _check_checksum(path: pathlib.Path, checksum: str) -> None:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        prefix = file.read(8)
        header = file.read(int.from_bytes(prefix, "little"))
        # `save` has hashed the file with the placeholder.
        is_valid = len(checksum) == 64 and header.count(checksum.encode()) == 1
        hasher.update(
            prefix + header.replace(checksum.encode(), CHECKSUM_PLACEHOLDER.encode())
        )
        while is_valid and (chunk := file.read(_CHUNK_BYTES)):
            hasher.update(chunk)
    if not is_valid or hasher.hexdigest() != checksum:
        raise CheckpointError(f"{path} has changed since it was written.")


def describe(keys: tuple, leaf: Any) -> tuple[LeafJson, dict[str, Any]]:
    """Returns a leaf as JSON, and its arrays by tensor name; raises TypeError."""
    entry: LeafJson = {"keys": [_json_key(key) for key in keys], "kind": "array"}
    if is_packed(leaf):
        entry |= {"kind": "QTensor", "shape": [*leaf.shape]}
        entry |= {name: getattr(leaf, name) for name in _PACKING}
        entry |= {"dtype": leaf.dtype_name, "axes": leaf.geometry.kinds}
    # Adapters with untrained leaves, such as the ids of a `Selected`, cannot be saved.
    # Their kind stays "array", so that `_check_array` rejects them.
    elif is_adapter(leaf) and not leaf.untrained_leaves:
        # Version 1 of the format stores the settings of a LoRA for every kind. Numbers
        # of NumPy and JAX cannot be written as JSON.
        scaling = float(getattr(leaf, "scaling", 1.0))
        entry |= {"kind": type(leaf).__name__, "scaling": scaling}
        entry |= {"dropout": float(leaf.dropout), "axes": leaf.geometry.kinds}
        entry |= {"sizes": [*leaf.geometry.sizes]}
        names = _extra_settings(type(leaf))
        entry |= {name: _setting_to_json(getattr(leaf, name)) for name in names}
    arrays = {}
    for attribute, name in _tensor_names(entry).items():
        arrays[name] = x = getattr(leaf, attribute) if attribute else leaf
        _check_array(leaf, x)
    return entry, arrays


def _extra_settings(kind: type[Adapter]) -> tuple[str, ...]:
    """Returns the names of the settings that LoRA does not have."""
    return tuple(name for name in kind.settings if name not in SETTINGS)


def _setting_to_json(setting: Any) -> dict[str, Any] | list[int]:
    # The setting is a `Packing` or a list of integers.
    if isinstance(setting, Packing):
        return {name: getattr(setting, name) for name in _PACKING}
    return [*setting]


def _setting_from_json(setting: Any) -> Packing | tuple[int, ...]:
    if isinstance(setting, dict):
        return Packing(*(setting[name] for name in _PACKING))
    return tuple(map(operator.index, setting))


def _tensor_names(entry: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of a leaf's tensors by the attributes of the leaf."""
    path = "/".join(map(str, entry["keys"]))
    if entry["kind"] == "QTensor":
        attributes = Packing(*(entry[name] for name in _PACKING)).array_names
    elif entry["kind"] == "array":
        attributes = ("",)  # the leaf itself
    else:
        attributes = (*_kind_of(entry).roles,)
    return {name: f"{path}:{name}" if name else path for name in attributes}


def _kind_of(entry: Mapping[str, Any]) -> type[Adapter]:
    if entry["kind"] not in KINDS:
        raise ValueError(
            f"The kind of an adapter must be one of {sorted(KINDS)}. Got "
            f"{entry['kind']!r:.80}."
        )
    return KINDS[entry["kind"]]


def _json_key(key: Any) -> str | int:
    if isinstance(key, DictKey) and isinstance(key.key, str):
        return key.key
    if isinstance(key, SequenceKey):
        return key.idx
    raise TypeError(
        "a tree must consist of lists, and of dicts with str keys. Got the key "
        f"{path_string((key,))!r} ({type(key).__name__})."
    )


def _check_array(leaf: object, x: Any) -> None:
    arrays = jax.tree.leaves(x)  # codes in host memory are a pytree node
    are_arrays = all(isinstance(a, np.ndarray | jax.Array) for a in arrays)
    if is_tree_leaf(x) or not are_arrays:
        kind = type(leaf).__name__
        raise TypeError(f"it must be an array, a QTensor or an adapter. Got {kind}.")
    if not all(getattr(a, "is_fully_addressable", True) for a in arrays):
        raise TypeError("it must be on the devices of this process.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError("it must hold numbers. Got PRNG keys.")


# The inverse of `describe`. A file may hold any JSON, which raises errors of many
# types: `restore` catches all of `_DESCRIPTION_ERRORS`.


def _trees_of(entries: list[LeafJson], tensors: Tensors) -> tuple[Tree, Tree]:
    """Returns the described tree twice: with shapes and with tensor names as leaves."""
    shapes, names, unused = {}, {}, set(tensors)
    for entry in entries:
        leaf_names = _tensor_names(entry).values()
        leaf = _leaf_of(entry, [_struct_of(tensors[name]) for name in leaf_names])
        _insert(shapes, entry["keys"], leaf)
        named_leaf = jax.tree.unflatten(jax.tree.structure(leaf), leaf_names)
        _insert(names, entry["keys"], named_leaf)
        unused -= {*leaf_names}
    if unused:
        raise ValueError(f"no leaf has these tensors: {sorted(unused)[:5]}.")
    # `_insert` puts the root under the key "", because the root may be a leaf.
    return _with_lists(shapes.get("", {})), _with_lists(names.get("", {}))


def _struct_of(tensor: TensorLike) -> jax.ShapeDtypeStruct:
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        raise ValueError(f"{tensor.dtype} arrays need jax_enable_x64.")
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def _leaf_of(entry: LeafJson, structs: list[Any]) -> Tree:
    if entry["kind"] == "array":
        return structs[0]
    if entry["kind"] == "QTensor":
        # NumPy evaluates some strings as dtypes, so it only gets these names.
        if entry["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"a dtype must be one of {FLOAT_DTYPES}.")
        settings = {
            name: entry[name] for name in ("shape", "fmt", "block_size", "dtype")
        }
        return QTensor.from_parts(*structs, contract=entry["axes"], **settings)
    kind, scaling = _kind_of(entry), entry["scaling"]
    if isinstance(scaling, list):  # from older versions
        raise ValueError(
            "`scaling` must be one number for all matrices of a stack. Read the "
            f"adapter of PEFT again with load_peft. Got {scaling!r:.80}."
        )
    settings: dict[str, Any] = {
        name: _setting_from_json(entry[name]) for name in _extra_settings(kind)
    }
    settings["scaling"] = float(scaling)
    settings["dropout"] = float(entry["dropout"])
    sizes = tuple(map(operator.index, entry["sizes"]))
    settings["geometry"] = geometry = Geometry(entry["axes"], sizes)
    # A file has the settings of a LoRA for every kind, but not every kind takes them.
    settings = {name: settings[name] for name in kind.settings}
    adapter: Any = kind(**dict(zip(kind.roles, structs, strict=True)), **settings)
    kernel_shape = geometry.kernel_shape(adapter.matrix_shape)
    if reason := misfit_reason(adapter, jax.ShapeDtypeStruct(kernel_shape, "float32")):
        raise ValueError(f"the arrays of a {entry['kind']} must fit together. {reason}")
    return adapter


def _insert(tree: dict, keys: list, leaf: Tree) -> None:
    *parents, last = ["", *keys]
    for key in parents:
        tree = tree.setdefault(key, {})
    if last in tree:
        raise ValueError(f"two leaves must not have the same keys {keys}.")
    tree[last] = leaf


def _with_lists(node: Tree) -> Tree:
    """Converts dicts whose keys are numbers to lists."""
    if not isinstance(node, dict):
        return node
    keys = [*node]
    if any(isinstance(key, int) for key in keys):
        if {*keys} != {*range(len(keys))}:
            raise ValueError(f"a list must have no gaps. Got the indices {keys[:5]}.")
        return [_with_lists(node[i]) for i in range(len(keys))]
    return {key: _with_lists(value) for key, value in node.items()}


def _config_to_json(config: QLoRAConfig) -> dict[str, Any]:
    """Returns a config as JSON; patterns become text and keep their order."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in _PATTERN_LISTS:
        values[name] = [_pattern_text(pattern) for pattern in values[name]]
    for name in _PATTERN_DICTS:
        # A list of pairs keeps the order, which a JSON object might lose. Tuples become
        # lists; `_config_from_json` restores them.
        pairs = [(_pattern_text(p), value) for p, value in values[name].items()]
        values[name] = [[p, [*x] if isinstance(x, tuple) else x] for p, x in pairs]
    return values


def _config_from_json(stored: dict[str, Any]) -> QLoRAConfig:
    settings = dict(stored)
    if (rule := settings.pop("scales", "absmax")) != "absmax":  # from older versions
        raise ValueError(f"`scales` must be 'absmax'. Got {rule!r}.")
    if patterns := settings.pop("shared", ()):  # from older versions
        raise ValueError(f"`shared` is not supported. Got {patterns}.")
    for name in _PATTERN_DICTS:
        pairs = settings.get(name, ())
        settings[name] = {p: tuple(x) if isinstance(x, list) else x for p, x in pairs}
    if settings["lora_dtype"] not in FLOAT_DTYPES:  # see `_leaf_of`
        raise ValueError(f"`lora_dtype` must be one of {FLOAT_DTYPES}.")
    return QLoRAConfig(**settings)


def _pattern_text(pattern: str | re.Pattern[str]) -> str:
    """Returns a pattern as text that begins with its flags."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
    return f"(?{flags}){pattern.pattern}" if flags else pattern.pattern
