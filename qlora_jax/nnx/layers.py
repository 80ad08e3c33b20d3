"""How wrapped modules compute: an einsum on the packed kernel, the adapter beside."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ..adapters.product import product
from ..matmul.einsum import parse_equation, through_matrix
from ..quant.kernel import as_kernel
from .variables import adapter_of, base_of

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def adapted_einsum(
    module: nnx.Module, name: str, equation: str, x: Array, precision: Any = None
) -> Array:
    """Returns the einsum of `x` and the module's kernel `name`, adapter included.

    Raises:
        ValueError: If the kernel has more axes than the equation says, as inside a scan
            whose filters left it out.
    """
    adapter = adapter_of(module, name)
    base = base_of(module, name)
    labels = equation.replace(" ", "").partition(",")[2].partition("->")[0]
    if len(base.shape) > len(labels):
        raise ValueError(
            f"the kernel must have the axes {labels!r} of its equation. Got shape "
            f"{base.shape}. In a stack run by nnx.scan or nnx.vmap, the filters must "
            "name `ql.nnx.Packed` wherever they name `nnx.Param`."
        )
    parsed = parse_equation(equation, x.ndim, len(base.shape))
    lora, key = adapter.lora, adapter.dropout_key()

    def multiply(rows: Array) -> Array:
        kernel = as_kernel(base, lora.geometry)
        return product(rows, kernel, lora, dropout_key=key, precision=precision)

    return through_matrix(parsed, lora.geometry, x, base.shape, multiply)


def _promoted(module: Any, x: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """Casts as the module does; a scalar stands for the kernel, in its dtype."""
    kernel = jnp.zeros((), module.kernel.dtype)
    x, _, bias = module.promote_dtype((x, kernel, bias), dtype=module.dtype)
    return x, bias


def _sharded(y: Array, out_sharding: Any) -> Array:
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _bias(module: Any) -> Array | None:
    return None if module.bias is None else module.bias[...]


def call_linear(self, inputs: Array, out_sharding: Any = None) -> Array:
    """Computes what `nnx.Linear` does."""
    x, bias = _promoted(self, inputs, _bias(self))
    y = adapted_einsum(self, "kernel", "...k,kn->...n", x, self.precision)
    y = _sharded(y, out_sharding)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def call_linear_general(self, inputs: Array, out_sharding: Any = None) -> Array:
    """Computes what `nnx.LinearGeneral` does."""
    ndim = inputs.ndim
    axis = sorted(a % ndim for a in self.axis)
    batch = sorted(a % ndim for a in self.batch_axis)
    x, bias = _promoted(self, inputs, _bias(self))
    letters = _LETTERS[:ndim]
    free = [a for a in range(ndim) if a not in axis and a not in batch]
    outputs = _LETTERS[ndim : ndim + len(self.out_features)]
    kernel = "".join(letters[a] for a in [*batch, *axis]) + outputs
    result = "".join(letters[a] for a in [*batch, *free]) + outputs
    y = adapted_einsum(
        self, "kernel", f"{letters},{kernel}->{result}", x, self.precision
    )
    y = _sharded(y, out_sharding)
    if bias is None:
        return y
    lead = [inputs.shape[a] if a in batch else 1 for a in range(ndim) if a not in axis]
    return y + bias.reshape((*lead, *self.out_features))


def call_einsum(self, inputs: Array, einsum_str: str | None = None, out_sharding=None):
    """Computes what `nnx.Einsum` does."""
    equation = (einsum_str or self.einsum_str).replace(" ", "")
    x, bias = _promoted(self, inputs, _bias(self))
    y = adapted_einsum(self, "kernel", equation, x, self.precision)
    y = _sharded(y, out_sharding)
    if bias is None:
        return y
    kernel, result = equation.split(",")[1].split("->")
    head, _, tail = result.partition("...")
    letters = [*head, *[None] * (y.ndim - len(head) - len(tail)), *tail]
    kept = [n if c in kernel else 1 for c, n in zip(letters, y.shape, strict=True)]
    return y + bias.reshape(kept)
