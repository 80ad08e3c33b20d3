"""Calls functions of float experts with packed experts.

JAX traces the function. The traced program then runs with products of packed experts
instead of `lax.ragged_dot`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, primitives
from jaxtyping import Array, PyTree

from .._jax.jaxprs import bind, evaluate
from ..product.matmul import offsets_of
from ..quant.kernel import Kernel, as_kernel
from ..quant.qtensor import QTensor
from .base import Adapter
from .product import product

Backends = tuple[str, ...] | None


@dataclass(frozen=True)
class _ExpertsView:
    """Packed experts that stand in for their float weights in a traced program."""

    kernel: Kernel
    lora: Adapter | None
    # The kernel's axes in the order of the program's array. The axis of experts is
    # missing if there is a single expert and the program has squeezed the axis.
    axes: tuple[int, ...]
    dtype: np.dtype

    @property
    def float_weights(self) -> Array:
        """The decoded weights, as the array that the program expects."""
        kernel = self.kernel
        w = kernel.dequantize() if self.lora is None else self.lora.merged(kernel)
        squeezed = tuple({*range(w.ndim)} - {*self.axes})
        w = w.transpose(*squeezed, *self.axes).astype(self.dtype)
        return w.squeeze(range(len(squeezed)))

    def after(self, eqn: JaxprEqn) -> "_ExpertsView | None":
        """Returns the result of an operation as a view, or None if it cannot be one."""
        name = eqn.primitive.name
        if name == "transpose":
            axes = tuple(self.axes[axis] for axis in eqn.params["permutation"])
            return replace(self, axes=axes)
        if name == "convert_element_type" and self.dtype == self.kernel.dtype:
            return replace(self, dtype=eqn.params["new_dtype"])
        if name == "squeeze" and len(self.axes) == 3:
            removed = {self.axes[i] for i in eqn.params["dimensions"]}
            axes = tuple(axis for axis in self.axes if axis not in removed)
            is_single = self.kernel.matrix_shape[0] == 1
            is_matrix = self._roles(axes) in ("kn", "nk")
            return replace(self, axes=axes) if is_single and is_matrix else None
        return self._slice_experts(**eqn.params) if name == "slice" else None

    def _roles(self, axes: Sequence[int]) -> str:
        return "".join(self.kernel.geometry.roles(3)[axis] for axis in axes)

    def _slice_experts(
        self, start_indices: tuple, limit_indices: tuple, strides: tuple | None
    ) -> "_ExpertsView | None":
        """Returns a range of experts, or None for a slice along another axis."""
        q, shape = self.kernel, [self.kernel.shape[axis] for axis in self.axes]
        # Codes in host memory can only be read for one kernel at a time.
        if not isinstance(q, QTensor) or q.memory == "host" or len(shape) != 3:
            return None
        ranges = [*zip(start_indices, limit_indices, strides or (1,) * 3, strict=True)]
        expert_axis = self._roles(self.axes).index("b")
        if any(ranges[i] != (0, shape[i], 1) for i in {0, 1, 2} - {expert_axis}):
            return None

        def slice_arrays(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda a: a[slice(*ranges[expert_axis])], tree)

        q = replace(slice_arrays(q), placement=None)
        lora = self.lora
        if lora is not None:
            lora = slice_arrays(lora)
        return replace(self, kernel=q, lora=lora)

    def is_multiplied(self, eqn: JaxprEqn) -> bool:
        """Whether an operation is a product that packed experts support.

        This is a ragged product of rows with experts, or the product with one expert.
        """
        name, params = eqn.primitive.name, eqn.params
        # The packed product computes in the dtype of x, which must be that of w.
        has_same_dtype = getattr(eqn.invars[0].aval, "dtype", None) == self.dtype
        if not is_experts(self.kernel, self.lora):
            return False
        if name == "dot_general" and len(self.axes) == 2:
            (x_axes, w_axes), batch_axes = params["dimension_numbers"]
            dtype = params["preferred_element_type"] or self.dtype
            is_plain = len(x_axes) == 1 and not any(batch_axes) and dtype == self.dtype
            is_over_k = self._roles(self.axes)[w_axes[0]] == "k"
            return is_plain and has_same_dtype and is_over_k
        if name != "ragged_dot_general" or params["group_offset"]:
            return False
        # Requires x [M, K] with ragged rows, and w with the axes groups, K and N.
        numbers = params["ragged_dot_dimension_numbers"]
        (x_axes, w_axes), batch_axes = numbers.dot_dimension_numbers
        if not numbers.rhs_group_dimensions:
            return False
        (group,), k = numbers.rhs_group_dimensions, w_axes[0]
        n = 3 - group - k  # the remaining one of the axes 0, 1 and 2
        is_plain = tuple(x_axes) == (1,) and not any(batch_axes)
        has_ragged_rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
        roles = self._roles([self.axes[i] for i in (group, k, n)])
        return roles == "bkn" and is_plain and has_ragged_rows and has_same_dtype


def is_experts(kernel: PyTree, lora: Adapter | None) -> bool:
    """Whether a kernel is a stack of experts, `[E, K, N]` in some order."""
    kernel = as_kernel(kernel, lora and lora.geometry)
    return kernel.ndim == len(kernel.matrix_shape) == 3


def call_with_experts(
    fn: Callable[[list[Array]], PyTree],
    kernels: Sequence[tuple[PyTree, Adapter | None]],
    backend: Backends = None,
) -> PyTree:
    """Returns `fn(weights)` for the float weights of kernels with their adapters.

    Ragged products with packed experts use the packed weights. If `fn` uses weights in
    any other operation, they are decoded, and `fn` runs under `jax.checkpoint`, so that
    the backward pass decodes them again.
    """
    # 1. Trace the function for the shapes of the float weights.
    views = []
    for leaf, lora in kernels:
        kernel = as_kernel(leaf, lora and lora.geometry)
        views.append(_ExpertsView(kernel, lora, (*range(kernel.ndim),), kernel.dtype))
    weights = jax.eval_shape(lambda: [view.float_weights for view in views])
    program, out = jax.make_jaxpr(fn, return_shape=True)(weights)

    # 2. Run its program with views in place of the weights.
    decoded: list[_ExpertsView] = []

    def decode(value: Any) -> Any:
        if not isinstance(value, _ExpertsView):
            return value
        decoded.append(value)
        return value.float_weights

    def run_equation(eqn: JaxprEqn, values: list) -> list:
        view_indices = [i for i, x in enumerate(values) if isinstance(x, _ExpertsView)]
        if view_indices:
            view = values[view_indices[0]]
            if (after := view.after(eqn)) is not None:
                return [after]
            if view_indices == [1] and view.is_multiplied(eqn):
                return _multiply(backend, eqn, values)
        return bind(eqn, map(decode, values))

    # Views are passed into jitted functions, which may contain the products.
    def is_entered(eqn: JaxprEqn, values: list) -> bool:
        has_views = any(isinstance(x, _ExpertsView) for x in values)
        return has_views and eqn.primitive is primitives.jit_p

    def run() -> list:
        return [*map(decode, evaluate(program, views, run_equation, is_entered))]

    jax.eval_shape(run)  # shows whether any view must be decoded
    leaves = jax.checkpoint(run)() if decoded else run()
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _multiply(backend: Backends, eqn: JaxprEqn, values: list) -> list[Array]:
    x, view, *group_sizes = values
    kernel, params = view.kernel, eqn.params
    precision, dtype = params["precision"], params["preferred_element_type"]
    if group_sizes:
        offsets = offsets_of(group_sizes[0], x.shape[0], kernel.matrix_shape[0])
        y = product(x, kernel, view.lora, None, backend, precision, offsets, dtype)
    else:
        # One expert: [..., K] -> [1, ..., K], with a batch axis for its stack.
        ((k_axis,), _), _ = params["dimension_numbers"]
        rows = jnp.moveaxis(x, k_axis, -1)[None]
        y = product(rows, kernel, view.lora, None, backend, precision)[0]
    sharding = params["out_sharding"]
    return [y if sharding is None else jax.sharding.reshard(y, sharding)]
