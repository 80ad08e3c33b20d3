"""Settings of a PEFT LoRA adapter (`adapter_config.json`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..files import CheckpointError, Path, member, read_json, refuse
from .checks import problems_of
from .module_patterns import setting_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings that PEFT 0.21 writes, with the defaults. They change nothing in a trained
# adapter, and are written as they were read.
_NO_EFFECT: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "corda_config": None,
    "eva_config": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": None,
    "task_type": "CAUSAL_LM",
}
# Settings with the only value of LoRA and DoRA.
_UNSUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Initializations that leave the base weights alone; PEFT changes them in others.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_NEUTRAL = (None, False, {}, [], "")


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a PEFT LoRA adapter, under PEFT's names.

    Attributes:
        r: Rank of the adapters.
        lora_alpha: Alpha: the scaling is `lora_alpha / r`.
        target_modules: Names of modules, or ends of names after a dot; or one regular
            expression for full names; or "all-linear".
        target_parameters: Names of parameters, or ends of names after a dot, of which
            a part is adapted for each expert.
        exclude_modules: Modules to leave out, as `target_modules`.
        lora_dropout: Rate of dropout on the adapter's input.
        bias: Which biases the adapter holds: "none", "all" or "lora_only".
        use_rslora: Whether the scaling is `lora_alpha / sqrt(r)`.
        use_dora: Whether the adapters are DoRA's.
        modules_to_save: Ends of the names of modules that the adapter replaces.
        trainable_token_indices: Numbers of the rows of the embedding that are trained
            alone; or by the end of an embedding's name.
        layers_to_transform: Number or numbers of layers with adapters; None for all.
        layers_pattern: Text before a layer's number in a name, or several.
        rank_pattern: Ranks by the end of a module's name; the first match wins.
        alpha_pattern: Alphas that differ, likewise.
        others: Settings that change nothing in a trained adapter, such as
            `base_model_name_or_path`; `save_peft` writes them.
        repeated: Names of base weights that the adapter holds too, as PEFT does for an
            adapted `lm_head`; they are in no file of settings.

    Raises:
        CheckpointError: If settings are of the wrong kind or out of range; lists all.

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
    trainable_token_indices: tuple[int, ...] | Mapping[str, Any] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, list):
                object.__setattr__(self, setting.name, tuple(value))
        refuse("these settings of a PEFT adapter are wrong", problems_of(self))

    @property
    def trained_tokens(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the rows that are trained, by the end of a module's name."""
        given = self.trainable_token_indices or {}
        by_name = given if isinstance(given, Mapping) else {"embed_tokens": given}
        return {module: tuple(rows) for module, rows in by_name.items()}

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The numbers of the layers that have adapters; None for all."""
        given = self.layers_to_transform
        return (given,) if isinstance(given, int) else given

    @property
    def layer_prefixes(self) -> tuple[str, ...]:
        """Patterns of the text before a layer's number; () for any text."""
        given = self.layers_pattern
        return (given,) if isinstance(given, str) else given

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's adapter: that of `rank_pattern`, else `r`.

        Args:
            module: The module's name in the model, or that of a parameter.
        """
        return setting_of(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """Returns the scaling of a module's adapter: alpha / r, or alpha / sqrt(r).

        Args:
            module: The module's name in the model.
        """
        alpha = setting_of(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank_of(module)
        return float(alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Returns the settings in the `adapter_config.json` of a folder.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: If it is missing, no LoRA, or uses what is not supported.
        """
        raw = read_json(member(folder, CONFIG_FILE))
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(
                f'`peft_type` must be "LORA". Got {raw.get("peft_type")!r:.80}.'
            )
        own = {f.name for f in fields(cls)} - {"others", "repeated"}
        given, others, problems = {}, {}, []
        for key, value in raw.items():
            if key in own:
                given[key] = value
            elif key in _UNSUPPORTED:
                if value not in (_UNSUPPORTED[key], *_NEUTRAL):
                    problems.append(f"`{key}` is not supported. Got {value!r:.80}.")
            elif key in _NO_EFFECT:
                others[key] = value
            elif key not in ("peft_type", "runtime_config") and value not in _NEUTRAL:
                problems.append(f"`{key}` is not known. Got {value!r:.80}.")
        if raw.get("init_lora_weights", True) not in _INITIALIZATIONS:
            problems.append(
                f"`init_lora_weights` must be one of {_INITIALIZATIONS}: others change "
                f"the base weights. Got {raw['init_lora_weights']!r:.80}."
            )
        refuse("this adapter is not supported", problems)
        # Empty values are the defaults.
        given = {name: x for name, x in given.items() if x not in (None, [], "")}
        return cls(**given, others=others)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `adapter_config.json`, as PEFT 0.21 writes it."""
        raw = {**_UNSUPPORTED, **_NO_EFFECT, **self.others, "peft_type": "LORA"}
        for setting in fields(self):
            if setting.name in ("others", "repeated"):
                continue
            value = getattr(self, setting.name)
            raw[setting.name] = list(value) if isinstance(value, tuple) else value
        others = "modules_to_save", "layers_pattern", "target_parameters"
        for name in ("exclude_modules", *others):
            raw[name] = raw[name] or None
        for name in ("rank_pattern", "alpha_pattern"):
            raw[name] = dict(raw[name])
        if isinstance(tokens := raw["trainable_token_indices"], Mapping):
            raw["trainable_token_indices"] = {m: [*rows] for m, rows in tokens.items()}
        return dict(sorted(raw.items()))
