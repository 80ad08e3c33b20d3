"""The format of this library: packed kernels and adapters in one safetensors file.

The header's metadata holds format, version, leaves (`entries`), config and a checksum
of the file.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ...adapters.config import QLoRAConfig
from ...trees.paths import Tree, leaves_by_keys, path_string, refuse_listed
from ..device_shards import put
from ..files import CheckpointError, Path, new_path, parse_json
from ..safetensors import make_header, open_safetensors, write_tensors
from .entries import config_from_json, config_to_json, describe, described

FORMAT = "qlora_jax"
VERSION = "1"
UNKNOWN = "0" * 64  # the checksum's place while it is computed
_CHUNK = 8 << 20
# Errors of reading data that `save` did not write.
_WRONG = (ArithmeticError, AttributeError, LookupError, RecursionError)
_WRONG += (TypeError, ValueError)


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

    tree: Any
    config: QLoRAConfig | None


def save(path: Path, tree: Tree, config: QLoRAConfig | None = None) -> None:
    """Writes a tree to one file, atomically.

    Args:
        path: The file, which is replaced if it exists.
        tree: A base tree, a lora tree, or both as `{"base": base, "lora": lora}`, in
            dicts and lists. Boxes such as `nn.Partitioned` are not stored: after
            `restore`, give `qlora_jax.sharding.place` rules or specs.
        config: A config to store with it.

    Raises:
        TypeError: If the tree has other leaves, which are listed. Tuples become lists.

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
    leaves, arrays, problems = [], {}, []
    for keys, leaf in leaves_by_keys(tree).items():
        try:
            entry, parts = describe(keys, leaf)
        except TypeError as error:
            problems.append(f"{path_string(keys)}: {error}")
            continue
        if parts.keys() & arrays.keys():
            problems.append(f"{path_string(keys)}: another leaf has that path.")
        leaves.append(entry)
        arrays |= parts
    refuse_listed("these leaves cannot be saved", problems, TypeError)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": UNKNOWN,
        "leaves": json.dumps(leaves),
        "config": json.dumps(None if config is None else config_to_json(config)),
    }
    start, order = make_header(arrays, metadata)
    with new_path(path) as new, new.open("wb") as file:
        sha = hashlib.sha256()
        write = lambda data: (sha.update(data), file.write(data))
        write(start)
        write_tensors(write, arrays, order)
        file.seek(start.index(UNKNOWN.encode()))
        file.write(sha.hexdigest().encode())


def restore(path: Path, *, place: Callable[[Tree], Tree] | None = None) -> Restored:
    """Returns the tree and the config that `save` wrote.

    Args:
        path: The file.
        place: As in `load`: puts shardings on the tree of shapes; devices read parts.

    Raises:
        CheckpointError: If `save` did not write it, if it has another version, if its
            bytes have changed, or if it does not hold the tree that it describes.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/base.safetensors"
        >>> ql.io.save(path, {"up": {"kernel": ql.quantize(jnp.ones((64, 8)))}})
        >>> ql.io.restore(path).tree["up"]["kernel"].fmt
        'nf4'
    """
    tensors = open_safetensors(path)
    metadata = tensors.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a file that qlora_jax.io.save wrote. Its format is "
            f"{metadata.get('format')!r}."
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} must be of version {VERSION}. Got {metadata.get('version')!r}."
        )
    _check_sum(pathlib.Path(path), metadata.get("checksum", ""))
    leaves = parse_json(metadata.get("leaves", "").encode(), f"`leaves` of {path}")
    config = parse_json(metadata.get("config", "").encode(), f"`config` of {path}")
    try:
        shapes, names = described(leaves, tensors)
        found = None if config is None else config_from_json(config)
    except _WRONG as error:
        why = str(error)[:300]
        raise CheckpointError(f"{path} must describe a tree of ours. {why}") from error
    base = shapes if place is None else place(shapes)
    structs, treedef = jax.tree.flatten(base)
    pairs = zip(jax.tree.leaves(names), structs, strict=True)
    arrays = [put(tensors[name], struct) for name, struct in pairs]
    return Restored(jax.tree.unflatten(treedef, arrays), found)


def _check_sum(path: pathlib.Path, expected: str) -> None:
    """Raises CheckpointError if a file's bytes have changed since it was written."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        prefix = file.read(8)
        header = file.read(int.from_bytes(prefix, "little"))
        # The file was hashed with UNKNOWN in the checksum's place.
        is_one = len(expected) == 64 and header.count(expected.encode()) == 1
        sha.update(prefix + header.replace(expected.encode(), UNKNOWN.encode()))
        while is_one and (chunk := file.read(_CHUNK)):
            sha.update(chunk)
    if not is_one or sha.hexdigest() != expected:
        raise CheckpointError(f"{path} has changed since it was written.")
