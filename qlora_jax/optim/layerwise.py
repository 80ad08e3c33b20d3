"""An update in parts: stacks layer by layer, all other arrays whole.

Every part calls the transformation on trees of the same structure, in which its stacks
have one layer (`[1, ...]`) and small zeros replace the arrays of other parts. So
labels, masks and dtypes are those of the whole. The shapes that `init` gives for such
trees show which arrays of the state belong to a part.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import dependence
from .blocks import SMALLEST
from .update import Arrays, NotInParts, Update

# What an array of the state is to a part.
OWN = "own"  # moments of the part's stacks
ABSENT = "absent"  # moments of other parts' arrays
SHARED = "shared"  # given to the part whole, such as counts


@dataclass(frozen=True)
class Part:
    """The arrays that one call updates.

    Attributes:
        layers: Layers of its stacks; 0 for the arrays that are not stacks.
        filler: First axis of the arrays that replace those of other parts.
        own: Whether each parameter belongs to it.
        state: What each array of the state is to it.
        shapes: The shape of each array of the state in it.
    """

    layers: int
    filler: int
    own: list[bool]
    state: list[str]
    shapes: list[tuple[int, ...]]

    def of(
        self,
        arrays: Arrays,
        take: Callable[[Any], Any],
        share: Callable[[Any], Any],
        make: Callable[[tuple[int, ...], Any], Any],
    ) -> Arrays:
        """Returns the arguments of this part.

        Args:
            arrays: The arguments of the whole update.
            take: Maps an array of the whole update to the array of this part.
            share: The same for arrays that all parts share.
            make: Maps a shape and an array of another part to the array that replaces
                it.
        """
        fill = lambda x: (
            make(_filler(x.shape, self.filler), x) if jnp.ndim(x) else share(x)
        )
        choose = lambda xs: [
            take(x) if own else fill(x) for x, own in zip(xs, self.own, strict=True)
        ]
        ways = {
            OWN: lambda x, shape: take(x),
            ABSENT: lambda x, shape: make(shape, x),
            SHARED: lambda x, shape: share(x),
        }
        held = zip(arrays.state, self.state, self.shapes, strict=True)
        state = [ways[role](x, shape) for x, role, shape in held]
        params = choose(arrays.params) if arrays.params else []
        return Arrays(choose(arrays.updates), state, params, arrays.extra)


def split(update: Update, sizes: Sequence[int]) -> list[Part]:
    """Returns the parts of an update, that of arrays that are not stacks last.

    Args:
        update: The update.
        sizes: The layers of each parameter, 0 for one that is no stack.

    Raises:
        NotInParts: If the parts together would not be the whole.
    """
    structs = jax.tree.map(_struct, update.arrays)
    given = structs.params or structs.updates
    if len(given) != len(sizes):
        raise NotInParts("`params` and `updates` differ in structure")
    whole = update.state_shapes(given)
    if whole is None or whole != [x.shape for x in structs.state]:
        raise NotInParts("`state` is not what `init` gives for these parameters")
    layers = [*sorted(set(sizes) - {0}), 0]
    firsts = {x.shape[0] for x in given if x.shape}
    filler = next(n for n in itertools.count(2) if n not in firsts)
    parts = [_part(update, given, sizes, n, filler, whole) for n in layers]
    _check(update, structs, sizes, parts)
    return parts


def _part(
    update: Update,
    given: list[jax.ShapeDtypeStruct],
    sizes: Sequence[int],
    layers: int,
    filler: int,
    whole: list[tuple[int, ...]],
) -> Part:
    """Finds which of the state's arrays change their shapes with those of a part."""
    own = [size == layers for size in sizes]
    take = _taker(layers)
    fill = lambda x: _resized(x, _filler(x.shape, filler))
    params = [take(x) if o else fill(x) for x, o in zip(given, own, strict=True)]
    found = _try_sizes(lambda: update.state_shapes(params))
    if found is None:
        raise NotInParts("the structure of the state depends on sizes")
    roles = []
    for shape, part in zip(whole, found, strict=True):
        if part == shape:
            roles.append(SHARED)
        elif layers and shape[:1] == (layers,) and part == (1, *shape[1:]):
            roles.append(OWN)
        else:
            roles.append(ABSENT)
    return Part(layers, filler, own, roles, found)


