"""Packed kernels in nnx modules that run linen modules (`nnx.bridge.ToNNX`).

The bridge's variables go to the `apply` of `ql.linen.wrap`, kernels with adapters.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from .._jax.pytree import split_arrays
from ..adapters.base import AdaptedKernel, dropout_keys, replace_arrays
from ..adapters.config import QLoRAConfig
from ..linen.init_model import trace_kinds
from ..linen.wrapped import wrap
from .subclass import subclass
from .variables import (
    AdapterModule,
    Holder,
    adapted_names,
    adapter_of,
    attributes,
    base_of,
    join_path,
    linen_attributes,
    runs_linen,
)


@functools.cache
def packed_linen(cls: type) -> type:
    """Returns the subclass of a bridge class that runs its linen module packed."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, wrap(self.to_nnx__module), args, kwargs)

    return subclass(cls, {"__call__": call}, (packed_linen, (cls,)))


def _run(self: Any, linen: Any, args: tuple, kwargs: dict) -> Any:
    """Calls a bridge of the original class that runs `linen`, with self's variables."""
    bridge = self.qlora_original(linen)
    given = {n: _to_linen(self, n) for n in linen_attributes(self)}
    for name, value in given.items():
        setattr(bridge, name, nnx.data(value))
    if kwargs.get("rngs") is None:
        kwargs = {**kwargs, "rngs": self.to_nnx__rngs}
    result = bridge(*args, **kwargs)
    for name, value in linen_attributes(bridge).items():
        if value is not given.get(name):
            _write_back(self, name, value)
    return result


def _to_linen(holder: Holder, name: str) -> Any:
    """Returns an attribute for the linen module: kernels with their adapters."""
    value = attributes(holder)[name]
    if isinstance(value, dict):
        names = [
            n for n, inner in value.items() if not isinstance(inner, AdapterModule)
        ]
        return {n: _to_linen(value, n) for n in names}
    if name not in adapted_names(holder):
        return value
    adapter = adapter_of(holder, name)
    base, lora, key = base_of(holder, name), adapter.sliced, adapter.dropout_key()
    if lora is None:
        return nnx.Param(base)
    if key is None:  # a "dropout" key of the linen module has no effect
        lora = replace_arrays(lora, lambda _, x: x, dropout=0.0)
    else:
        key = dropout_keys(lora, key)
    return nnx.Param(AdaptedKernel(base, lora, key))


def _write_back(holder: Holder, name: str, value: Any) -> None:
    """Copies back variables that the linen module changed."""
    own = attributes(holder).get(name)
    if isinstance(own, dict) and isinstance(value, dict):
        own = dict(own)
        for key, inner in value.items():
            _write_back(own, key, inner)
        value = own
    elif name in adapted_names(holder):
        return
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, nnx.data(value))


Found = tuple[dict[str, str], dict[str, str]]


@dataclass(frozen=True)
class _TracedLinen:
    """Stands for a bridge's linen module in a trace, and fills `found`."""

    module: nn.Module
    config: QLoRAConfig
    prefix: str
    found: Found

    def apply(self, variables: Mapping, *args: Any, **kwargs: Any) -> Any:
        others = {name: v for name, v in variables.items() if name != "params"}
        params = variables["params"]
        new = trace_kinds(self.module, params, self.config, args, kwargs, others)
        for texts, more in zip(self.found, new, strict=True):
            texts.update({self.prefix + path: text for path, text in more.items()})
        return self.module.apply(variables, *args, **kwargs)


def kinds_of_linen(
    model: nnx.Module, config: QLoRAConfig, paths: list[str], args: tuple, kwargs: dict
) -> Found:
    """Returns linen targets' kinds of axes, and why some are unfit, by path."""
    found: Found = {}, {}
    graphdef, state = nnx.split(model)
    arrays, rebuild = split_arrays((args, kwargs))

    def call(state: Any, arrays: list) -> Any:
        traced: Any = nnx.merge(graphdef, state)
        for path, module in list(nnx.iter_modules(traced)):
            prefix = f"{join_path(path)}/" if path else ""
            own = [p.removeprefix(prefix) for p in paths if p.startswith(prefix)]
            if runs_linen(module) and own:
                # Settings by pattern may name what is outside.
                inside = QLoRAConfig(
                    targets=tuple(map(re.escape, own)), dropout=config.dropout
                )
                new = _recording(type(module), inside, prefix, found)
                object.__setattr__(module, "__class__", new)
        args, kwargs = rebuild(arrays)
        return jax.tree.leaves(traced(*args, **kwargs))

    jax.eval_shape(call, state, arrays)
    return found


def _recording(cls: type, config: QLoRAConfig, prefix: str, found: Found) -> type:
    """Returns a bridge class whose calls record the linen module's kernels."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        linen = _TracedLinen(self.to_nnx__module, config, prefix, found)
        return _run(self, linen, args, kwargs)

    return subclass(cls, {"__call__": call}, ())
