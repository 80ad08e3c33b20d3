"""Maps kernels of any rank to stacks of `[K, N]` matrices.

Blocks run along the contracted axes, so a kernel is stored as `[*batch, K, N]`: K runs
over its contracted axes and N over its output axes, each in the kernel's order.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .._jax.modes import call_in_auto_mode
from .._jax.specs import AnyMesh, SpecEntry, fitting_spec, spec_of

Contract = int | Sequence[int] | str

# A `weight` is [out, in] in PyTorch and Equinox, and [in, out] elsewhere. If it is
# square, a wrong guess would silently transpose the kernel.
UNKNOWN_AXES = (
    '`contract` must say which axes of a float weight are contracted: "nk" for '
    '[out, in], "kn" for [in, out]. Got None.'
)


def check_contract(contract: Contract) -> tuple[int, ...] | str:
    """Returns `contract` as a tuple of axes, or as roles; raises if it is invalid."""
    if isinstance(contract, str):
        if not set(contract) <= set("bkn") or "k" not in contract:
            raise ValueError(
                "the roles of a kernel's axes must be letters: b (batch), k "
                "(contracted) and n (output), with at least one k. Got "
                f"{contract!r}."
            )
        return contract
    try:
        indices = contract if isinstance(contract, Sequence) else (contract,)
        axes = tuple(operator.index(axis) for axis in indices)
    except TypeError:
        axes = ()
    if not axes or max(axes) >= 0 or len(set(axes)) < len(axes):
        raise ValueError(
            "contracted axes must be negative integers (scan and vmap change the "
            f"number of leading axes). Got {contract}."
        )
    return axes


@dataclass(frozen=True)
class Geometry:
    """The roles of a kernel's trailing axes, b (batch), k (contracted) and n (output).

    Axes in front of those, as `nn.scan` adds, are batch axes. If a scan or a vmap has
    sliced the kernel, its first batch axes are missing. The attribute `kinds` has the
    roles of the trailing axes of the whole kernel, and `roles` those of all axes.
    """

    kinds: str = "kn"
    # The size of each axis, or -1 for batch axes, the first k and the first n. Sizes
    # of -1 are derived from the stored arrays, so that slicing and sharding cannot make
    # them stale. If an axis of the kernel has size 0, only batch axes have -1.
    sizes: tuple[int, ...] = (-1, -1)

    @classmethod
    def of(cls, kinds: str, shape: Sequence[int]) -> "Geometry":
        """Returns the geometry of a kernel of `shape` whose last axes are `kinds`."""
        if "k" not in kinds:
            raise ValueError(f"a kernel must have a contracted axis. Got {kinds=}.")
        if len(shape) < len(kinds):
            raise ValueError(
                f"a kernel must have at least {len(kinds)} axes. Got shape "
                f"{tuple(shape)}."
            )
        trailing = shape[len(shape) - len(kinds) :]
        derived = {kinds.find("k"), kinds.find("n")}
        if 0 in trailing:  # a product of sizes that is 0 does not determine them
            derived = set()
        sizes = tuple(
            -1 if i in derived or kind == "b" else int(size)
            for i, (kind, size) in enumerate(zip(kinds, trailing, strict=True))
        )
        return cls(kinds, sizes)

    @classmethod
    def contracting(cls, contract: Contract, shape: Sequence[int]) -> "Geometry":
        """Returns the geometry of a kernel of `shape` from `QLoRAConfig.contract`.

        Axes after the first contracted axis that are not contracted are outputs. If
        there are none, the axis in front of it is the output: -1 means `[out, in]`.
        """
        contract = check_contract(contract)
        if isinstance(contract, str):
            return cls.of(contract, shape)
        kinds = "".join("k" if i in contract else "n" for i in range(min(contract), 0))
        return cls.of(kinds if "n" in kinds else "n" + kinds, shape)

    def axes(self, kind: str, ndim: int) -> list[int]:
        """Positions of the axes with one role in a kernel of `ndim` axes."""
        return [i for i, role in enumerate(self.roles(ndim)) if role == kind]

    def roles(self, ndim: int) -> str:
        """The role of every axis of a kernel of `ndim` axes."""
        num_leading = ndim - len(self.kinds)
        if num_leading >= 0:
            return "b" * num_leading + self.kinds
        return self.kinds.replace("b", "", -num_leading)  # the first ones are sliced

    def batch_ndim(self, kernel_ndim: int) -> int:
        """Number of batch axes of a kernel with that many axes."""
        return self.roles(kernel_ndim).count("b")

    def _permutation(self, ndim: int) -> list[int]:
        # The kernel's axes in the order of the matrix form: all b, then all k, then n.
        return [axis for kind in "bkn" for axis in self.axes(kind, ndim)]

    def to_matrix(self, kernel: Array) -> Array:
        """Returns the kernel as `[*batch, K, N]`."""
        order = self._permutation(kernel.ndim)
        shape = self.matrix_shape(kernel.shape)
        if order != sorted(order):
            kernel = jnp.transpose(kernel, order)
        return kernel if kernel.shape == shape else kernel.reshape(shape)

    def from_matrix(self, matrix: Array) -> Array:
        """Inverts `to_matrix`: a kernel in its shape, from `[*batch, K, N]`."""
        shape = self.kernel_shape(matrix.shape)
        order = self._permutation(len(shape))
        permuted = tuple(shape[a] for a in order)
        if matrix.shape != permuted:
            matrix = matrix.reshape(permuted)
        if order == sorted(order):
            return matrix
        return jnp.transpose(matrix, [order.index(a) for a in sorted(order)])

    def matrix_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the matrix form of a kernel of shape `kernel_shape`."""
        ndim = len(kernel_shape)
        order = self._permutation(ndim)
        batch = (kernel_shape[a] for a in order[: self.batch_ndim(ndim)])
        k, n = (math.prod(kernel_shape[a] for a in self.axes(c, ndim)) for c in "kn")
        return (*batch, k, n)

    def kernel_shape(self, matrix_shape: Sequence[int]) -> tuple[int, ...]:
        """The kernel's own shape, from the shape `(*batch, K, N)` of its matrix."""
        *batch, k, n = matrix_shape
        pairs = [x for x in zip(self.kinds, self.sizes, strict=True) if x[0] != "b"]
        batch_sizes, stored_sizes = iter(batch), iter(pairs)
        shape = []
        for role in self.roles(len(batch) + len(pairs)):
            if role == "b":
                shape.append(next(batch_sizes))
                continue
            _, size = next(stored_sizes)
            if size == -1:
                # K, or N, divided by the sizes of its other axes.
                others = math.prod(s for c, s in pairs if c == role and s != -1)
                size = (k if role == "k" else n) // max(others, 1)
            shape.append(size)
        return tuple(shape)

    def matrix_spec(self, spec: Sequence[SpecEntry], ndim: int) -> PartitionSpec:
        """Returns the PartitionSpec of the matrix form, from the kernel's `spec`."""
        # K and N merge several axes. The reshape keeps only the split of the first one.
        padded = [*spec, *[None] * (ndim - len(spec))]
        order = self._permutation(ndim)
        batch = [padded[a] for a in order[: self.batch_ndim(ndim)]]
        firsts = [self.axes(kind, ndim)[:1] for kind in "kn"]
        return PartitionSpec(*batch, *[padded[a[0]] if a else None for a in firsts])

    def kernel_spec(self, spec: Sequence[SpecEntry], ndim: int) -> PartitionSpec:
        """Inverts `matrix_spec`: the spec of a kernel of `ndim` axes."""
        entries: list[SpecEntry] = [None] * ndim
        order = self._permutation(ndim)
        batch_ndim = self.batch_ndim(ndim)
        for axis, entry in zip(order[:batch_ndim], spec[:batch_ndim], strict=True):
            entries[axis] = entry
        for kind, entry in zip("kn", spec[batch_ndim:], strict=True):
            for axis in self.axes(kind, ndim)[:1]:
                entries[axis] = entry
        return PartitionSpec(*entries)


def roles_fit(stored: str, required: str) -> bool:
    """Whether stored roles equal the required ones, except that b may replace n."""
    pairs = zip(stored, required, strict=False)
    is_allowed = all(s == r or (s, r) == ("b", "n") for s, r in pairs)
    return is_allowed and len(stored) == len(required)


def to_matrix(geometry: Geometry, w: Array) -> Array:
    """Returns `geometry.to_matrix(w)` for weights that may have Explicit mesh axes."""

    def matrix_spec(mesh: AnyMesh) -> PartitionSpec:
        spec = geometry.matrix_spec(spec_of(w), w.ndim)
        return fitting_spec(mesh, spec, geometry.matrix_shape(w.shape))

    return call_in_auto_mode(geometry.to_matrix, matrix_spec, w)
