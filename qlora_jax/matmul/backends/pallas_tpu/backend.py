"""The fused TPU kernel as a back end."""

import math

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from ...spec import Backend, Operands, ProductSpec
from .tiling import CHIPS, KINDS, Chip, plan


class PallasTPU(Backend):
    """Decodes and multiplies in a single TPU kernel."""

    # Methods import the kernels when they run, because Pallas takes a second to import.
    is_opaque = True

    def __init__(self, chip_name: str | None = None):
        """By default, the kernel is for the chip of this process."""
        self._chip_name = chip_name

    @property
    def chip(self) -> Chip:
        """The chip that the kernel is for."""
        return CHIPS[self._chip_name or KINDS.get(jax.devices()[0].device_kind, "any")]

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: np.dtype, columns: int
    ) -> str | None:
        """See `Backend.refusal`."""
        if spec.precision is not None:
            return f"It supports no `precision`. Got precision={spec.precision!r}."
        if np.promote_types(spec.dtype, dtype) != spec.dtype:
            return (
                "It rounds weights once, so x must not be wider than the weights. Got "
                f"{spec.dtype} weights and {dtype} inputs."
            )
        if export.is_symbolic_dim(shape[-2]):
            return f"It needs a number of rows that is not symbolic. Got {shape[-2]}."
        tiling = plan(spec, shape[-2], columns, dtype, self.chip)
        return tiling if isinstance(tiling, str) else None

    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.product`."""
        from . import fused

        # The kernel takes at most one axis of experts, and one of layers for the codes.
        x, codes, scales, layer, _ = operands
        batch = x.shape[:-2]
        experts = (math.prod(batch),) if batch else ()
        stack = () if layer is None else codes.shape[:1]
        y = fused.product(
            spec,
            x.reshape(*experts, *x.shape[-2:]),
            codes.reshape(*stack, *experts, *codes.shape[-2:]),
            scales.reshape(*experts, *scales.shape[-2:]),
            layer,
            chip=self.chip,
        )
        return y.reshape(*batch, *y.shape[-2:])

    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.ragged_product`."""
        from . import visits

        x, codes, scales, layer, offsets = operands
        assert offsets is not None
        return visits.product(spec, x, codes, scales, offsets, layer, chip=self.chip)
