"""The settings of quantization and adapters."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from ..quant.formats import Packing, check_dtype
from ..quant.geometry import Contract, check_contract
from .patterns import Pattern, as_patterns, by_pattern, first_match, matches


@dataclass(frozen=True, eq=False)
class QLoRAConfig:
    """Which kernels are quantized and adapted, and how. Hashable, so static under jit.

    The method is QLoRA (Dettmers et al. 2023, section 3) with the adapters of LoRA (Hu
    et al. 2021, section 4.1).

    Patterns are regular expressions (text or compiled) that must match a leaf's whole
    path, such as `"layer/q_proj/kernel"`.

    Attributes:
        rank: Rank of the adapters, at least 1.
        alpha: LoRA's alpha, above 0; by default the rank, so that the scaling is 1.
        fmt: Number format of the frozen kernels, as in `quantize`; None leaves them in
            float (plain LoRA).
        block_size: Weights along the contracted axes that share a scale, as in
            `quantize`.
        double_quant: Whether the scales are quantized too, likewise.
        targets: Pattern, or several, of the kernels to quantize and adapt.
        exclude: Pattern, or several, of leaves to leave alone though `targets` match.
        trainable: Pattern, or several, of float leaves to train in full, such as biases
            and norms. They are no targets, also where `targets` match: PEFT's
            `modules_to_save`.
        trainable_rows: The numbers of rows of tables that are trained alone, such as
            those of new tokens, by pattern. These tables are no targets: PEFT's
            `trainable_token_indices`.
        freeze_base: False trains the float kernels too, through a straight-through
            quantizer.
        dropout: Rate of dropout on the adapter's input, in [0, 1).
        rank_pattern: Ranks that differ: the first pattern that matches wins. A sequence
            is a rank for each expert of a stack: A and B have the largest, with zeros,
            which stay zero in training, beyond the expert's own.
        alpha_pattern: Alphas that differ, likewise.
        shared: Pattern, or several, of stacks of experts of which each has one adapter
            for all of its experts.
        rank_stabilized: Scale by alpha / sqrt(rank) and not by alpha / rank (rsLoRA,
            Kalajdzievski 2023).
        use_dora: Train the magnitude of each output apart from its direction (DoRA, Liu
            et al. 2024). Slower than LoRA; see the guide of adapters.
        contract: Which axes of the kernels are contracted, by pattern, or one value for
            all targets; -2 where nothing is said. Either the axes, as negative
            integers: -3 for attention's `[D, H, Dh]`, (-3, -2) for `[H, Dh, D]`, -1 for
            `[out, in]`. Or the role of each trailing axis, as letters: "kn" for
            `[in, out]`, "nk" for `[out, in]`, "bnk" for experts `[E, out, in]` (b
            batch, k contracted, n output). Axes in front of those are batch axes. A
            `weight` needs it: [out, in] and [in, out] are both common. The Flax
            integrations find the roles from the modules.
        lora_dtype: Dtype of A and B: "bfloat16", "float16", "float32" or "float64".
            Leaves that are trained in full have it too, or their own if that is finer.

    Raises:
        TypeError: If patterns are not text or compiled from text, if settings by
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
    trainable_rows: Mapping[Any, Sequence[int]] = field(default_factory=dict)
    freeze_base: bool = True
    dropout: float = 0.0
    rank_pattern: Mapping[Any, int | Sequence[int]] = field(default_factory=dict)
    alpha_pattern: Mapping[Any, float] = field(default_factory=dict)
    shared: Pattern | Sequence[Pattern] = ()
    rank_stabilized: bool = False
    use_dora: bool = False
    contract: Mapping[Any, Contract] | Contract = field(default_factory=dict)
    lora_dtype: Any = "float32"

    def __post_init__(self):
        own = lambda name, value: object.__setattr__(self, name, value)
        for name in ("targets", "exclude", "trainable", "shared"):
            own(name, as_patterns(name, getattr(self, name)))
        contract = self.contract
        if not isinstance(contract, Mapping):
            contract = {".*": contract}
        own("contract", by_pattern("contract", contract, check_contract))
        own("rank", as_rank(self.rank))
        own("rank_pattern", by_pattern("rank_pattern", self.rank_pattern, _as_ranks))
        own(
            "trainable_rows",
            by_pattern("trainable_rows", self.trainable_rows, _as_rows),
        )
        if self.alpha is not None:
            own("alpha", _as_alpha(self.alpha))
        alphas = by_pattern("alpha_pattern", self.alpha_pattern, _as_alpha)
        own("alpha_pattern", alphas)
        if self.fmt is None and not self.freeze_base:
            raise ValueError(
                "`freeze_base` must be True where `fmt` is None: a float base that is "
                "trained needs no quantizer. Got freeze_base=False."
            )
        if self.shared and self.use_dora:
            raise ValueError(
                "`use_dora` must be False where `shared` is set. Got True."
            )
        packing = Packing(self.fmt or "nf4", self.block_size, self.double_quant)
        own("block_size", packing.block_size)
        own("double_quant", packing.double_quant)
        if not isinstance(self.dropout, numbers.Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Got {self.dropout!r}.")
        own("dropout", float(self.dropout))
        check_dtype("lora_dtype", self.lora_dtype)

    @property
    def packing(self) -> Packing | None:
        """Format, block size and `double_quant`; None where kernels stay in float."""
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

    def is_target(self, path: str) -> bool:
        """Returns whether `targets` match a path, and nothing that leaves it out.

        Args:
            path: Path of the leaf, such as `"layers/0/q_proj/kernel"`.
        """
        others = (self.exclude, self.trainable, self.trainable_rows)
        is_other = any(matches(patterns, path) for patterns in others)
        return matches(self.targets, path) and not is_other

    def is_trained(self, path: str) -> bool:
        """Returns whether a leaf is trained in full, by `trainable`.

        Args:
            path: Path of the leaf.
        """
        return matches(self.trainable, path)

    def rows_of(self, path: str) -> tuple[int, ...] | None:
        """Returns the rows of a table that are trained alone, by `trainable_rows`.

        Args:
            path: Path of the table.
        """
        return first_match(self.trainable_rows, path, None)

    def rank_of(self, path: str) -> int:
        """Returns the rank of an adapter: that of `rank_pattern`, or `rank`.

        The largest, if experts have their own.

        Args:
            path: Path of its kernel.
        """
        return max(self.ranks_of(path) or (self._given_rank(path),))

    def ranks_of(self, path: str) -> tuple[int, ...] | None:
        """Returns the ranks of experts, by `rank_pattern`; None for one rank.

        Args:
            path: Path of their kernel.
        """
        rank = self._given_rank(path)
        return rank if isinstance(rank, tuple) else None

    def _given_rank(self, path: str) -> Any:
        return first_match(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> Any:
        """Returns an adapter's scaling: alpha / rank, or alpha / sqrt(rank).

        A tuple, if experts have their own ranks.

        Args:
            path: Path of its kernel.
        """
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        power = 0.5 if self.rank_stabilized else 1
        of = lambda rank: float((rank if alpha is None else alpha) / rank**power)
        ranks = self.ranks_of(path)
        return tuple(map(of, ranks)) if ranks else of(self.rank_of(path))

    def contract_of(self, path: str) -> tuple[int, ...] | str | None:
        """Returns a kernel's contracted axes, or the roles as letters, or None.

        Args:
            path: Path of the kernel.
        """
        return first_match(self.contract, path, None)


def is_table(path: str) -> bool:
    """Returns whether a leaf is a table of embeddings, by Flax's name for them."""
    return path.rpartition("/")[2] == "embedding"


def settings_by_pattern(config: QLoRAConfig) -> tuple[Pattern, ...]:
    """Returns the patterns that set something for targets; each must match one."""
    contract = cast(Mapping, config.contract)
    by_pattern = (*config.rank_pattern, *config.alpha_pattern, *contract)
    return (*by_pattern, *cast(Sequence, config.shared))


def check_config(config: Any) -> None:
    """Raises TypeError for what is no config."""
    if not isinstance(config, QLoRAConfig):
        raise TypeError(f"`config` must be a QLoRAConfig. Got {type(config).__name__}.")


def check_layer_config(config: Any) -> None:
    """Refuses a config of one layer that does not target "kernel", or names others."""
    check_config(config)
    by_pattern = settings_by_pattern(config)
    others = (*config.trainable, *config.trainable_rows)
    if by_pattern or others or not config.is_target("kernel"):
        raise ValueError(
            "the `config` of a layer must target 'kernel' and have no settings by "
            f"pattern. Got targets {config.targets}, exclude {config.exclude}, "
            f"trainable {others} and settings for {by_pattern}."
        )


def as_rank(rank: Any) -> int:
    """Returns a rank; raises ValueError unless it is a positive integer."""
    try:
        whole = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"`rank` must be a positive integer. Got {rank!r}.")
    return whole


def _as_ranks(ranks: Any) -> int | tuple[int, ...]:
    is_several = isinstance(ranks, list | tuple) and len(ranks) > 0
    return tuple(map(as_rank, ranks)) if is_several else as_rank(ranks)


def _as_rows(rows: Any) -> tuple[int, ...]:
    try:
        found = tuple(sorted({operator.index(row) for row in rows}))
    except TypeError:
        found = ()
    if not found or found[0] < 0 or len(found) < len(rows):
        raise ValueError(f"rows must be integers from 0, each once. Got {rows!r}.")
    return found


def _as_alpha(alpha: Any) -> float:
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not is_number or not 0 < float(alpha) < math.inf:
        raise ValueError(f"`alpha` must be a positive, finite number. Got {alpha!r}.")
    return alpha if isinstance(alpha, int) else float(alpha)
