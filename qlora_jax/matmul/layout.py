"""Lays out a product on a mesh.

Weights stay where they are, split over their outputs (column-parallel: nothing moves),
over K (row-parallel: one all-reduce), or over experts (one all-reduce: each device has
all rows, and multiplies those of its experts). If rows of `x` are split over the same
mesh axes (FSDP), each device gathers codes and scales in one all-gather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jax.sharding import PartitionSpec

from .._jax.specs import Axes, axes_of, fitting, make_spec, unused, ways
from .spec import ProductSpec


@dataclass(frozen=True)
class Split:
    """The mesh axes that split one axis of the weights."""

    kept: Axes = ()  # split it while a device multiplies
    gathered: Axes = ()  # first; the inner axes, so parts are contiguous

    @property
    def stored(self) -> Axes:
        """Mesh axes that split the stored axis."""
        return self.kept + self.gathered


@dataclass(frozen=True)
class Layout:
    """The parts that each device has, gathers, multiplies and reduces."""

    local: ProductSpec  # the product of one device's parts
    lead: tuple[Axes, ...]  # mesh axes of batch and rows, of x and the result
    batch: tuple[Axes, ...]  # mesh axes of the batch axes of the weights
    k: Split
    n: Split
    experts: Split = Split()

    @property
    def summed(self) -> Axes:
        """Mesh axes over which results are summed."""
        return self.contracted + self.experts.kept

    @property
    def contracted(self) -> Axes:
        """Mesh axes that split what is contracted."""
        return (self.n if self.local.transpose else self.k).kept

    @property
    def outputs(self) -> Axes:
        """Mesh axes that split the outputs."""
        return (self.k if self.local.transpose else self.n).kept

    @property
    def is_gathered(self) -> bool:
        """Whether a device gathers weights before it multiplies."""
        return any(part.gathered for part in (self.experts, self.k, self.n))

    @property
    def x(self) -> PartitionSpec:
        """Spec of x."""
        return make_spec(*self.lead, self.contracted)

    @property
    def weights(self) -> PartitionSpec:
        """Spec of codes and of scales, for a single kernel."""
        experts = [self.experts.stored] * self.local.is_ragged
        return make_spec(*self.batch, *experts, self.k.stored, self.n.stored)

    @property
    def result(self) -> PartitionSpec:
        """Spec of the result."""
        return make_spec(*self.lead, self.outputs)

    def __post_init__(self):
        for spec in (self.x, self.weights, self.result):
            axes = [a for entry in spec for a in axes_of(entry)]
            assert len(axes) == len(set(axes)), f"a mesh axis is used twice: {spec}"


def lay_out(
    spec: ProductSpec,
    sizes: Mapping[str, int],
    x_axes: Sequence[Axes],
    weight_axes: Sequence[Axes],
    x_shape: Sequence[int],
    scales_shape: Sequence[int],
) -> Layout:
    """Returns the layout; weights `[*batch, K, N]` are split over `weight_axes`."""
    batch, lead = [], []
    used: set[str] = set()
    for own, others, size in zip(
        weight_axes[: spec.batch], x_axes, scales_shape, strict=False
    ):
        batch.append(fitting(unused(own or others, used), sizes, size))
        used.update(batch[-1])
    *_, blocks, n = scales_shape
    # A device stores and multiplies whole blocks, as many as the others do.
    k_parts = blocks if spec.k == blocks * spec.block_size else 1
    stored_e: Axes = ()
    if spec.is_ragged:
        stored_e = fitting(weight_axes[-3], sizes, scales_shape[-3])
    stored_k = fitting(unused(weight_axes[-2], used | {*stored_e}), sizes, k_parts)
    stored = {*stored_e, *stored_k}
    stored_n = fitting(unused(weight_axes[-1], used | stored), sizes, n)
    stored.update(stored_n)

    for axes, size in zip(
        x_axes[spec.batch : -1], x_shape[spec.batch : -1], strict=True
    ):
        lead.append(fitting(unused(axes, used), sizes, size))
        used.update(lead[-1])

    def split(stored_axes: Axes, length: int = 1, is_contracted: bool = False) -> Split:
        kept = unused(stored_axes, used)
        if is_contracted and not stored_axes:
            # x is split along what is contracted, whole weights are cut to match.
            kept = fitting(unused(x_axes[-1], used | stored), sizes, length)
        return Split(kept, stored_axes[len(kept) :])

    k = split(stored_k, k_parts, not spec.transpose)
    n_split = split(stored_n, n, spec.transpose)
    local = replace(spec, k=spec.k // ways(sizes, k.kept), placement=None, mesh=None)
    return Layout(local, (*batch, *lead), tuple(batch), k, n_split, split(stored_e))
