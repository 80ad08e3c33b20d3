"""Maps Flax paths to Hugging Face tensor names.

Each matrix `[K, N]` of a kernel `[*batch, K, N]` (see `QLoRAConfig.contract`) is the
transpose of a weight `[N, K]`, so a table only needs names and the roles of axes.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..quant.geometry import check_contract

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
# Leading zeros are not allowed, so that a path has only one spelling. The length is
# limited, because converting a huge number in a hostile name would take long.
_NUMBER = r"0|[1-9][0-9]{0,8}"

BatchIndex = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """The names of one leaf's tensors.

    Attributes:
        names: A name in which a placeholder, such as `{layer}` or `{expert}`, stands
            for each number; or several such names, which form the last batch axis. A
            name that ends in a dot and a placeholder is a part of a tensor, such as one
            expert of gpt-oss.
        roles: The role of each trailing axis of a kernel, as a letter (b batch, k
            contracted, n output): "kn", "knn", "bnkn". In "wwkn", each w is an axis of
            the window of a convolution in Flax's layout. "nn" is a bias that has
            several axes, but is a vector in the checkpoint. "" is any other leaf; its
            axes are the batch axes and then the tensor's. None means "kn" for a leaf
            named `kernel`, and "" for others.
        parameter: The name of the leaf's parameter in transformers' model, if PEFT can
            adapt it as one of `target_parameters`. It has no {expert} if the parameter
            holds all experts. Leaves of the same parameter are concatenated along N.
            A table must have the parameters of a module in the order in which the
            module defines them, because PEFT wraps them in this order.
        stack_roles: The roles of the axes of each part, if the name is that of a part
            of a tensor: "kn" or "nk".
        numbers: The numbers that a placeholder stands for along its batch axis, such as
            the layers in a stack; by default 0, 1, 2, ... .

    Raises:
        ValueError: If roles or placeholders are invalid, or if numbers repeat.

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
    stack_roles: Literal["kn", "nk"] = "kn"
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        # "nn" describes the axes of a bias, not of a kernel.
        if self.roles and not re.fullmatch("n+", self.roles):
            check_contract(self.roles.replace("w", "k"))
        if not self.names or not all(isinstance(n, str) and n for n in self._templates):
            raise ValueError(f"`names` must be non-empty strings. Got {self.names!r}.")
        for name in (*self._templates, self.parameter or ""):
            literal_text = _PLACEHOLDER.sub("", name)
            if "{" in literal_text or "}" in literal_text:
                raise ValueError(
                    "a placeholder must consist of lower-case letters and underscores "
                    f"in braces, such as {{layer}}. Got {name!r}."
                )
        if len({frozenset(_PLACEHOLDER.findall(name)) for name in self._templates}) > 1:
            raise ValueError(
                f"all `names` must have the same placeholders. Got {self.names!r}."
            )
        if unknown := sorted(self.numbers.keys() - {*self._placeholders}):
            raise ValueError(
                f"`numbers` must be those of placeholders in `names`. Got {unknown}."
            )
        for placeholder, numbers in self.numbers.items():
            if len({*numbers}) < len(numbers):
                raise ValueError(
                    f"`numbers` of a placeholder must differ. Got {[*numbers]} for "
                    f"{placeholder!r}."
                )
        in_parameter = {*_PLACEHOLDER.findall(self.parameter or "")}
        if unknown := sorted(in_parameter - {*self._placeholders}):
            raise ValueError(
                "placeholders of `parameter` must be in `names`. Got "
                f"{unknown} in {self.parameter!r}."
            )
        if self.stack_roles not in ("kn", "nk"):
            raise ValueError(
                f"`stack_roles` must be 'kn' or 'nk'. Got {self.stack_roles!r}."
            )

    @property
    def _templates(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else tuple(self.names)

    @property
    def _placeholders(self) -> list[str]:
        # A placeholder may occur several times in a name.
        return list(dict.fromkeys(_PLACEHOLDER.findall(self._templates[0])))

    def _numbers_at(self, axes: list[str], index: BatchIndex) -> dict[str, int]:
        """Returns the number of each placeholder in `axes` at a batch index."""
        # `strict` is false because the last index may select one of several names.
        return {
            axis: self.numbers[axis][i] if axis in self.numbers else i
            for axis, i in zip(axes, index, strict=False)
        }


@dataclass(frozen=True, eq=False)
class Names:
    r"""A table of a model's leaves and their names in a Hugging Face model.

    Paths may have placeholders too, for models that have a leaf for each layer. A
    placeholder that is only in the names is a batch axis of the leaf; these axes have
    the order of the first name. Several names in an entry add a last batch axis.

    Attributes:
        entries: An `Entry` for each leaf path; or the names, which become an `Entry`.
            If several paths match a leaf, the first of them is used.
        ignored: Regular expressions of tensors to ignore: `r".*\.inv_freq"`.

    Raises:
        ValueError: If a path has a placeholder that its names lack, if two leaves have
            the same name, or if `ignored` is a single string or has an invalid
            expression.

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
        object.__setattr__(self, "entries", entries)  # the dataclass is frozen
        if isinstance(self.ignored, str):  # its letters would be taken for expressions
            raise ValueError(
                f"`ignored` must be a tuple of expressions. Got {self.ignored!r}."
            )
        for expression in self.ignored:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(
                    f"`ignored` must hold regular expressions. Got {expression!r}: "
                    f"{error}."
                ) from error
        for path, entry in entries.items():
            if unnamed := {*_PLACEHOLDER.findall(path)} - {*entry._placeholders}:
                raise ValueError(
                    f"placeholders of a path must be in its names. Got "
                    f"{sorted(unnamed)} in {path!r} for {entry.names!r}."
                )
            if repeated := sorted({*_PLACEHOLDER.findall(path)} & {*entry.numbers}):
                raise ValueError(
                    f"`numbers` must not be those of placeholders in the path. Got "
                    f"{repeated} in {path!r}."
                )
        self._check_duplicates()

    def _check_duplicates(self):
        # Names that differ only in their placeholders refer to the same tensors, unless
        # a placeholder stands for different numbers.
        numbers_of: dict[str, list[list[Sequence[int] | None]]] = {}
        duplicates = set()
        for entry in self.entries.values():
            numbers = [entry.numbers.get(name) for name in entry._placeholders]
            for template in entry._templates:
                name = _PLACEHOLDER.sub("{}", template)
                earlier_numbers = numbers_of.setdefault(name, [])
                if any(_overlap(numbers, earlier) for earlier in earlier_numbers):
                    duplicates.add(name)
                earlier_numbers.append(numbers)
        if duplicates:
            raise ValueError(
                "each name must belong to one leaf. Got duplicates: "
                f"{sorted(duplicates)}."
            )

    def of(self, path: str, batch_shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns the names of a leaf's tensors, as an array of shape `batch_shape`.

        Args:
            path: The leaf's path.
            batch_shape: The sizes of its batch axes.

        Raises:
            ValueError: If no entry has that path, or if it has other batch axes.
        """
        entry, path_numbers, axes = self._find(path)
        templates = entry._templates
        has_name_axis = not isinstance(entry.names, str)
        expected = [*axes, len(templates)] if has_name_axis else axes
        has_all_axes = len(batch_shape) == len(expected)
        if not has_all_axes or has_name_axis and batch_shape[-1] != len(templates):
            # An axis of the kernel counts as a batch axis if `roles` lack it.
            has_more = len(batch_shape) > len(expected)
            hint = " If the leaf has no other batch axes, set `roles` in its entry."
            raise ValueError(
                f"{path} must have batch axes {expected}. Got sizes "
                f"{list(batch_shape)}.{hint if has_more else ''}"
            )
        for axis, size in zip(axes, batch_shape, strict=False):
            count = len(entry.numbers.get(axis, range(size)))
            if size != count:
                raise ValueError(
                    f"{path} must have {count} entries along {axis!r}. Got {size}."
                )
        names = np.empty(batch_shape, object)
        for index in np.ndindex(*batch_shape):
            template = templates[index[-1] if has_name_axis else 0]
            numbers = entry._numbers_at(axes, index)
            names[index] = template.format(**path_numbers, **numbers)
        return names

    def roles(self, path: str) -> str:
        """Returns the roles of a leaf's trailing axes; see `Entry.roles`.

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
        """Returns the number of a leaf's batch axes.

        Args:
            path: The leaf's path.

        Raises:
            ValueError: If no entry has that path.
        """
        return len(self.batch_sizes(path))

    def batch_sizes(self, path: str) -> list[int | None]:
        """Returns the sizes of a leaf's batch axes that the table determines.

        Args:
            path: The leaf's path.

        Returns:
            A size for each batch axis: the number of `Entry.numbers`, or for the last
            axis, that of several `Entry.names`. None if the table allows any size.

        Raises:
            ValueError: If no entry has that path.
        """
        entry, _, axes = self._find(path)
        counts = {axis: len(numbers) for axis, numbers in entry.numbers.items()}
        sizes = [counts.get(axis) for axis in axes]
        return sizes if isinstance(entry.names, str) else [*sizes, len(entry.names)]

    def parameters(
        self, batch_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, dict[str, list[BatchIndex]]]:
        """Returns the parts of leaves that form each `Entry.parameter`.

        Args:
            batch_shapes: The sizes of the leaves' batch axes, by path.

        Returns:
            For the full name of each parameter, the paths of its leaves with the batch
            indices of its kernels: `{"layers.1.up": {"layers/up": [(1, 0), (1, 1)]}}`
            for the two experts of layer 1.
        """
        parameters: dict[str, dict[str, list[BatchIndex]]] = {}
        # Parameters concatenate their leaves in the order of the table.
        for key, pattern in self._path_patterns:
            if not (template := self.entries[key].parameter):
                continue
            for path in filter(pattern.fullmatch, batch_shapes):
                entry, path_numbers, axes = self._find(path)
                if entry is not self.entries[key]:  # an earlier entry has this path
                    continue
                for index in np.ndindex(*batch_shapes[path]):
                    # The parameter of all experts has no {expert}, so all indices of
                    # experts are appended to the same list.
                    numbers = entry._numbers_at(axes, index)
                    name = template.format(**path_numbers, **numbers)
                    parts = parameters.setdefault(name, {})
                    parts.setdefault(path, []).append(index)
        return parameters

    def parts_of_parameter(self, name: str) -> list[str]:
        """Returns the names of the tensors in the parameter of all experts of a layer.

        Args:
            name: The full name of a parameter in transformers' model.

        Returns:
            One name for each leaf of the parameter, in the order in which it
            concatenates them; `{expert}` stands for the number of an expert. Empty if
            the name is not that of a parameter of several experts.
        """
        parts = []
        for pattern, entry in self._expert_parameters:
            if match := pattern.fullmatch(name):
                numbers = {key: int(text) for key, text in match.groupdict().items()}
                # The entry may have only some layers (`Entry.numbers`), and another
                # entry the same parameter in the other layers.
                if all(
                    number in entry.numbers.get(key, (number,))
                    for key, number in numbers.items()
                ):
                    template = entry._templates[0]
                    parts.append(template.format(**numbers, expert="{expert}"))
        return parts

    def is_ignored(self, name: str) -> bool:
        """Returns whether an expression of `ignored` matches a full name.

        Args:
            name: The name of a tensor in a checkpoint.
        """
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def is_stack(self, name: str) -> bool:
        """Returns whether the table names this tensor's parts: `name.0`, `name.1`, ...

        Args:
            name: The name of a tensor in a checkpoint.
        """
        return self.stack_roles(name) is not None

    def stack_roles(self, name: str) -> str | None:
        """Returns `Entry.stack_roles` of a tensor's parts; None if it has no parts.

        Args:
            name: The name of a tensor in a checkpoint.
        """
        matches = (roles for stack, roles in self._stacks if stack.fullmatch(name))
        return next(matches, None)

    def _find(self, path: str) -> tuple[Entry, dict[str, str], list[str]]:
        """Returns a leaf's entry, the numbers in its path, and its batch axes' names.

        For the path `layers_3/up` and the name `{layer}.{expert}.up`, the numbers are
        `{"layer": "3"}`, and the axes are `["expert"]`.
        """
        for key, pattern in self._path_patterns:
            if match := pattern.fullmatch(path):
                entry, numbers = self.entries[key], match.groupdict()
                axes = [name for name in entry._placeholders if name not in numbers]
                return entry, numbers, axes
        raise ValueError(f"`path` must be one of {sorted(self.entries)}. Got {path!r}.")

    @functools.cached_property
    def _stacks(self) -> list[tuple[re.Pattern, str]]:
        # `experts.{expert}` names the parts of a tensor called `experts`.
        return [
            (_pattern(match[1]), entry.stack_roles)
            for entry in self.entries.values()
            for template in entry._templates
            if (match := re.fullmatch(r"(.*)\.\{[a-z_]+\}", template))
        ]

    @functools.cached_property
    def _expert_parameters(self) -> list[tuple[re.Pattern, Entry]]:
        # A parameter of all experts has the other numbers of the names, but not the
        # expert's.
        return [
            (_pattern(entry.parameter), entry)
            for entry in self.entries.values()
            if entry.parameter
            and {*entry._placeholders} - {*_PLACEHOLDER.findall(entry.parameter)}
            == {"expert"}
        ]

    @functools.cached_property
    def _path_patterns(self) -> list[tuple[str, re.Pattern]]:
        return [(key, _pattern(key)) for key in self.entries]


def _overlap(
    numbers: list[Sequence[int] | None], others: list[Sequence[int] | None]
) -> bool:
    """Whether the numbers of two names overlap at each of their placeholders."""
    # None stands for all numbers.
    pairs = zip(numbers, others, strict=True)
    return all(a is None or b is None or {*a} & {*b} for a, b in pairs)


def _pattern(template: str) -> re.Pattern:
    """Returns a regular expression that matches numbers at a template's placeholders.

    Each placeholder becomes a named group; its later occurrences refer to that group.
    """
    pattern = re.escape(template)
    for name in dict.fromkeys(_PLACEHOLDER.findall(template)):
        placeholder = re.escape(f"{{{name}}}")
        pattern = pattern.replace(placeholder, f"(?P<{name}>{_NUMBER})", 1)
        pattern = pattern.replace(placeholder, f"(?P={name})")
    return re.compile(pattern)
