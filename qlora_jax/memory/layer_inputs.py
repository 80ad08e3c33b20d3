"""Layer inputs in host memory between the forward and the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .._jax.memory import HOST_KIND

NAME = "layer_input"


def layer_input(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a layer's input with a name, for `offload_layer_inputs`.

    Call it first in a layer, which then uses the result alone. Otherwise the layer's
    argument is kept on the device too.

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
    return checkpoint_name(x, NAME)


def offload_layer_inputs() -> Callable[..., Any]:
    """Returns a policy for `jax.checkpoint` that keeps layer inputs in host memory.

    For layers under a scan, each of which is one `jax.checkpoint` (`nn.remat`,
    `nnx.remat`) and begins with `layer_input`. Inputs are copied to host memory in the
    forward pass and back in the backward pass, while layers compute; all else is
    computed again. So residuals on the device do not grow with the number of layers.
    It needs `jax.jit`. A scan with `unroll` above 1 does not compile on TPUs.

    Raises:
        NotImplementedError: On GPUs: XLA computed wrong gradients there, without an
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
            "end. Compute layers again without this policy (in the decoder, "
            "`remat=True`)."
        )
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[NAME],
        offload_src="device",
        offload_dst=HOST_KIND,
    )
