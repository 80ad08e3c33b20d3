"""`init` for linen models."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._jax.memory import is_concrete
from ..adapters.config import QLoRAConfig, check_config
from ..trees.init import init_checked
from ..trees.paths import Tree
from .trace import trace_kinds
from .wrapped import WrappedModel, linen_module


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
    """Returns a model's parameters with quantized targets, and a tree of adapters.

    Like `qlora_jax.init`, but one abstract trace of `model.apply` finds the contracted
    axes. `config.contract` is only needed where another axis than -2 is contracted by a
    module that reads its kernel itself, or by an nnx module (`nnx.bridge.ToLinen`).

    Args:
        key: PRNG key for A.
        model: The model, wrapped or not.
        params: Its parameters. Inside `jax.eval_shape` they may be shapes.
        config: What to target, and how.
        *args: Arguments of a sample call; arrays may be shapes
            (`jax.ShapeDtypeStruct`).
        other_variables: The model's other collections, such as `"batch_stats"`.
        donate: As in `qlora_jax.init`.
        **kwargs: Keyword arguments of the sample call, passed to `model.apply`.

    Raises:
        TypeError: If `key` is not a PRNG key, `model` is not a linen module, or
            `config` is not a `QLoRAConfig`.
        ValueError: As `qlora_jax.init`; and for targets that belong to no module that
            the call runs, are contracted in several ways, stacked along another axis
            than 0, transformed by `nn.map_variables`, differentiated by `nn.jvp` or,
            with dropout, read by their module itself. All are named. Also if the model
            holds a `QLoRADense`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.DenseGeneral((4, 16)), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> base["kernel"].shape, lora["kernel"].b.shape
        ((64, 4, 16), (4, 64))
    """
    module = linen_module(model)
    check_config(config)
    params = _with_arrays(params)
    kinds, problems = trace_kinds(
        module, params, config, args, kwargs, other_variables or {}
    )
    return init_checked(key, params, config, kinds, problems, donate=donate)


def _with_arrays(params: Tree) -> Tree:
    """Replaces shapes by zeros under a trace, where zeros take no memory."""
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    if not any(map(is_shape, jax.tree.leaves(params))):
        return params
    if is_concrete(jnp.zeros(())):  # there is no trace: `init` refuses shapes
        return params
    zeros = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
    return jax.tree.map(zeros, params)
