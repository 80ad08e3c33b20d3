"""Finds the targets of a config in a tree."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from .._jax.pytree import is_tree_leaf
from ..adapters.config import (
    QLoRAConfig,
    check_config,
    is_table,
    matches,
    setting_patterns,
    unmatched_by,
)
from ..quant.geometry import UNKNOWN_AXES, Contract, Geometry, roles_fit
from ..quant.kernel import Kernel, as_kernel
from ..quant.pack import check_kernel, check_values
from .paths import Leaf, raise_if_any


def find_targets(
    leaves: Mapping[str, Leaf],
    config: QLoRAConfig,
    axis_roles: Mapping[str, str] | None = None,
    problems: Mapping[str, str] | None = None,
    *,
    accept: Callable[[Kernel], bool] = lambda kernel: False,
) -> dict[str, Geometry]:
    """Returns the geometry of each target; raises one error for all problems."""
    # An integration passes what it knows, by path: `axis_roles` replace the config's
    # `contract` (see `Geometry.kinds`), and `problems` has reasons why some leaves
    # cannot be targets. Float arrays can be targets, and kernels that `accept` accepts.
    check_config(config)
    targets = {path: x for path, x in leaves.items() if config.is_target(path)}
    _check_patterns(leaves, targets, config)
    # Check every target before any work, and report all problems at once.
    geometries: dict[str, Geometry] = {}
    problems = dict(problems or {})
    for path, leaf in targets.items():
        try:
            # A `weight` may be [in, out] or [out, in]. Only an integration knows which
            # of the two.
            is_weight = path.rpartition("/")[2] == "weight" and not is_tree_leaf(leaf)
            if axis_roles is None and is_weight and config.contract_of(path) is None:
                raise ValueError(UNKNOWN_AXES)
            leaf_roles = (axis_roles or {}).get(path)
            geometries[path] = _checked_geometry(path, leaf, config, leaf_roles, accept)
            shape = geometries[path].matrix_shape(leaf.shape)
            _check_merged(as_kernel(leaf), shape[-2], config)
        except (TypeError, ValueError) as error:
            problems.setdefault(path, str(error))
    raise_if_any("these leaves cannot be targets", problems)
    trained = {path: x for path, x in leaves.items() if config.is_trained(path)}
    raise_if_any(
        "leaves that are trained in full must be float arrays. Got",
        [f"{path}: {_label(x)}" for path, x in trained.items() if not _is_float(x)],
    )
    tables = {path: x for path, x in leaves.items() if config.rows_of(path)}
    raise_if_any(
        "`trainable_rows` do not fit these leaves",
        {path: _rows_problem(x, config.rows_of(path)) for path, x in tables.items()},
    )
    return geometries


def _check_patterns(
    leaves: Mapping[str, Leaf], targets: Mapping[str, Leaf], config: QLoRAConfig
) -> None:
    if not targets and not config.trainable and not config.trainable_rows:
        raise ValueError(
            f"`targets` must match at least one leaf. Got targets={config.targets!r}, "
            f"exclude={config.exclude!r}, which match none of {sorted(leaves)}."
        )
    # `QLoRAConfig` stores single patterns as tuples.
    settings: Any = config.targets, config.exclude, config.trainable
    patterns = itertools.chain(*settings, config.trainable_rows)
    if unmatched := unmatched_by(patterns, leaves):
        raise ValueError(
            "every pattern of `targets`, `exclude`, `trainable` and `trainable_rows` "
            f"must match a leaf. Got {unmatched}, which match none of {sorted(leaves)}."
        )
    if unmatched := unmatched_by(setting_patterns(config), targets):
        raise ValueError(
            "patterns of `rank_pattern`, `alpha_pattern` and `contract` must "
            f"match a target. Got {unmatched}, which match none of {sorted(targets)}."
        )


def _check_merged(kernel: Kernel, k: int, config: QLoRAConfig) -> None:
    """Raises ValueError if `merge_aware` needs a packing that does not fit K."""
    packing = config.merged_packing(kernel.packing or config.packing)
    if packing is not None:
        try:
            packing.check_rows(k)
        except ValueError as error:
            raise ValueError(
                f"merged kernels in {packing.fmt!r} have blocks of "
                f"{packing.block_size}, which must divide the contracted size. Got {k}."
            ) from error


def _rows_problem(leaf: Leaf, rows: tuple[int, ...] | None) -> str | None:
    kernel, shape = as_kernel(leaf), getattr(leaf, "shape", ())
    if kernel.geometry.kinds != "kn" or len(shape) < 2 or kernel.is_trained:
        return f"it must be a table [V, D]. Got {_label(leaf)} {tuple(shape)}."
    if not rows or rows[-1] >= leaf.shape[-2]:  # rows are sorted
        return f"rows must be below {leaf.shape[-2]}. Got {rows}."
    return None


def _is_float(leaf: Leaf) -> bool:
    # Leaves may also be Python numbers, which have no dtype.
    is_array = hasattr(leaf, "dtype") and not is_tree_leaf(leaf)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def _label(leaf: Leaf) -> str:
    return as_kernel(leaf).label if hasattr(leaf, "dtype") else type(leaf).__name__


def _checked_geometry(
    path: str,
    leaf: Leaf,
    config: QLoRAConfig,
    axis_roles: str | None,
    accept: Callable[[Kernel], bool],
) -> Geometry:
    contract = config.contract_of(path)
    if axis_roles is not None:
        # A config may turn output axes of a module into batch axes.
        is_refinement = isinstance(contract, str) and roles_fit(contract, axis_roles)
        contract = contract if is_refinement else axis_roles
    # Leaves that are kernels already keep their geometry and packing.
    if accept(as_kernel(leaf)):
        _check_accepted(leaf, config, contract, is_module=axis_roles is not None)
        return leaf.geometry
    if is_tree_leaf(leaf):
        raise TypeError(f"it is a kernel already. Got {type(leaf).__name__}.")
    check_kernel(leaf)
    geometry = Geometry.contracting(-2 if contract is None else contract, leaf.shape)
    if config.packing is not None:
        check_values(leaf, config.packing, geometry)
    return geometry


def _check_accepted(
    kernel: Kernel, config: QLoRAConfig, contract: Contract | None, *, is_module: bool
) -> None:
    # A packed kernel has no float weights to train.
    if not kernel.is_trained and not config.freeze_base:
        raise ValueError("it is packed already; `freeze_base` must be True.")
    if kernel.is_trained and (packing := kernel.packing) is not None:
        if packing != config.packing:
            raise ValueError(
                f"it is trained through {packing}; the config has {config.packing}."
            )
        check_values(kernel.value, packing, kernel.geometry)
    if contract is None:
        return
    expected = Geometry.contracting(contract, kernel.shape).roles(kernel.ndim)
    stored = kernel.geometry.roles(kernel.ndim)
    # A config may have turned output axes of the module into batch axes.
    if stored != expected and not (is_module and roles_fit(stored, expected)):
        raise ValueError(
            f"it is packed with axes {stored!r} (b batch, k contracted, n output), but "
            f"the {'module' if is_module else 'config'} has {expected!r}."
        )


def refuse_tables(paths: Iterable[str]) -> None:
    """Raises ValueError for targets that are embedding tables."""
    raise_if_any(
        "embedding tables cannot have adapters: exclude them, or match them in "
        "`trainable_rows` or `trainable`. Got",
        [path for path in paths if is_table(path)],
    )


def check_adapter_sizes(
    leaves: Mapping[str, Leaf], config: QLoRAConfig, geometries: Mapping[str, Geometry]
) -> None:
    """Raises ValueError if adapters are so large that `contract` is probably wrong."""
    problems = []
    for path, geometry in geometries.items():
        shape = tuple(leaves[path].shape)
        *_, k, n = geometry.matrix_shape(shape)
        # A and B have rank * (K + N) entries, which is always more than K * N if K or N
        # is 1. For kernels of three axes or more, the default of `contract` is often
        # wrong, and a large adapter is a sign of it. Other large adapters are allowed.
        is_default = len(shape) > 2 and config.contract_of(path) is None
        is_rejected = min(k, n) == 1 or (
            is_default and config.rank_of(path) * (k + n) > k * n
        )
        if k * n and is_rejected and not matches(config.rank_pattern, path):
            problems.append(
                f"{path}: shape {shape} with axes {geometry.roles(len(shape))!r} (b "
                f"batch, k contracted, n output) is [{k}, {n}] in matrix form"
            )
    raise_if_any(
        "these adapters would be larger than their kernels. Set the contracted axes in "
        "`contract`, exclude these kernels, or match them in `rank_pattern`",
        problems,
    )
