"""Puts the two trees on a mesh; packed kernels record their sharding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from .._jax.memory import is_concrete
from .._jax.specs import Axes, axes_of, make_spec, ways
from ..adapters.base import Adapter, replace_arrays, stored_axes
from ..quant.kernel import Kernel, is_packed
from ..quant.placement import Placement
from ..quant.qtensor import placed
from .adapters import adapters_by_path
from .partition_specs import axes_on_mesh, specs_by_path
from .paths import Tree, leaves_by_path, map_by_path, nested, refuse_listed

__all__ = ["place"]


def place(
    base: Tree,
    lora: Tree,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    specs: Tree | None = None,
    logical_axes: Mapping[str, str | Sequence[str] | None] | None = None,
    rows: Sequence[str | Sequence[str] | None] = (),
    memory: Literal["device", "host"] = "device",
) -> tuple[Tree, dict]:
    """Returns the base and the lora tree on a mesh, with the same values.

    Codes and scales are split as the float kernel would be. Packed kernels also get a
    static `placement`: over Auto mesh axes, their products run as a `shard_map`, and
    weights are gathered packed. A is split along K and B along N, over all mesh axes of
    the kernel, and so is the optimizer's state.

    With `memory="host"`, the codes of packed stacks are in host memory: kernels with an
    axis of layers, as in a model whose layers run in a scan. A product moves the codes
    of its layer to the device. `memory="device"` moves them back.

    Works on arrays (`jax.device_put`), inside `jit` (a sharding constraint), and on
    `jax.ShapeDtypeStruct`, which come back with their `sharding` set, for
    `jit(...).lower` and checkpoint readers.

    Args:
        base: The base tree, of arrays or `jax.ShapeDtypeStruct`.
        lora: The lora tree.
        mesh: The mesh, with Auto axes, Explicit axes or both.
        rules: Specs by path pattern, for the shape of the float kernel, not of codes.
            The first pattern that matches the full path is used. Leaves that no rule
            matches are replicated.
        specs: In place of rules, a tree like the float parameters: PartitionSpecs, or
            boxes that hold names, such as `nn.Partitioned`. By default the boxes in
            `base`.
        logical_axes: Mesh axes of the names in boxes that are not mesh axes; None for
            an axis that is not split.
        rows: The mesh axes that split the row axes of inputs: batch, then perhaps
            sequence. Each entry is a name, several, or None.
        memory: Where the codes of packed stacks are between products.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If `rules` and `specs` are both given; if a rule matches no leaf or
            `specs` has other leaves than `base`; if `rows` or a spec names an axis that
            the mesh lacks, or one twice; if an adapter does not fit its kernel; if
            leaves cannot be split as asked (all are listed); or if `memory` is "host"
            and there is no packed stack, or the mesh has Explicit axes.
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
    adapters = adapters_by_path(base, lora)
    row_axes = tuple(axes_of(entry) for entry in rows)
    leaves = leaves_by_path(base)
    wanted = specs_by_path(base, rules, specs, logical_axes or {})
    _check_rows(mesh, row_axes)
    _check_memory(memory, mesh, leaves)
    plans: dict[str, _Plan] = {}
    problems: dict[str, str] = {}
    for path, leaf in leaves.items():
        try:
            axes = axes_on_mesh(mesh, wanted.get(path, ()), leaf)
            own = memory if _is_stack(leaf) else "device"
            plan = _Plan(mesh, row_axes, axes, own)
            plan.check(leaf)
            plans[path] = plan
        except ValueError as error:
            problems[path] = str(error)
    refuse_listed("these leaves cannot be split as asked", problems)
    placed = map_by_path(lambda path, leaf: plans[path].leaf(leaf), base)
    return placed, nested(
        {path: plans[path].adapter(x) for path, x in adapters.items()}
    )


