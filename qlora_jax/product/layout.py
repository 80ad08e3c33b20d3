"""Decides how a product is split over a mesh.

Weights that are split over their outputs (column-parallel) need no communication.
Weights that are split over K (row-parallel) or over experts need one all-reduce of the
result. With experts, each device has all rows and multiplies those of its own experts.
Weights are moved only if the same mesh axes also split the rows of `x` (FSDP): each
device then gathers codes and scales in one all-gather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jax.sharding import PartitionSpec

from .._jax.specs import (
    AnyMesh,
    Axes,
    axes_of,
    dividing_prefix,
    free_prefix,
    make_spec,
    num_parts,
)
from .spec import ProductSpec


@dataclass(frozen=True)
class Split:
    """The mesh axes that split one axis of the weights."""

    active: Axes = ()  # those that still split it during the multiplication
    # Those over which parts are gathered first. They are the innermost axes, so that
    # the gathered parts are contiguous.
    gathered: Axes = ()

    @property
    def stored(self) -> Axes:
        """The mesh axes that split the stored axis."""
        return self.active + self.gathered


@dataclass(frozen=True)
class Layout:
    """Which parts each device stores, gathers, multiplies and sums."""

    local: ProductSpec  # the product of one device's parts
    lead: tuple[Axes, ...]  # mesh axes of batch and rows
    batch: tuple[Axes, ...]  # mesh axes of the batch axes of the weights
    k: Split
    n: Split
    experts: Split = Split()
    mesh: AnyMesh | None = None  # of the `shard_map`, over the axes in `axis_names`
    axis_names: frozenset[str] = frozenset()

    @property
    def summed(self) -> Axes:
        """The mesh axes over which results are summed."""
        # A device computes zeros for the rows of other devices' experts.
        return self.contracted + self.experts.active

    @property
    def contracted(self) -> Axes:
        """The mesh axes that split the contracted axis."""
        return (self.n if self.local.transpose else self.k).active

    @property
    def is_gathered(self) -> bool:
        """Whether a device gathers weights before it multiplies."""
        return any(part.gathered for part in (self.experts, self.k, self.n))

    @property
    def x(self) -> PartitionSpec:
        """The spec of the input."""
        return make_spec(*self.lead, self.contracted)

    @property
    def weights(self) -> PartitionSpec:
        """The spec of the codes and scales of one layer."""
        experts = [self.experts.stored] * self.local.is_ragged
        return make_spec(*self.batch, *experts, self.k.stored, self.n.stored)

    @property
    def result(self) -> PartitionSpec:
        """The spec of the result."""
        return make_spec(
            *self.lead, (self.k if self.local.transpose else self.n).active
        )

    def __post_init__(self):
        for spec in (self.x, self.weights, self.result):
            axes = [axis for entry in spec for axis in axes_of(entry)]
            assert len(axes) == len(set(axes)), f"a mesh axis is used twice: {spec}"


def lay_out(
    spec: ProductSpec,
    sizes: Mapping[str, int],
    x_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    x_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> Layout:
    """Returns the layout for weights `[*batch, K, N]` that `weight_axes` split.

    `sizes` has the size of each mesh axis. `scales_shape` is `[*batch, blocks, N]`, or
    `[E, blocks, N]` if the product is ragged.
    """
    # A mesh axis can split only one axis of an array. Mesh axes are assigned in order
    # of priority: batch, stored weights, rows of x and y. If a mesh axis splits both
    # the rows and the stored weights, the weights are gathered over it.
    used: set[str] = set()

    # 1. Batch axes, which all arrays share.
    batch: list[Axes] = []
    batch_axes = zip(weight_axes[: spec.batch], x_axes, scales_shape, strict=False)
    for weight_entry, x_entry, length in batch_axes:
        axes = free_prefix(weight_entry or x_entry, used)
        batch.append(dividing_prefix(axes, sizes, length))
        used.update(batch[-1])

    # 2. The stored weights. K is split between blocks.
    *_, num_blocks, n = scales_shape
    stored_experts: Axes = ()
    if spec.is_ragged:
        stored_experts = dividing_prefix(weight_axes[-3], sizes, scales_shape[-3])
    stored_k = dividing_prefix(
        free_prefix(weight_axes[-2], used | {*stored_experts}), sizes, num_blocks
    )
    stored = {*stored_experts, *stored_k}
    stored_n = dividing_prefix(free_prefix(weight_axes[-1], used | stored), sizes, n)
    stored.update(stored_n)

    # 3. The rows of x and y.
    rows: list[Axes] = []
    row_slice = slice(spec.batch, -1)
    for entry, length in zip(x_axes[row_slice], x_shape[row_slice], strict=True):
        rows.append(dividing_prefix(free_prefix(entry, used), sizes, length))
        used.update(rows[-1])

    # 4. The weights during the multiplication: only axes that the rows do not use.
    def split(stored_axes: Axes, length: int = 1, is_contracted: bool = False) -> Split:
        active = free_prefix(stored_axes, used)
        if is_contracted and not stored_axes:
            # If only x is split along the contracted axis, the weights are split to
            # match.
            axes = free_prefix(x_axes[-1], used | stored)
            active = dividing_prefix(axes, sizes, length)
        return Split(active, stored_axes[len(active) :])

    k_split = split(stored_k, num_blocks, not spec.transpose)
    n_split = split(stored_n, n, spec.transpose)
    local_k = spec.k // num_parts(sizes, k_split.active)
    local = replace(spec, k=local_k, placement=None, mesh=None, is_local=True)
    lead = *batch, *rows
    return Layout(local, lead, tuple(batch), k_split, n_split, split(stored_experts))
