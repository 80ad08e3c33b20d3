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
        make: Callable[[tuple[int, ...], Any], Any],
        share: Callable[[Any], Any] = lambda x: x,
    ) -> Arrays:
        """Returns the arguments of this part.

        Args:
            arrays: The arguments of the whole update.
            take: Maps an array of the whole update to the array of this part.
            make: Maps a shape and an array of another part to the array that replaces
                it.
            share: Maps an array that all parts share.
        """
        ways = {
            OWN: lambda x, shape: take(x),
            ABSENT: lambda x, shape: make(shape, x),
            SHARED: lambda x, shape: share(x),
        }
        held = zip(arrays.state, self.state, self.shapes, strict=True)
        state = [ways[role](x, shape) for x, role, shape in held]
        params = self.choose(arrays.params, take, make, share) if arrays.params else []
        updates = self.choose(arrays.updates, take, make, share)
        return Arrays(updates, state, params, arrays.extra)

    def choose(
        self,
        params: Sequence[Any],
        take: Callable[[Any], Any],
        make: Callable[[tuple[int, ...], Any], Any],
        share: Callable[[Any], Any] = lambda x: x,
    ) -> list[Any]:
        """Returns the parameters of this part; for the arguments see `of`."""
        fill = lambda x: (
            make(_filler(x.shape, self.filler), x) if jnp.ndim(x) else share(x)
        )
        pairs = zip(params, self.own, strict=True)
        return [take(x) if own else fill(x) for x, own in pairs]


def find_parts(update: Update, structs: Arrays, sizes: Sequence[int]) -> list[Part]:
    """Returns the parts of an update, that of arrays that are not stacks last.

    Args:
        update: The update.
        structs: The shapes of its arguments.
        sizes: The layers of each parameter, 0 for one that is no stack.

    Raises:
        NotInParts: If the state is not one of these parameters, or if its structure
            depends on sizes.
    """
    given = structs.params or structs.updates
    if len(given) != len(sizes):
        raise NotInParts("`params` and `updates` differ in structure")
    whole = update.state_shapes(given)
    if whole is None or whole != [x.shape for x in structs.state]:
        raise NotInParts("`state` is not what `init` gives for these parameters")
    layers = [*sorted(set(sizes) - {0}), 0]
    firsts = {x.shape[0] for x in given if x.shape}
    filler = next(n for n in itertools.count(2) if n not in firsts)
    return [_part(update, given, sizes, n, filler, whole) for n in layers]


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
    take = taker(layers)
    fill = lambda x: resized(_filler(x.shape, filler), x)
    params = [take(x) if o else fill(x) for x, o in zip(given, own, strict=True)]
    found = try_sizes(lambda: update.state_shapes(params))
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


def try_sizes(run: Callable[[], Any]) -> Any:
    """Runs a transformation on sizes that it may not support."""
    try:
        return run()
    except Exception as error:  # `tx` may raise anything
        why = f"{type(error).__name__}: {error}"
        raise NotInParts(f"it fails on arrays of other sizes ({why})") from error


def struct(x: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array."""
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def resized(shape: tuple[int, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns an array's type with another shape."""
    return jax.ShapeDtypeStruct(shape, x.dtype, weak_type=x.weak_type)


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Returns the array that replaces one of another part."""
    return jnp.zeros(shape, like.dtype)


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


def taker(layers: int) -> Callable[[Any], Any]:
    """Returns what gives the shape of one layer of a stack, or of a whole array."""
    return (lambda x: resized((1, *x.shape[1:]), x)) if layers else lambda x: x
