"""Moves the codes of packed kernels from host memory to the device."""

from typing import Any

import jax
from jaxtyping import Array, Int

from .._jax.pytree import take_layer
from ..quant.kernel import is_kernel


def to_device(tree: Any, layer: Int[Array, ""] | int | None = None) -> Any:
    """Returns a tree whose packed kernels have their codes on the device.

    Each product does this for its kernel, in the forward and again in the backward
    pass. Call it where a kernel is read several times, as by a function of `tiled`:
    inside the `jax.checkpoint` of a layer, or the result is kept for the backward pass.

    Args:
        tree: Any pytree with a `QTensor` in it, such as the base tree of a layer, an
            nnx module, or a kernel. Other leaves stay as they are.
        layer: The layer to take of the arrays in `tree`, all of which are stacks; None
            for all layers.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> from jax.sharding import AxisType
        >>> base = {"kernel": ql.quantize(jnp.ones((3, 64, 8)))}  # of three layers
        >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
        >>> base, _ = ql.sharding.place(base, {}, mesh, memory="host")
        >>> layer = ql.memory.to_device(base, layer=1)
        >>> base["kernel"].memory, layer["kernel"].memory, layer["kernel"].shape
        ('host', 'device', (64, 8))
    """
    if layer is not None:
        tree = take_layer(tree, layer)
    move = lambda node: node.to_device() if is_kernel(node) else node
    return jax.tree.map(move, tree, is_leaf=is_kernel)
