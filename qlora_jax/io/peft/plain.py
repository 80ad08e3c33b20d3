"""LoRA as files for servers hold it: by module, with one alpha."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...adapters.lora import LoRA
from ...trees.paths import Tree
from ..names import Names
from .adapter_config import PREFIX, PeftConfig
from .adapter_file import array_keys
from .describe import pattern_of, peft_config
from .portable import portable
from .write import adapter_tensors


@dataclass(frozen=True)
class PlainLoRA:
    """Adapters by module, as the files of llama.cpp and of mlx-lm hold them.

    `load_peft` takes one in the place of a folder.

    Attributes:
        alpha: The scaling of each module is this over its rank.
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
        """Returns a lora tree in this form, as `portable` makes it.

        Args:
            base: The base tree, or its shapes.
            lora: The lora tree.
            names: The names of the leaves of `base` in the Hugging Face model.

        Raises:
            ValueError: If an adapter is not LoRA or does not fit its kernel.
        """
        lora = portable(base, lora)
        config = peft_config(base, lora, names)
        if config.target_parameters:
            raise ValueError(
                "the file must hold adapters of modules: export others in the format "
                f"merged. Got {list(config.target_parameters)}."
            )
        factors: dict[str, dict[str, np.ndarray]] = {}
        for key, x in adapter_tensors(base, lora, names, config).items():
            module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
            factors.setdefault(module, {})[kind[0].lower()] = x
        return cls(config.lora_alpha, factors, config.lora_dropout)

    def to_peft(self) -> tuple[PeftConfig, dict[str, np.ndarray]]:
        """Returns the settings and the tensors that PEFT would store."""
        tensors, ranks = {}, {}
        for module, own in self.factors.items():
            keys = array_keys(LoRA, module)
            tensors |= {keys[name]: x for name, x in own.items()}
            sizes = own["a"].shape if "a" in own else own["b"].shape[::-1]
            ranks[module] = (*sizes, 0)[0]
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        config = PeftConfig(
            r=rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=tuple(self.factors),
            rank_pattern=pattern_of(ranks, rank),
        )
        return config, tensors
