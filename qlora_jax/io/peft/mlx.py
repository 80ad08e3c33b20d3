"""Reads and writes adapters in the format of mlx-lm."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import Path, member, new_folder, read_json, refuse, require, write_json
from ..safetensors import open_safetensors, write_safetensors
from .config import CONFIG_FILE
from .files import PlainLoRA
from .settings import alpha_of

_MLX_WEIGHTS = "adapters.safetensors"  # the name that mlx-lm requires


def save_mlx(path: Path, adapter: PlainLoRA, num_layers: int) -> None:
    """Writes adapters in the format of mlx-lm.

    Args:
        path: The folder to write, new or empty.
        adapter: The adapters, all of one rank.
        num_layers: The number of the model's layers.

    Raises:
        ValueError: If `path` has files, if ranks differ, or if experts have adapters.
            mlx-lm has one tensor for all experts, and would ignore these adapters.

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
    ranks = {len(arrays["a"]) for arrays in adapter.factors.values()}
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
        ...     found = ql.io.read_mlx(folder)
        >>> found.alpha, found.factors["model.layers.0.mlp.up_proj"]["b"].shape
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
        elif len(shape := tensor.shape) != 2 or shape[kind == "a"] != rank:
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
    is_given = isinstance(settings, dict)
    require(is_given, f"`lora_parameters` must be given. Got {settings!r:.80}.")
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
    return re.sub(r".*\.layers\.\d+\.", "", module)
