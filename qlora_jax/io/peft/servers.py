"""Adapters in the forms that servers load, such as llama.cpp, vLLM and mlx-lm."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...adapters.lora import LoRA, LowRank, is_low_rank
from ...trees.adapters import checked_adapters
from ...trees.paths import Tree, nested, raise_if_any
from ..files import Path, new_folder, write_json
from ..names import Names
from ..safetensors import write_safetensors
from .config import CONFIG_FILE, PREFIX
from .files import adapter_tensors
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
        path: type(x).__name__
        for path, x in adapters.items()
        if not (is_low_rank(x) and x.is_linear)
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


def _in_layer(module: str) -> str:
    """Returns a module's name within its layer, or its full name without a layer."""
    return _LAYER.sub("", module)
