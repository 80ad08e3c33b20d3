"""Add adapters to their kernels."""

import warnings

import jax
import jax.numpy as jnp

from ..lora.adapter import effective_kernel
from ..quant.kernel import dequantize_kernel, is_concrete, quantize_kernel
from ..quant.qtensor import QTensor
from .quantize import dequantize
from .tree import Tree, adapters_by_path, map_by_path

_merge_kernel = jax.jit(effective_kernel)


def merge(base: Tree, lora: Tree, *, requantize: bool = False) -> Tree:
    """Adds the adapters to their kernels: a plain parameter tree again.

    Args:
        base: The base tree, or one kernel.
        lora: The lora tree, or one LoRA.
        requantize: Pack the merged kernels again, in each one's own format. That rounds
            every weight to 4 bits once more, and moves the model by about as much as
            the first quantization did: outside jit a warning says by how much, beside
            what the adapters themselves change. Float kernels are left alone.

    Returns:
        The tree with float arrays (in each kernel's dtype) for all kernels.

    Raises:
        ValueError: If an adapter has no kernel in `base`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> ql.merge(base, lora)["kernel"].dtype
        dtype('float32')
    """
    adapters = adapters_by_path(base, lora)
    errors: list = []

    def one(path, leaf):
        if path in adapters:
            merged = _merge_kernel(leaf, adapters[path])
        else:
            merged = dequantize(leaf)
        if not requantize or not isinstance(leaf, QTensor):
            return merged
        if path not in adapters:
            return leaf
        packed = quantize_kernel(
            merged,
            leaf.fmt,
            block_size=leaf.block_size,
            double_quant=leaf.double_quant,
            geometry=leaf.geometry,
        )
        if is_concrete(merged):
            errors.append(_relative_changes(leaf, merged, packed))
        return packed

    tree = map_by_path(one, base)
    if errors:
        rounding, change = (100 * float(max(e)) for e in zip(*errors, strict=True))
        warnings.warn(
            f"requantizing moved the merged kernels by up to {rounding:.2g}% (relative "
            f"Frobenius norm); the adapters had changed them by up to {change:.2g}%.",
            UserWarning,
            stacklevel=2,
        )
    return tree


@jax.jit
def _relative_changes(before, merged, packed):
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
    whole = jnp.maximum(norm(merged), 1e-30)
    rounding = norm(dequantize_kernel(packed) - merged)
    change = norm(merged - dequantize_kernel(before))
    return rounding / whole, change / whole
