"""Packed kernels in nnx modules that run linen modules (`nnx.bridge.ToNNX`)."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from .._jax.pytree import split_arrays
from ..adapters.base import AdaptedKernel, dropout_keys, with_dropout
from ..adapters.config import QLoRAConfig
from ..linen.init_model import trace_kinds
from ..linen.wrapped import wrap
from ..trees.paths import Tree
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
    set_attribute,
)


@functools.cache
def packed_linen(cls: type) -> type:
    """Returns a subclass of a bridge class that runs linen on packed kernels."""
    return _bridge_subclass(cls, wrap, (packed_linen, (cls,)))


def _bridge_subclass(cls: type, wrap_linen: Callable, recipe: tuple) -> type:
    """Returns a subclass of a bridge class that runs `wrap_linen(its linen module)`."""
    # The `recipe` is for pickle, as in `subclass`.

    # Makes a bridge of the original class around the new module, gives it the variables
    # of this bridge, with adapters added to the kernels, and calls it.
    def call(self: Any, *args: object, **kwargs: object) -> Tree:
        bridge = self.qlora_original(wrap_linen(self.to_nnx__module))
        variables = {name: _to_linen(self, name) for name in linen_attributes(self)}
        for name, value in variables.items():
            setattr(bridge, name, nnx.data(value))
        # The new bridge has no rngs of its own.
        if kwargs.get("rngs") is None:
            kwargs = {**kwargs, "rngs": self.to_nnx__rngs}
        result = bridge(*args, **kwargs)
        for name, value in linen_attributes(bridge).items():
            if value is not variables.get(name):
                _write_back(self, name, value)
        return result

    return subclass(cls, {"__call__": call}, recipe)


def _to_linen(holder: Holder, name: str) -> Tree:
    value = attributes(holder)[name]
    if isinstance(value, dict):
        names = [n for n, x in value.items() if not isinstance(x, AdapterModule)]
        return {n: _to_linen(value, n) for n in names}
    if name not in adapted_names(holder):
        return value
    adapter = adapter_of(holder, name)
    base, lora, key = base_of(holder, name), adapter.sliced, adapter.dropout_key()
    if lora is None:
        return nnx.Param(base)
    if key is not None:
        key = dropout_keys(lora, key)
    elif lora.dropout:
        # Dropout is off, but a "dropout" key of the linen module would turn it on.
        lora = with_dropout(lora, 0.0)
    return nnx.Param(AdaptedKernel(base, lora, key))


def _write_back(holder: Holder, name: str, value: Tree) -> None:
    # Changed entries of a nested collection are merged into a copy of it.
    old = attributes(holder).get(name)
    if isinstance(old, dict) and isinstance(value, dict):
        merged = dict(old)
        for key, inner in value.items():
            _write_back(merged, key, inner)
        value = merged
    # Kernels and adapters do not change in a call.
    elif name in adapted_names(holder):
        return
    set_attribute(holder, name, value if isinstance(holder, dict) else nnx.data(value))


@dataclass(frozen=True)
class _TracedLinen:
    """Replaces the linen module of a bridge in a trace, and records its kernels."""

    config: QLoRAConfig
    prefix: str  # the path of the bridge
    # Filled by `apply`: the roles of the targets' axes and the reasons why targets are
    # unfit, both by path, and the paths of the bridges that ran.
    records: tuple[dict[str, str], dict[str, str]]
    prefixes_run: set[str]
    module: nn.Module

    def apply(self, variables: Mapping, *args: object, **kwargs: Any) -> Tree:
        state = dict(variables)  # the other collections, once `params` is removed
        params = state.pop("params")
        traced = trace_kinds(self.module, params, self.config, args, kwargs, state)
        for record, by_path in zip(self.records, traced, strict=True):
            record.update({self.prefix + path: text for path, text in by_path.items()})
        self.prefixes_run.add(self.prefix)
        return self.module.apply(variables, *args, **kwargs)


def linen_axis_roles(
    model: nnx.Module, config: QLoRAConfig, paths: list[str], args: tuple, kwargs: dict
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Traces a sample call, and returns what it shows about targets in linen modules.

    These are the roles of their axes and the reasons why some are unfit, both by path,
    and the paths in bridges that did not run.
    """
    records: tuple[dict[str, str], dict[str, str]] = {}, {}
    prefixes_run: set[str] = set()
    graphdef, state = nnx.split(model)
    arrays, rebuild = split_arrays((args, kwargs))

    # Runs the whole model, so that each bridge gets the inputs that it gets in a call.
    def abstract_call(state: nnx.GraphState, arrays: list) -> list:
        traced: Any = nnx.merge(graphdef, state)
        for path, module in list(nnx.iter_modules(traced)):
            prefix = f"{join_path(path)}/" if path else ""
            inner = [p.removeprefix(prefix) for p in paths if p.startswith(prefix)]
            if runs_linen(module) and inner:
                # The config has only these targets. It has no settings by pattern: the
                # patterns may be meant for paths outside of this module.
                targets = tuple(map(re.escape, inner))
                linen_config = QLoRAConfig(targets=targets, dropout=config.dropout)
                # The bridge passes its linen module, the last field of `_TracedLinen`.
                replace_linen = functools.partial(
                    _TracedLinen, linen_config, prefix, records, prefixes_run
                )
                # This class exists only during the trace: it is not cached or pickled.
                cls = _bridge_subclass(type(module), replace_linen, ())
                object.__setattr__(module, "__class__", cls)
        args, kwargs = rebuild(arrays)
        return jax.tree.leaves(traced(*args, **kwargs))

    jax.eval_shape(abstract_call, state, arrays)
    return *records, [p for p in paths if not p.startswith(tuple(prefixes_run))]
