"""Keeps layer inputs and packed kernels in host memory between their uses."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from .._jax.memory import HOST_KIND
from .._jax.pytree import take_layer
from ..quant.kernel import is_kernel

LAYER_INPUT = "layer_input"  # the name for `jax.checkpoint` policies


def layer_input(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a layer's input, named so that `offload_layer_inputs` can offload it.

    Call it first in a layer, and then use only its result. Otherwise, the argument of
    the layer stays in device memory too.

    Args:
        x: The input.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> def layer(x, w):
        ...     x = ql.memory.layer_input(x)
        ...     return x + jnp.tanh(x @ w), None
        >>> def loss(weights, x, policy=None):
        ...     body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        ...     return jnp.mean(jax.lax.scan(body, x, weights)[0])
        >>> weights, x = jnp.ones((4, 8, 8)), jnp.ones((2, 8))
        >>> policy = ql.memory.offload_layer_inputs()
        >>> grads = jax.jit(jax.grad(loss), static_argnums=2)(weights, x, policy)
        >>> bool(jnp.array_equal(grads, jax.jit(jax.grad(loss))(weights, x)))
        True
    """
    return checkpoint_name(x, LAYER_INPUT)


def offload_layer_inputs() -> Callable[..., Any]:
    """Returns a policy for `jax.checkpoint` that keeps layer inputs in host memory.

    Use it for layers under a scan, each of which is one `jax.checkpoint` (`nn.remat`,
    `nnx.remat`) and begins with `layer_input`. The inputs are copied to host memory in
    the forward pass and back in the backward pass, while layers compute. Everything
    else is computed again, so the residuals on the device do not grow with the number
    of layers. The policy needs `jax.jit`. A scan with `unroll` above 1 does not compile
    on TPUs.

    Raises:
        NotImplementedError: On GPUs, where XLA computed wrong gradients without an
            error (openxla/xla pull request 46231).

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> policy = ql.memory.offload_layer_inputs()
        >>> layer = lambda x: jnp.sin(jnp.sin(ql.memory.layer_input(x)))
        >>> grad = jax.grad(jax.checkpoint(layer, policy=policy))
        >>> bool(jax.jit(grad)(1.0) == jax.jit(jax.grad(layer))(1.0))
        True
    """
    if jax.default_backend() == "gpu":
        raise NotImplementedError(
            "layer inputs must not be offloaded on a GPU, where XLA computed wrong "
            "gradients (openxla/xla pull request 46231). Got a GPU as the default back "
            "end. Recompute layers without this policy (in the decoder, `remat=True`)."
        )
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=HOST_KIND,
    )


def to_device(tree: PyTree, layer: Int[Array, ""] | int | None = None) -> PyTree:
    """Returns a tree whose packed kernels have their codes on the device.

    Products move codes from host memory by themselves, once in the forward pass and
    again in the backward pass. Call this function if a kernel is read several times,
    for example by a function that `tiled` runs. Call it inside the `jax.checkpoint` of
    a layer: otherwise the result stays in device memory for the backward pass.

    Args:
        tree: Any pytree that contains a `QTensor`, such as the base tree of a layer, an
            nnx module or a kernel. Other leaves stay as they are.
        layer: The index of a layer to take. All arrays in `tree` must then be stacks of
            layers. Pass None to keep all layers.

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

    def move(node: PyTree) -> PyTree:
        return node.to_device() if is_kernel(node) else node

    return jax.tree.map(move, tree, is_leaf=is_kernel)
