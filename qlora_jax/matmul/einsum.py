"""Einsum with a kernel on the right: rearrange `x`, multiply, rearrange back."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..quant.geometry import Geometry, roles_fit
from ..quant.qtensor import QTensor
from .quantized import as_float, check_packed, matmul


class Equation(NamedTuple):
    """The labels of an einsum with two operands, ellipsis written out."""

    x: str
    kernel: str
    out: str

    @property
    def kinds(self) -> str:
        """The kind of each axis of the kernel, as in `Geometry`."""
        in_x = {True: "b", False: "n"}
        return "".join(
            in_x[label in self.x] if label in self.out else "k" for label in self.kernel
        )


def split_equation(equation: str) -> Equation:
    """Returns the labels of an equation as it is written, ellipsis included."""
    operands, arrow, out = equation.replace(" ", "").partition("->")
    x, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel or "." in kernel:
        raise ValueError(
            "an einsum must be an explicit equation of two operands, the kernel on the "
            f"right, without an ellipsis. Got {equation!r}."
        )
    return Equation(x, kernel, out)


def parse_equation(equation: str, x_ndim: int, kernel_ndim: int) -> Equation:
    """Reads an equation such as `"BTD,NDH->BTNH"` or `"...D,DF->...F"`."""
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
                f"`equation` must give each axis one label, and an ellipsis only to x "
                f"and the result. Got {equation!r} for {x_ndim} and {kernel_ndim} axes."
            )
    summed_alone = (set(x) ^ set(kernel)) - set(out)
    if summed_alone or not set(out) <= set(x + kernel) or "k" not in parsed.kinds:
        raise ValueError(
            "`equation` must contract the kernel with x and sum no axis of one operand "
            f"alone. Got {equation!r}."
        )
    return parsed


def kernel_kinds(equation: str) -> str:
    """Returns the kinds of the kernel's axes in an equation; x may have any rank."""
    kinds = split_equation(equation).kinds
    if "k" not in kinds:
        raise ValueError(f"`einsum` must contract the kernel. Got {equation!r}.")
    return kinds


def why_no_fit(
    equation: Equation, x_shape: Sequence[int], kernel_shape: Sequence[int]
) -> str | None:
    """Returns why an input cannot be multiplied by a kernel, or None if it can."""
    sizes = dict(zip(equation.kernel, kernel_shape, strict=True))
    pairs = zip(equation.x, x_shape, strict=True)
    wanted = tuple(sizes.get(label, size) for label, size in pairs)
    if tuple(x_shape) == wanted:
        return None
    return (
        f"`x` must have shape {wanted} for a kernel of shape {tuple(kernel_shape)}. "
        f"Got {tuple(x_shape)}."
    )


def through_matrix(
    equation: Equation,
    geometry: Geometry,
    x: Array,
    kernel_shape: tuple[int, ...],
    product: Callable[[Array], Array],
) -> Array:
    """Computes an einsum by a product of `[*batch, ..., K]` with the matrix form."""
    stored = geometry.roles(len(kernel_shape))
    if not roles_fit(stored, equation.kinds):
        raise ValueError(
            f"the kernel is stored with axes {stored!r} (b batch, k contracted, n "
            f"output); the equation needs {equation.kinds!r}."
        )
    labels: dict[str, list[str]] = {"b": [], "k": [], "n": []}
    for label, kind in zip(equation.kernel, stored, strict=True):
        labels[kind].append(label)
    sizes = dict(zip(equation.kernel, kernel_shape, strict=True))
    rest = [c for c in equation.x if c not in labels["b"] + labels["k"]]

    # A batch axis of the stored kernel that x lacks is an output axis: x is broadcast.
    new = [c for c in labels["b"] if c not in equation.x]
    present = [c for c in labels["b"] if c in equation.x]
    x = _transpose(x, equation.x, "".join([*present, *rest, *labels["k"]]))
    rest_shape = x.shape[len(present) : len(present) + len(rest)]
    for axis, label in enumerate(labels["b"]):
        if label in new:
            shape = (*x.shape[:axis], sizes[label], *x.shape[axis:])
            x = jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
    batch = tuple(sizes[c] for c in labels["b"])
    k = math.prod(sizes[c] for c in labels["k"])
    y = product(x.reshape(*batch, *rest_shape, k))
    y = y.reshape(*batch, *rest_shape, *(sizes[c] for c in labels["n"]))
    return _transpose(y, "".join(labels["b"] + rest + labels["n"]), equation.out)


def _transpose(x: Array, have: str, want: str) -> Array:
    return x if have == want else jnp.transpose(x, [have.index(c) for c in want])


def einsum(
    equation: str,
    x: Float[Array, "..."],
    q: QTensor,
    *,
    backend: str | Sequence[str] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Returns `jnp.einsum(equation, x, dequantize(q))` in `x.dtype`, as `matmul` does.

    Args:
        equation: Explicit, of two operands; x may have an ellipsis.
        x: The left operand, a floating-point array.
        q: The quantized kernel. The equation must contract the axes along which it was
            quantized (`contract`).
        backend: As in `matmul`.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `q` is not a QTensor, or `x` is not floating-point.
        ValueError: If the equation is not of that kind or does not fit, or the back end
            is unknown.
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
    product = lambda rows: matmul(rows, q, backend=backend, precision=precision)
    return through_matrix(parsed, q.geometry, x, q.shape, product)
