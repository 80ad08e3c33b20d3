"""Decides how a product is split over a mesh.

Weights that are split over their outputs (column-parallel) need no communication.
Weights that are split over K (row-parallel) or over experts need one all-reduce of the
result. With experts, each device has all rows and multiplies those of its own experts.
Weights are moved only if the same mesh axes also split the rows of `x` (FSDP): each
device then gathers codes and scales in one all-gather. Float weights are not gathered
in this way: they are resharded before the `shard_map`, as it needs them.
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
from .spec import OPERANDS, ArrayName, ProductSpec


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
    lead: tuple[Axes, ...]  # mesh axes of batch and rows, in x and y
    batch: tuple[Axes, ...]  # mesh axes of the batch axes of the weights
    k: Split
    n: Split
    experts: Split = Split()
    mesh: AnyMesh | None = None  # of the `shard_map`, over the axes in `axis_names`
    axis_names: frozenset[str] = frozenset()

    @property
    def summed(self) -> Axes:
        """The mesh axes over which results are summed."""
        if self.local.output == "w":
            return self.contracted
        # A device computes zeros for the rows of other devices' experts.
        return self.contracted + self.experts.active

    @property
    def contracted(self) -> Axes:
        """The mesh axes that split the contracted axes."""
        rows = self.lead[len(self.batch) :]
        contracted = {"y": self.k.active, "x": self.n.active, "w": sum(rows, ())}
        return contracted[self.local.output]

    @property
    def is_gathered(self) -> bool:
        """Whether a device gathers weights before it multiplies."""
        return any(part.gathered for part in (self.experts, self.k, self.n))

    def spec_of(self, name: ArrayName) -> PartitionSpec:
        """Returns the spec of x, y, or the weights without an axis of layers."""
        if name != "w":
            return make_spec(*self.lead, (self.k if name == "x" else self.n).active)
        experts = [self.experts.stored] * self.local.is_ragged
        return make_spec(*self.batch, *experts, self.k.stored, self.n.stored)

    @property
    def left(self) -> PartitionSpec:
        """The spec of the left operand."""
        return self.spec_of(OPERANDS[self.local.output][0])

    @property
    def right(self) -> PartitionSpec:
        """The spec of the right operand, such as codes and scales of one layer."""
        return self.spec_of(OPERANDS[self.local.output][1])

    @property
    def result(self) -> PartitionSpec:
        """The spec of the result."""
        return self.spec_of(self.local.output)

    def __post_init__(self):
        for spec in (self.left, self.right, self.result):
            axes = [axis for entry in spec for axis in axes_of(entry)]
            assert len(axes) == len(set(axes)), f"a mesh axis is used twice: {spec}"


def lay_out(
    spec: ProductSpec,
    sizes: Mapping[str, int],
    left_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    left_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> Layout:
    """Returns the layout for weights `[*batch, K, N]` that `weight_axes` split.

    `sizes` has the size of each mesh axis. `scales_shape` is `[*batch, blocks, N]`, or
    `[E, blocks, N]` if the product is ragged. Each row of float weights counts as a
    block.
    """
    # A mesh axis can split only one axis of an array. Mesh axes are assigned in order
    # of priority: batch, stored weights, rows of x and y. If a mesh axis splits both
    # the rows and the stored weights, the weights are gathered over it.
    used: set[str] = set()

    # 1. Batch axes, which all arrays share.
    batch: list[Axes] = []
    batch_axes = zip(weight_axes[: spec.batch], left_axes, scales_shape, strict=False)
    for weight_entry, left_entry, length in batch_axes:
        axes = free_prefix(weight_entry or left_entry, used)
        batch.append(dividing_prefix(axes, sizes, length))
        used.update(batch[-1])

    # 2. The stored weights. All devices store and multiply the same number of complete
    #    blocks, so K is not split (`k_parts` is 1) if the last block is partial.
    *_, num_blocks, n = scales_shape
    k_parts = num_blocks if spec.k == num_blocks * spec.block_size else 1
    stored_experts: Axes = ()
    if spec.is_ragged:
        stored_experts = dividing_prefix(weight_axes[-3], sizes, scales_shape[-3])
    stored_k = dividing_prefix(
        free_prefix(weight_axes[-2], used | {*stored_experts}), sizes, k_parts
    )
    stored = {*stored_experts, *stored_k}
    stored_n = dividing_prefix(free_prefix(weight_axes[-1], used | stored), sizes, n)
    stored.update(stored_n)

    # 3. The rows of x and y.
    rows: list[Axes] = []
    row_slice = slice(spec.batch, -1)
    for entry, length in zip(left_axes[row_slice], left_shape[row_slice], strict=True):
        rows.append(dividing_prefix(free_prefix(entry, used), sizes, length))
        used.update(rows[-1])

    # 4. The weights during the multiplication: only axes that the rows do not use.
    def split(stored_axes: Axes, length: int = 1, is_contracted: bool = False) -> Split:
        active = free_prefix(stored_axes, used)
        if is_contracted and not stored_axes:
            # If only the left operand is split along the contracted axis, the weights
            # are split to match.
            axes = free_prefix(left_axes[-1], used | stored)
            active = dividing_prefix(axes, sizes, length)
        return Split(active, stored_axes[len(active) :] if spec.packed_as else ())

    k_split = split(stored_k, k_parts, spec.output == "y")
    n_split = split(stored_n, n, spec.output == "x")
    local_k = spec.k // num_parts(sizes, k_split.active)
    local = replace(spec, k=local_k, placement=None, mesh=None, weight_axes=None)
    lead = *batch, *rows
    return Layout(local, lead, tuple(batch), k_split, n_split, split(stored_experts))
