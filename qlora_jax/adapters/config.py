"""What to target in a parameter tree, and how."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax.numpy as jnp

from ..quant.settings import Packing


def _as_patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _as_axes(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def matches(patterns: str | Sequence[str], path: str) -> bool:
    """Whether any of the regular expressions matches the whole path."""
    return any(re.fullmatch(p, path) for p in _as_patterns(patterns))


@dataclass(frozen=True, eq=False)
class QLoRAConfig:
    """Which kernels are quantized and adapted, and how. Hashable, so static under jit.

    Patterns are regular expressions that must match a leaf's whole path, such as
    `"layer/q_proj/kernel"`.

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
        contract: Contracted axes of kernels, by pattern, as negative integers: (-3,)
            for attention's `[D, H, Dh]`, (-3, -2) for `[H, Dh, D]`. Axis -2 where
            nothing is said. Axes in front of the first one are batch axes. The Flax
            doors find these axes themselves.
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
    targets: str | Sequence[str] = r"(.*/)?kernel"
    exclude: str | Sequence[str] = ()
    freeze_base: bool = True
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    contract: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    lora_dtype: Any = "float32"

    def __post_init__(self):
        own = lambda name, value: object.__setattr__(self, name, value)
        for name in ("targets", "exclude"):
            own(name, _as_patterns(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            own(name, dict(getattr(self, name)))
        own("contract", {p: _as_axes(axes) for p, axes in self.contract.items()})
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"`rank` must be a positive integer. Got {rank!r}.")
        alphas = () if self.alpha is None else (self.alpha,)
        for alpha in (*alphas, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not alpha > 0:
                raise ValueError(f"`alpha` must be a positive number. Got {alpha!r}.")
        if self.fmt is None and not self.freeze_base:
            raise ValueError(
                "`freeze_base` must be True where `fmt` is None: a float base that is "
                "trained needs no quantizer. Got freeze_base=False."
            )
        Packing(self.fmt or "nf4", self.block_size)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Got {self.dropout!r}.")
        if not jnp.issubdtype(jnp.dtype(self.lora_dtype), jnp.floating):
            raise TypeError(
                f"`lora_dtype` must be a floating dtype. Got {self.lora_dtype!r}."
            )
        for pattern in (*self.targets, *self.exclude, *self.pattern_settings()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"patterns must be regular expressions. Got {pattern!r}: {error}."
                ) from error

    @property
    def packing(self) -> Packing | None:
        """How the frozen kernels are packed; None where they stay in float."""
        if self.fmt is None:
            return None
        return Packing(self.fmt, self.block_size, self.double_quant)

    def _key(self):
        # With the order of patterns: the first one that matches wins.
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values)

    def __eq__(self, other):
        if not isinstance(other, QLoRAConfig):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def pattern_settings(self) -> tuple[str, ...]:
        """The patterns that set something for single leaves; each must match one."""
        return (*self.rank_pattern, *self.alpha_pattern, *self.contract)

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

    def contracted_axes_of(self, path: str) -> tuple[int, ...]:
        """Contracted axes of the kernel at `path`."""
        return _as_axes(_first(self.contract, path, -2))


def _first(by_pattern, path, otherwise):
    for pattern, value in by_pattern.items():
        if re.fullmatch(pattern, path):
            return value
    return otherwise
