"""Settings of a PEFT LoRA adapter (`adapter_config.json`)."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from ..files import CheckpointError, Path, member, read_json, refuse
from .matching import first_matches, is_plain, key_regex, layer_regex

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

N = TypeVar("N", int, float)

# Settings that PEFT 0.21 writes, with their defaults. They have no effect on a trained
# adapter, and are written as they were read.
_NO_EFFECT: dict[str, Any] = {
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "task_type": "CAUSAL_LM",
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("corda_config", "eva_config", "lora_ga_config")),
}
# Settings of which only the default is supported: None or False.
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config")),
    **dict.fromkeys(("layer_replication", "megatron_config", "monteclora_config")),
    **dict.fromkeys(("use_bdlora", "velora_config")),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out"), False),
    **dict.fromkeys(("lora_bias", "use_qalora"), False),
}
_MAX_PATTERNS = 100_000  # characters of regular expressions
_BIASES = ("none", "all", "lora_only")
# With other initializations, such as PiSSA, PEFT changes the base weights.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Unknown settings, of later versions of PEFT, are ignored if they have these values.
_OFF = (None, False, {}, [], "")
# Fields of `PeftConfig` that are not settings of PEFT under that name.
_NOT_SETTINGS = ("extra_settings", "saved_base_weights")


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a PEFT LoRA adapter, under PEFT's names.

    Attributes:
        r: Rank of the adapters.
        lora_alpha: Alpha: the scaling is `lora_alpha / r`.
        target_modules: Names of modules, or the ends of names, split at a dot; or one
            regular expression for full names; or "all-linear".
        target_parameters: Names of parameters that hold all experts, or the ends of
            these names, split at a dot. Each expert's part is adapted.
        exclude_modules: Modules to leave out, in the same form as `target_modules`.
        lora_dropout: Rate of dropout on the adapter's input.
        bias: Which biases the adapter holds: "none", "all" or "lora_only".
        use_rslora: Whether the scaling is `lora_alpha / sqrt(r)`.
        use_dora: Whether the adapters are DoRA.
        modules_to_save: Ends of the names of modules that the adapter replaces.
        trainable_token_indices: The ids of the embedding's rows that are trained; or a
            mapping from the end of an embedding's name to the ids.
        layers_to_transform: Number or numbers of layers with adapters; None for all.
        layers_pattern: The text before a layer's number in a name, or several texts.
        rank_pattern: Ranks by the end of a module's name; the first match wins.
        alpha_pattern: Alphas by the end of a module's name; the first match wins.
        extra_settings: Settings that have no effect on a trained adapter, such as
            `base_model_name_or_path`; `save_peft` writes them.
        saved_base_weights: Names of unchanged base weights in the adapter's file, such
            as the weight of an adapted `lm_head`. They are not in the JSON.

    Raises:
        CheckpointError: If settings have the wrong type or are out of range. All are
            listed.

    Example:
        >>> import qlora_jax as ql
        >>> config = ql.io.PeftConfig(
        ...     r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"),
        ...     rank_pattern={"v_proj": 4})
        >>> config.rank_of("model.layers.0.self_attn.v_proj")
        4
        >>> config.scaling_of("model.layers.0.self_attn.v_proj")
        4.0
        >>> config.to_json()["peft_type"]
        'LORA'
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    extra_settings: Mapping[str, Any] = field(default_factory=dict)
    saved_base_weights: tuple[str, ...] = ()

    def __post_init__(self):
        # JSON has lists; tuples are hashable and cannot change.
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, list):
                object.__setattr__(self, setting.name, tuple(value))
        if self.layers_to_transform == ():  # which means all layers in PEFT
            object.__setattr__(self, "layers_to_transform", None)
        refuse("these settings of a PEFT adapter are invalid", _problems_of(self))

    @property
    def trained_tokens(self) -> dict[str, tuple[int, ...]]:
        """The ids of the trained rows, by the end of an embedding's name."""
        # PEFT applies a bare list to the input embedding.
        indices = self.trainable_token_indices or {}
        by_name = indices if isinstance(indices, Mapping) else {"embed_tokens": indices}
        return {module: tuple(rows) for module, rows in by_name.items()}

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The numbers of the layers that have adapters; None for all."""
        layers = self.layers_to_transform
        return (layers,) if isinstance(layers, int) else layers

    @property
    def layer_prefixes(self) -> tuple[str, ...]:
        """Patterns of the text before a layer's number; () for any text."""
        patterns = self.layers_pattern
        return (patterns,) if isinstance(patterns, str) else patterns

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's adapter: from `rank_pattern`, or else `r`.

        Args:
            module: The module's name in the model, or the name of a parameter.
        """
        return self.ranks_of([module])[module]

    def ranks_of(self, modules: Collection[str]) -> dict[str, int]:
        """Returns the ranks of several modules, as `rank_of` does.

        Args:
            modules: Names, as in `rank_of`.
        """
        return first_matches("rank_pattern", self.rank_pattern, modules, self.r)

    def scaling_of(self, module: str) -> float:
        """Returns the scaling of a module's adapter: alpha / r, or alpha / sqrt(r).

        Args:
            module: The module's name in the model, or the name of a parameter.
        """
        return self.scalings_of([module])[module]

    def scalings_of(self, modules: Collection[str]) -> dict[str, float]:
        """Returns the scalings of several modules, as `scaling_of` does.

        Args:
            modules: Names, as in `scaling_of`.
        """
        patterns, ranks = self.alpha_pattern, self.ranks_of(modules)
        alphas = first_matches("alpha_pattern", patterns, modules, self.lora_alpha)
        divisors = {m: math.sqrt(r) if self.use_rslora else r for m, r in ranks.items()}
        return {m: float(alpha / divisors[m]) for m, alpha in alphas.items()}

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Returns the settings in the `adapter_config.json` of a folder.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: If the file is missing, does not describe a LoRA, or has
                settings that are not supported.
        """
        raw = read_json(member(folder, CONFIG_FILE))
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(
                f'`peft_type` must be "LORA". Got {raw.get("peft_type")!r:.80}.'
            )
        field_names = {f.name for f in fields(cls)} - {*_NOT_SETTINGS}
        settings, extra_settings, problems = {}, {}, []
        # Settings that would change the result must not be ignored silently.
        for key, value in raw.items():
            if key in field_names:
                # null and empty values mean that PEFT uses the default.
                if value not in (None, [], ""):
                    settings[key] = value
            elif key in _UNSUPPORTED:
                if value not in (_UNSUPPORTED[key], *_OFF):
                    problems.append(f"`{key}` is not supported. Got {value!r:.80}.")
            elif key in _NO_EFFECT:
                extra_settings[key] = value
            # `runtime_config` says only on which devices PEFT computes.
            elif key not in ("peft_type", "runtime_config") and value not in _OFF:
                problems.append(f"`{key}` is not known. Got {value!r:.80}.")
        refuse("this adapter is not supported", problems)
        return cls(**settings, extra_settings=extra_settings)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `adapter_config.json`, as PEFT 0.21 writes it."""
        raw = {**_UNSUPPORTED, **_NO_EFFECT, **self.extra_settings, "peft_type": "LORA"}
        for setting in fields(self):
            if setting.name not in _NOT_SETTINGS:
                value = getattr(self, setting.name)
                raw[setting.name] = list(value) if isinstance(value, tuple) else value
        # PEFT writes null for these if they are empty.
        nullable = "exclude_modules modules_to_save layers_pattern target_parameters"
        for name in nullable.split():
            raw[name] = raw[name] or None
        for name in ("rank_pattern", "alpha_pattern"):
            raw[name] = dict(raw[name])
        if isinstance(tokens := raw["trainable_token_indices"], Mapping):
            raw["trainable_token_indices"] = {m: [*rows] for m, rows in tokens.items()}
        return dict(sorted(raw.items()))


# These functions find settings from the ranks and scalings of modules.


def alpha_of(scaling: float, rank: int, use_rslora: bool = False) -> float:
    """Returns the alpha that gives a scaling, as an integer if possible."""
    divisor = math.sqrt(rank) if use_rslora else rank
    alpha = scaling * divisor
    # PEFT declares `lora_alpha` as an integer, but not every scaling has one.
    return round(alpha) if round(alpha) / divisor == scaling else alpha


def split_common(values: Mapping[str, N]) -> tuple[N, dict[str, N]]:
    """Returns the most common value, and the other values by name or its last part."""
    common = Counter(values.values()).most_common(1)[0][0]
    # The last part of a name is enough if all modules with it have the same value.
    values_by_part: dict[str, set[N]] = {}
    for module, value in values.items():
        values_by_part.setdefault(last_part(module), set()).add(value)
    pattern = {
        last_part(module) if len(values_by_part[last_part(module)]) == 1 else module: x
        for module, x in values.items()
        if x != common
    }
    return common, pattern


def module_of(name: str) -> str:
    """Returns the module of a tensor: its name without the last part."""
    return name.rpartition(".")[0]


def last_part(name: str) -> str:
    """Returns the part of a name after its last dot."""
    return name.rpartition(".")[2]


# These functions check settings, which may come from a hostile file.


def _is_integer(value: object, minimum: int = 1) -> bool:
    # `type`, because `isinstance(True, int)` is true.
    return type(value) is int and minimum <= value < 2**31


def _is_number(value: Any, low: float = 1e-9, high: float = 1e9) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value < high


def _is_names(value: object) -> bool:
    is_tuple = isinstance(value, tuple)
    return is_tuple and all(isinstance(name, str) and name for name in value)


def _is_names_or_regex(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_indices(value: object) -> bool:
    return isinstance(value, list | tuple) and all(_is_integer(x, 0) for x in value)


def _is_token_ids(value: Any) -> bool:
    return _is_indices(value) and len({*value}) == len(value) > 0


def _is_dict_of(check: Callable[[Any], bool], value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(key, str) and check(x) for key, x in value.items())


# The names of settings, their check, and their requirement for error messages.
_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _is_integer, "a positive integer"),
    ("lora_alpha", _is_number, "a positive number below 1e9"),
    ("lora_dropout", lambda x: _is_number(x, 0, 1), "in [0, 1)"),
    ("use_rslora use_dora", lambda x: isinstance(x, bool), "true or false"),
    (
        "target_parameters modules_to_save saved_base_weights",
        _is_names,
        "a list of names",
    ),
    ("layers_pattern", _is_names_or_regex, "a name or a list of names"),
    ("rank_pattern", partial(_is_dict_of, _is_integer), "positive integers by name"),
    (
        "alpha_pattern",
        partial(_is_dict_of, _is_number),
        "positive numbers below 1e9 by name",
    ),
    (
        "target_modules exclude_modules",
        _is_names_or_regex,
        "a list of names or a regular expression",
    ),
    ("bias", lambda x: x in _BIASES, '"none", "all" or "lora_only"'),
    (
        "extra_settings",
        partial(_is_dict_of, lambda x: True),
        "a dict of settings by name",
    ),
    (
        "trainable_token_indices",
        lambda x: x is None or _is_token_ids(x) or _is_dict_of(_is_token_ids, x),
        "distinct token ids",
    ),
    (
        "layers_to_transform",
        lambda x: x is None or _is_integer(x, 0) or _is_indices(x),
        "a layer's number or a list of numbers",
    ),
)


def _problems_of(config: PeftConfig) -> list[str]:
    problems = [
        f"`{name}` must be {requirement}. Got {value!r:.80}."
        for setting_names, is_valid, requirement in _CHECKS
        for name in setting_names.split()
        if not is_valid(value := getattr(config, name))
    ]
    # The checks below need settings of the right types.
    if problems:
        return problems
    extra_settings = config.extra_settings
    reserved = {setting.name for setting in fields(config)} | {"peft_type"}
    problems += [
        f"`extra_settings` must not have `{name}`, which has an effect."
        for name in sorted(extra_settings.keys() & (reserved | _UNSUPPORTED.keys()))
    ]
    initialization = extra_settings.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        problems.append(
            f"`init_lora_weights` must be one of {_INITIALIZATIONS}: others change the "
            f"base weights. Got {initialization!r:.80}."
        )
    if problems:
        return problems
    if config.target_parameters and (config.lora_dropout or config.use_dora):
        return [
            "`lora_dropout` must be 0 and `use_dora` false with `target_parameters`, "
            f"as in PEFT. Got {config.lora_dropout} and {config.use_dora}."
        ]
    has_layers = config.layers_to_transform is not None or config.layers_pattern
    if isinstance(config.target_modules, str) and has_layers:
        return [
            "`layers_to_transform` and `layers_pattern` must be left out if "
            "`target_modules` is a regular expression."
        ]
    regexes = [("layers_pattern", layer_regex(x)) for x in config.layer_prefixes]
    for name in ("rank_pattern", "alpha_pattern"):
        keys = (key for key in getattr(config, name) if not is_plain(key))
        regexes += [(name, key_regex(key)) for key in keys]
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value.lower() != "all-linear":
            regexes.append((name, value))
    if (size := sum(len(pattern) for _, pattern in regexes)) > _MAX_PATTERNS:
        return [
            f"regular expressions must have at most {_MAX_PATTERNS} characters in all. "
            f"Got {size} in {sorted({name for name, _ in regexes})}."
        ]
    for name, pattern in regexes:
        try:
            re.compile(pattern)
        # `re` raises the last two errors for huge patterns.
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(
                f"`{name}` must be a regular expression. Got {pattern!r}: {error}."
            )
    return problems
