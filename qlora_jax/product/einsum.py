"""Einsum with a kernel on the right: rearrange `x`, multiply, rearrange back."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from ..quant.geometry import Geometry, roles_fit
from ..quant.qtensor import QTensor
from .matmul import as_float, check_packed, matmul


def einsum(
    equation: str,
    x: Float[Array, "..."],
    q: QTensor,
    *,
    backend: str | Sequence[str] | None = None,
    precision: PrecisionLike = None,
) -> Float[Array, "..."]:
    """Returns `jnp.einsum(equation, x, dequantize(q))` in `x.dtype`, as `matmul` does.

    Args:
        equation: An explicit equation of two operands, where x may have an ellipsis.
        x: The left operand, a floating-point array.
        q: The quantized kernel. The equation must contract the axes along which it was
            quantized (`contract`).
        backend: As in `matmul`.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `q` is not a QTensor, or `x` is not floating-point.
        ValueError: If the equation is not of this form or does not match the shapes, or
            if the back end is unknown.
        NotImplementedError: As in `matmul`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> q = ql.quantize(jnp.ones((64, 2, 8)), contract=-3)
        >>> ql.einsum("BTD,DNH->BTNH", jnp.ones((1, 3, 64)), q).shape
        (1, 3, 2, 8)
    """
    check_packed(q)
    if not isinstance(equation, str):
        raise TypeError(f"`equation` must be a string. Got {type(equation).__name__}.")
    x = as_float(x)
    parsed = parse_equation(equation, x.ndim, q.ndim)
    if reason := why_no_fit(parsed, x.shape, q.shape):
        raise ValueError(reason)

    def multiply(rows: Array) -> Array:
        return matmul(rows, q, backend=backend, precision=precision)

    return through_matrix(parsed, q.geometry, x, q.shape, multiply)


class Equation(NamedTuple):
    """The labels of an einsum with two operands, without an ellipsis."""

    x: str
    kernel: str
    out: str

    @property
    def kinds(self) -> str:
        """The kind of each axis of the kernel, as in `Geometry`."""
        return "".join(
            "k" if label not in self.out else "b" if label in self.x else "n"
            for label in self.kernel
        )


def split_equation(equation: str) -> Equation:
    """Splits an equation into its labels, without expanding an ellipsis."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    x, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel or "." in kernel:
        raise ValueError(
            "an einsum must be an explicit equation of two operands, x and the kernel, "
            f"with no ellipsis in the kernel. Got {equation!r}."
        )
    return Equation(x, kernel, out)


def parse_equation(equation: str, x_ndim: int, kernel_ndim: int) -> Equation:
    """Reads an equation such as `"BTD,NDH->BTNH"` or `"...D,DF->...F"`."""
    # An ellipsis becomes labels that the equation does not use.
    x, kernel, out = split_equation(equation)
    unused = iter(sorted(set("abcdefghijklmnopqrstuvwxyz") - set(equation)))
    if "..." in x:
        missing = x_ndim - len(x.replace("...", ""))
        labels = "".join(next(unused) for _ in range(max(missing, 0)))
        x, out = x.replace("...", labels), out.replace("...", labels)
    parsed = Equation(x, kernel, out)
    for part, ndim in zip(parsed, (x_ndim, kernel_ndim, len(out)), strict=True):
        if len(part) != ndim or len(set(part)) != ndim or "." in part:
            raise ValueError(
                "`equation` must have one label for each axis, and an ellipsis only in "
                f"x and the result. Got {equation!r} for {x_ndim} and {kernel_ndim} "
                "axes."
            )
    summed_alone = (set(x) ^ set(kernel)) - set(out)
    if summed_alone or not set(out) <= set(x + kernel) or "k" not in parsed.kinds:
        raise ValueError(
            "`equation` must contract the kernel with x, and must not sum over a label "
            f"of only one operand. Got {equation!r}."
        )
    return parsed


def kernel_kinds(equation: str) -> str:
    """Returns the kinds of the kernel's axes. The rank of x need not be known."""
    kinds = split_equation(equation).kinds
    if "k" not in kinds:
        raise ValueError(f"`einsum` must contract the kernel. Got {equation!r}.")
    return kinds


def why_no_fit(
    equation: Equation, x_shape: Sequence[int], kernel_shape: Sequence[int]
) -> str | None:
    """Returns why an input cannot be multiplied by a kernel, or None if it can."""
    sizes = dict(zip(equation.kernel, kernel_shape, strict=True))
    labeled_sizes = zip(equation.x, x_shape, strict=True)
    expected = tuple(sizes.get(label, size) for label, size in labeled_sizes)
    if tuple(x_shape) == expected:
        return None
    return (
        f"`x` must have shape {expected} for a kernel of shape {tuple(kernel_shape)}. "
        f"Got {tuple(x_shape)}."
    )


def through_matrix(
    equation: Equation,
    geometry: Geometry,
    x: Array,
    kernel_shape: tuple[int, ...],
    multiply: Callable[[Array], Array],
) -> Array:
    """Computes an einsum as one product with the kernel's matrix form.

    `multiply` maps `[*batch, ..., K]` to `[*batch, ..., N]`.
    """
    # 1. Group the labels of the kernel by the kinds of its stored axes: b, k or n.
    stored = geometry.roles(len(kernel_shape))
    if not roles_fit(stored, equation.kinds):
        raise ValueError(
            f"the kernel is stored with axes {stored!r} (b batch, k contracted, n "
            f"output), but the equation needs {equation.kinds!r}."
        )
    labels: dict[str, list[str]] = {"b": [], "k": [], "n": []}
    for label, kind in zip(equation.kernel, stored, strict=True):
        labels[kind].append(label)
    sizes = dict(zip(equation.kernel, kernel_shape, strict=True))
    rows = [c for c in equation.x if c not in labels["b"] + labels["k"]]

    # 2. Bring x into the order [*batch, *rows, *contracted].
    x_batch = [c for c in labels["b"] if c in equation.x]
    x = _transpose(x, equation.x, "".join([*x_batch, *rows, *labels["k"]]))
    row_shape = x.shape[len(x_batch) : len(x_batch) + len(rows)]
    for axis, label in enumerate(labels["b"]):
        if label not in x_batch:
            # The kernel is stored with a batch axis that x does not have, and that is
            # an output axis of the equation. So x is broadcast along it.
            shape = (*x.shape[:axis], sizes[label], *x.shape[axis:])
            x = jnp.broadcast_to(jnp.expand_dims(x, axis), shape)

    # 3. Multiply [*batch, *rows, K] by the matrix form, and restore the output axes.
    batch_shape = tuple(sizes[c] for c in labels["b"])
    k = math.prod(sizes[c] for c in labels["k"])
    y = multiply(x.reshape(*batch_shape, *row_shape, k))
    y = y.reshape(*batch_shape, *row_shape, *(sizes[c] for c in labels["n"]))
    return _transpose(y, "".join(labels["b"] + rows + labels["n"]), equation.out)


def _transpose(x: Array, labels: str, new_labels: str) -> Array:
    if labels == new_labels:
        return x
    return jnp.transpose(x, [labels.index(label) for label in new_labels])
