"""Call a function of float parameters with packed ones."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from .._jax.pytree import split_arrays
from .merge import merge
from .paths import Tree


def with_float_kernels(
    fn: Callable[..., Any], *, policy: Callable[..., bool] | None = None
) -> Callable[..., Any]:
    """Returns `fn(params, ...)` as a function of a base and a lora tree.

    For layers that need their weights in float: convolutions, or a model's own code.
    The float weights, adapters merged in, exist only during the call. They are not kept
    for the backward pass, which computes them and `fn` again (`jax.checkpoint`); so
    wrap one layer, not a whole model.

    Args:
        fn: A function of a tree of float parameters, and of other arguments.
        policy: As in `jax.checkpoint`: which intermediate values of `fn` are kept. By
            default none. A policy that keeps results of matrix products keeps the
            adapters' `A B` too, which are as large as the kernels.

    Returns:
        A function of `(base, lora, *args, **kwargs)` that returns
        `fn(merge(base, lora), *args, **kwargs)`. `lora` may be None.

    Raises:
        TypeError: As `merge`, when the returned function is called.
        ValueError: As `merge`, when the returned function is called.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> layer = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=2))
        >>> ql.with_float_kernels(layer)(base, lora, jnp.ones((2, 64))).shape
        (2, 8)
    """

    @functools.wraps(fn)
    def call(base: Tree, lora: Tree, *args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = split_arrays((base, lora, args, kwargs))
        rebuild_output: list[Callable[[list], Any]] = []

        def run(arrays: list) -> list:
            base, lora, args, kwargs = rebuild(arrays)
            output = fn(merge(base, lora), *args, **kwargs)
            outputs, to_output = split_arrays(output)
            rebuild_output.append(to_output)
            return outputs

        outputs = jax.checkpoint(run, policy=policy)(arrays)
        return rebuild_output[-1](outputs)

    return call
