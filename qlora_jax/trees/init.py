"""`init` packs the targets of a tree and gives each an adapter."""

from collections.abc import Mapping

import jax

from .._jax.arguments import check_key
from .._jax.memory import check_donated
from ..adapters.base import Adapter
from ..adapters.config import QLoRAConfig
from ..adapters.create import new_adapter
from ..quant.geometry import Geometry
from ..quant.kernel import as_kernel, is_packed
from .paths import (
    KeyPath,
    Leaf,
    Tree,
    leaves_by_path,
    map_by_keys,
    nested_by_keys,
    path_string,
)
from .quantize import as_base_leaf, largest_weights_of
from .targets import check_adapter_sizes, find_targets, refuse_tables


def init(
    key: jax.Array, params: Tree, config: QLoRAConfig, *, donate: bool = False
) -> tuple[Tree, dict]:
    """Quantizes the targets of a parameter tree and gives each an adapter.

    Targets become `QTensor` leaves (QLoRA, Dettmers et al. 2023, section 3). Each
    adapter initially adds nothing, as in LoRA (Hu et al. 2021, section 4.1): B is zero,
    and A is drawn from `U(-1/sqrt(K), 1/sqrt(K))`, PEFT's Kaiming-uniform default.
    Targets that are already packed (`QTensor`) keep their packing and get an adapter
    too. For shapes, use `jax.eval_shape(lambda key, params: ql.init(key, params,
    config), key, params)`.

    Args:
        key: PRNG key for A.
        params: Any pytree of arrays, which may be in boxes such as `nn.Partitioned`.
            Targets are bfloat16, float16, float32 or float64 and have at least two
            axes.
        config: Selects the targets, and sets how they are packed and adapted.
        donate: Delete each targeted float array once it is quantized, so that memory
            peaks at the float tree plus one packed leaf. Has no effect under jit, on
            NumPy arrays, or where targets stay in float.

    Returns:
        The base tree and the lora tree. The base tree is `params` with a kernel at each
        target: a QTensor, a StraightThrough if `config.freeze_base` is False, or the
        float array if `config.fmt` is None. The lora tree is a nested dict with an
        adapter at the path of each target, a `Trained` at the path of each leaf that
        `config.trainable` matches, and a `TrainedRows` for `config.trainable_rows`.

    Raises:
        TypeError: If `key` is not a PRNG key, or `config` is not a QLoRAConfig.
        ValueError: Before any work: if a pattern matches nothing; if leaves that match
            cannot be targets (not a float array, too few axes, a weight that is not
            finite, a float array called `weight` without `config.contract`), all listed
            with the reason; if a target that `rank_pattern` does not match has a K or N
            of 1, or has three axes or more, no match in `contract` and fewer weights
            than its adapter; if two paths have the same spelling; or if a donated
            target shares its array with another leaf.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}, "norm": jnp.ones(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> base["q_proj"]["kernel"].fmt, lora["q_proj"]["kernel"].rank
        ('nf4', 4)
    """
    return check_and_init(key, params, config, donate=donate)


def check_and_init(
    key: jax.Array,
    params: Tree,
    config: QLoRAConfig,
    axis_roles: Mapping[str, str] | None = None,
    problems: Mapping[str, str] | None = None,
    *,
    donate: bool,
) -> tuple[Tree, dict]:
    """Checks the arguments as `find_targets` does, and returns the two trees."""
    check_key("key", key)
    leaves = leaves_by_path(params)
    geometries = find_targets(leaves, config, axis_roles, problems, accept=is_packed)
    refuse_tables(geometries)
    # An integration passes the roles of axes. Without them, a huge adapter is a sign
    # that the contracted axes were guessed wrong.
    if axis_roles is None:
        check_adapter_sizes(leaves, config, geometries)
    if donate and config.freeze_base and config.packing is not None:
        check_donated(leaves, geometries)
    return init_targets(key, params, config, geometries, donate=donate)


def init_targets(
    key: jax.Array,
    params: Tree,
    config: QLoRAConfig,
    geometries: Mapping[str, Geometry],
    *,
    donate: bool,
) -> tuple[Tree, dict]:
    """Packs and adapts checked targets one by one, and deletes donated arrays."""
    keys = iter(jax.random.split(key, len(geometries)))
    adapters: dict[KeyPath, Adapter] = {}
    leaves = leaves_by_path(params)
    largest = largest_weights_of(leaves, geometries, config.packing)

    def init_leaf(key_path: KeyPath, leaf: Leaf) -> Leaf:
        path = path_string(key_path)
        is_target, geometry = path in geometries, geometries.get(path)
        if not (is_target or config.is_trained(path) or config.rows_of(path)):
            return leaf
        kernel = as_kernel(leaf, geometry)
        if is_target and not kernel.is_packed:
            leaf = as_base_leaf(kernel, config, largest.get(path), donate=donate)
        # DoRA's magnitudes are the norms of the packed weights.
        base_kernel = as_kernel(leaf, geometry)
        # Only the adapters of targets have random values; the others ignore their key.
        adapter_key = next(keys) if is_target else key
        adapters[key_path] = new_adapter(adapter_key, base_kernel, config, path)
        return leaf

    return map_by_keys(init_leaf, params), nested_by_keys(adapters)
