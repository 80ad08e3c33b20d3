"""`init` for linen models."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from ..adapters.config import QLoRAConfig
from ..quant.qtensor import QTensor
from ..trees.init import init_targets
from ..trees.paths import Tree
from ..trees.targets import find_targets
from .trace import trace_kinds
from .wrap import WrappedModel


def init(
    key: Any,
    model: nn.Module | WrappedModel,
    params: Tree,
    config: QLoRAConfig,
    *args: Any,
    other_variables: Mapping | None = None,
    donate: bool = False,
    **kwargs: Any,
) -> tuple[Tree, dict]:
    """Quantizes and adapts a model's targets, as `qlora_jax.init`.

    One abstract trace of `model.apply` (nothing is computed) tells which axes of each
    kernel are contracted, so `config.contract` is needed only for modules that read
    their kernels themselves and contract another axis than -2.

    Args:
        key: PRNG key for A.
        model: The model, wrapped or not.
        params: Its parameters.
        config: What to target, and how.
        *args: Arguments of a call; arrays may be shapes (`jax.ShapeDtypeStruct`).
        other_variables: The model's other collections, such as `"batch_stats"`.
        donate: As in `qlora_jax.init`.
        **kwargs: Passed to `model.apply`.

    Returns:
        The base tree and the lora tree.

    Raises:
        ValueError: As `qlora_jax.init`; and if a target belongs to no module that the
            call runs, is contracted in several ways, is stacked along another axis
            than 0, or, with dropout, is read by its module itself: all of those are
            named in the same error.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.DenseGeneral((4, 16)), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> base["kernel"].shape, lora["kernel"].b.shape
        ((64, 4, 16), (4, 64))
    """
    module = model.module if isinstance(model, WrappedModel) else model
    kinds, problems = trace_kinds(
        module, params, config, args, kwargs, other_variables or {}
    )
    targets = find_targets(params, config, kinds, problems, accept=(QTensor,))
    return init_targets(key, params, config, targets, donate=donate)
