"""Divides the layers of a decoder into groups, and each group into stacks of layers.

A group is a period of layers that repeats. Layers at the same position in different
periods have the same structure, so their parameters can be stacked along a new axis.
The layers at one position are therefore called a stack. One scan runs over the periods
of a group. Most decoders are one group, whose period is a single layer.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

from .config import DecoderConfig, LayerKind

_MAX_PERIOD = 64  # longer than that of any published model; bounds the search


@dataclasses.dataclass(frozen=True)
class Stack:
    """The layers of a group that are at the same position in their periods.

    Attributes:
        path: Path of the module whose parameters are stacked.
        layers: The numbers of the layers in the model.
        kinds: The kinds of these layers, which have the same structure.
    """

    path: str
    layers: range
    kinds: tuple[LayerKind, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """A period of layers that repeats.

    Attributes:
        name: Name of the module that is scanned.
        stacks: One stack for each position of the period, in order.
    """

    name: str
    stacks: tuple[Stack, ...]

    @property
    def repeats(self) -> int:
        """The number of periods."""
        return len(self.stacks[0].layers)


@functools.cache
def layer_groups(config: DecoderConfig) -> tuple[Group, ...]:
    """Returns the groups of a decoder, in order.

    A single group is called `layers`, and several groups `layers_0`, `layers_1` and so
    on. If a period has several layers, they are called `layer_0`, `layer_1` and so on
    in their group. These names are paths of parameters, and so a part of stored
    adapters.
    """
    # Layers of a stack also rotate the same number of values.
    structures = [(kind.structure, config.dim_of(kind.rope)) for kind in config.layers]
    periods = split_into_periods(structures)
    groups, start = [], 0
    for i, (period, repeats) in enumerate(periods):
        name = "layers" if len(periods) == 1 else f"layers_{i}"
        end = start + period * repeats
        stacks = []
        for position in range(period):
            layers = range(start + position, end, period)
            path = name if period == 1 else f"{name}/layer_{position}"
            kinds = tuple(config.layers[layer] for layer in layers)
            stacks.append(Stack(path, layers, kinds))
        groups.append(Group(name, tuple(stacks)))
        start = end
    return tuple(groups)


def layer_stacks(config: DecoderConfig) -> tuple[Stack, ...]:
    """Returns the stacks of all groups, in order."""
    return tuple(stack for group in layer_groups(config) for stack in group.stacks)


def split_into_periods(structures: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Returns the length of each group's period, and how often it repeats, in order.

    Every period repeats as often as it can. Of all such divisions, this is the one with
    the fewest stacks, because the compiled program of a step contains the code of each
    stack once. Of several with equally few stacks, it has the fewest groups, and then
    the longest period in the first group.

    The number of stacks is not always the smallest possible one, because a period may
    not repeat less often than it can: "aaabaabaab" is divided into "aaa", "baabaa" and
    "b", which have 1 + 3 + 1 stacks, while "a" and "aabaabaab" would have 1 + 3. This
    rule must not change, because the division determines the paths of parameters in
    stored adapters.
    """
    count = len(structures)
    # From the last layer to the first: the best division of the layers from `start`
    # on, as (stacks, groups, -period, repeats).
    best = [(0, 0, 0, 0)] * (count + 1)
    # matches[p]: the number of consecutive layers, from `start` on, each of which is
    # equal to the layer p places after it.
    matches = [0] * (min(count, _MAX_PERIOD) + 1)
    for start in reversed(range(count)):
        options = []
        for period in range(1, min(count - start, _MAX_PERIOD) + 1):
            later = start + period
            is_match = later < count and structures[start] == structures[later]
            matches[period] = matches[period] + 1 if is_match else 0
            repeats = 1 + matches[period] // period
            stacks, groups, _, _ = best[start + period * repeats]
            options.append((stacks + period, groups + 1, -period, repeats))
        best[start] = min(options)
    periods, start = [], 0
    while start < count:
        _, _, negative_period, repeats = best[start]
        periods.append((-negative_period, repeats))
        start -= negative_period * repeats
    return periods
