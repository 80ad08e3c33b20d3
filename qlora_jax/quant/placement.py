"""The sharding of a packed kernel over Auto mesh axes.

Types of arrays name Explicit axes alone, and shardings over Auto axes are not known
while a program is traced: so they are a static field of the kernel.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, AxisType

from .._jax.specs import Axes


@dataclass(frozen=True)
class Placement:
    """The sharding of a packed kernel on a mesh, read where mesh axes are Auto.

    One that is out of date costs a reshard, not a wrong number.
    """

    sizes: tuple[tuple[str, int], ...]  # names and sizes of the mesh axes
    # The mesh axes of each axis of the matrix form `[*batch, K, N]`. Read from the
    # right, so that it fits a slice of a stack.
    kernel: tuple[Axes, ...]
    # The mesh axes of the row axes of the input: batch, then perhaps sequence.
    rows: tuple[Axes, ...] = ()

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh, with Auto axes."""
        names, sizes = zip(*self.sizes, strict=True)
        return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))

    def matrix_axes(self, ndim: int) -> tuple[Axes, ...]:
        """The mesh axes of a matrix form with `ndim` axes."""
        missing = ndim - len(self.kernel)
        return ((),) * missing + self.kernel[max(-missing, 0) :]

    def row_axes(self, count: int) -> tuple[Axes, ...]:
        """The mesh axes of an input's `count` row axes."""
        return (self.rows + ((),) * count)[:count]
