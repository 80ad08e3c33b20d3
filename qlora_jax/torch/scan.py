"""Runs equal layers as one scan."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import torch
import torchax

from .layers import LayerRun, ScanError
from .weights import Leaf, PendingOutput, as_array, as_tensor, call_module

# How many layers after the first one are compared with it, besides the last one. Layers
# that differ usually do so by a rule with a short period, such as every fourth layer.
NUM_COMPARED = 4
Arguments = list[Any]  # all arguments of a layer except its hidden states, flattened


@dataclass(frozen=True)
class LayerCall:
    """How one layer was called."""

    arguments: Arguments
    structure: Any  # the pytree of the arguments
    is_positional: bool  # whether the hidden states are the first positional argument


@dataclass
class LayerScan:
    """Runs the layers of a `LayerRun` as one scan, during one call of the module.

    A run consists of periods: layers at the same position in each period are equal, and
    layers at different positions may differ.

    The module calls each layer as usual. Each layer but the last only records its
    arguments, and returns a placeholder without data, which no PyTorch function
    accepts. The call of the last layer runs all layers, in a scan over the periods.
    """

    run: LayerRun
    layers: list[torch.nn.Module]  # all layers of the run
    # For each position in the period, the stacked leaves by their name in the layer.
    stacks: list[dict[str, Leaf]]
    policy: Callable[..., bool] | None  # of `jax.checkpoint`
    calls: list[LayerCall] = field(default_factory=list)
    # Set when the first layer is called: its input, and whether it returns a tuple.
    hidden: jax.Array = field(init=False)
    returns_tuple: bool = field(init=False)
    # Set by `active`. A layer may have a `forward` that replaces that of its class.
    forwards: list[Callable | None] = field(init=False)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes the layers record their calls while the context is active."""
        self.forwards = [vars(layer).get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(self.record, index)
        try:
            yield
        finally:
            for index in range(len(self.layers)):
                self._restore_forward(index)

    def _restore_forward(self, index: int) -> None:
        layer, forward = self.layers[index], self.forwards[index]
        vars(layer).pop("forward", None)
        if forward is not None:
            layer.forward = forward

    def record(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Records the call of a layer, in place of its `forward`.

        The last call returns the output of the scan.
        """
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if not isinstance(hidden, torch.Tensor):
            self._refuse(
                "they must get their hidden states as the first argument, or as "
                f"`hidden_states`. Got {type(hidden).__name__}"
            )
        is_chained = isinstance(hidden, PendingOutput) and hidden.source_scan is self
        if index != len(self.calls) or is_chained != (index > 0):
            self._refuse("they must run one after another, each on the last output")
        arguments, structure = jax.tree.flatten((args[1:], kwargs))
        self.calls.append(LayerCall(arguments, structure, bool(args)))
        if index == 0:
            self.hidden = as_array(hidden)
            # The placeholder must be returned in the form of the layer's output.
            _, self.returns_tuple = self._program(0)
        if index + 1 < len(self.layers):
            output: torch.Tensor = PendingOutput(self.hidden.shape, self.hidden.dtype)
            output.source_scan, output.list_name = self, self.run.list_name
        else:
            output = self._scan()
        return (output,) if self.returns_tuple else output

    def _refuse(self, problem: str) -> NoReturn:
        raise ScanError(
            f"the layers of {self.run.list_name!r} cannot be scanned: {problem}. Pass "
            "trees that are not stacked."
        )

    def _call(
        self, index: int, hidden: jax.Array, leaves: Mapping, arguments: Arguments
    ) -> Any:
        """Runs the code of a layer on these hidden states, leaves and arguments."""
        layer, call = self.layers[index], self.calls[index % self.run.period]
        args, kwargs = jax.tree.unflatten(call.structure, arguments)
        if call.is_positional:
            args = (as_tensor(hidden), *args)
        else:
            kwargs = {"hidden_states": as_tensor(hidden), **kwargs}
        recorder = layer.forward
        self._restore_forward(index)
        try:
            prefix = self.run.stacked_name(index % self.run.period, "")
            return call_module(layer, leaves, args, kwargs, prefix)
        finally:
            layer.forward = recorder

    def _program(self, index: int) -> tuple[str, bool]:
        """Returns the jaxpr of a layer as text, and whether it returns a tuple."""
        position = index % self.run.period
        is_tuple: list[bool] = []

        def call(hidden: jax.Array, leaves: dict) -> jax.Array:
            # Restores torchax's key afterwards, if the layer draws random numbers.
            with torchax.default_env().override_property():
                arguments = self.calls[position].arguments
                output = self._call(index, hidden, leaves, arguments)
            is_tuple.append(isinstance(output, tuple))
            new_hidden = _hidden_states(output)
            input_type, output_type = jax.typeof(hidden), jax.typeof(new_hidden)
            is_same_shape = input_type.shape == output_type.shape
            if not is_same_shape or input_type.dtype != output_type.dtype:
                self._refuse(
                    "their output must have the shape and dtype of their input, "
                    f"{input_type.str_short()}, but is {output_type.str_short()}"
                )
            return new_hidden

        leaves = jax.tree.map(lambda x: x[0], self.stacks[position])
        program = jax.make_jaxpr(call)(self.hidden, leaves)
        return re.sub(r"0x[0-9a-f]+", "", str(program)), is_tuple[0]  # no addresses

    def _check_equal(self) -> None:
        # A layer may have its index as an attribute. What the layer computes must not
        # depend on the index, because a scan runs the code of the first period for all
        # others too. At each position in the period, this compares the jaxpr of the
        # first layer with those of the next few layers and of the last one. Tracing all
        # layers would take too long.
        for first in range(self.run.period):
            others = range(first, len(self.layers), self.run.period)[1:]
            program = self._program(first)
            for other in sorted({*others[:NUM_COMPARED], *others[-1:]}):
                if self._program(other) != program:
                    indices = [self.run.start + index for index in (first, other)]
                    self._refuse(f"layers {indices} compute differently")

    def _scan(self) -> torch.Tensor:
        self._check_equal()
        env, period = torchax.default_env(), self.run.period
        # The first key is for what runs after the scan, the others for the periods.
        keys = jax.random.split(env.prng_key, len(self.calls) // period + 1)
        draws: list[bool] = []  # whether each traced layer draws random numbers

        def run_layer(
            position: int,
            hidden: jax.Array,
            leaves: dict,
            varying: dict,
            key: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            arguments = list(self.calls[position].arguments)
            for index, array in varying.items():
                arguments[index] = as_tensor(array)
            with env.override_property(prng=key):
                output = self._call(position, hidden, leaves, arguments)
                draws.append(env.prng_key is not key)
                return _hidden_states(output), env.prng_key

        # Without `prevent_cse`, XLA may recompute all layers of a period before the
        # backward pass needs the first of them, and then they are all in memory. A
        # period of one layer does not need it.
        checkpointed = jax.checkpoint(
            run_layer, policy=self.policy, prevent_cse=period > 1, static_argnums=0
        )

        def run_period(hidden: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            stacks, varying, key = xs
            for position in range(period):
                hidden, key = checkpointed(
                    position, hidden, stacks[position], varying[position], key
                )
            return hidden, None

        varying_arguments = [
            self._varying_arguments(self.calls[i::period]) for i in range(period)
        ]
        xs = self.stacks, varying_arguments, keys[1:]
        hidden, _ = jax.lax.scan(run_period, self.hidden, xs)
        if any(draws):
            env.prng_key = keys[0]
        return as_tensor(hidden)

    def _varying_arguments(self, calls: list[LayerCall]) -> dict[int, jax.Array]:
        """Returns the arguments that differ between `calls`, stacked, by their index.

        The calls are those of the layers at one position in the period.
        """
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


def _hidden_states(output: Any) -> jax.Array:
    if isinstance(output, torch.Tensor):
        return as_array(output)
    if not isinstance(output, tuple) or any(value is not None for value in output[1:]):
        kind = type(output).__name__
        if isinstance(output, tuple):
            kind = f"a tuple of {len(output)} values"
        raise ScanError(
            "a scanned layer must return its hidden states alone: a tensor, or a tuple "
            f"whose other values are None. Got {kind}. Pass trees that are not stacked."
        )
    return as_array(output[0])
