"""Writes adapters for mlx-lm."""

import pathlib
import re

import numpy as np

from .files import Path, check_new, new_path, write_json
from .peft.adapter_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, PeftConfig
from .safetensors.reader import open_safetensors, write_safetensors


def save_mlx(path: Path, adapter: Path, num_layers: int) -> None:
    """Writes adapters as mlx-lm loads them.

    Args:
        path: The folder to write, new or empty.
        adapter: A folder that `save_peft` wrote of adapters of `portable`.
        num_layers: The number of the model's layers.

    Raises:
        ValueError: If `path` has files.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql, tempfile
        >>> params = {"up": {"kernel": jnp.ones((64, 8))}}
        >>> names = ql.io.Names({"up/kernel": "model.layers.0.mlp.up_proj.weight"})
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> lora = ql.io.portable(base, lora)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ql.io.save_peft(folder + "/peft", base, lora, names)
        ...     ql.io.save_mlx(folder + "/mlx", folder + "/peft", num_layers=1)
        ...     sorted(ql.io.open_safetensors(folder + "/mlx/adapters.safetensors"))
        ['model.layers.0.mlp.up_proj.lora_a', 'model.layers.0.mlp.up_proj.lora_b']
    """
    folder = pathlib.Path(adapter)
    config = PeftConfig.read(folder)
    found = {}
    for key, tensor in open_safetensors(folder / WEIGHTS_FILE).items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        found[module, kind[0].lower()] = np.ascontiguousarray(tensor[...].T)
    # Names in a layer, or in the model. mlx-lm adds adapters to these in every layer,
    # and those that the file lacks stay zero.
    keys = {re.sub(r".*\.layers\.\d+\.", "", module) for module, _ in found}
    scale = config.lora_alpha / config.r
    settings = {"rank": config.r, "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    about = {"fine_tune_type": "lora", "num_layers": num_layers}
    tensors = {f"{module}.lora_{kind}": x for (module, kind), x in found.items()}
    check_new(path)
    with new_path(path) as new:
        new.mkdir()
        write_safetensors(new / "adapters.safetensors", tensors)
        write_json(new / CONFIG_FILE, about | {"lora_parameters": settings})
