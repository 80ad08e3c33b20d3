"""Chooses the back end that computes the product of one device's arrays."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from .._jax import modes
from .backends.pallas_tpu.backend import PallasTPU
from .backends.reference import Reference
from .backends.tiled import Tiled
from .spec import Backend, Operands, ProductSpec, Unsupported

BACKENDS: dict[str, Backend] = {
    "reference": Reference(),
    "tiled": Tiled(),
    "pallas_tpu": PallasTPU(),
    "pallas_tpu_v5e": PallasTPU("v5e"),
    "pallas_tpu_v5p": PallasTPU("v5p"),
    "pallas_tpu_v6e": PallasTPU("v6e"),
    "pallas_tpu_7x": PallasTPU("7x"),
}

# The back ends that are tried on each platform, in this order. On a CPU, decoded
# weights should stay in cache. On a TPU, they should not be written to HBM. On a GPU,
# the weights are decoded in one fused pass, followed by the vendor's GEMM, as
# bitsandbytes does in training.
PREFERRED = {
    "cpu": ("tiled",),
    "tpu": ("pallas_tpu", "reference"),
    "default": ("reference",),
}


def as_backends(backend: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns a tuple of names, or None. Raises ValueError if a name is unknown."""
    if backend is None:
        return None
    names: tuple[str, ...] = ()
    if isinstance(backend, Sequence):
        names = (backend,) if isinstance(backend, str) else tuple(backend)
    # Search a list, because entries that are not strings may not be hashable.
    if not names or any(name not in [*BACKENDS] for name in names):
        raise ValueError(
            f"`backend` must be one of {sorted(BACKENDS)}, or several of them. Got "
            f"{backend!r}."
        )
    return names


def first_supported(
    names: Sequence[str],
    spec: ProductSpec,
    shape: tuple[int, ...],
    dtype: np.dtype,
    columns: int,
) -> Backend:
    """Returns the first back end that supports a product.

    Raises `Unsupported` with all reasons if there is none.
    """
    reasons: list[str] = []
    for name in names:
        try:
            BACKENDS[name].check(spec, shape, dtype, columns)
        except Unsupported as reason:
            reasons.append(f"`{name}` does not support this product. {reason}")
        else:
            return BACKENDS[name]
    raise Unsupported("\n".join(reasons))


def run(spec: ProductSpec, operands: Operands) -> Array:
    """Computes a product with the requested back end, or with the platform's default.

    If it is not known that the arrays are on one device, XLA may have to partition the
    product, which opaque back ends do not allow.
    """
    # Back ends accept a single axis of rows.
    x = operands.x
    shape = *x.shape[: spec.batch], math.prod(x.shape[spec.batch : -1]), x.shape[-1]
    operands = operands._replace(x=x.reshape(shape))
    spec = replace(spec, is_local=spec.is_local or modes.is_local())

    # Choose one back end, or one for each platform: a jitted function may be lowered
    # for the CPU of a machine that has a TPU.
    preferred = PREFERRED
    if spec.backend is not None:
        preferred = {"default": spec.backend}
    elif not spec.is_local or jax.default_backend() != "tpu":
        # The back end of TPUs is tuned for the chip of this process. If a process
        # without a TPU lowers the program for one, the chip is not known.
        preferred = {
            platform: [name for name in names if not BACKENDS[name].is_opaque]
            for platform, names in PREFERRED.items()
        }
    columns = operands.codes.shape[-1]
    backends = {
        platform: first_supported(names, spec, shape, x.dtype, columns)
        for platform, names in preferred.items()
    }
    default = backends["default"]

    # Branch on the platform when the program is lowered. Platforms that use the same
    # back end as the default share its branch, so that it is traced once.
    method = "ragged_product" if spec.is_ragged else "product"
    branches = {
        platform: functools.partial(getattr(backend, method), spec)
        for platform, backend in backends.items()
        if backend is not default
    }
    compute = functools.partial(getattr(default, method), spec)
    if branches:
        y = lax.platform_dependent(operands, default=compute, **branches)
    else:
        y = compute(operands)
    return y.reshape(*x.shape[:-1], y.shape[-1])
