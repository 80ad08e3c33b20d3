"""The fused TPU kernel as a back end."""

import math
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from ...spec import Operands, ProductSpec
from ..base import Backend
from .chips import CHIPS, KINDS, Chip


class PallasTPU(Backend):
    """Decodes and multiplies in one TPU kernel."""

    is_opaque = True

    def __init__(self, chip: str | None = None):
        """Takes the name of a chip in `CHIPS`; by default that of this process."""
        self._chip = chip

    @property
    def chip(self) -> Chip:
        """The chip that the kernel is for."""
        return CHIPS[self._chip or KINDS.get(jax.devices()[0].device_kind, "any")]

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: Any, columns: int
    ) -> str | None:
        """See `Backend.refusal`."""
        from .tiling import plan  # Pallas takes a second to import

        if spec.precision is not None:
            return f"It has one precision. Got precision={spec.precision!r}."
        if np.promote_types(spec.dtype, dtype) != spec.dtype:
            return f"It rounds once. Got {spec.dtype} weights and {dtype} inputs."
        if export.is_symbolic_dim(shape[-2]):
            return f"It tiles a known number of rows. Got {shape[-2]}."
        found = plan(spec, shape[-2], columns, dtype, self.chip)
        return found if isinstance(found, str) else None

    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.product`."""
        from . import fused

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
        args = spec, x, codes, scales, offsets, layer
        return visits.product(*args, chip=self.chip)
