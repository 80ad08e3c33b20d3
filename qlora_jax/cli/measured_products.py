"""Products on this machine's device, compared with NumPy's and with dense ones."""

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql

from .._jax.progress import progress_bar
from .configs import Fmt

_SHAPE = 512, 768  # of the kernel, of whole blocks in every format
_ROWS = 16, 512  # as in generation and in training
_DTYPES = "float32", "bfloat16"
_DIRECTIONS = "x W", "x W^T"
FORMATS = tuple(fmt for fmt in get_args(Fmt) if fmt != "none")
# Kernels of models' sizes, whose product takes a CPU a few milliseconds.
_TIMED = {"cpu": (2048, 2048)}
_TIMED_ELSEWHERE = 4096, 14336


def check_products() -> list[dict[str, Any]]:
    """Returns the errors of products in each format, dtype and direction."""
    cases = [(fmt, dtype) for fmt in FORMATS for dtype in _DTYPES]
    bar = progress_bar("checking products", " kernels", iterable=cases, leave=False)
    return [found for case in bar for found in _check_kernel(*case)]


def _check_kernel(fmt: str, dtype: str) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    w = draw(*_SHAPE)
    kernels = ql.quantize(w, fmt), ql.quantize(w, fmt, double_quant=False)
    for q in kernels[1 - kernels[0].double_quant :]:
        yield from _check_directions(q, draw)


def _check_directions(q: ql.QTensor, draw: Any) -> Iterator[dict[str, Any]]:
    with on_cpu():
        w = np.asarray(ql.dequantize(jax.device_get(q)), np.float64)
    # All back ends round a weight in one way, so decoding is exact.
    is_exact = np.array_equal(np.asarray(ql.dequantize(q), np.float64), w)
    cases = [*itertools.product(_ROWS, (False, True))]
    xs = [draw(rows, _SHAPE[is_transposed]) for rows, is_transposed in cases]
    ys = _products(xs, q)
    for (rows, is_transposed), x, y in zip(cases, xs, ys, strict=True):
        tried = ql.explain_backend(x, q, transpose=is_transposed)
        error, bound = _error(y, x, w.T if is_transposed else w)
        yield {
            "format": q.fmt + " double" * q.double_quant,
            "dtype": q.dtype.name,
            "rows": rows,
            "direction": _DIRECTIONS[is_transposed],
            "backend": list(tried)[-1],
            "refused": {k: why for k, why in tried.items() if why is not None},
            "decodes_exactly": is_exact,
            "error": error if np.isfinite(error) else None,
            "bound": bound,
            "is_right": is_exact and error <= bound,
        }


def _product(x: jax.Array, q: ql.QTensor, is_transposed: bool) -> jax.Array:
    """Returns a product with a kernel; the other direction is that of a gradient."""
    multiply = lambda x: ql.matmul(x, q, precision="highest")
    if not is_transposed:
        return multiply(x)
    _, pull = jax.vjp(multiply, jnp.zeros((len(x), q.shape[0]), x.dtype))
    return pull(x)[0]


@jax.jit
def _products(xs: list[jax.Array], q: ql.QTensor) -> list[jax.Array]:
    # One program: most of the time is compilation.
    return [_product(x, q, x.shape[1] != q.shape[0]) for x in xs]


def _error(y: jax.Array, x: jax.Array, w: np.ndarray) -> tuple[float, float]:
    """Returns the relative error of a product, and its bound, in Frobenius norms."""
    given = np.asarray(x, np.float64)
    want = given @ w
    # A sum of K products in float32, and half a unit of the rounded result.
    norm = np.linalg.norm(want)
    summed = len(w) * 2.0**-24 * np.linalg.norm(np.abs(given) @ np.abs(w)) / norm
    rounded = float(jnp.finfo(y.dtype).eps) / 2
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / norm
    return float(error), float(summed + rounded)


def time_products(rounds: int) -> list[dict[str, Any]]:
    """Returns seconds of products in nf4 and of dense ones, in bfloat16."""
    shape = _TIMED.get(jax.default_backend(), _TIMED_ELSEWHERE)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q, found, product = ql.quantize(w), [], jax.jit(_product, static_argnums=2)
    dense = jax.jit(jnp.dot), jax.jit(lambda x, w: jnp.dot(x, w.T))
    cases = [*itertools.product((1, *_ROWS), (False, True))]
    bar = progress_bar("measuring products", " products", iterable=cases, leave=False)
    for rows, is_transposed in bar:
        x = jnp.asarray(rng.normal(size=(rows, shape[is_transposed])), w.dtype)
        calls = {
            "seconds": functools.partial(product, x, q, is_transposed),
            "dense_seconds": functools.partial(dense[is_transposed], x, w),
        }
        facts = {"format": "nf4 double", "shape": shape, "rows": rows}
        facts |= {"direction": _DIRECTIONS[is_transposed]}
        found.append(facts | medians(calls, rounds))
    return found


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of calls, which take turns, after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name] += [time.perf_counter() - start] * (index > 0)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


@contextlib.contextmanager
def on_cpu() -> Iterator[bool]:
    """Computes on a CPU, if JAX has one; says whether it is another device."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # of JAX_PLATFORMS=tpu
        yield False
        return
    with jax.default_device(cpu):
        yield jax.default_backend() != "cpu"
