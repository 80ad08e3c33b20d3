"""Chooses the back end that computes the product of one device's arrays."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from .._jax import modes
from .backends.pallas_tpu.backend import PallasTPU
from .backends.reference import Reference, Rounding
from .backends.tiled import Tiled
from .spec import Backend, Operands, ProductSpec, Unsupported

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

# The back ends that are tried on each platform, in this order. On a CPU, decoded
# weights should stay in cache. On a TPU, they should not be written to HBM. On a GPU,
# the weights are decoded in one fused pass, followed by the vendor's GEMM, as
# bitsandbytes does in training.
PREFERRED = {
    "cpu": ("tiled",),
    "tpu": ("pallas_tpu", "reference"),
    "cuda": ("rounding", "reference"),
    "default": ("reference",),
}


def checked_backend(
    backend: str | Sequence[str] | None,
) -> str | tuple[str, ...] | None:
    """Returns one name or a tuple of names. Raises ValueError if one is unknown."""
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
    return backend if isinstance(backend, str) else names


def choose(
    backends: Sequence[str],
    spec: ProductSpec,
    shape: tuple[int, ...],
    dtype: np.dtype,
    columns: int,
) -> Backend:
    """Returns the first back end that supports a product.

    Raises `Unsupported` with all reasons if there is none.
    """
    reasons: dict[str, str] = {}
    for name in backends:
        try:
            BACKENDS[name].check(spec, shape, dtype, columns)
        except Unsupported as unsupported:
            reasons[name] = str(unsupported)
        else:
            return BACKENDS[name]
    raise Unsupported(
        "\n".join(
            f"`{name}` does not support this product. {reason}"
            for name, reason in reasons.items()
        )
    )


def default_backends(platform: str, is_local: bool) -> list[str]:
    """Returns the back ends to try on a platform, in order of preference."""
    # Opaque back ends need all arrays on one device, which `is_local` promises. That of
    # TPUs is tuned for the chip of this process. If a process without a TPU lowers the
    # program for one, the chip is not known.
    is_chip_known = platform != "tpu" or jax.default_backend() == "tpu"
    may_be_opaque = is_local and is_chip_known
    backends = PREFERRED[platform]
    return [name for name in backends if may_be_opaque or not BACKENDS[name].is_opaque]


def run(spec: ProductSpec, operands: Operands, *, is_device: bool = False) -> Array:
    """Computes a product with the requested back end, or with the platform's default.

    `is_device` is whether the arrays are those of one device in a `shard_map`.
    Otherwise, XLA may have to partition the product, which opaque back ends do not
    allow.
    """
    # Back ends accept a single axis of rows.
    x = operands.x
    num_rows = math.prod(x.shape[spec.batch : -1])
    shape = *x.shape[: spec.batch], num_rows, x.shape[-1]
    operands = operands._replace(x=x.reshape(shape))
    check_args = spec, shape, x.dtype, operands.codes.shape[-1]  # of `Backend.check`

    # Choose one back end, or one for each platform: a jitted function may be lowered
    # for the CPU of a machine that has a TPU.
    if spec.backend is not None:
        backends = (spec.backend,) if isinstance(spec.backend, str) else spec.backend
        default, chosen = choose(backends, *check_args), {}
    else:
        is_local = is_device or modes.is_local()
        chosen = {
            platform: choose(default_backends(platform, is_local), *check_args)
            for platform in PREFERRED
        }
        default = chosen["default"]

    # Branch on the platform when the program is lowered. Platforms that use the same
    # back end as the default share its branch, so that it is traced once.
    method = "ragged_product" if spec.is_ragged else "product"
    branches = {
        platform: functools.partial(getattr(backend, method), spec)
        for platform, backend in chosen.items()
        if backend is not default
    }
    compute = functools.partial(getattr(default, method), spec)
    if branches:
        y = lax.platform_dependent(operands, default=compute, **branches)
    else:
        y = compute(operands)
    return y.reshape(*x.shape[:-1], y.shape[-1])
