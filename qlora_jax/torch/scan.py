"""Runs equal layers as one scan."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax

from .layers import LayerRun, ScanError
from .weights import Leaf, PendingOutput, as_array, as_tensor, tensor_of

Arguments = list[Any]  # the arguments of a layer but its hidden states, flattened


@dataclass(frozen=True)
class LayerCall:
    """How one layer was called."""

    arguments: Arguments
    structure: Any  # the pytree of the arguments
    is_positional: bool  # whether the hidden states are the first positional argument


@dataclass
class LayerScan:
    """Replaces the calls of a run of layers in one call of the module.

    Each layer only records its arguments, and returns a placeholder without data, which
    no function of PyTorch takes. The last layer runs them all, in a scan over periods.
    """

    run: LayerRun
    layers: list[torch.nn.Module]  # all layers of the run
    stacks: list[dict[str, Leaf]]  # the stacked leaves of each position, by name
    policy: Callable[..., bool] | None  # of `jax.checkpoint`
    calls: list[LayerCall] = field(default_factory=list)
    # Set when the first layer is called: its input, and what it returns.
    hidden: jax.Array = field(init=False)
    returns_tuple: bool = field(init=False)

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

    def record(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Records the call of a layer; the last one returns the output of all."""
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        follows = isinstance(hidden, PendingOutput) and hidden.source_scan is self
        if index != len(self.calls) or follows != (index > 0):
            self._refuse("they must run one after another, each on the last output")
        arguments, structure = jax.tree.flatten((args[1:], kwargs))
        self.calls.append(LayerCall(arguments, structure, bool(args)))
        if index == 0:
            self.hidden = as_array(hidden)
            kinds: list[bool] = []
            self._program(0, lambda output: kinds.append(isinstance(output, tuple)))
            self.returns_tuple = kinds[0]
        if index + 1 < len(self.layers):
            output: torch.Tensor = PendingOutput(self.hidden.shape, self.hidden.dtype)
            output.source_scan, output.list_name = self, self.run.list_name
        else:
            output = self._scan()
        return (output,) if self.returns_tuple else output

    def _refuse(self, problem: str) -> None:
        raise ScanError(
            f"the layers of {self.run.list_name!r} cannot be scanned: {problem}. Pass "
            "trees that are not stacked."
        )

    def _call(
        self, index: int, hidden: jax.Array, leaves: Mapping, arguments: Arguments
    ) -> Any:
        """Calls a layer on these hidden states, leaves and arguments."""
        layer, call = self.layers[index], self.calls[index % self.run.period]
        args, kwargs = jax.tree.unflatten(call.structure, arguments)
        if call.is_positional:
            args = (as_tensor(hidden), *args)
        else:
            kwargs = {"hidden_states": as_tensor(hidden), **kwargs}
        tensors = {name: tensor_of(leaf) for name, leaf in leaves.items()}
        recorder = layer.__dict__.pop("forward")
        try:
            return torch.func.functional_call(layer, tensors, args, kwargs)
        finally:
            layer.forward = recorder

    def _program(self, index: int, inspect: Callable[[Any], object]) -> str:
        """Returns what one layer computes, as text; `inspect` gets its output."""
        position = index % self.run.period

        def call(hidden: jax.Array, leaves: dict) -> jax.Array:
            # Random numbers that are drawn here do not change the key of the call.
            with torchax.default_env().override_property():
                arguments = self.calls[position].arguments
                output = self._call(index, hidden, leaves, arguments)
            inspect(output)
            return _hidden_states(output)

        leaves = jax.tree.map(lambda x: x[0], self.stacks[position])
        program = jax.make_jaxpr(call)(self.hidden, leaves)
        return re.sub(r"0x[0-9a-f]+", "", str(program))  # without addresses

    def _check_equal(self) -> None:
        # Layers know their index, and only caches should depend on it. The first and
        # the last layer show it if the computation does too.
        for first in range(self.run.period):
            last = len(self.layers) - self.run.period + first
            if self._program(first, type) != self._program(last, type):
                indices = [self.run.start + index for index in (first, last)]
                self._refuse(f"layers {indices} compute differently")

    def _scan(self) -> torch.Tensor:
        self._check_equal()
        env, period = torchax.default_env(), self.run.period
        calls = [self.calls[position::period] for position in range(period)]
        keys = jax.random.split(env.prng_key, len(calls[0]) + 1)
        draws: list[bool] = []  # whether a layer draws random numbers

        def run_period(hidden: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            stacks, varying, layer_key = xs
            with env.override_property(prng=layer_key):
                for position in range(period):
                    arguments = list(calls[position][0].arguments)
                    for index, array in varying[position].items():
                        arguments[index] = as_tensor(array)
                    output = self._call(position, hidden, stacks[position], arguments)
                    hidden = _hidden_states(output)
                draws.append(env.prng_key is not layer_key)
            return hidden, None

        xs = self.stacks, [self._varying_arguments(group) for group in calls], keys[1:]
        body = jax.checkpoint(run_period, policy=self.policy, prevent_cse=False)
        hidden, _ = jax.lax.scan(body, self.hidden, xs)
        if any(draws):
            env.prng_key = keys[0]
        return as_tensor(hidden)

    def _varying_arguments(self, calls: list[LayerCall]) -> dict[int, jax.Array]:
        """Returns stacks of the arguments that differ between the layers."""
        if any(call.structure != calls[0].structure for call in calls):
            self._refuse("they are called with different arguments")
        varying = {}
        columns = zip(*(call.arguments for call in calls), strict=True)
        for index, values in enumerate(columns):
            if all(value is values[0] for value in values):
                continue
            if isinstance(values[0], torch.Tensor):
                varying[index] = jnp.stack([as_array(value) for value in values])
            elif any(value != values[0] for value in values):
                self._refuse(f"they are called with different arguments {values}")
        return varying


@dataclass(frozen=True)
class _Recorder:
    """Takes the place of a layer's `forward`."""

    scan: LayerScan
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.scan.record(self.index, args, kwargs)


def _hidden_states(output: Any) -> jax.Array:
    if not isinstance(output, tuple):
        return as_array(output)
    if any(value is not None for value in output[1:]):
        raise ScanError(
            "a scanned layer must return its hidden states alone. Got "
            f"{len(output)} values. Pass trees that are not stacked."
        )
    return as_array(output[0])
