"""Turns the adapters of a wrapped model off and on."""

import contextlib
from collections.abc import Iterator

from flax import nnx

from .variables import adapted_kernels, adapter_of, set_attribute


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """A context in which a wrapped model computes without its adapters.

    As PEFT's `disable_adapter`: for the outputs of the base model, such as the
    reference of a preference loss. No product of an adapter is computed, and no dropout
    drawn. `merge` and `split` still give the adapters.

    Like `model.eval()`, this changes the graph definition: it works inside and outside
    of `nnx.jit`, `nnx.grad` and `nnx.scan`, and `nnx.jit` compiles a second program.
    Earlier results of `nnx.split` and `nnx.cached_partial` keep their definition.

    Args:
        model: A wrapped model, one with `QLoRALinear` in it, or a part of either.

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
    places = [(holder, name) for _, holder, name in adapted_kernels(model)]
    adapters = [adapter_of(*place) for place in places]
    if not adapters:
        raise ValueError(
            "`model` must have adapters: wrap it first. Got "
            f"{type(model).__name__} without any."
        )
    before = [adapter.enabled for adapter in adapters]

    def switch(enabled: list[bool]) -> None:
        for place, adapter, is_on in zip(places, adapters, enabled, strict=True):
            adapter.enabled = is_on
            if adapter.frozen is not None:
                set_attribute(
                    *place, adapter.variables["value"] if is_on else adapter.frozen
                )

    try:
        switch([False] * len(adapters))
        yield
    finally:
        switch(before)
