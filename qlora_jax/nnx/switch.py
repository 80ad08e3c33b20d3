"""Turns the adapters of a wrapped model off and on."""

import contextlib
from collections.abc import Iterator

from flax import nnx

from .variables import adapted_kernels, adapter_of


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """A context in which a wrapped model computes without its adapters.

    As PEFT's `disable_adapter`: for the outputs of the model that was fine-tuned, such
    as the reference of a preference loss, from the same packed weights. Products of the
    adapters are not computed, and no dropout is drawn. `merge` and `split` give the
    adapters all the same.

    Whether an adapter is on is part of the graph definition, as what `model.eval()`
    sets: the context works inside and outside of `nnx.jit`, `nnx.grad` and `nnx.scan`,
    and `nnx.jit` compiles one program with adapters and one without. What has the graph
    definition already (`nnx.split`, `nnx.cached_partial`) does not see it.

    Args:
        model: A wrapped model, or one with `QLoRALinear` in it; or a part of it, to
            turn off its adapters alone.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model has no adapters.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> layer, x = ql.nnx.QLoRALinear(64, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
        >>> layer.kernel_lora.b[...] += 1  # as training does
        >>> with ql.nnx.disable_adapters(layer):
        ...     y = layer(x)
        >>> bool(jnp.allclose(y, x @ ql.dequantize(layer.kernel.get_value())))
        True
        >>> bool(jnp.allclose(y, layer(x)))
        False
    """
    adapters = [adapter_of(holder, name) for _, holder, name in adapted_kernels(model)]
    if not adapters:
        raise ValueError(
            "`model` must have adapters: wrap it first. Got "
            f"{type(model).__name__} without any."
        )
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled
