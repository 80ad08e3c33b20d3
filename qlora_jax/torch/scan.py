"""Runs equal layers as one scan."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax

from .layers import LayerRun
from .weights import Leaf, PendingOutput, as_array, as_tensor, tensor_of

PyTree = Any


@dataclass
class LayerCall:
    """The arguments of one layer's call, apart from the hidden states."""

    leaves: list[object]  # the arguments and their defaults, flattened
    spec: Any  # how `torch.utils._pytree` puts them together
    is_positional: bool  # whether the hidden states are the first positional argument

    def rebuild(self, hidden: torch.Tensor, leaves: list[object]) -> tuple[tuple, dict]:
        """Returns the arguments with these hidden states and leaves."""
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, self.spec)
        if self.is_positional:
            return (hidden, *args), kwargs
        return args, {"hidden_states": hidden, **kwargs}


@dataclass
class LayerScan:
    """Replaces the calls of a run of layers in one call of the module.

    Each layer only records its arguments, and returns a placeholder without data, which
    no other code may read. The last layer runs them all, in a scan over periods.
    """

    run: LayerRun
    layers: list[torch.nn.Module]  # all layers of the run
    stacks: list[dict[str, Leaf]]  # the stacked leaves of each position, by name
    has_dropout: bool
    policy: Any
    calls: list[LayerCall] = field(default_factory=list)
    hidden: torch.Tensor | None = None  # the input of the first layer
    pending: torch.Tensor | None = None  # the output of the last layer that was called

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes the layers record their calls while the context is active."""
        for index, layer in enumerate(self.layers):
            layer.forward = _Recorder(self, index)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def record(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Records the call of a layer; the last one returns the output of all."""
        is_positional = bool(args)
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        expected = self.hidden if index == 0 else self.pending
        if index != len(self.calls) or (index > 0 and hidden is not expected):
            raise ValueError(self._reason(f"layer {index} does not run on the output"))
        leaves, spec = torch.utils._pytree.tree_flatten((args[1:], kwargs))
        self.calls.append(LayerCall(leaves, spec, is_positional))
        if index == 0:
            self.hidden = hidden
            self.returns_tuple = self._returns_tuple()
        if index + 1 < len(self.layers):
            hidden = as_array(self.hidden)
            self.pending = PendingOutput(hidden.shape, hidden.dtype)
            self.pending.list_name = self.run.list_name
            return (self.pending,) if self.returns_tuple else self.pending
        output = self._scan()
        return (output,) if self.returns_tuple else output

    def _reason(self, problem: str) -> str:
        return (
            f"the layers of {self.run.list_name!r} cannot be scanned: {problem} of the "
            "layer before it. Pass trees that are not stacked."
        )

    def _returns_tuple(self) -> bool:
        # One abstract call shows what a layer returns.
        def call(hidden: jax.Array, leaves: dict) -> jax.Array:
            output = self._call(0, as_tensor(hidden), leaves, self.calls[0].leaves)
            kinds.append(isinstance(output, tuple))
            return as_array(_first(output))

        kinds: list[bool] = []
        first = {
            name: jax.tree.map(lambda x: x[0], leaf)
            for name, leaf in self.stacks[0].items()
        }
        jax.eval_shape(call, as_array(self.hidden), first)
        return kinds[0]

    def _call(
        self, position: int, hidden: torch.Tensor, leaves: Mapping, arguments: list
    ) -> Any:
        layer, call = self.layers[position], self.calls[position]
        recorder = layer.__dict__.pop("forward")
        try:
            args, kwargs = call.rebuild(hidden, arguments)
            tensors = {name: tensor_of(leaf) for name, leaf in leaves.items()}
            return torch.func.functional_call(layer, tensors, args, kwargs)
        finally:
            layer.forward = recorder

    def _scan(self) -> torch.Tensor:
        env, period = torchax.default_env(), self.run.period
        calls = [self.calls[p::period] for p in range(period)]
        varying = [self._varying_arguments(group) for group in calls]
        count = len(self.layers) // period
        key, *keys = jax.random.split(env.prng_key, count + 1)
        draws = []  # whether a layer draws random numbers

        def run_period(hidden: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            stacks, arguments, layer_key = xs
            with env.override_property(prng=layer_key):
                for p in range(period):
                    values = list(calls[p][0].leaves)
                    for index, array in arguments[p].items():
                        values[index] = as_tensor(array)
                    output = self._call(p, as_tensor(hidden), stacks[p], values)
                    hidden = as_array(_first(output)).astype(hidden.dtype)
                draws.append(env.prng_key is not layer_key)
            return hidden, None

        xs = self.stacks, varying, jnp.stack(keys)
        body = jax.checkpoint(run_period, policy=self.policy, prevent_cse=False)
        hidden, _ = jax.lax.scan(body, as_array(self.hidden), xs)
        if any(draws):
            env.prng_key = key
        return as_tensor(hidden)

    def _varying_arguments(self, calls: list[LayerCall]) -> dict[int, jax.Array]:
        """Returns stacks of the arguments that differ between the layers."""
        first, varying = calls[0], {}
        for index, value in enumerate(first.leaves):
            values = [call.leaves[index] for call in calls]
            if any(call.spec != first.spec for call in calls):
                raise ValueError(self._reason("a layer has other arguments than those"))
            if all(other is value for other in values):
                continue
            if isinstance(value, torch.Tensor):
                varying[index] = jnp.stack([as_array(x) for x in values])
            elif any(other != value for other in values):
                raise ValueError(
                    self._reason(f"a layer has other arguments {values} than those")
                )
        return varying


@dataclass
class _Recorder:
    """Takes the place of a layer's `forward`."""

    scan: LayerScan
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.scan.record(self.index, args, kwargs)


def _first(output: Any) -> torch.Tensor:
    if not isinstance(output, tuple):
        return output
    if any(value is not None for value in output[1:]):
        raise ValueError(
            "a scanned layer must return its hidden states alone. Got "
            f"{len(output)} values. Pass trees that are not stacked."
        )
    return output[0]
