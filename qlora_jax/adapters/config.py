"""What to target in a parameter tree, and how."""

import math
import numbers
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import jax.numpy as jnp

from ..quant.geometry import Contract, check_contract
from ..quant.settings import FLOAT_DTYPES, Packing

Pattern = str | re.Pattern


@dataclass(frozen=True, eq=False)
class QLoRAConfig:
    """Which kernels are quantized and adapted, and how. Hashable, so static under jit.

    Patterns are regular expressions (text or compiled) that must match a leaf's whole
    path, such as `"layer/q_proj/kernel"`.

    Attributes:
        rank: Rank of the adapters.
        alpha: LoRA's alpha; the rank where not given, so that the scaling is 1.
        fmt: Number format of the frozen kernels: "nf4", "fp4", "int4" or "int8"; None
            leaves them in float (plain LoRA).
        block_size: Weights along the contracted axes that share a scale.
        double_quant: Whether the scales are quantized too.
        targets: Pattern, or several, of the kernels to quantize and adapt.
        exclude: Pattern, or several, of leaves to leave alone though `targets` match.
        freeze_base: False trains the float kernels too, through a straight-through
            quantizer.
        dropout: Rate of dropout on the adapter's input.
        rank_pattern: Ranks that differ: the first pattern that matches wins.
        alpha_pattern: Alphas that differ, likewise.
        rank_stabilized: Scale by alpha / sqrt(rank) (Kalajdzievski 2023) and not by
            alpha / rank.
        contract: Which axes of the kernels are contracted, by pattern, or one value for
            all targets; -2 where nothing is said. Either the axes, as negative
            integers: -3 for attention's `[D, H, Dh]`, (-3, -2) for `[H, Dh, D]`, -1 for
            `[out, in]`. Or the role of each trailing axis, as letters: "kn" for
            `[in, out]`, "nk" for `[out, in]`, "bnk" for experts `[E, out, in]` (b
            batch, k contracted, n output). Axes in front of those are batch axes. The
            Flax integrations find the roles from the modules.
        lora_dtype: Dtype of A and B.

    Raises:
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of its range.

    Example:
        >>> import qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=8, targets=r".*(q|v)_proj/kernel")
        >>> config.scaling_of("layer/q_proj/kernel")
        1.0
    """

    rank: int = 16
    alpha: float | None = None
    fmt: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    targets: Pattern | Sequence[Pattern] = r"(.*/)?kernel"
    exclude: Pattern | Sequence[Pattern] = ()
    freeze_base: bool = True
    dropout: float = 0.0
    rank_pattern: Mapping[Any, int] = field(default_factory=dict)
    alpha_pattern: Mapping[Any, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    contract: Mapping[Any, Contract] | Contract = field(default_factory=dict)
    lora_dtype: Any = "float32"

    def __post_init__(self):
        own = lambda name, value: object.__setattr__(self, name, value)
        for name in ("targets", "exclude"):
            own(name, _as_patterns(name, getattr(self, name)))
        contract = self.contract
        if not isinstance(contract, Mapping):
            contract = {".*": contract}
        own("contract", _by_pattern("contract", contract, check_contract))
        own("rank", _as_rank(self.rank))
        own("rank_pattern", _by_pattern("rank_pattern", self.rank_pattern, _as_rank))
        if self.alpha is not None:
            own("alpha", _as_alpha(self.alpha))
        alphas = _by_pattern("alpha_pattern", self.alpha_pattern, _as_alpha)
        own("alpha_pattern", alphas)
        if self.fmt is None and not self.freeze_base:
            raise ValueError(
                "`freeze_base` must be True where `fmt` is None: a float base that is "
                "trained needs no quantizer. Got freeze_base=False."
            )
        Packing(self.fmt or "nf4", self.block_size)
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Got {self.dropout!r}.")
        own("dropout", float(self.dropout))
        if jnp.dtype(self.lora_dtype).name not in FLOAT_DTYPES:
            raise TypeError(
                f"`lora_dtype` must be a floating dtype: one of {FLOAT_DTYPES}. Got "
                f"{self.lora_dtype!r}."
            )

    @property
    def packing(self) -> Packing | None:
        """How the frozen kernels are packed; None where they stay in float."""
        if self.fmt is None:
            return None
        return Packing(self.fmt, self.block_size, self.double_quant)

    def _key(self) -> tuple[Any, ...]:
        # With the order of patterns: the first one that matches wins.
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QLoRAConfig):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def pattern_settings(self) -> tuple[Pattern, ...]:
        """The patterns that set something for single leaves; each must match one."""
        contract = cast(Mapping, self.contract)
        return (*self.rank_pattern, *self.alpha_pattern, *contract)

    def leaf_patterns(self) -> tuple[Pattern, ...]:
        """The patterns that choose leaves; each must match one."""
        return (*cast(tuple, self.targets), *cast(tuple, self.exclude))

    def is_target(self, path: str) -> bool:
        """Whether the leaf at `path` is targeted."""
        return matches(self.targets, path) and not matches(self.exclude, path)

    def rank_of(self, path: str) -> int:
        """Rank of the adapter at `path`."""
        return _first(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """Multiplier of the adapter's product at `path`."""
        rank = self.rank_of(path)
        alpha = _first(self.alpha_pattern, path, self.alpha)
        alpha = rank if alpha is None else alpha
        return float(alpha / rank**0.5 if self.rank_stabilized else alpha / rank)

    def contract_of(self, path: str) -> tuple[int, ...] | str | None:
        """What `contract` says of the kernel at `path`, or None."""
        return _first(self.contract, path, None)


def matches(patterns: Pattern | Iterable[Pattern], path: str) -> bool:
    """Whether any of the regular expressions matches the whole path."""
    if isinstance(patterns, Pattern):
        patterns = (patterns,)
    return any(re.fullmatch(p, path) for p in patterns)


def _first(by_pattern: Any, path: str, otherwise: Any) -> Any:
    for pattern, value in by_pattern.items():
        if re.fullmatch(pattern, path):
            return value
    return otherwise


def _as_patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    if isinstance(value, Pattern):
        value = (value,)
    is_text = lambda p: isinstance(getattr(p, "pattern", p), str)
    if not isinstance(value, Iterable) or not all(map(is_text, value := tuple(value))):
        raise TypeError(
            f"`{name}` must hold regular expressions: one, or a list of them. Got "
            f"{value!r}."
        )
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must hold regular expressions. Got {pattern!r}: {error}."
            ) from error
    return value


def _by_pattern(name: str, value: Any, check: Any) -> dict[Pattern, Any]:
    """Returns a mapping from patterns to settings, each of them checked."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of patterns. Got {value!r}.")
    patterns = _as_patterns(name, value.keys())
    try:
        settings = [check(setting) for setting in value.values()]
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    return dict(zip(patterns, settings, strict=True))


def _as_rank(rank: Any) -> int:
    try:
        whole = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"`rank` must be a positive integer. Got {rank!r}.")
    return whole


def _as_alpha(alpha: Any) -> float:
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not is_number or not 0 < float(alpha) < math.inf:
        raise ValueError(f"`alpha` must be a positive, finite number. Got {alpha!r}.")
    return alpha if isinstance(alpha, int) else float(alpha)
