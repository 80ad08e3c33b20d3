"""Reads and writes adapters of mlx-lm."""

import pathlib
import re
from typing import Any

import numpy as np

from .files import (
    CheckpointError,
    Path,
    member,
    new_folder,
    read_json,
    refuse,
    write_json,
)
from .peft.adapter_config import CONFIG_FILE
from .peft.describe import alpha_of
from .peft.plain import PlainLoRA
from .safetensors import open_safetensors, write_safetensors

WEIGHTS = "adapters.safetensors"


def save_mlx(path: Path, adapter: PlainLoRA, num_layers: int) -> None:
    """Writes adapters as mlx-lm loads them.

    Args:
        path: The folder to write, new or empty.
        adapter: The adapters, all of one rank.
        num_layers: The number of the model's layers.

    Raises:
        ValueError: If `path` has files, if ranks differ, or if adapters are of experts,
            which are one tensor in mlx-lm: it would ignore them.

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
            "adapters for mlx-lm, as written here, must have none of experts: export "
            f"the sum, in the format merged. Got {len(experts)}, as {experts[0]}."
        )
    ranks = {len(own["a"]) for own in adapter.factors.values()}
    if len(ranks) != 1:
        raise ValueError(f"`adapter` must have one rank. Got {sorted(ranks)}.")
    (rank,) = ranks
    # mlx-lm adds adapters to these in every layer, and those that the file lacks stay
    # zero.
    keys = sorted({_in_layer(module) for module in adapter.factors})
    settings = {"rank": rank, "scale": adapter.alpha / rank, "keys": keys}
    settings["dropout"] = adapter.dropout
    about = {"fine_tune_type": "lora", "num_layers": num_layers}
    tensors = {
        f"{module}.lora_{kind}": np.ascontiguousarray(x.T)
        for module, own in adapter.factors.items()
        for kind, x in own.items()
    }
    with new_folder(path) as new:
        write_safetensors(new / WEIGHTS, tensors)
        write_json(new / CONFIG_FILE, about | {"lora_parameters": settings})


def read_mlx(path: Path) -> PlainLoRA:
    """Returns the adapters that mlx-lm trained, for `load_peft`.

    Args:
        path: A folder with `adapter_config.json` and `adapters.safetensors`.

    Raises:
        CheckpointError: If they are not LoRA, as for DoRA and full fine-tuning, or if
            the file has other tensors or ranks than the settings say.

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
    rank, scale, dropout, keys = _settings(read_json(member(folder, CONFIG_FILE)))
    factors: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for name, tensor in open_safetensors(member(folder, WEIGHTS)).items():
        module, _, kind = name.rpartition(".lora_")
        is_known = keys is None or {module, _in_layer(module)} & {*keys}
        if not module or kind not in ("a", "b") or not is_known:
            problems.append(f"{name}: unexpected")
        elif len(shape := tensor.shape) != 2 or shape[kind == "a"] != rank:
            problems.append(f"{name}: its rank must be {rank}. Got shape {shape}")
        else:
            factors.setdefault(module, {})[kind] = tensor[...].T
    refuse(f"{WEIGHTS} is not what {CONFIG_FILE} says", problems)
    return PlainLoRA(alpha_of(scale, rank), factors, dropout)


def _settings(raw: dict[str, Any]) -> tuple[int, float, float, list[str] | None]:
    """Returns rank, scaling, dropout and names of modules, if they are given."""
    if (kind := raw.get("fine_tune_type", "lora")) != "lora":
        raise CheckpointError(
            f'`fine_tune_type` must be "lora". Got {kind!r:.80}: fuse the model.'
        )
    found = raw.get("lora_parameters")
    if not isinstance(found, dict):
        raise CheckpointError(f"`lora_parameters` must be given. Got {found!r:.80}.")
    known = {"rank", "scale", "dropout", "keys"}
    problems = [f"`{key}` is not known." for key in sorted(found.keys() - known)]
    rank, scale = found.get("rank", 0), found.get("scale", 0)
    if type(rank) is not int or rank < 1:
        problems.append(f"`rank` must be a positive integer. Got {rank!r:.80}.")
    if type(scale) not in (int, float) or not 0 < scale < 1e9:
        problems.append(f"`scale` must be a positive number. Got {scale!r:.80}.")
    keys = found.get("keys")
    is_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if keys is not None and not is_names:
        problems.append(f"`keys` must be names of modules. Got {keys!r:.80}.")
    refuse("`lora_parameters` must be those of mlx-lm", problems)
    return rank, scale, found.get("dropout", 0.0), keys


def _in_layer(module: str) -> str:
    """Returns a module's name in its layer, or in the model."""
    return re.sub(r".*\.layers\.\d+\.", "", module)
