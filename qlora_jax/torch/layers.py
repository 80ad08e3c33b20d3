"""Finds equal layers, and stacks their arrays."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from .arrays import Model, module_of, named_tensors

PyTree = Any
# "model.layers.1:11:3.mlp.weight" has the layers 1, 4, 7 and 10 of "model.layers".
STACKED_NAME = re.compile(r"(.*?)\.(\d+):(\d+):(\d+)\.(.*)")
# Attributes with a layer's own index. Most layers use it only for caches.
INDEX_NAMES = {"layer_idx", "layer_id", "layer_number"}


class ScanError(ValueError):
    """Stacked layers cannot be scanned. The model may work with unstacked layers."""


@dataclass(frozen=True)
class LayerRun:
    """Layers of a `ModuleList` that repeat: layer i equals layer i + period."""

    list_name: str  # name of the ModuleList
    start: int
    stop: int
    period: int

    @property
    def indices(self) -> range:
        """The indices of all layers."""
        return range(self.start, self.stop)

    def stacked_name(self, position: int, tensor_name: str) -> str:
        """Returns the name of a stack.

        A stack has one layer of each period. `position` is the index of this layer in
        the period, and `tensor_name` is the name of the stacked tensor in the layer.
        """
        # The slice stops right after the last layer at this position.
        start, stop = self.start + position, self.stop - self.period + position + 1
        return f"{self.list_name}.{start}:{stop}:{self.period}.{tensor_name}"

    def parse(self, stacked_name: str) -> tuple[int, str]:
        """Returns the `position` and the `tensor_name` of a `stacked_name`."""
        match = STACKED_NAME.fullmatch(stacked_name)
        assert match is not None
        return int(match[2]) - self.start, match[5]

    def names(self, position: int, tensor_name: str) -> list[str]:
        """Returns the names of the tensors of a stack."""
        indices = range(self.start + position, self.stop, self.period)
        return [f"{self.list_name}.{index}.{tensor_name}" for index in indices]


def stack(model: Model, tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns a tree in which the arrays of equal layers are stacked.

    `apply` scans over stacked layers, and computes each again in the backward pass
    (`jax.checkpoint`). It therefore compiles one layer instead of all, and by default
    keeps only the input of each layer for the backward pass.

    Layers of a `ModuleList` are equal if they have the same classes, settings and
    shapes of tensors, but no tensor in common. Different layers may also repeat in a
    fixed pattern, such as three layers with linear attention and one with full
    attention. Each step of the scan then runs all layers of one period. The layers must
    run one after another, each on the output of the previous one.

    The stack of layers 0 to 15 has a name such as `"model.layers.0:16:1.mlp.weight"`,
    with the start, stop and step of a Python slice.

    Args:
        model: The module, wrapped or not.
        tree: Its parameters, or a base or lora tree of them.

    Raises:
        ValueError: If arrays of equal layers cannot be stacked, because they are packed
            differently.

    Example:
        >>> import jax, qlora_jax as ql, torch
        >>> class Layers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         layers = [torch.nn.Linear(8, 8) for _ in range(3)]
        ...         self.layers = torch.nn.ModuleList(layers)
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return x
        >>> params = ql.torch.stack(Layers(), ql.torch.params(Layers()))
        >>> {name: x.shape for name, x in params.items()}
        {'layers.0:3:1.weight': (3, 8, 8), 'layers.0:3:1.bias': (3, 8)}
    """
    stacked = dict(tree)
    module = module_of(model)
    for run in find_runs(module):
        for position in range(run.period):
            layer = module.get_submodule(f"{run.list_name}.{run.start + position}")
            for tensor_name in named_tensors(layer):
                names = run.names(position, tensor_name)
                if not any(name in stacked for name in names):
                    continue
                leaves = [stacked.pop(name, None) for name in names]
                new_name = run.stacked_name(position, tensor_name)
                stacked[new_name] = _stack_leaves(new_name, leaves)
    return stacked


