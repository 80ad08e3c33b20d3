"""Chooses the back end that computes the product of one device's arrays."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from .backends.base import Backend
from .backends.pallas_tpu.backend import PallasTPU
from .backends.reference import Reference, Rounding
from .backends.tiled import Tiled
from .spec import Operands, ProductSpec

BACKENDS: dict[str, Backend] = {
    "reference": Reference(),
    "rounding": Rounding(),
    "tiled": Tiled(),
    "pallas_tpu": PallasTPU(),
    "pallas_tpu_v5e": PallasTPU("v5e"),
    "pallas_tpu_v5p": PallasTPU("v5p"),
    "pallas_tpu_v6e": PallasTPU("v6e"),
    "pallas_tpu_7x": PallasTPU("7x"),
}

# What is tried on a platform, in this order. On a CPU decoded weights should stay in
# cache; on a TPU they should not be written to HBM. On a GPU, decoding in one fused
# pass and the vendor's GEMM is what bitsandbytes does for training.
PREFERRED = {
    "cpu": ("tiled",),
    "tpu": ("pallas_tpu", "reference"),
    "cuda": ("rounding", "reference"),
    "default": ("reference",),
}


def checked_backend(
    backend: str | Sequence[str] | None,
) -> str | tuple[str, ...] | None:
    """Returns the back end, or several; raises ValueError for an unknown one."""
    names = (backend,) if isinstance(backend, str) else backend
    if names is not None and (not names or not {*names} <= {*BACKENDS}):
        raise ValueError(
            f"`backend` must be one of {sorted(BACKENDS)}, or several of them. Got "
            f"{backend!r}."
        )
    return backend if backend is None or isinstance(backend, str) else tuple(backend)


def refusals(
    platform: str, spec: ProductSpec, shape: tuple[int, ...], dtype: Any, columns: int
) -> dict[str, str | None]:
    """Returns why back ends do not compute a platform's product; None for the first."""
    found: dict[str, str | None] = {}
    for name in _considered(platform, is_local=True):
        found[name] = BACKENDS[name].refusal(spec, shape, dtype, columns)
        if found[name] is None:
            break
    return found


def choose(
    names: Sequence[str],
    spec: ProductSpec,
    shape: tuple[int, ...],
    dtype: Any,
    columns: int,
) -> Backend:
    """Returns the first back end of `names` that supports the product."""
    reasons = []
    for name in names:
        reason = BACKENDS[name].refusal(spec, shape, dtype, columns)
        if reason is None:
            return BACKENDS[name]
        reasons.append(f"`{name}` does not support this product. {reason}")
    raise NotImplementedError("\n".join(reasons))


def run(spec: ProductSpec, operands: Operands, *, is_local: bool) -> Array:
    """Computes the product by the requested back end, or the platform's.

    If arrays are not `is_local`, XLA may have to partition the product, which it cannot
    do with a kernel.
    """
    x = operands.x
    rows = math.prod(x.shape[spec.batch : -1])
    shape = *x.shape[: spec.batch], rows, x.shape[-1]
    operands = operands._replace(x=x.reshape(shape))
    facts = spec, shape, x.dtype, operands.codes.shape[-1]
    # The platform is that of the lowering: a jitted function may run on the CPU of a
    # machine that has a TPU.
    if spec.backend is not None:
        names = (spec.backend,) if isinstance(spec.backend, str) else spec.backend
        chosen = {"default": choose(names, *facts)}
    else:
        chosen = {p: choose(_considered(p, is_local), *facts) for p in PREFERRED}
    # Platforms with the default's back end need no branch of `platform_dependent`.
    default = chosen["default"]
    name = "ragged_product" if spec.is_ragged else "product"
    branches = {
        platform: functools.partial(getattr(backend, name), spec)
        for platform, backend in chosen.items()
        if backend is not default
    }
    compute = functools.partial(getattr(default, name), spec)
    if branches:
        y = lax.platform_dependent(operands, default=compute, **branches)
    else:
        y = compute(operands)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _considered(platform: str, is_local: bool) -> list[str]:
    """Returns the back ends that are tried on a platform."""
    # The TPU kernel is for the chip of this process.
    is_here = platform != "tpu" or jax.default_backend() == "tpu"
    may_be_opaque = is_local and is_here
    names = PREFERRED[platform]
    return [n for n in names if may_be_opaque or not BACKENDS[n].is_opaque]
