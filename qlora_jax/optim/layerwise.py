"""Whether a transformation in parts does what it does to the whole.

Its programs are read, for the whole and for each part (see `dependence`).
"""

from collections.abc import Sequence

import jax

from . import dependence
from .parts import (
    OWN,
    SHARED,
    Part,
    find_parts,
    resized,
    struct,
    taker,
    try_sizes,
)
from .update import Arrays, NotInParts, Update


def split(update: Update, sizes: Sequence[int]) -> list[Part]:
    """Returns the parts of an update, that of arrays that are not stacks last.

    Args:
        update: The update.
        sizes: The layers of each parameter, 0 for one that is no stack.

    Raises:
        NotInParts: If the parts together would not be the whole.
    """
    structs = jax.tree.map(struct, update.arrays)
    parts = find_parts(update, structs, sizes)
    params, state = _labels(structs, sizes, parts)
    # Every part gets the extra arguments whole.
    extra = [dependence.OTHER if x.shape else dependence.UNIFORM for x in structs.extra]
    labels = [*params, *state, *(params if structs.params else []), *extra]
    trace = lambda sized: jax.make_jaxpr(lambda sized: update(sized))(sized)
    program = trace(structs)
    wanted = [*params, *state]
    whole = dependence.read(program, labels)
    _check_labels(update.paths, wanted, whole)
    kinds = lambda xs: [(x.shape, x.dtype) for x in xs]
    if kinds(program.out_avals[len(params) :]) != kinds(structs.state):
        raise NotInParts("the update changes a shape or dtype of the state")
    for part in parts:
        sized = part.of(structs, taker(part.layers), resized)
        found = try_sizes(lambda sized=sized: trace(sized))
        _check_keys(part, whole, dependence.read(found, labels), wanted)
    return parts


def split_init(update: Update, sizes: Sequence[int]) -> list[Part]:
    """Returns the parts in which the first state can be made.

    Args:
        update: An update of parameters, in the place of gradients too, with the state
            that `init` gives for them.
        sizes: The layers of each parameter, 0 for one that is no stack.

    Raises:
        NotInParts: If the parts together would not be the whole.
    """
    structs = jax.tree.map(struct, update.arrays)
    parts = find_parts(update, structs, sizes)
    params, wanted = _labels(structs, sizes, parts)
    read = lambda given: dependence.read(jax.make_jaxpr(update.init)(given), params)
    whole = read(structs.params)
    _check_labels([], wanted, whole)
    for part in parts:
        sized = part.choose(structs.params, taker(part.layers), resized)
        found = try_sizes(lambda sized=sized: read(sized))
        _check_keys(part, whole, found, wanted)
    return parts


def _labels(
    structs: Arrays, sizes: Sequence[int], parts: Sequence[Part]
) -> tuple[list[str], list[str]]:
    """Returns what parameters and the state's arrays may depend on."""
    params = [dependence.stack(n) if n else dependence.OTHER for n in sizes]
    roles = zip(*(part.state for part in parts), strict=True)
    layers = [part.layers for part in parts]
    pairs = zip(structs.state, roles, strict=True)
    return params, [_state_label(x.shape, found, layers) for x, found in pairs]


def _check_keys(
    part: Part,
    whole: dependence.Reading,
    found: dependence.Reading,
    wanted: Sequence[str],
) -> None:
    """Raises NotInParts if a part computes its arrays in another way than the whole."""
    label = dependence.stack(part.layers) if part.layers else dependence.OTHER
    for kind in (label, dependence.UNIFORM, dependence.FIXED):
        for want, x, y in zip(wanted, whole.results, found.results, strict=True):
            if want == kind and x.key != y.key:
                raise NotInParts("what it computes depends on the sizes of arrays")


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
