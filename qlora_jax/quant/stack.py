"""One layer of a packed stack that is not sliced."""

import operator
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Float, Float32

from .._jax.pytree import register, take_layer
from .host_codes import HostCodes, on_device
from .kernel import Kernel, PackedInput
from .qtensor import QTensor, float_scales


@dataclass(frozen=True, eq=False)
class LayerOfStack(Kernel):
    """One kernel of a packed stack `[L, *kernel]`; TPU kernels do not slice it."""

    stack: QTensor
    index: Any
    is_packed = True

    # These are the stack's.
    dtype, geometry, packing, label, placement, memory = (  # pyright: ignore
        property(operator.attrgetter(f"stack.{name}"))
        for name in ("dtype", "geometry", "packing", "label", "placement", "memory")
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one kernel."""
        return self.stack.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of one kernel."""
        return self.stack.nbytes // self.stack.shape[0]

    @property
    def spec(self) -> tuple:
        """The mesh axes that split each axis of the kernel (Explicit axes)."""
        return self.stack.spec[1:]

    def to_device(self) -> Kernel:
        """The kernel, cut out on the device, if the stack is in host memory."""
        return self.take().to_device() if self.memory == "host" else self

    def take(self) -> QTensor:
        """Returns the kernel, cut out of the stack."""
        return take_layer(self.stack, self.index)

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The weights in the kernel's shape."""
        return self.take().dequantize(dtype)

    def dequantize_matrix(self, dtype: Any = None) -> Float[Array, "*batch k n"]:
        """As `dequantize`, in matrix form."""
        return self.take().dequantize_matrix(dtype)

    def product_input(self, dtype: Any) -> PackedInput:
        """The stack and the index."""
        del dtype
        return PackedInput(self.stack, self.index)


register(LayerOfStack, ("stack", "index"), ())


def product_arrays(
    q: QTensor, layer: Array | None
) -> tuple[Array, Float32[Array, "*batch blocks n"], Array | None]:
    """Returns codes on the device, float32 scales, and the layer still to be taken."""
    codes = q.codes
    if layer is not None:
        # Scales are few: those of one layer are cut out, and then expanded.
        q = replace(q, **take_layer(q.stored_scales, layer)._asdict())
    scales = float_scales(q)
    if isinstance(codes, HostCodes):
        codes = on_device(codes if layer is None else take_layer(codes, layer))
        layer = None
    return codes, scales, layer