def _check(
    update: Update, structs: Arrays, sizes: Sequence[int], parts: list[Part]
) -> None:
    """Raises NotInParts unless the parts compute what the whole does."""
    params = [dependence.stack(n) if n else dependence.OTHER for n in sizes]
    roles = zip(*(part.state for part in parts), strict=True)
    state = [
        _state_label(x.shape, found, [part.layers for part in parts])
        for x, found in zip(structs.state, roles, strict=True)
    ]
    # Every part gets the extra arguments whole.
    extra = [dependence.OTHER if x.shape else dependence.UNIFORM for x in structs.extra]
    labels = [*params, *state, *(params if structs.params else []), *extra]
    trace = lambda sized: jax.make_jaxpr(lambda sized: update(sized))(sized)

    program = trace(structs)
    whole = dependence.read(program, labels)
    _check_labels(update.paths, [*params, *state], whole)
    kinds = lambda xs: [(x.shape, x.dtype) for x in xs]
    if kinds(program.out_avals[len(params) :]) != kinds(structs.state):
        raise NotInParts("the update changes a shape or dtype of the state")
    keys = _own_keys(whole, params, state)
    for part in parts:
        make = lambda shape, x: _resized(x, shape)
        sized = part.of(structs, _taker(part.layers), lambda x: x, make)
        found = _try_sizes(lambda sized=sized: trace(sized))
        own = _own_keys(dependence.read(found, labels), params, state)
        label = dependence.stack(part.layers) if part.layers else dependence.OTHER
        for kind in (label, dependence.UNIFORM, dependence.FIXED):
            if own.get(kind) != keys.get(kind):
                raise NotInParts("what it computes depends on the sizes of arrays")


def _own_keys(
    reading: dependence.Reading, params: list[str], state: list[str]
) -> dict[str, list[Any]]:
    """Returns how the results of each kind of array are computed."""
    keys: dict[str, list[Any]] = {}
    for label, result in zip([*params, *state], reading.results, strict=True):
        keys.setdefault(label, []).append(result.key)
    return keys


def _try_sizes(run: Callable[[], Any]) -> Any:
    """Runs a transformation on sizes that it may not support."""
    try:
        return run()
    except Exception as error:  # `tx` may raise anything
        why = f"{type(error).__name__}: {error}"
        raise NotInParts(f"it fails on arrays of other sizes ({why})") from error


def _state_label(
    shape: tuple[int, ...], roles: Sequence[str], layers: list[int]
) -> str:
    if OWN in roles:
        return dependence.stack(layers[roles.index(OWN)])
    if set(roles) == {SHARED}:
        return dependence.FIXED if shape else dependence.UNIFORM
    if roles[-1] == SHARED:  # moments of arrays that are not stacks
        return dependence.OTHER
    raise NotInParts(f"the state has an array of shape {shape}, not a stack")


def _check_labels(
    paths: list[str], wanted: list[str], reading: dependence.Reading
) -> None:
    """Raises NotInParts if a result depends on more than its own part."""
    simple = {dependence.UNIFORM, dependence.FIXED, dependence.OTHER}
    allowed = lambda want: simple if want in simple else {want, dependence.UNIFORM}
    pairs = list(zip(wanted, (x.label for x in reading.results), strict=True))
    bad = [i for i, (want, got) in enumerate(pairs) if got not in allowed(want)]
    if not bad:
        return
    named = [paths[i] for i in bad if i < len(paths)] or "the state"
    mixers = ", ".join(dict.fromkeys(reading.mixers)) or "another array"
    raise NotInParts(f"the update of {named} depends on other entries, by {mixers}")


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def _resized(x: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, weak_type=x.weak_type)


def _filler(shape: tuple[int, ...], first: int) -> tuple[int, ...]:
    """The shape of what replaces another part's array: as many axes, and small.

    It is not empty: `jnp.where`, for one, treats empty arrays in another way. Where
    `adamw8bit` has moments in 8 bits for an array, it has them for what replaces it.
    """
    if not shape:
        return ()
    size = math.prod(shape[1:] if len(shape) > 2 else shape)
    last = SMALLEST if size >= SMALLEST else 1
    if len(shape) == 1:
        return (first * last,)
    return (first, *[1] * (len(shape) - 2), last)


def _taker(layers: int) -> Callable[[Any], Any]:
    return (lambda x: _resized(x, (1, *x.shape[1:]))) if layers else lambda x: x
