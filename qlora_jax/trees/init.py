"""`init`: packs the targets of a tree and gives each an adapter."""

from collections.abc import Mapping
from typing import Any

import jax

from ..adapters.config import QLoRAConfig
from ..adapters.initializers import init_lora
from .paths import Tree, leaves_by_path, nested
from .quantize import freeze_targets
from .targets import find_targets


def init(
    key: Any,
    params: Tree,
    config: QLoRAConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    problems: Mapping[str, str] | None = None,
    donate: bool = False,
) -> tuple[Tree, dict]:
    """Quantizes the targets of a parameter tree and gives each an adapter.

    Args:
        key: PRNG key for A.
        params: Any pytree of arrays; boxes such as `nn.Partitioned` are taken off the
            targets.
        config: What to target, and how.
        kinds: As in `find_targets`; the Flax doors give it.
        problems: As in `find_targets`; likewise.
        donate: Delete each targeted float array once it is quantized, so that memory
            peaks at the float tree plus one packed leaf. Does nothing under jit, to
            NumPy arrays, or where targets stay in float. Arrays that stand at two paths
            are refused.

    Returns:
        The base tree (as `params`, frozen kernels at the targets) and the lora tree.

    Raises:
        ValueError: As `find_targets`, or if `donate` is set and a target shares its
            array with another leaf; before any work is done.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}, "norm": jnp.ones(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> base["q_proj"]["kernel"].fmt, lora["q_proj"]["kernel"].rank
        ('nf4', 4)
    """
    geometries = find_targets(params, config, kinds, problems)
    base = freeze_targets(params, config, geometries, donate, pack=config.freeze_base)
    kernels = leaves_by_path(base)
    adapters = {}
    keys = jax.random.split(key, len(geometries))
    for key, (path, geometry) in zip(keys, geometries.items(), strict=True):
        shape = jax.eval_shape(geometry.to_matrix, _shape_of(kernels[path])).shape
        adapters[path] = init_lora(
            key,
            shape,
            geometry,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            dropout=config.dropout,
            dtype=config.lora_dtype,
        )
    return base, nested(adapters)


def _shape_of(kernel):
    return jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
