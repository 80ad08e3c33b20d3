"""The back ends of the product, and which one serves where.

A back end takes plain arrays and static settings, sees one device's part of them, and
equals `reference.product`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._jax.pytree import take_layer
from .backends import reference, tiled
from .layout import Call


class Backend(NamedTuple):
    """A way to compute the product.

    Attributes:
        product: Takes `x`, `codes`, `scales`, `layer` and the settings; the codes are
            a stack if there is a layer, the scales that layer's own.
        refuses: Takes the same, and says why it cannot serve, or returns None.
        is_opaque: Whether it is a kernel, which a partitioner cannot split.
    """

    product: Callable[..., Array]
    refuses: Callable[..., str | None]
    is_opaque: bool


def _xla(product: Callable[..., Array]) -> Backend:
    """A back end that serves everything."""

    def of_layer(x, codes, scales, layer, weights, *, transpose, precision):
        if layer is not None:
            codes = take_layer(codes, layer)
        # The weights do not depend on x: unless tied to it, XLA decodes those of every
        # layer of a Python loop before the first product.
        x, codes, scales = lax.optimization_barrier((x, codes, scales))
        return product(
            x, codes, scales, weights, transpose=transpose, precision=precision
        )

    return Backend(of_layer, lambda *args, **settings: None, is_opaque=False)


def _pallas_tpu(chip: str | None) -> Backend:
    """The fused TPU kernel for a chip (None: the one at hand)."""

    def settings(weights, transpose):
        from .backends import pallas_tpu

        found = pallas_tpu.CHIPS[chip or pallas_tpu.chip_at_hand()]
        fixed = {"fmt": weights.fmt, "block_size": weights.block_size}
        return pallas_tpu, {**fixed, **found._asdict(), "transpose": transpose}

    def refuses(x, codes, scales, layer, weights, *, transpose, precision):
        module, found = settings(weights, transpose)
        if precision is not None:
            return f"It has one precision. Got {precision=}."
        logical = jnp.dtype(weights.dtype_name)
        if jnp.promote_types(logical, x.dtype) != logical:
            return f"It rounds once. Got {logical} weights and {x.dtype} inputs."
        return module.can_serve(
            x.shape[-2], weights.k, codes.shape[-1], x.dtype, **found
        )

    def product(x, codes, scales, layer, weights, *, transpose, precision):
        given = x, codes, scales, layer, weights
        reason = refuses(*given, transpose=transpose, precision=precision)
        if reason is not None:
            raise NotImplementedError(f"`pallas_tpu` cannot serve this. {reason}")
        module, found = settings(weights, transpose)
        batch = x.shape[:-2]
        experts = (math.prod(batch),) if batch else ()
        stack = () if layer is None else codes.shape[:1]
        y = module.product(
            x.reshape(*experts, *x.shape[-2:]),
            codes.reshape(*stack, *experts, *codes.shape[-2:]),
            scales.reshape(*experts, *scales.shape[-2:]),
            layer,
            **found,
        )
        return y.reshape(*batch, *y.shape[-2:])

    return Backend(product, refuses, is_opaque=True)


BACKENDS = {
    "reference": _xla(reference.product),
    "tiled": _xla(tiled.product),
    "pallas_tpu": _pallas_tpu(None),
    "pallas_tpu_v5e": _pallas_tpu("v5e"),
    "pallas_tpu_v5p": _pallas_tpu("v5p"),
    "pallas_tpu_v6e": _pallas_tpu("v6e"),
    "pallas_tpu_7x": _pallas_tpu("7x"),
}

# What is tried on a platform, in this order. On a GPU, decoding in one fused pass and
# the vendor's GEMM is what bitsandbytes does for training; on a CPU decoded weights
# should stay in cache; on a TPU they should not see HBM.
PREFERRED = {
    "cpu": ("tiled",),
    "tpu": ("pallas_tpu", "reference"),
    "any other": ("reference",),
}


def run_backend(call: Call, x: Array, codes: Array, scales: Array, *layer) -> Array:
    """Computes the product of one device's parts by the back end that it names."""
    assert call.backend is not None
    given = codes, scales, layer[0] if layer else None, call.weights
    matrix = x.reshape(_matrix_shape(call, x))
    y = BACKENDS[call.backend].product(matrix, *given, **_settings(call))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _matrix_shape(call, x):
    rows = math.prod(x.shape[call.batch : -1])
    return (*x.shape[: call.batch], rows, x.shape[-1])


def _settings(call):
    return {"transpose": call.transpose, "precision": call.precision}


def on_one_device(call: Call, *arrays: Array) -> Array:
    """Computes the product of arrays that are a device's own."""
    return by_platform(call, *arrays, split=run_backend, alone=True)


def by_platform(
    call: Call,
    *arrays: Array,
    split: Callable[..., Array],
    alone: bool | None = None,
) -> Array:
    """Chooses a back end, unless the call names one, and computes the product.

    The platform is that of the lowering: a jitted function may run on the CPU of a
    machine that has a TPU. The TPU kernel is thought of only where the process has a
    TPU: Pallas takes a second to import, and its chip is the one at hand.

    Args:
        call: The product.
        *arrays: `x`, codes, scales and, for a stack, the layer.
        split: Computes `(call, *arrays)` on arrays that may be split over devices. It
            is not for TPUs, whose partitioner cannot ask.
        alone: Whether the arrays are one device's; by default, if there is but one.
    """
    if call.backend is not None and BACKENDS[call.backend].is_opaque:
        return run_backend(call, *arrays)

    def by(name, run):
        return lambda *arrays: run(dataclasses.replace(call, backend=name), *arrays)

    def choose(platform):
        if call.backend is not None:
            return call.backend
        for name in PREFERRED[platform]:
            found = BACKENDS[name]
            if found.is_opaque and not has_one_tpu:
                continue
            if found.refuses(*given, **_settings(call)) is None:
                return name
        raise AssertionError(f"nothing serves {platform}")

    x, codes, scales, *layer = arrays
    x = jax.ShapeDtypeStruct(_matrix_shape(call, x), x.dtype)
    given = x, codes, scales, layer[0] if layer else None, call.weights
    alone = jax.device_count() == 1 if alone is None else alone
    has_one_tpu = alone and jax.default_backend() == "tpu"
    return lax.platform_dependent(
        *arrays,
        cpu=by(choose("cpu"), split),
        tpu=by(choose("tpu"), run_backend),
        default=by(choose("any other"), split),
    )