def _check_rows(mesh: Mesh, rows: tuple[Axes, ...]) -> None:
    names = [name for axes in rows for name in axes]
    if not {*names} <= {*mesh.axis_names} or len({*names}) < len(names):
        raise ValueError(
            f"`rows` must name axes of the mesh {mesh.axis_names}, each once. Got "
            f"{rows}."
        )


def _check_memory(memory: str, mesh: Mesh, leaves: Mapping[str, Any]) -> None:
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
            '`memory` must be "device" where no kernel is a packed stack, of which one '
            'layer at a time is moved. Got "host".'
        )


def _is_stack(leaf: Any) -> bool:
    return is_packed(leaf) and leaf.is_stack


@dataclass(frozen=True)
class _Plan:
    """Splits one leaf of the base tree, and its adapter, over the mesh."""

    mesh: Mesh
    rows: tuple[Axes, ...]  # mesh axes of the inputs' rows
    axes: tuple[Axes, ...]  # mesh axes of each axis of the leaf
    memory: str  # where its codes are between products

    def check(self, leaf: Any) -> None:
        """Raises ValueError if the leaf cannot be split so."""
        for axis, (axes, size) in enumerate(zip(self.axes, leaf.shape, strict=True)):
            self._check_divides(f"axis {axis} of {tuple(leaf.shape)}", axes, size)
        if not is_packed(leaf):
            return
        geometry, ndim = leaf.geometry, len(leaf.shape)
        for axes in (geometry.axes(kind, ndim) for kind in "kn"):
            for axis in axes[1:]:
                if self.axes[axis]:
                    raise ValueError(
                        f"axes {axes} are stored as one, of which only the first can "
                        f"be split. Got {self.axes[axis]} for axis {axis}. Split axis "
                        f"{axes[0]}."
                    )
        k, k_axes = leaf.matrix_shape[-2], self._matrix_axes(leaf)[-2]
        if k_axes and k % leaf.block_size:
            raise ValueError(
                f"K = {k} is not a whole number of blocks of {leaf.block_size}, so it "
                f"cannot be split. Got {k_axes}. Split the outputs."
            )
        blocks = leaf.scales.shape[-2]
        self._check_divides(
            f"the {blocks} blocks of {leaf.block_size} along K = {k}", k_axes, blocks
        )

    def _check_divides(self, what: str, axes: Axes, size: int) -> None:
        parts = ways(self.mesh.shape, axes)
        if size % parts:
            fit = [d for d in range(1, min(size, self.mesh.size) + 1) if size % d == 0]
            raise ValueError(
                f"{what} must divide among {parts} devices ({', '.join(axes)}). Numbers"
                f" of devices that would fit: {', '.join(map(str, fit))}."
            )

    def _matrix_axes(self, kernel: Kernel) -> tuple[Axes, ...]:
        """Mesh axes of the matrix form `[*batch, K, N]`."""
        spec = kernel.geometry.matrix_spec(self.axes, len(self.axes))
        return tuple(axes_of(entry) for entry in spec)

    def leaf(self, leaf: Any) -> Any:
        if not is_packed(leaf):
            return jax.tree.map(lambda a: self._put(a, self.axes), leaf)
        sizes, axes = (*self.mesh.shape.items(),), self._matrix_axes(leaf)
        return placed(leaf, self._put, Placement(sizes, axes, self.rows), self.memory)

    def adapter(self, lora: Adapter) -> Adapter:
        axes = stored_axes(lora, self.axes, self.mesh.shape)
        return replace_arrays(lora, lambda name, x: self._put(x, axes[name]))

    def _put(
        self, array: Any, axes: Sequence[Axes], memory_kind: str | None = None
    ) -> Any:
        spec = make_spec(*axes)
        sharding = NamedSharding(self.mesh, spec, memory_kind=memory_kind)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        if is_concrete(array) or memory_kind is not None:
            return jax.device_put(array, sharding)
        if {*self.mesh.axis_types} == {AxisType.Explicit}:
            return reshard(array, sharding)
        return lax.with_sharding_constraint(array, sharding)
