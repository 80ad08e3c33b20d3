"""Adapters in the forms that servers load, such as llama.cpp, vLLM and mlx-lm."""

import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...adapters.config import is_table
from ...adapters.lora import LoRA, LowRank, is_low_rank
from ...trees.adapters import checked_adapters
from ...trees.paths import Tree, nested, raise_if_any
from ..files import Path, member, new_folder, read_json, refuse, require, write_json
from ..names import Names
from ..safetensors import open_safetensors, write_safetensors
from .config import CONFIG_FILE, PREFIX, PeftConfig, alpha_of, split_common
from .files import adapter_tensors
from .modules import array_keys
from .settings import peft_config

_MLX_WEIGHTS = "adapters.safetensors"  # the name that mlx-lm requires
_LAYER = re.compile(r".*\.layers\.(\d+)\.")  # the start of the name of a module


def portable(base: Tree, lora: Tree) -> Tree:
    """Returns equivalent adapters in float32, all with the same rank and scaling 1.

    B is multiplied by the scaling, and smaller ranks are padded with zeros. Servers
    that ignore rsLoRA, or patterns of ranks and alphas, therefore get equal results.

    Args:
        base: The base tree, or its shapes.
        lora: The lora tree.

    Returns:
        The lora tree of these adapters, for `save_peft`.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If an adapter is not a LoRA, or does not fit its kernel.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"up": jnp.ones((64, 8)), "down": jnp.ones((8, 64))}
        >>> ranks = {"rank": 4, "rank_pattern": {"down": 2}}
        >>> config = ql.QLoRAConfig(**ranks, alpha=8, fmt=None, targets=".*")
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> new = ql.io.portable(base, lora)
        >>> lora["down"].a.shape, lora["down"].scaling
        ((8, 2), 4.0)
        >>> new["down"].a.shape, new["down"].scaling
        ((8, 4), 1.0)
    """
    adapters = checked_adapters(base, lora)
    unsupported = {
        path: type(x).__name__ + " of a table" * is_table(path)
        for path, x in adapters.items()
        if not (is_low_rank(x) and x.is_linear) or is_table(path)
    }
    title = "adapters for servers must be LoRA: export others as a merged model. Got"
    raise_if_any(title, unsupported)
    # All get one rank, because servers may read only the rank in the config.
    rank = max((x.rank for x in adapters.values()), default=0)
    low_rank = {path: x for path, x in adapters.items() if is_low_rank(x)}
    return nested({path: _portable_lora(x, rank) for path, x in low_rank.items()})


def _portable_lora(adapter: LowRank, rank: int) -> LoRA:
    batch_shape = adapter.batch_shape
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)  # [*batch, K, r], [..., r, N]
    # The product is computed in float64, so that it is rounded only once, to float32.
    b = b.astype(np.float64) * adapter.scaling
    no_padding = [(0, 0)] * len(batch_shape)
    rank_padding = (0, rank - adapter.rank)
    a = np.pad(a, [*no_padding, (0, 0), rank_padding]).astype(np.float32)
    b = np.pad(b, [*no_padding, rank_padding, (0, 0)]).astype(np.float32)
    # The arrays stay in NumPy, so that a large adapter is not copied to a device.
    return LoRA(a, b, 1.0, adapter.dropout, adapter.geometry)  # pyright: ignore


