"""The settings of quantization and adapters, and patterns that match paths."""

import math
import numbers
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

from jax.typing import DTypeLike

from ..quant.formats import FORMATS, Packing, check_dtype
from ..quant.geometry import Contract, check_contract

Pattern = str | re.Pattern

T = TypeVar("T")
D = TypeVar("D")


def matches(patterns: Pattern | Iterable[Pattern], path: str) -> bool:
    """Returns whether any of the regular expressions matches the full path."""
    if isinstance(patterns, Pattern):
        patterns = (patterns,)
    return any(re.fullmatch(p, path) for p in patterns)


def unmatched_by(patterns: Iterable[Pattern], paths: Collection[str]) -> list[Pattern]:
    """Returns the patterns that match none of the paths."""
    return [p for p in patterns if not any(matches(p, path) for path in paths)]


def first_match(settings: Mapping[Any, T], path: str, default: D) -> T | D:
    """Returns the setting of the first pattern that matches the full path."""
    for pattern, value in settings.items():
        if re.fullmatch(pattern, path):
            return value
    return default


@dataclass(frozen=True, eq=False)
class QLoRAConfig:
    """Settings of quantization and adapters. Hashable, so it can be static under jit.

    The method is QLoRA (Dettmers et al. 2023, section 3) with the adapters of LoRA (Hu
    et al. 2021, section 4.1).

    Patterns are regular expressions (strings or compiled) that must match a leaf's full
    path, such as `"layer/q_proj/kernel"`.

    Attributes:
        rank: Rank of the adapters, at least 1.
        alpha: LoRA's alpha, above 0; by default the rank, so that the scaling is 1.
        fmt: Number format of the frozen kernels, as in `quantize`; None leaves them in
            float (plain LoRA).
        block_size: Weights along the contracted axes that share a scale, as in
            `quantize`. Where `fmt` is None, this is a setting of `target_fmt`.
        double_quant: Whether the scales are quantized too, as in `quantize`. Where
            `fmt` is None, this is a setting of `target_fmt`.
        targets: Pattern, or several, of the kernels to quantize and adapt.
        exclude: Pattern, or several, of leaves that are not targets, even if `targets`
            matches them.
        trainable: Pattern, or several, of float leaves to train in full, such as biases
            and norms (PEFT's `modules_to_save`). They are not targets, even if
            `targets` matches them.
        trainable_rows: The indices of rows of tables to train, by pattern, such as the
            rows of new tokens (PEFT's `trainable_token_indices`). Other rows stay
            frozen: these tables are not targets, nor trained in full by `trainable`.
        freeze_base: False trains the float kernels too, through a straight-through
            quantizer.
        dropout: Rate of dropout on the adapter's input, in [0, 1).
        rank_pattern: Ranks by pattern: the first pattern that matches wins.
        alpha_pattern: Alphas by pattern: the first pattern that matches wins.
        rank_stabilized: Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA,
            Kalajdzievski 2023).
        use_dora: Train the magnitude of each output apart from its direction (DoRA, Liu
            et al. 2024). Slower than LoRA; see the guide of adapters.
        merge_aware: Train adapters through the packing of their merged kernels, so that
            `merge` with `requantize` returns weights that compute what was trained.
            Needs `dropout` of 0.
        target_fmt: With `merge_aware`: the number format in which the merged kernels
            will be packed; by default the format of each kernel in `base`. A kernel
            that is in this format already keeps its blocks and scales. For any other
            kernel, `block_size` and `double_quant` apply if `fmt` is None or equal to
            `target_fmt`; otherwise, the defaults of `target_fmt` do. If the base is in
            float or in a finer format than `target_fmt`, smaller changes are enough to
            move a weight to another packed value.
        contract: Which axes of the kernels are contracted, by pattern, or one value for
            all targets; -2 by default. Either the axes, as negative integers: -3 for
            attention's `[D, H, Dh]`, (-3, -2) for `[H, Dh, D]`, -1 for `[out, in]`. Or
            the role of each trailing axis, as letters: "kn" for `[in, out]`, "nk" for
            `[out, in]`, "bnk" for experts `[E, out, in]` (b batch, k contracted, n
            output). Axes in front of those are batch axes. A leaf called `weight` needs
            this setting, since [out, in] and [in, out] are both common. The Flax
            integrations get the roles from the modules.
        lora_dtype: Dtype of A and B: "bfloat16", "float16", "float32" or "float64".
            Leaves that are trained in full have this dtype or their own, whichever is
            more precise.

    Raises:
        TypeError: If patterns are not strings or compiled from strings, if settings by
            pattern are not a dict, or if `lora_dtype` is not one of those dtypes.
        ValueError: If any other setting is out of its range, if a pattern is not a
            regular expression, or if `freeze_base` is False where `fmt` is None.

    Example:
        >>> import qlora_jax as ql
        >>> config = ql.QLoRAConfig(rank=16, alpha=32, rank_pattern={".*/up/.*": 8},
        ...                         contract={".*/out/.*": (-3, -2)}, exclude="head/.*")
        >>> config.is_target("layer/up/kernel"), config.is_target("head/kernel")
        (True, False)
        >>> config.rank_of("layer/up/kernel"), config.scaling_of("layer/up/kernel")
        (8, 4.0)
        >>> [config.contract_of(f"layer/{name}/kernel") for name in ("out", "up")]
        [(-3, -2), None]
    """

    rank: int = 16
    alpha: float | None = None
    fmt: str | None = "nf4"
    block_size: int | None = None
    double_quant: bool | None = None
    targets: Pattern | Sequence[Pattern] = r"(.*/)?kernel"
    exclude: Pattern | Sequence[Pattern] = ()
    trainable: Pattern | Sequence[Pattern] = ()
    trainable_rows: Mapping[Pattern, Sequence[int]] = field(default_factory=dict)
    freeze_base: bool = True
    dropout: float = 0.0
    rank_pattern: Mapping[Pattern, int] = field(default_factory=dict)
    alpha_pattern: Mapping[Pattern, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    use_dora: bool = False
    merge_aware: bool = False
    target_fmt: str | None = None
    contract: Mapping[Pattern, Contract] | Contract = field(default_factory=dict)
    lora_dtype: DTypeLike = "float32"

    def __post_init__(self):
        def set_field(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        # 1. Convert patterns to tuples, and check and convert the settings by pattern.
        for name in ("targets", "exclude", "trainable"):
            set_field(name, as_patterns(name, getattr(self, name)))
        if not isinstance(self.contract, Mapping):
            set_field("contract", {".*": self.contract})
        converters = {"contract": check_contract, "rank_pattern": as_rank}
        converters |= {"trainable_rows": _as_rows, "alpha_pattern": _as_alpha}
        for name, convert in converters.items():
            set_field(name, settings_by_pattern(name, getattr(self, name), convert))
        # 2. Check flags, and check and convert numbers.
        for name in ("freeze_base", "merge_aware", "rank_stabilized", "use_dora"):
            if (value := getattr(self, name)) not in (True, False):
                raise ValueError(f"`{name}` must be True or False. Got {value!r}.")
        set_field("rank", as_rank(self.rank))
        if self.alpha is not None:
            set_field("alpha", _as_alpha(self.alpha))
        set_field("dropout", as_dropout(self.dropout))
        set_field("lora_dtype", check_dtype("lora_dtype", self.lora_dtype))
        # 3. Check combinations of settings, and set defaults that depend on the format.
        if self.fmt is None and not self.freeze_base:
            raise ValueError(
                "`freeze_base` must be True where `fmt` is None: a float base that is "
                "trained needs no quantizer. Got freeze_base=False."
            )
        self._check_merge_aware()
        formats = (self.fmt, self.target_fmt, "nf4")
        fmt = next(name for name in formats if name is not None)
        packing = Packing(fmt, self.block_size, self.double_quant)
        set_field("block_size", packing.block_size)
        set_field("double_quant", packing.double_quant)

    def _check_merge_aware(self) -> None:
        if self.target_fmt is not None and not self.merge_aware:
            raise ValueError(
                "`merge_aware` must be True where `target_fmt` is set. Got False."
            )
        if not self.merge_aware:
            return
        if self.target_fmt is not None and self.target_fmt not in FORMATS:
            raise ValueError(
                f"`target_fmt` must be one of {sorted(FORMATS)}. Got "
                f"{self.target_fmt!r}."
            )
        if self.fmt is None and self.target_fmt is None:
            raise ValueError(
                "`target_fmt` must be set with `merge_aware` where `fmt` is None, "
                "because kernels in float have no format to be packed in. Got None."
            )
        settings = {"use_dora": self.use_dora, "dropout": self.dropout}
        settings |= {"freeze_base": not self.freeze_base}
        if wrong := [name for name, is_set in settings.items() if is_set]:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ValueError(
                "`merge_aware` must be False with DoRA, with a base that is trained, "
                "and with dropout, which packed weights cannot reproduce. Got "
                f"{values}."
            )

    @property
    def packing(self) -> Packing | None:
        """Format, block size and `double_quant`; None where kernels stay in float."""
        if self.fmt is None:
            return None
        return Packing(self.fmt, self.block_size, self.double_quant)

    def merged_packing(self, packing: Packing | None) -> Packing | None:
        """Returns how a merged kernel will be packed; None unless `merge_aware`.

        Args:
            packing: How the kernel in the base tree is packed; None if it is in float.
        """
        if not self.merge_aware:
            return None
        if packing is not None and self.target_fmt in (None, packing.fmt):
            return packing
        target_fmt = cast(str, self.target_fmt or self.fmt)
        if self.fmt in (None, target_fmt):  # the config's blocks and scales fit
            return Packing(target_fmt, self.block_size, self.double_quant)
        return Packing(target_fmt)

    def _key(self) -> tuple[object, ...]:
        # The order of patterns matters, because the first one that matches wins.
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(tuple(v.items()) if isinstance(v, dict) else v for v in values)

    def __eq__(self, value: object) -> bool:
        if not isinstance(value, QLoRAConfig):
            return NotImplemented
        return self._key() == value._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def is_target(self, path: str) -> bool:
        """Returns whether the leaf at `path` is quantized and adapted.

        It must match `targets` and none of `exclude`, `trainable` and `trainable_rows`.

        Args:
            path: The path of a leaf.
        """
        exceptions = (self.exclude, self.trainable, self.trainable_rows)
        is_exception = any(matches(patterns, path) for patterns in exceptions)
        return matches(self.targets, path) and not is_exception

    def is_trained(self, path: str) -> bool:
        """Returns whether the leaf at `path` is trained in full, by `trainable`.

        Args:
            path: The path of a leaf.
        """
        return matches(self.trainable, path)

    def rows_of(self, path: str) -> tuple[int, ...] | None:
        """Returns the rows of the table at `path` to train, by `trainable_rows`.

        Args:
            path: The path of a table.
        """
        return first_match(cast(Mapping, self.trainable_rows), path, None)

    def rank_of(self, path: str) -> int:
        """Returns the rank of the adapter of the kernel at `path`.

        Args:
            path: The path of a kernel.
        """
        return first_match(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """Returns the scaling of the adapter of the kernel at `path`.

        It is alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`.

        Args:
            path: The path of a kernel.
        """
        rank, alpha = (
            self.rank_of(path),
            first_match(self.alpha_pattern, path, self.alpha),
        )
        power = 0.5 if self.rank_stabilized else 1
        return float((rank if alpha is None else alpha) / rank**power)

    def contract_of(self, path: str) -> tuple[int, ...] | str | None:
        """Returns the contracted axes of the kernel at `path`, or roles as letters.

        Returns None if no pattern matches.

        Args:
            path: The path of a kernel.
        """
        return first_match(cast(Mapping, self.contract), path, None)


def is_table(path: str) -> bool:
    """Returns whether a leaf is a table of embeddings, by Flax's name for them."""
    return path.rpartition("/")[2] == "embedding"


def setting_patterns(config: QLoRAConfig) -> tuple[Pattern, ...]:
    """Returns all patterns of settings for targets; each must match a target."""
    contract = cast(Mapping[Pattern, Contract], config.contract)
    return (*config.rank_pattern, *config.alpha_pattern, *contract)


def check_config(config: object) -> None:
    """Raises TypeError unless `config` is a QLoRAConfig."""
    if not isinstance(config, QLoRAConfig):
        raise TypeError(f"`config` must be a QLoRAConfig. Got {type(config).__name__}.")


def as_rank(rank: object) -> int:
    """Returns a rank; raises ValueError unless it is a positive integer."""
    try:
        integer = 0 if isinstance(rank, bool) else operator.index(cast(int, rank))
    except TypeError:
        integer = 0
    if integer < 1:
        raise ValueError(f"`rank` must be a positive integer. Got {rank!r}.")
    return integer


def as_dropout(dropout: object) -> float:
    """Returns a dropout rate; raises ValueError unless it is in [0, 1)."""
    if not isinstance(dropout, numbers.Real) or not 0 <= float(dropout) < 1:
        raise ValueError(f"`dropout` must be in [0, 1). Got {dropout!r}.")
    return float(dropout)


def _as_rows(rows: Iterable[int]) -> tuple[int, ...]:
    try:
        # Bools would be a mask, not indices. They become -1, which is rejected below.
        indices = sorted(
            -1 if isinstance(row, bool) else operator.index(row) for row in rows
        )
    except TypeError:
        indices = []
    if not indices or indices[0] < 0 or len({*indices}) < len(indices):
        raise ValueError(f"rows must be distinct integers from 0. Got {rows!r}.")
    return tuple(indices)


def _as_alpha(alpha: Any) -> float:
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not is_number or not 0 < float(alpha) < math.inf:
        raise ValueError(f"`alpha` must be a positive, finite number. Got {alpha!r}.")
    return alpha if isinstance(alpha, int) else float(alpha)  # 16 is not saved as 16.0


def as_patterns(argument: str, value: object) -> tuple[Pattern, ...]:
    """Returns one or more patterns as a tuple, or raises an error that names them."""
    if isinstance(value, Pattern):
        value = (value,)
    patterns = tuple(value) if isinstance(value, Iterable) else None
    # A pattern may also be compiled from bytes, which cannot match paths.
    if patterns is None or not all(
        isinstance(getattr(p, "pattern", p), str) for p in patterns
    ):
        received = value if patterns is None else patterns
        raise TypeError(
            f"`{argument}` must be a regular expression, or a list of them. Got "
            f"{received!r}."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{argument}` must be a regular expression. Got {pattern!r}: {error}."
            ) from error
    return patterns


def settings_by_pattern(
    argument: str, value: object, convert: Callable[[object], T]
) -> dict[Pattern, T]:
    """Returns converted settings by pattern, or raises an error that names them."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{argument}` must be a dict of patterns. Got {value!r}.")
    patterns = as_patterns(argument, value.keys())
    try:
        settings = [convert(setting) for setting in value.values()]
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from error
    return dict(zip(patterns, settings, strict=True))
