"""The fused TPU kernel as a back end."""

import math

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from ...spec import Backend, Operands, ProductSpec, Unsupported
from .tiling import CHIP_NAMES, CHIPS, Chip, plan


class PallasTPU(Backend):
    """Decodes and multiplies in a single TPU kernel."""

    # Methods import the kernels when they run, because Pallas takes a second to import.
    is_opaque = True

    def __init__(self, chip_name: str | None = None):
        """`chip_name` is a key of `CHIPS`. None selects the chip of this process."""
        self._chip_name = chip_name

    @property
    def chip(self) -> Chip:
        """The chip that the kernel is for."""
        return CHIPS[
            self._chip_name or CHIP_NAMES.get(jax.devices()[0].device_kind, "any")
        ]

    def check(  # noqa: D102
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: np.dtype, columns: int
    ) -> None:
        if spec.precision is not None:
            raise Unsupported(
                f"It does not support `precision`. Got {spec.precision!r}."
            )
        if np.promote_types(spec.dtype, dtype) != spec.dtype:
            raise Unsupported(
                "It rounds weights once, so the dtype of x must not be wider than that "
                f"of the weights. Got {spec.dtype} weights and {dtype} inputs."
            )
        if export.is_symbolic_dim(shape[-2]):
            raise Unsupported(
                f"It does not support a symbolic number of rows. Got {shape[-2]}."
            )
        plan(spec, shape[-2], columns, dtype, self.chip)  # raises `Unsupported`, too

    def product(self, spec: ProductSpec, operands: Operands) -> Array:  # noqa: D102
        from . import fused

        # The kernel accepts one axis of experts, and for codes also one axis of layers.
        x, codes, scales, layer, _ = operands
        assert scales is not None
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

    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:  # noqa: D102
        from . import visits

        x, codes, scales, layer, offsets = operands
        assert scales is not None and offsets is not None
        return visits.product(spec, x, codes, scales, offsets, layer, chip=self.chip)
