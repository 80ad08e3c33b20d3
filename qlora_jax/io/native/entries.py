"""Describes tree leaves and a `QLoRAConfig` as JSON."""

import operator
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, SequenceKey

from ..._jax.pytree import is_tree_leaf
from ...adapters.base import KINDS, SETTINGS, Adapter, why_not
from ...adapters.config import QLoRAConfig
from ...quant.geometry import Geometry
from ...quant.kernel import is_packed
from ...quant.qtensor import QTensor
from ...quant.settings import FLOAT_DTYPES, Packing
from ...trees.paths import path_string
from ..tensors import Tensors

_PATTERNS = ("targets", "exclude", "trainable", "shared")
_BY_PATTERN = ("rank_pattern", "alpha_pattern", "contract", "trainable_rows")
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}
_FLAGS["x"] = re.VERBOSE
_PARTS = {"array": ("",), **{kind: (*cls.roles,) for kind, cls in KINDS.items()}}


def describe(keys: tuple, leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a leaf as plain data, and its arrays by tensor name."""
    place = [_plain_key(key) for key in keys]
    entry: dict[str, Any] = {"keys": place, "kind": "array"}
    if is_packed(leaf):
        entry |= {
            "kind": "QTensor",
            "shape": [*leaf.shape],
            "fmt": leaf.fmt,
            "block_size": leaf.block_size,
            "double_quant": leaf.double_quant,
            "dtype": leaf.dtype_name,
            "axes": leaf.geometry.kinds,
        }
    elif isinstance(leaf, Adapter):
        entry |= {
            "kind": type(leaf).__name__,
            "scaling": leaf.scaling,
            "dropout": leaf.dropout,
            "axes": leaf.geometry.kinds,
            "sizes": [*leaf.geometry.sizes],
        }
        entry |= {name: [*getattr(leaf, name)] for name in _more(type(leaf))}
    arrays = {}
    for part, name in _names(entry).items():
        arrays[name] = x = getattr(leaf, part) if part else leaf
        _check_array(leaf, x)
    return entry, arrays


def _more(kind: type[Adapter]) -> tuple[str, ...]:
    """Returns the settings of a kind, lists of integers, that others do not have."""
    return tuple(name for name in kind.settings if name not in SETTINGS)


def _names(entry: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of a leaf's tensors, by part."""
    path = "/".join(map(str, entry["keys"]))
    if entry["kind"] == "QTensor":
        settings = ("fmt", "block_size", "double_quant")
        parts = Packing(*(entry[name] for name in settings)).arrays
    else:
        parts = _PARTS[entry["kind"]]
    return {part: f"{path}:{part}" if part else path for part in parts}


def _plain_key(key: Any) -> str | int:
    if isinstance(key, DictKey) and isinstance(key.key, str):
        return key.key
    if isinstance(key, SequenceKey):
        return key.idx
    raise TypeError(
        "a tree must be of dicts, with text as keys, and lists. Got the key "
        f"{path_string((key,))!r} ({type(key).__name__})."
    )


def _check_array(leaf: Any, x: Any) -> None:
    arrays = jax.tree.leaves(x)  # one, whatever memory it is in
    is_array = lambda a: isinstance(a, np.ndarray | jax.Array)
    if is_tree_leaf(x) or not all(map(is_array, arrays)):
        kind = type(leaf).__name__
        raise TypeError(f"it must be an array, a QTensor or an adapter. Got {kind}.")
    if not all(getattr(a, "is_fully_addressable", True) for a in arrays):
        raise TypeError("it must be on the devices of this process.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError("it must hold numbers. Got PRNG keys.")


def described(entries: Any, tensors: Tensors) -> tuple[Any, Any]:
    """Returns the tree of shapes that entries describe, and one of tensor names.

    Entries come from a file: wrong ones raise errors of many types.
    """
    shapes, names = {}, {}
    left = set(tensors)
    for entry in entries:
        of = _names(entry)
        leaf = _leaf(entry, [_struct(tensors[name]) for name in of.values()])
        named = jax.tree.unflatten(jax.tree.structure(leaf), of.values())
        _insert(shapes, entry["keys"], leaf)
        _insert(names, entry["keys"], named)
        left -= {*of.values()}
    if left:
        raise ValueError(f"tensors without a leaf: {sorted(left)[:5]}.")
    return _with_lists(shapes.get("", {})), _with_lists(names.get("", {}))


def _struct(tensor: Any) -> jax.ShapeDtypeStruct:
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        raise ValueError(f"{tensor.dtype} arrays need jax_enable_x64.")
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def _leaf(entry: Mapping[str, Any], structs: list[jax.ShapeDtypeStruct]) -> Any:
    if entry["kind"] == "QTensor":
        # NumPy reads some texts as code.
        if entry["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"a dtype must be one of {FLOAT_DTYPES}.")
        return QTensor.from_parts(
            *structs,
            shape=entry["shape"],
            fmt=entry["fmt"],
            block_size=entry["block_size"],
            dtype=entry["dtype"],
            contract=entry["axes"],
        )
    if entry["kind"] == "array":
        return structs[0]
    kind, scaling = KINDS[entry["kind"]], entry["scaling"]
    is_several = isinstance(scaling, list)
    integers = lambda name: tuple(map(operator.index, entry[name]))
    settings: dict = {name: integers(name) for name in _more(kind)}
    settings["scaling"] = tuple(map(float, scaling)) if is_several else float(scaling)
    settings["dropout"] = float(entry["dropout"])
    settings["geometry"] = geometry = Geometry(entry["axes"], integers("sizes"))
    adapter: Any = kind(**dict(zip(kind.roles, structs, strict=True)), **settings)
    kernel = geometry.kernel_shape(adapter.matrix_shape)
    if why := why_not(adapter, jax.ShapeDtypeStruct(kernel, "float32")):
        raise ValueError(f"a {entry['kind']} must be of one kernel. {why}")
    return adapter


def _insert(tree: dict, keys: list, leaf: Any) -> None:
    *parents, last = ["", *keys]
    for key in parents:
        tree = tree.setdefault(key, {})
    if last in tree:
        raise ValueError(f"two leaves must not have the keys {keys}.")
    tree[last] = leaf


def _with_lists(node: Any) -> Any:
    """Returns a tree in which nodes whose keys are numbers are lists."""
    if not isinstance(node, dict):
        return node
    keys = [*node]
    if any(isinstance(key, int) for key in keys):
        if {*keys} != {*range(len(keys))}:
            raise ValueError(f"the places in a list must be whole. Got {keys[:5]}.")
        return [_with_lists(node[i]) for i in range(len(keys))]
    return {key: _with_lists(value) for key, value in node.items()}


def config_to_json(config: QLoRAConfig) -> dict[str, Any]:
    """Returns a config as plain data; patterns in their order, as text."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    plain = lambda x: [*x] if isinstance(x, tuple) else x
    for name in _PATTERNS:
        found[name] = [_text(pattern) for pattern in found[name]]
    for name in _BY_PATTERN:
        found[name] = [[_text(p), plain(x)] for p, x in found[name].items()]
    if not config.shared:
        del found["shared"]  # as files had it before
    return found | {"lora_dtype": jnp.dtype(config.lora_dtype).name}


def config_from_json(found: dict[str, Any]) -> QLoRAConfig:
    """Inverts `config_to_json`."""
    settings = dict(found)
    for name in _BY_PATTERN:
        plain = lambda x: tuple(x) if isinstance(x, list) else x
        settings[name] = {p: plain(x) for p, x in settings.get(name, ())}
    if settings["lora_dtype"] not in FLOAT_DTYPES:  # NumPy reads some texts as code
        raise ValueError(f"`lora_dtype` must be one of {FLOAT_DTYPES}.")
    return QLoRAConfig(**settings)


def _text(pattern: Any) -> str:
    """Returns a pattern as text, with its flags in front."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
    return f"(?{flags}){pattern.pattern}" if flags else pattern.pattern
