"""Whether a program treats every layer of a stack alike, read from its jaxpr.

A transformation may run layer by layer only where that changes nothing: where each
layer of a stack's update depends on the same layer of the gradient, the parameter and
the moments, and on scalars. Every value of the program gets a label that says what it
depends on. Most transformations work entry by entry; a scan over the layers may mix the
entries of a layer. A primitive that is not known to keep layers apart mixes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from .._jax.memory import is_concrete

# What a value depends on. An array whose first axis is the layers of a stack, each of
# which depends on the same layer of stacks, has the label `stack(layers)`.
UNIFORM = "uniform"  # scalars: one number, or an array that holds one number
FIXED = "fixed"  # scalars and constants; entries may differ
OTHER = "other"  # arrays that are not stacks
MIXED = "mixed"  # more than one layer of a stack, or stacks and other arrays

_ENTRYWISE = frozenset(
    """abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div
    eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p
    logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round rsqrt
    select_n sign sin sinh sqrt square sub tan tanh xor""".split()
)
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call checkpoint
    remat2""".split()
)


def stack(layers: int) -> str:
    """The label of the entries of stacks of that many layers."""
    return f"stack of {layers}"


@dataclass(frozen=True)
class Value:
    """What is known of a value of a program.

    Attributes:
        label: What it depends on.
        key: Tells how it is computed from arguments and constants, apart from the sizes
            of what is entrywise and from numbers of layers. Two programs that give
            equal keys do the same to arrays of other sizes.
    """

    label: str
    key: Any


@dataclass(frozen=True)
class Reading:
    """What a program computes, as far as it matters here.

    Attributes:
        results: Its results.
        mixers: Names of the primitives that mixed layers, in order.
    """

    results: list[Value]
    mixers: list[str]


def read(program: core.ClosedJaxpr, labels: Sequence[str]) -> Reading:
    """Follows the labels of a program's arguments to its results."""
    arguments = [Value(label, i) for i, label in enumerate(labels)]
    mixers: list[str] = []
    return Reading(_follow(program, arguments, mixers), mixers)


def _follow(
    program: core.ClosedJaxpr, arguments: Sequence[Value], mixers: list[str]
) -> list[Value]:
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    for var, const in zip(jaxpr.constvars, program.consts, strict=True):
        known[var] = _constant(const)
    value = lambda x: _constant(x.val) if isinstance(x, core.Literal) else known[x]
    for eqn in jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        found = _equation(eqn, operands, mixers)
        name = eqn.primitive.name
        if name not in _CALLS and _is_mixed(found) and not _is_mixed(operands):
            mixers.append(name)
        known.update(zip(eqn.outvars, found, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _is_mixed(values: Sequence[Value]) -> bool:
    return any(value.label == MIXED for value in values)


def _equation(eqn: Any, operands: list[Value], mixers: list[str]) -> list[Value]:
    name = eqn.primitive.name
    if name in _CALLS and len(inner := _programs(eqn.params.values())) == 1:
        return _follow(inner[0], operands, mixers)
    if name == "cond":
        predicate, *rest = operands
        branches = [_follow(b, rest, mixers) for b in eqn.params["branches"]]
        ways = [(predicate, *values) for values in zip(*branches, strict=True)]
        return [
            Value(_join([v.label for v in way]), hash((name, *(v.key for v in way))))
            for way in ways
        ]
    labels, how = _primitive(eqn, [x.label for x in operands])
    key = hash((name, how, *(x.key for x in operands)))
    return [Value(label, hash((key, i))) for i, label in enumerate(labels)]


def _primitive(eqn: Any, operands: list[str]) -> tuple[list[str], str]:
    """Returns the labels of a primitive's results, and what else tells what it does."""
    name = eqn.primitive.name
    shapes = [v.aval.shape for v in eqn.outvars]
    joined = _join(operands)
    if name in _ENTRYWISE:
        return [joined], str(eqn.params)
    if name in ("broadcast_in_dim", "reshape"):
        array, *_ = operands
        if array == UNIFORM or eqn.invars[0].aval.shape == shapes[0]:
            return [array], ""
    is_stack = joined not in (UNIFORM, FIXED, OTHER, MIXED)
    if is_stack and _is_map_over_layers(eqn, operands):
        (body,) = _programs(eqn.params.values())
        how = str((body.jaxpr, [_constant(x).key for x in body.consts]))
        return [joined for _ in shapes], how
    # Other primitives depend on sizes, even for a uniform array: a sum, for one.
    how = str((eqn.params, [v.aval.shape for v in eqn.invars], shapes))
    if joined in (UNIFORM, FIXED):
        return [UNIFORM if shape == () else FIXED for shape in shapes], how
    return [joined if joined == OTHER else MIXED for _ in shapes], how


def _is_map_over_layers(eqn: Any, operands: list[str]) -> bool:
    """Whether a scan's iterations are apart, and none sees a whole stack.

    What a scan iterates over has one axis more than its body sees; for a stack that is
    the axis of layers. What it carries, and what all iterations share, has the same.
    """
    if eqn.primitive.name != "scan":
        return False
    (body,) = _programs(eqn.params.values())
    is_sliced = lambda outer, inner: outer.aval.ndim > inner.ndim
    given = zip(operands, eqn.invars, body.in_avals, strict=True)
    shared = {label for label, *pair in given if not is_sliced(*pair)}
    results = zip(eqn.outvars, body.out_avals, strict=True)
    return shared <= {UNIFORM} and all(is_sliced(*pair) for pair in results)


def _join(labels: Sequence[str]) -> str:
    """The label of what is computed, entry by entry, of values with these labels."""
    found = set(labels) - {UNIFORM}
    if not found:
        return UNIFORM
    if found <= {FIXED, OTHER}:
        return OTHER if OTHER in found else FIXED
    return found.pop() if len(found) == 1 else MIXED


def _programs(values: Any) -> list[core.ClosedJaxpr]:
    found = [v for v in values if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]
    closed: Callable = lambda v: core.ClosedJaxpr(v, ())
    return [closed(v) if isinstance(v, core.Jaxpr) else v for v in found]


def _constant(value: Any) -> Value:
    """Returns a constant, with a key that compares by value; by identity if traced."""
    label = UNIFORM if np.ndim(value) == 0 else FIXED
    if isinstance(value, jax.Array):
        if not is_concrete(value):
            return Value(label, id(value))
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
    array = np.asarray(value)
    return Value(label, (array.dtype.name, array.shape, array.tobytes()))
