"""Functions of float experts whose ragged products are computed with packed ones.

JAX traces the function, and its program is run with products of packed experts in the
place of `lax.ragged_dot`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, primitives
from jaxtyping import Array

from .._jax.jaxprs import bind, run_program
from ..matmul.ragged import offsets_of
from ..quant.kernel import Kernel, as_kernel
from ..quant.qtensor import QTensor
from .base import Adapter, sliced
from .product import product


@dataclass(frozen=True)
class _Weights:
    """Packed experts where a function has their float weights."""

    kernel: Kernel
    lora: Adapter | None
    # Those of the kernel, in the order of the function's; without that of a single
    # expert, where the function has no axis for it.
    axes: tuple[int, ...]
    dtype: Any

    @property
    def in_float(self) -> Array:
        """The weights that the function has."""
        kernel = self.kernel
        w = kernel.dequantize() if self.lora is None else self.lora.merged(kernel)
        single = tuple({*range(w.ndim)} - {*self.axes})
        w = w.transpose(*single, *self.axes).astype(self.dtype)
        return w.squeeze(range(len(single)))

    def after(self, eqn: Any) -> "_Weights | None":
        """The experts that an operation returns; None if it computes something else."""
        name = eqn.primitive.name
        if name == "transpose":
            axes = tuple(self.axes[axis] for axis in eqn.params["permutation"])
            return replace(self, axes=axes)
        if name == "convert_element_type" and self.dtype == self.kernel.dtype:
            return replace(self, dtype=eqn.params["new_dtype"])
        if name == "squeeze" and len(self.axes) == 3:
            gone = {self.axes[i] for i in eqn.params["dimensions"]}
            axes = tuple(axis for axis in self.axes if axis not in gone)
            is_single = self.kernel.matrix_shape[0] == 1
            is_matrix = self._roles(axes) in ("kn", "nk")
            return replace(self, axes=axes) if is_single and is_matrix else None
        return self._cut(**eqn.params) if name == "slice" else None

    def _roles(self, axes: Sequence[int]) -> str:
        return "".join(self.kernel.geometry.roles(3)[axis] for axis in axes)

    def _cut(self, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
        """Experts that are next to each other; None for a slice along another axis."""
        q, shape = self.kernel, [self.kernel.shape[axis] for axis in self.axes]
        if not isinstance(q, QTensor) or q.memory == "host" or len(shape) != 3:
            return None
        ends = [*zip(start_indices, limit_indices, strides or (1,) * 3, strict=True)]
        expert = self._roles(self.axes).index("b")
        if any(ends[i] != (0, shape[i], 1) for i in {0, 1, 2} - {expert}):
            return None
        cut = lambda tree: jax.tree.map(lambda a: a[slice(*ends[expert])], tree)
        q = replace(cut(q), placement=None)
        lora = self.lora
        if lora is not None and not lora.is_shared:
            lora = cut(sliced(lora))
        return replace(self, kernel=q, lora=lora)

    def is_multiplied(self, eqn: Any) -> bool:
        """Whether an operation is the product of rows with experts, or with one."""
        name, same = eqn.primitive.name, eqn.invars[0].aval.dtype == self.dtype
        if not is_experts(self.kernel, self.lora):
            return False
        if name == "dot_general" and len(self.axes) == 2:
            (x_axes, w_axes), batch = eqn.params["dimension_numbers"]
            result = eqn.params["preferred_element_type"] or self.dtype
            is_plain = (len(x_axes), *batch) == (1, (), ()) and result == self.dtype
            return is_plain and same and self._roles(self.axes)[w_axes[0]] == "k"
        if name != "ragged_dot_general" or eqn.params["group_offset"]:
            return False
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (x_axes, (k, *more)), batch = numbers.dot_dimension_numbers
        (group,) = numbers.rhs_group_dimensions or (k,)
        n = 3 - group - k
        is_plain = (*x_axes, more, *batch) == (1, [], (), ())
        of_rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
        roles = self._roles([self.axes[i] for i in (group, k, n)])
        return roles == "bkn" and is_plain and of_rows and same


def is_experts(kernel: Any, lora: Adapter | None) -> bool:
    """Whether a kernel is a stack of experts, `[E, K, N]` in some order."""
    kernel = as_kernel(kernel, lora and lora.geometry)
    return kernel.ndim == len(kernel.matrix_shape) == 3


def call_with_experts(
    fn: Callable[[list[Array]], Any],
    kernels: Sequence[tuple[Any, Adapter | None]],
    backend: str | tuple[str, ...] | None = None,
) -> Any:
    """Returns `fn(weights)` of the float weights of kernels and their adapters.

    Ragged products with packed experts are computed as they are, packed. If `fn` uses
    weights in another way, it gets them, and runs under `jax.checkpoint`: the backward
    pass decodes them again.
    """
    known = [
        (as_kernel(kernel, lora and lora.geometry), lora) for kernel, lora in kernels
    ]
    views = [_Weights(q, lora, (*range(q.ndim),), q.dtype) for q, lora in known]
    weights = jax.eval_shape(lambda: [view.in_float for view in views])
    program, out = jax.make_jaxpr(fn, return_shape=True)(weights)
    operands = [*program.consts, *views]
    decoded: list[_Weights] = []

    def look(eqn: Any, values: list) -> list:
        decoded.extend(value for value in values if isinstance(value, _Weights))
        return [None] * len(eqn.outvars)

    results = _run(program.jaxpr, operands, look, lambda eqn, values: [None])
    decoded.extend(value for value in results if isinstance(value, _Weights))
    compute = lambda eqn, values: bind(eqn, map(_value, values))
    multiply = functools.partial(_multiply, backend)
    run = lambda: list(map(_value, _run(program.jaxpr, operands, compute, multiply)))
    leaves = jax.checkpoint(run)() if decoded else run()
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _run(
    jaxpr: Jaxpr,
    operands: Sequence[Any],
    compute: Callable[[Any, list], Sequence[Any]],
    multiply: Callable[[Any, list], Sequence[Any]],
) -> list[Any]:
    """Runs a program in which some values are views of experts.

    `multiply` computes ragged products with those, and `compute` other operations.
    """

    def one(eqn: Any, values: list) -> Sequence[Any]:
        places = [i for i, value in enumerate(values) if isinstance(value, _Weights)]
        if not places:
            return compute(eqn, values)
        view = values[places[0]]
        if eqn.primitive is primitives.jit_p:
            inner = eqn.params["jaxpr"]
            return _run(inner.jaxpr, [*inner.consts, *values], compute, multiply)
        if (after := view.after(eqn)) is not None:
            return [after]
        is_product = places == [1] and view.is_multiplied(eqn)
        return (multiply if is_product else compute)(eqn, values)

    return run_program(jaxpr, operands, one)


def _value(value: Any) -> Any:
    return value.in_float if isinstance(value, _Weights) else value


def _multiply(backend: Any, eqn: Any, values: list) -> list[Any]:
    x, view, *sizes = values
    kernel, settings = view.kernel, eqn.params
    precision, result = settings["precision"], settings["preferred_element_type"]
    if sizes:
        offsets = offsets_of(sizes[0], x.shape[0], kernel.matrix_shape[0])
        y = product(x, kernel, view.lora, None, backend, precision, offsets, result)
    else:
        ((axis,), _), _ = settings["dimension_numbers"]
        rows = jnp.moveaxis(x, axis, -1)[None]
        y = product(rows, kernel, view.lora, None, backend, precision)[0]
    sharding = settings["out_sharding"]
    return [y if sharding is None else jax.sharding.reshard(y, sharding)]
