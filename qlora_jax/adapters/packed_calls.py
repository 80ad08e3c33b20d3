"""Functions of float experts whose ragged products are computed with packed ones.

JAX traces the function, and its program is run with products of packed experts in the
place of `lax.ragged_dot`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, primitives
from jaxtyping import Array

from ..matmul.ragged import offsets_of
from ..quant.kernel import Kernel, as_kernel
from .base import Adapter
from .product import product


@dataclass(frozen=True)
class _Weights:
    """Packed experts where a function has their float weights."""

    kernel: Kernel
    lora: Adapter | None
    axes: tuple[int, ...]  # those of the kernel, in the order of the function's
    dtype: Any

    @property
    def in_float(self) -> Array:
        """The weights that the function has."""
        kernel = self.kernel
        w = kernel.dequantize() if self.lora is None else self.lora.merged(kernel)
        return w.transpose(self.axes).astype(self.dtype)

    def after(self, eqn: Any) -> "_Weights | None":
        """The experts that an operation returns; None if it computes something else."""
        name = eqn.primitive.name
        if name == "transpose":
            axes = tuple(self.axes[axis] for axis in eqn.params["permutation"])
            return replace(self, axes=axes)
        if name == "convert_element_type" and self.dtype == self.kernel.dtype:
            return replace(self, dtype=eqn.params["new_dtype"])
        return None

    def is_multiplied(self, eqn: Any) -> bool:
        """Whether an operation is the ragged product of rows with the experts."""
        if eqn.primitive.name != "ragged_dot_general" or eqn.params["group_offset"]:
            return False
        if not is_experts(self.kernel, self.lora):
            return False
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (x_axes, (k, *more)), batch = numbers.dot_dimension_numbers
        (group,) = numbers.rhs_group_dimensions or (k,)
        n = 3 - group - k
        roles = [self.kernel.geometry.roles(3)[self.axes[i]] for i in (group, k, n)]
        is_plain = (*x_axes, more, *batch) == (1, [], (), ())
        of_rows = tuple(numbers.lhs_ragged_dimensions) == (0,)
        same = eqn.invars[0].aval.dtype == self.dtype
        return roles == ["b", "k", "n"] and is_plain and of_rows and same


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

    def look(jaxpr: Jaxpr, eqn: Any, values: list) -> list:
        del jaxpr
        decoded.extend(value for value in values if isinstance(value, _Weights))
        return [None] * len(eqn.outvars)

    look_on = lambda eqn, values: [None]
    results = _run(program.jaxpr, operands, look, look_on)
    decoded.extend(value for value in results if isinstance(value, _Weights))
    multiply = functools.partial(_multiply, backend)
    run = lambda: list(map(_value, _run(program.jaxpr, operands, _compute, multiply)))
    leaves = jax.checkpoint(run)() if decoded else run()
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _run(
    jaxpr: Jaxpr,
    operands: Sequence[Any],
    compute: Callable[[Jaxpr, Any, list], Sequence[Any]],
    multiply: Callable[[Any, list], Sequence[Any]],
) -> list[Any]:
    """Runs a program in which some values are views of experts.

    `multiply` computes ragged products with those, and `compute` other operations.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        places = [i for i, value in enumerate(values) if isinstance(value, _Weights)]
        view = values[places[0]] if places else None
        if view is None:
            results = compute(jaxpr, eqn, values)
        elif eqn.primitive is primitives.jit_p:
            inner = eqn.params["jaxpr"]
            results = _run(inner.jaxpr, [*inner.consts, *values], compute, multiply)
        elif (after := view.after(eqn)) is not None:
            results = [after]
        elif places == [1] and view.is_multiplied(eqn):
            results = multiply(eqn, values)
        else:
            results = compute(jaxpr, eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _value(value: Any) -> Any:
    return value.in_float if isinstance(value, _Weights) else value


def _compute(jaxpr: Jaxpr, eqn: Any, values: list) -> list[Any]:
    """Computes one operation, with float weights of experts."""
    pairs = zip(eqn.invars, values, strict=True)
    known = {atom: _value(x) for atom, x in pairs if not isinstance(atom, Literal)}
    parts = {"constvars": [], "invars": [*known], "outvars": eqn.outvars}
    jaxpr = jaxpr.replace(**parts, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*known.values())


def _multiply(backend: Any, eqn: Any, values: list) -> list[Any]:
    x, view, sizes = values
    kernel, settings = view.kernel, eqn.params
    offsets = offsets_of(sizes, x.shape[0], kernel.matrix_shape[0])
    precision, result = settings["precision"], settings["preferred_element_type"]
    y = product(x, kernel, view.lora, None, backend, precision, offsets, result)
    sharding = settings["out_sharding"]
    return [y if sharding is None else jax.sharding.reshard(y, sharding)]
