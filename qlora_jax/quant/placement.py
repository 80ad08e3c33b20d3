"""How a packed kernel is sharded over Auto mesh axes.

With Explicit axes, types of arrays say it. With Auto axes nothing does until the
program is compiled, so a kernel carries its sharding as a static field.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, AxisType

from .._jax.specs import Axes


@dataclass(frozen=True)
class Placement:
    """The sharding of a packed kernel on a mesh, read where mesh axes are Auto.

    Written by `qlora_jax.sharding.place`. One that is out of date costs a reshard, not
    a wrong number.

    Attributes:
        sizes: Names and sizes of the mesh axes.
        kernel: The mesh axes that split each axis of the matrix form `[*batch, K, N]`.
            Read from the right, so that it fits a slice of a stack.
        rows: The mesh axes that split the input's row axes from the left: batch, then
            perhaps sequence.
    """

    sizes: tuple[tuple[str, int], ...]
    kernel: tuple[Axes, ...]
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
