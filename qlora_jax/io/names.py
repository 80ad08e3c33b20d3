"""Maps Flax paths to Hugging Face tensor names.

Each kernel of a matrix form `[*batch, K, N]` (see `QLoRAConfig.contract`) is the
transpose of a weight `[N, K]`, so a table needs names and roles of axes only.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..quant.geometry import check_contract

_FIELD = re.compile(r"\{([a-z_]+)\}")
_INDEX = r"0|[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class Entry:
    """The names of one leaf's tensors.

    Attributes:
        names: A name with a placeholder such as `{layer}` or `{expert}` for each
            number; or several such names, which form the last batch axis. One that ends
            in a dot and a placeholder is a part of a tensor, as the experts of gpt-oss.
        roles: The role of each trailing axis of a kernel, as letters (b batch, k
            contracted, n output: "kn", "knn", "bnkn"), with a w for each axis of the
            window of a convolution, as Flax has it: "wwkn"; "nn" for a bias of several
            axes that is a vector in the checkpoint; "" for other leaves, whose axes are
            the batch axes and then the tensor's. None means "kn" for a leaf named
            `kernel` and "" for others.
        parameter: The name of its parameter in transformers' model, where PEFT adapts
            it as one of `target_parameters`: that of all experts has no {expert}.
            Leaves of one parameter are side by side along N. Those of a module are in
            the order of the module.

    Example:
        >>> import qlora_jax as ql
        >>> key = "model.layers.{layer}.self_attn.k_proj.weight"
        >>> value = "model.layers.{layer}.self_attn.v_proj.weight"
        >>> ql.io.Entry((key, value), roles="bnkn").names == (key, value)
        True
    """

    names: str | tuple[str, ...]
    roles: str | None = None
    parameter: str | None = None

    def __post_init__(self):
        if self.roles and not re.fullmatch("n+", self.roles):
            check_contract(self.roles.replace("w", "k"))
        if not self.names or not all(isinstance(n, str) and n for n in self._each):
            raise ValueError(f"`names` must be text. Got {self.names!r}.")
        if len({frozenset(_FIELD.findall(name)) for name in self._each}) > 1:
            raise ValueError(
                f"all `names` must have the same placeholders. Got {self.names!r}."
            )

    @property
    def _each(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else tuple(self.names)


@dataclass(frozen=True, eq=False)
class Names:
    r"""A table of a model's leaves and their names in a Hugging Face model.

    Paths may hold placeholders too, for models that have a leaf for each layer. Other
    placeholders of the names are batch axes of the leaf, in the order of the first
    name. Several names in an entry are one more batch axis, the last.

    Attributes:
        entries: An `Entry` for each leaf path; or the names that become one.
        ignored: Regular expressions of a checkpoint's other names: `r".*\.inv_freq"`.

    Raises:
        ValueError: If a path's placeholder is not in its names, or a name stands twice.

    Example:
        >>> import qlora_jax as ql
        >>> names = ql.io.Names({
        ...     "embed/embedding": "model.embed_tokens.weight",
        ...     "layers/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
        ...     "layers_{layer}/norm/scale": "model.layers.{layer}.norm.weight"})
        >>> names.of("layers/up/kernel", (2,)).tolist()
        ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
        >>> names.of("layers_1/norm/scale").item()
        'model.layers.1.norm.weight'
        >>> names.roles("layers/up/kernel"), names.num_batch_axes("layers/up/kernel")
        ('kn', 1)
    """

    entries: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def __post_init__(self):
        entries = {
            path: entry if isinstance(entry, Entry) else Entry(entry)
            for path, entry in self.entries.items()
        }
        object.__setattr__(self, "entries", entries)
        for path, entry in entries.items():
            if alone := {*_FIELD.findall(path)} - {*_FIELD.findall(entry._each[0])}:
                raise ValueError(
                    f"placeholders of a path must be in its names. Got {sorted(alone)} "
                    f"in {path!r} for {entry.names!r}."
                )
        every = [_FIELD.sub("{}", n) for e in entries.values() for n in e._each]
        if twice := sorted({n for n in every if every.count(n) > 1}):
            raise ValueError(f"each name must be that of one leaf. Got twice: {twice}.")

    def of(self, path: str, batch_shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns the names of a leaf's tensors, an array `batch_shape` of text.

        Args:
            path: The leaf's path.
            batch_shape: Sizes of its batch axes.

        Raises:
            ValueError: If no entry has that path and that number of batch axes.
        """
        entry, filled, free = self._find(path)
        is_listed = not isinstance(entry.names, str)
        wanted = [*free, len(entry._each)] if is_listed else free
        if len(batch_shape) != len(wanted) or (
            is_listed and batch_shape[-1] != len(entry._each)
        ):
            raise ValueError(
                f"{path} must have batch axes {wanted}. Got sizes {list(batch_shape)}."
            )
        found = np.empty(batch_shape, object)
        for index in np.ndindex(*batch_shape):
            name = entry._each[index[-1] if is_listed else 0]
            found[index] = name.format(**filled, **dict(zip(free, index, strict=False)))
        return found

    def roles(self, path: str) -> str:
        """Returns the roles of a leaf's trailing axes, as in `Entry.roles`.

        Args:
            path: The leaf's path.

        Raises:
            ValueError: If no entry has that path.
        """
        roles = self._find(path)[0].roles
        if roles is None:
            return "kn" if path.rpartition("/")[2] == "kernel" else ""
        return roles

    def num_batch_axes(self, path: str) -> int:
        """Returns the number of a leaf's batch axes, which its names count.

        Args:
            path: The leaf's path.

        Raises:
            ValueError: If no entry has that path.
        """
        entry, _, free = self._find(path)
        return len(free) + (not isinstance(entry.names, str))

    def parameters(
        self, batch_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, dict[str, list[tuple[int, ...]]]]:
        """Returns the parts of each `Entry.parameter`: batch indices, by leaf.

        Args:
            batch_shapes: The sizes of the leaves' batch axes, by path.
        """
        found: dict[str, dict[str, list[tuple[int, ...]]]] = {}
        for key, pattern in self._path_patterns:
            template = self.entries[key].parameter or ""
            for path in filter(pattern.fullmatch, batch_shapes) if template else ():
                _, filled, free = self._find(path)
                for index in np.ndindex(*batch_shapes[path]):
                    numbers = dict(zip(free, index, strict=False))
                    parts = found.setdefault(template.format(**filled, **numbers), {})
                    parts.setdefault(path, []).append(index)
        return found

    def is_ignored(self, name: str) -> bool:
        """Returns whether an expression of `ignored` matches a full name.

        Args:
            name: The name of a tensor in a checkpoint.
        """
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def is_stack(self, name: str) -> bool:
        """Returns whether the table has `name.0`, `name.1` ... for its parts.

        Args:
            name: The name of a tensor in a checkpoint.
        """
        return any(pattern.fullmatch(name) for pattern in self._stacks)

    def _find(self, path: str) -> tuple[Entry, dict[str, str], list[str]]:
        """Returns a leaf's entry, its numbers, and the names of its batch axes."""
        for key, pattern in self._path_patterns:
            if match := pattern.fullmatch(path):
                entry, numbers = self.entries[key], match.groupdict()
                fields = dict.fromkeys(_FIELD.findall(entry._each[0]))
                return entry, numbers, [name for name in fields if name not in numbers]
        raise ValueError(f"`path` must be one of {sorted(self.entries)}. Got {path!r}.")

    @functools.cached_property
    def _stacks(self) -> list[re.Pattern]:
        templates = [name for e in self.entries.values() for name in e._each]
        stems = (re.fullmatch(r"(.*)\.\{[a-z_]+\}", name) for name in templates)
        return [_pattern(stem[1]) for stem in stems if stem]

    @functools.cached_property
    def _path_patterns(self) -> list[tuple[str, re.Pattern]]:
        return [(key, _pattern(key)) for key in self.entries]


def _pattern(template: str) -> re.Pattern:
    """Returns a regular expression that takes numbers for a template's placeholders."""
    pattern = re.escape(template)
    for field in dict.fromkeys(_FIELD.findall(template)):
        place = re.escape(f"{{{field}}}")
        pattern = pattern.replace(place, f"(?P<{field}>{_INDEX})", 1)
        pattern = pattern.replace(place, f"(?P={field})")  # where it comes again
    return re.compile(pattern)