@dataclass(frozen=True)
class PlainLoRA:
    """Adapters by module, as llama.cpp and mlx-lm store them in files.

    `load_peft` accepts one instead of a folder.

    Attributes:
        alpha: The scaling of each module is alpha divided by its rank.
        factors: The arrays of each module: `"a"` is `[rank, K]`, `"b"` `[N, rank]`.
        dropout: Rate of dropout in training.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> plain = ql.io.PlainLoRA.of(base, lora, names)
        >>> plain.alpha, plain.factors["model.q_proj"]["a"].shape
        (4, (4, 64))
        >>> ql.io.load_peft(plain, base, names)[1]["q_proj"]["kernel"].a.shape
        (64, 4)
    """

    alpha: float
    factors: Mapping[str, Mapping[str, np.ndarray]]
    dropout: float = 0.0

    @classmethod
    def of(cls, base: Tree, lora: Tree, names: Names) -> "PlainLoRA":
        """Returns a lora tree in this form, after converting it with `portable`.

        Args:
            base: The base tree, or its shapes.
            lora: The lora tree.
            names: The names of the leaves of `base` in the Hugging Face model.

        Raises:
            ValueError: If an adapter is not a LoRA or does not fit its kernel.
        """
        # One rank and scaling 1, because this form has one alpha for all modules.
        lora = portable(base, lora)
        config = peft_config(base, lora, names)
        if config.target_parameters:
            raise ValueError(
                "the file must hold adapters of modules: export others as a merged "
                f"model. Got {list(config.target_parameters)}."
            )
        factors: dict[str, dict[str, np.ndarray]] = {}
        for key, x in adapter_tensors(base, lora, names, config).items():
            # Keys end in `.lora_A.weight` and `.lora_B.weight`.
            module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
            factors.setdefault(module, {})[kind[0].lower()] = x
        return cls(config.lora_alpha, factors, config.lora_dropout)

    def to_peft(self) -> tuple[PeftConfig, dict[str, np.ndarray]]:
        """Returns the settings and the tensors that PEFT would store.

        Raises:
            ValueError: If a module has neither `"a"` nor `"b"`, or other arrays.
        """
        invalid_modules = [
            module
            for module, arrays in self.factors.items()
            if not arrays or {*arrays} - {"a", "b"}
        ]
        title = "`factors` must have `a` and `b`, and nothing else, of these modules"
        raise_if_any(title, invalid_modules)
        tensors, ranks = {}, {}
        for module, arrays in self.factors.items():
            keys = array_keys(LoRA, module)
            tensors |= {keys[name]: x for name, x in arrays.items()}
            # A hostile file may lack A or B, or contain a scalar. `load_peft` reports
            # these, because it knows the shapes.
            shape = arrays["a"].shape if "a" in arrays else arrays["b"].shape[::-1]
            ranks[module] = shape[0] if shape else 0
        # The most common rank is the default, and other ranks are exceptions.
        rank, rank_pattern = split_common(ranks) if ranks else (1, {})
        config = PeftConfig(
            r=rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=tuple(self.factors),
            rank_pattern=rank_pattern,
        )
        return config, tensors


def save_mlx(path: Path, adapter: PlainLoRA, num_layers: int) -> None:
    """Writes adapters in the format of mlx-lm.

    Args:
        path: The folder to write, new or empty.
        adapter: The adapters, all of one rank.
        num_layers: The number of the model's layers.

    Raises:
        ValueError: If `path` has files, if a module lacks the matrices `"a"` or `"b"`,
            if ranks differ, or if mlx-lm would ignore adapters: those of experts,
            because it has one tensor for all experts, or if `num_layers` is too small,
            because it reads adapters of only that many layers, the last ones.

    Example:
        >>> import numpy as np, qlora_jax as ql, tempfile
        >>> factors = {"a": np.ones((4, 64)), "b": np.ones((8, 4))}
        >>> plain = ql.io.PlainLoRA(8, {"model.layers.0.mlp.up_proj": factors})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_mlx(folder, plain, num_layers=1)
        ...     sorted(ql.io.open_safetensors(folder + "/adapters.safetensors"))
        ['model.layers.0.mlp.up_proj.lora_a', 'model.layers.0.mlp.up_proj.lora_b']
    """
    if experts := sorted(name for name in adapter.factors if ".experts." in name):
        raise ValueError(
            "adapters for mlx-lm must not include adapters of experts: export a merged "
            f"model. Got {len(experts)}, such as {experts[0]}."
        )
    incomplete = [
        module
        for module, arrays in adapter.factors.items()
        if {*arrays} != {*"ab"} or any(len(x.shape) != 2 for x in arrays.values())
    ]
    title = "`adapter` must have matrices `a` and `b` of these modules"
    raise_if_any(title, incomplete)
    layers = [int(match[1]) for m in adapter.factors if (match := _LAYER.match(m))]
    if layers and max(layers) >= num_layers:
        raise ValueError(
            f"`num_layers` must be greater than {max(layers)}, the number of the last "
            f"layer with an adapter. Got {num_layers}."
        )
    factors = adapter.factors.values()
    ranks = {rank for x in factors for rank in (x["a"].shape[0], x["b"].shape[1])}
    if len(ranks) != 1:
        raise ValueError(f"`adapter` must have one rank. Got {sorted(ranks)}.")
    (rank,) = ranks
    # mlx-lm adds adapters to these modules in every layer. Those that the file lacks
    # stay zero.
    keys = sorted({_in_layer(module) for module in adapter.factors})
    parameters = {"rank": rank, "scale": adapter.alpha / rank, "keys": keys}
    parameters["dropout"] = adapter.dropout
    settings = {"fine_tune_type": "lora", "num_layers": num_layers}
    # mlx-lm has A [K, rank] and B [rank, N].
    tensors = {
        f"{module}.lora_{name}": np.ascontiguousarray(x.T)
        for module, arrays in adapter.factors.items()
        for name, x in arrays.items()
    }
    with new_folder(path) as folder:
        write_safetensors(folder / _MLX_WEIGHTS, tensors)
        write_json(folder / CONFIG_FILE, settings | {"lora_parameters": parameters})


