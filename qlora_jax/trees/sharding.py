"""Puts base and lora trees on a mesh; packed kernels record their sharding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    reshard,
)
from jaxtyping import Array

from .._jax.memory import is_concrete
from .._jax.pytree import is_box
from .._jax.specs import Axes, SpecEntry, axes_of, make_spec, num_parts
from ..adapters.base import Adapter, replace_arrays, stored_axes
from ..adapters.config import first_match, settings_by_pattern, unmatched_by
from ..quant.kernel import Kernel, Placement, is_packed
from ..quant.qtensor import placed
from .adapters import checked_adapters
from .paths import (
    Leaf,
    Tree,
    boxed_by_path,
    leaves_by_path,
    map_by_path,
    raise_if_any,
)

__all__ = ["place"]

Spec = PartitionSpec | Sequence[SpecEntry]


def place(
    base: Tree,
    lora: Tree,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    specs: Tree | None = None,
    logical_axes: Mapping[str, SpecEntry] | None = None,
    rows: Sequence[SpecEntry] = (),
    memory: Literal["device", "host"] = "device",
) -> tuple[Tree, Tree]:
    """Returns the base and the lora tree on a mesh, with the same values.

    Codes and scales are split as the float kernel would be. Packed kernels also get a
    static `placement`: over Auto mesh axes, their products run as a `shard_map`, which
    gathers weights in packed form. A is split along K, and B along N, each over all the
    mesh axes that split K or N of the kernel, and so is the optimizer's state.

    It uses `jax.device_put` for arrays, and a sharding constraint inside `jit`. It sets
    the `sharding` of a `jax.ShapeDtypeStruct`, for `jit(...).lower` and checkpoints.

    Args:
        base: The base tree, of arrays or `jax.ShapeDtypeStruct`.
        lora: The lora tree.
        mesh: The mesh, with Auto axes, Explicit axes or both.
        rules: Specs by path pattern, for the shape of the float kernel. The first
            pattern that matches the full path is used. Other leaves are replicated.
        specs: Instead of rules, a tree like the float parameters, of PartitionSpecs or
            of boxes with names of axes, such as `nn.Partitioned`. By default, the boxes
            in `base` are used.
        logical_axes: Maps names in boxes that are not mesh axes to mesh axes, or to
            None for an axis that is not split.
        rows: The mesh axes that split the row axes of inputs: batch, then perhaps
            sequence. Each entry is one name, several names, or None.
        memory: Where the codes of packed stacks are stored between products. Stacks are
            kernels with an axis of layers, as in a scan. With "host", each product
            moves the codes of its layer to the device. "device" moves them back.

    Raises:
        TypeError: If `base` is a combined tree; if `rules` is not a dict of specs,
            `rows` is not a sequence, or the names in a box are a string; or if a leaf
            of `specs` is not a PartitionSpec, a box or an array. Arrays without a box
            are replicated.
        ValueError: If `rules` is combined with `specs` or `logical_axes`; if a rule is
            not a regular expression or matches no leaf, or `specs` has leaves that
            `base` lacks; if `rows` or a spec names an axis twice or one that the mesh
            lacks; if an adapter does not fit its kernel; if leaves cannot be split as
            requested (all are listed); or if `memory` is "host" and there is no packed
            stack, or the mesh has Explicit axes.
        NotImplementedError: If `memory` is "host" on a GPU.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> rules = {"kernel": P("fsdp", None)}
        >>> base, lora = ql.sharding.place(base, lora, mesh, rules, rows=["fsdp"])
        >>> tuple(base["kernel"].codes.sharding.spec)
        ('fsdp', None)
    """
    # 1. Check the arguments, and find the spec of each leaf.
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh. Got {type(mesh).__name__}."
        )
    checked_adapters(base, lora)  # raises an error if an adapter does not fit
    leaves = leaves_by_path(base)
    leaf_specs = _resolve_specs(base, rules, specs, logical_axes or {})
    row_axes = _checked_rows(mesh, rows)
    _check_memory(memory, mesh, leaves)
    # 2. Plan every leaf before any array moves, so that one error lists all problems.
    plans: dict[str, _Plan] = {}
    problems: dict[str, str] = {}
    for path, leaf in leaves.items():
        try:
            axes = _axes_on_mesh(mesh, leaf_specs.get(path, ()), leaf)
            leaf_memory = memory if _is_stack(leaf) else "device"
            plans[path] = _Plan(mesh, row_axes, axes, leaf_memory)
            plans[path].check(leaf)
        except ValueError as error:
            problems[path] = str(error)
    raise_if_any("these leaves cannot be split as asked", problems)
    # 3. Move the arrays.
    new_base = map_by_path(lambda path, leaf: plans[path].place_leaf(leaf), base)
    new_lora = map_by_path(lambda path, x: plans[path].place_adapter(x), lora)
    return new_base, new_lora


def _resolve_specs(
    base: Tree,
    rules: Mapping[str, PartitionSpec] | None,
    specs: Tree | None,
    logical_axes: Mapping[str, SpecEntry],
) -> dict[str, Spec]:
    # Rules come first, then a tree of specs, then the names in the boxes of `base`.
    if rules is not None and specs is not None:
        raise ValueError("`rules` and `specs` must not both be given. Got both.")
    if rules is not None and logical_axes:
        raise ValueError(
            "`logical_axes` must not be given with `rules`, which name mesh axes. Got "
            f"{logical_axes}."
        )
    leaves = boxed_by_path(base)
    if rules is not None:
        by_pattern = settings_by_pattern("rules", rules, _checked_spec)
        if unmatched := unmatched_by(by_pattern, leaves):
            raise ValueError(
                f"every rule must match a leaf. Got {unmatched}, which match none of "
                f"{sorted(leaves)}."
            )
        # () replicates
        return {path: first_match(by_pattern, path, ()) for path in leaves}
    spec_leaves = leaves if specs is None else boxed_by_path(specs)
    if unknown := sorted(set(spec_leaves) - set(leaves)):
        raise ValueError(
            f"`specs` must be a tree like `base`. Got leaves that it lacks: {unknown}."
        )
    by_path: dict[str, Spec] = {}
    for path, leaf in spec_leaves.items():
        if isinstance(leaf, PartitionSpec):
            by_path[path] = leaf
        elif is_box(leaf):
            if (names := getattr(leaf, "names", None)) is not None:
                by_path[path] = spec_of_names(path, names, logical_axes)
        elif specs is not None and not hasattr(leaf, "shape"):
            raise TypeError(
                "leaves of `specs` must be PartitionSpecs, or boxes with names of "
                f"axes. Got {type(leaf).__name__} at {path!r}."
            )
    return by_path


def _checked_spec(spec: object) -> Spec:
    # A string, for example, would be read letter by letter.
    if not isinstance(spec, PartitionSpec | tuple | list):
        raise TypeError(f"`rules` must map patterns to PartitionSpecs. Got {spec!r}.")
    return spec


def spec_of_names(
    path: str, names: Sequence, logical_axes: Mapping[str, SpecEntry]
) -> PartitionSpec:
    """Returns the spec of an array whose axes have these logical or mesh names."""
    if isinstance(names, str):
        raise TypeError(
            "names of axes must be a sequence, with an entry for each axis. Got "
            f"{names!r} at {path!r}."
        )

    def mesh_axes(name: Any) -> Axes:
        # An axis of the array may have several names, each for one or more mesh axes.
        if isinstance(name, tuple | list):
            return tuple(axis for part in name for axis in mesh_axes(part))
        return axes_of(logical_axes.get(name, name))

    return make_spec(*map(mesh_axes, names))


def _axes_on_mesh(mesh: Mesh, spec: Spec, leaf: Leaf) -> tuple[Axes, ...]:
    if not hasattr(leaf, "shape"):
        raise ValueError(f"it must be an array. Got {type(leaf).__name__}.")
    ndim = len(leaf.shape)
    axes = tuple(axes_of(entry) for entry in spec)
    names = [name for entry in axes for name in entry]
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(f"the mesh has axes {mesh.axis_names}. Got {unknown}.")
    if len({*names}) < len(names):
        raise ValueError(
            f"each mesh axis must split one axis at most. Got {tuple(spec)}."
        )
    if len(axes) > ndim:
        raise ValueError(f"a spec must have at most {ndim} entries. Got {tuple(spec)}.")
    return axes + ((),) * (ndim - len(axes))  # as in JAX, other axes are not split


def _checked_rows(mesh: Mesh, rows: Sequence[SpecEntry]) -> tuple[Axes, ...]:
    """Returns the mesh axes of each row axis; raises if they are not valid."""
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(
            f"`rows` must be a sequence, with an entry for each row axis. Got {rows!r}."
        )
    axes = tuple(axes_of(entry) for entry in rows)
    names = [name for entry in axes for name in entry]
    is_known = all(name in mesh.axis_names for name in names)
    if not is_known or len({*names}) < len(names):
        raise ValueError(
            f"`rows` must name axes of the mesh {mesh.axis_names}, each once. Got "
            f"{axes}."
        )
    return axes


def _check_memory(memory: str, mesh: Mesh, leaves: Mapping[str, Leaf]) -> None:
    if memory not in ("device", "host"):
        raise ValueError(f'`memory` must be "device" or "host". Got {memory!r}.')
    if memory == "device":
        return
    if jax.default_backend() == "gpu":
        raise NotImplementedError(
            '`memory` must be "device" on a GPU: packed kernels in host memory are not '
            "tested there, and XLA computed wrong gradients with other arrays in host "
            'memory (openxla/xla pull request 46231). Got "host".'
        )
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            '`memory` must be "device" where the mesh has Explicit axes. Got "host" '
            f"and {mesh.axis_types}. Make the axes Auto."
        )
    if not any(_is_stack(leaf) for leaf in leaves.values()):
        raise ValueError(
            '`memory` must be "device" where no kernel is a packed stack, since only '
            'stacks are moved, one layer at a time. Got "host".'
        )


def _is_stack(leaf: Leaf) -> bool:
    return is_packed(leaf) and leaf.is_stack


@dataclass(frozen=True)
class _Plan:
    """Splits one leaf of the base tree, and its adapter, over the mesh."""

    mesh: Mesh
    rows: tuple[Axes, ...]  # mesh axes of the inputs' rows
    axes: tuple[Axes, ...]  # mesh axes of each axis of the leaf
    memory: str  # where its codes are stored between products

    def check(self, leaf: Leaf) -> None:
        """Raises ValueError if the leaf cannot be split this way."""
        for axis, (axes, size) in enumerate(zip(self.axes, leaf.shape, strict=True)):
            self._check_divides(f"axis {axis} of {tuple(leaf.shape)}", axes, size)
        if not is_packed(leaf):
            return
        # Codes merge all contracted axes into K, and all outputs into N. Only parts of
        # the first of these axes are contiguous in the merged axis.
        geometry, ndim = leaf.geometry, len(leaf.shape)
        for axes in (geometry.axes(kind, ndim) for kind in "kn"):
            for axis in axes[1:]:
                if self.axes[axis]:
                    raise ValueError(
                        f"axes {axes} are stored as one axis, so only the first of "
                        f"them can be split. Got {self.axes[axis]} for axis {axis}. "
                        f"Split axis {axes[0]}."
                    )
        # A block has a single scale, so no block may be cut.
        k, k_axes = leaf.matrix_shape[-2], self._matrix_axes(leaf)[-2]
        blocks = leaf.scales.shape[-2]  # of [*batch, blocks, N]
        self._check_divides(
            f"the {blocks} blocks of {leaf.block_size} along K = {k}", k_axes, blocks
        )

    def _check_divides(self, label: str, axes: Axes, size: int) -> None:
        num_devices = num_parts(self.mesh.shape, axes)
        if size % num_devices:
            fit = [d for d in range(1, min(size, self.mesh.size) + 1) if size % d == 0]
            raise ValueError(
                f"{label} must divide among {num_devices} devices ({', '.join(axes)}). "
                f"Numbers of devices that would fit: {', '.join(map(str, fit))}."
            )

    def _matrix_axes(self, kernel: Kernel) -> tuple[Axes, ...]:
        # One tuple of mesh axes for each axis of the matrix form [*batch, K, N].
        spec = kernel.geometry.matrix_spec(self.axes, len(self.axes))
        return tuple(axes_of(entry) for entry in spec)

    def place_leaf(self, leaf: Leaf) -> Leaf:
        # A kernel in float, or trained through its quantizer, is one array.
        if not is_packed(leaf):
            return jax.tree.map(lambda array: self._put(array, self.axes), leaf)
        sizes, axes = (*self.mesh.shape.items(),), self._matrix_axes(leaf)
        return placed(leaf, self._put, Placement(sizes, axes, self.rows), self.memory)

    def place_adapter(self, lora: Adapter) -> Adapter:
        # K and N are split over all mesh axes of the kernel, where they divide.
        axes = stored_axes(lora, self.axes, self.mesh.shape)
        return replace_arrays(lora, lambda name, x: self._put(x, axes[name]))

    def _put(
        self,
        array: Array | jax.ShapeDtypeStruct,
        axes: Sequence[Axes],
        memory_kind: str | None = None,
    ) -> Array | jax.ShapeDtypeStruct:
        spec = make_spec(*axes)
        sharding = NamedSharding(self.mesh, spec, memory_kind=memory_kind)
        # Callers pass shapes for `jit(...).lower`, or to read checkpoints into them.
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        # Under jit, only `device_put` can change the memory of an array.
        if is_concrete(array) or memory_kind is not None:
            return jax.device_put(array, sharding)
        if {*self.mesh.axis_types} == {AxisType.Explicit}:
            return reshard(array, sharding)
        return lax.with_sharding_constraint(array, sharding)