def unstack(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns a tree with separate arrays for each layer: the inverse of `stack`.

    Args:
        tree: A tree that `stack` returned, or a base or lora tree of it.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> sorted(ql.torch.unstack({"layers.0:3:1.bias": jnp.ones((3, 8))}))
        ['layers.0.bias', 'layers.1.bias', 'layers.2.bias']
    """
    leaves = {}
    for name, leaf in tree.items():
        names = names_in(name)
        if names == [name]:
            leaves[name] = leaf
            continue
        for index, layer_name in enumerate(names):
            leaves[layer_name] = jax.tree.map(lambda x, i=index: x[i], leaf)
    return leaves


def names_in(name: str) -> list[str]:
    """Returns the names of the tensors in a leaf: one, or several if it is a stack."""
    template, indices = template_of(name)
    return [template.format(layer=index) for index in indices] or [name]


def template_of(name: str) -> tuple[str, range]:
    """Returns the name of a stack with `{layer}` for the index, and all its indices.

    For a leaf that is not a stack, these are its name and an empty range.
    """
    match = STACKED_NAME.fullmatch(name)
    if match is None:
        return name, range(0)
    list_name, start, stop, step, tensor_name = match.groups()
    indices = range(int(start), int(stop), int(step))
    return f"{list_name}.{{layer}}.{tensor_name}", indices


def stacked_names(module: torch.nn.Module) -> list[str]:
    """Returns the names of the leaves that `stack` returns for a module."""
    tensors = named_tensors(module)
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, "float32") for name, x in tensors.items()
    }
    return list(jax.eval_shape(lambda tree: stack(module, tree), shapes))


def runs_of(names: Iterable[str], module: torch.nn.Module) -> dict[LayerRun, list[str]]:
    """Groups the names of stacks by the run of layers that the stacks belong to."""
    matches = [(name, STACKED_NAME.fullmatch(name)) for name in names]
    stacks = sorted(
        (m[1], int(m[2]), int(m[3]), int(m[4]), name) for name, m in matches if m
    )
    runs_by_stack = _runs_with_empty_start(module) if stacks else {}
    runs: dict[LayerRun, list[str]] = {}
    run = None
    for list_name, start, stop, period, name in stacks:
        # Stacks are sorted by the start of their slice. All stacks of a run start
        # within its first period, and have one layer of each period.
        if (
            run is None
            or (run.list_name, run.period) != (list_name, period)
            or start >= run.start + period
        ):
            num_periods = len(range(start, stop, period))
            run = LayerRun(list_name, start, start + num_periods * period, period)
            # This run is wrong if it begins with layers that have no tensors.
            run = runs_by_stack.get(run.stacked_name(0, ""), run)
        runs.setdefault(run, []).append(name)
    return runs


def _runs_with_empty_start(module: torch.nn.Module) -> dict[str, LayerRun]:
    """Returns the runs whose first layer has no tensors.

    Such a run starts before its first stack. The keys are the names of these stacks, up
    to the name of the tensor.
    """
    runs = {}
    for run in find_runs(module):
        layers = [
            module.get_submodule(f"{run.list_name}.{run.start + position}")
            for position in range(run.period)
        ]
        has_tensors = [bool(named_tensors(layer)) for layer in layers]
        if any(has_tensors) and not has_tensors[0]:
            runs[run.stacked_name(has_tensors.index(True), "")] = run
    return runs


def find_runs(module: torch.nn.Module) -> Iterator[LayerRun]:
    """Yields the runs of equal layers of every outermost `ModuleList`."""
    outermost: list[str] = []
    tensor_names = named_tensors(module).keys()
    for name, inner in module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in outermost)
        # If the whole module is a ModuleList, only lists in its layers are searched.
        if name and isinstance(inner, torch.nn.ModuleList) and not is_inside:
            outermost.append(name)
            layers = list(inner)
            signatures = []
            for index, layer in enumerate(layers):
                prefix = f"{name}.{index}."
                names = {prefix + tensor_name for tensor_name in named_tensors(layer)}
                # Each layer of a run needs its own module and its own tensors. A tensor
                # that a layer shares has the name of the first layer that has it.
                is_shared = layers.count(layer) > 1 or not names <= tensor_names
                signatures.append((index,) if is_shared else _signature(layer))
            for start, stop, period in _periodic(signatures, 0, len(signatures)):
                yield LayerRun(name, start, stop, period)


def _periodic(
    signatures: list[tuple], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """Yields the runs of layers between two indices, as (start, stop, period).

    The longest run is chosen first, and then the longest runs before and after it. They
    are yielded in the order of the layers.
    """
    best_start = best_stop = best_period = 0
    for period in range(1, (stop - start) // 2 + 1):
        first = start
        for index in range(start, stop - period + 1):
            is_last = index + period == stop
            if is_last or signatures[index] != signatures[index + period]:
                # Layers `first` to `index + period - 1` repeat with this period. A run
                # has only whole periods.
                count = (index + period - first) // period * period
                if count >= 2 * period and count > best_stop - best_start:
                    best_start, best_stop, best_period = first, first + count, period
                first = index + 1
    if best_period:
        yield from _periodic(signatures, start, best_start)
        yield best_start, best_stop, best_period
        yield from _periodic(signatures, best_stop, stop)


def _signature(layer: torch.nn.Module) -> tuple:
    """Returns a value that is the same for all layers that can be stacked."""
    tensors = named_tensors(layer).items()
    return (
        tuple((name, tuple(x.shape), x.dtype) for name, x in tensors),
        tuple((name, type(m), _settings(m)) for name, m in layer.named_modules()),
    )


def _settings(module: torch.nn.Module) -> str:
    """Returns a module's plain values and functions as text, without `INDEX_NAMES`."""
    plain = (bool, int, float, str, tuple, torch.dtype)
    values = {
        name: value
        for name, value in vars(module).items()
        if name not in INDEX_NAMES
        and (isinstance(value, plain) or inspect.isroutine(value))
    }
    return repr(sorted(values.items()))


def _stack_leaves(name: str, leaves: list[PyTree]) -> PyTree:
    structures = {jax.tree.structure(leaf) for leaf in leaves}
    if any(leaf is None for leaf in leaves) or len(structures) > 1:
        kinds = sorted({"none" if x is None else type(x).__name__ for x in leaves})
        raise ValueError(
            f"the leaves of equal layers must be packed and adapted alike. Got {kinds} "
            f"with different settings for {name}."
        )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)