def read_mlx(path: Path) -> PlainLoRA:
    """Returns the adapters that mlx-lm trained, for `load_peft`.

    Args:
        path: A folder with `adapter_config.json` and `adapters.safetensors`.

    Raises:
        CheckpointError: If the adapters are not LoRA (for example DoRA), or if tensors
            or ranks do not match the settings.

    Example:
        >>> import numpy as np, qlora_jax as ql, tempfile
        >>> factors = {"a": np.ones((4, 64)), "b": np.ones((8, 4))}
        >>> plain = ql.io.PlainLoRA(8, {"model.layers.0.mlp.up_proj": factors})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_mlx(folder, plain, num_layers=1)
        ...     again = ql.io.read_mlx(folder)
        >>> again.alpha, again.factors["model.layers.0.mlp.up_proj"]["b"].shape
        (8, (8, 4))
    """
    folder = pathlib.Path(path)
    rank, scale, dropout, keys = _mlx_settings(read_json(member(folder, CONFIG_FILE)))
    factors: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for name, tensor in open_safetensors(member(folder, _MLX_WEIGHTS)).items():
        module, _, kind = name.rpartition(".lora_")
        # Keys are names within a layer, or full names of modules outside the layers.
        is_listed = keys is None or {module, _in_layer(module)} & {*keys}
        if not module or kind not in ("a", "b") or not is_listed:
            problems.append(f"{name}: unexpected")
        # A is [K, rank] and B is [rank, N].
        elif len(shape := tensor.shape) != 2 or shape[{"a": 1, "b": 0}[kind]] != rank:
            problems.append(f"{name}: its rank must be {rank}. Got shape {shape}")
        else:
            factors.setdefault(module, {})[kind] = tensor[...].T
    refuse(f"{_MLX_WEIGHTS} does not match {CONFIG_FILE}", problems)
    return PlainLoRA(alpha_of(scale, rank), factors, dropout)


def _mlx_settings(raw: Mapping[str, Any]) -> tuple[int, float, float, list[str] | None]:
    """Returns the rank, scaling, dropout and module names (None for all modules)."""
    kind = raw.get("fine_tune_type", "lora")
    settings: Any = raw.get("lora_parameters")
    hint = f"Got {kind!r:.80}: fuse it into the model."
    require(kind == "lora", f'`fine_tune_type` must be "lora". {hint}')
    is_dict = isinstance(settings, dict)
    require(is_dict, f"`lora_parameters` must be given. Got {settings!r:.80}.")
    unknown = sorted(settings.keys() - {"rank", "scale", "dropout", "keys"})
    problems = [f"`{key}` is not known." for key in unknown]
    rank, scale = settings.get("rank", 0), settings.get("scale", 0)
    # `type`, because `isinstance(True, int)` is true.
    if type(rank) is not int or rank < 1:
        problems.append(f"`rank` must be a positive integer. Got {rank!r:.80}.")
    if type(scale) not in (int, float) or not 0 < scale < 1e9:
        problems.append(f"`scale` must be a positive number. Got {scale!r:.80}.")
    keys = settings.get("keys")
    is_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if keys is not None and not is_names:
        problems.append(f"`keys` must be names of modules. Got {keys!r:.80}.")
    refuse("`lora_parameters` are not supported", problems)
    return rank, scale, settings.get("dropout", 0.0), keys


def _in_layer(module: str) -> str:
    """Returns a module's name within its layer, or its full name without a layer."""
    return _LAYER.sub("", module)
