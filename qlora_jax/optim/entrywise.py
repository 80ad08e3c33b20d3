"""Whether a program treats every entry of a stack alike, read from its jaxpr.

A transformation may run layer by layer only where that changes nothing: where each
entry of a stack's update depends on the same entry of the gradient, the parameter and
the moments, and on scalars. Every value of the program gets a label that says what it
depends on; a primitive that is not known to be entrywise mixes the entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core

from .._jax.memory import is_concrete

# What a value depends on. The entries of a stack have the label `stack(layers)`.
UNIFORM = "uniform"  # scalars: one number, or an array that holds one number
FIXED = "fixed"  # scalars and constants; entries may differ
OTHER = "other"  # arrays that are not stacks
MIXED = "mixed"  # more than one entry of a stack, or stacks and other arrays

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
class Reading:
    """What a program computes, as far as it matters here.

    Attributes:
        labels: The label of each result.
        mixers: Names of the primitives that mixed entries, in order.
        steps: What the program computes, apart from the sizes of what is entrywise:
            two programs with equal steps do the same to arrays of other sizes.
    """

    labels: list[str]
    mixers: list[str]
    steps: list[Any]


def read(program: core.ClosedJaxpr, labels: Sequence[str]) -> Reading:
    """Follows the labels of a program's arguments to its results."""
    reading = Reading([], [], [])
    reading.labels.extend(_follow(program, labels, reading))
    return reading


def _follow(
    program: core.ClosedJaxpr, labels: Sequence[str], reading: Reading
) -> list[str]:
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, labels, strict=True))
    for var, const in zip(jaxpr.constvars, program.consts, strict=True):
        known[var] = UNIFORM if np.ndim(const) == 0 else FIXED
        reading.steps.append(_constant(const))

    def label(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            reading.steps.append(_constant(atom.val))
            return UNIFORM if np.ndim(atom.val) == 0 else FIXED
        return known[atom]

    for eqn in jaxpr.eqns:
        operands = [label(atom) for atom in eqn.invars]
        found = _equation(eqn, operands, reading)
        name = eqn.primitive.name
        if MIXED in found and MIXED not in operands and name not in _CALLS:
            reading.mixers.append(name)
        known.update(zip(eqn.outvars, found, strict=True))
    return [label(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, operands: list[str], reading: Reading) -> list[str]:
    name = eqn.primitive.name
    shapes = [v.aval.shape for v in eqn.outvars]
    if name in _CALLS and len(inner := _programs(eqn.params.values())) == 1:
        return _follow(inner[0], operands, reading)
    if name == "cond":
        predicate, *rest = operands
        branches = [_follow(b, rest, reading) for b in eqn.params["branches"]]
        return [_join((predicate, *labels)) for labels in zip(*branches, strict=True)]
    reading.steps.append(name)
    if name in _ENTRYWISE:
        reading.steps.append(str(eqn.params))
        return [_join(operands)]
    if name in ("broadcast_in_dim", "reshape"):
        array, *_ = operands
        if array == UNIFORM or eqn.invars[0].aval.shape == shapes[0]:
            return [array]
    # Other primitives depend on sizes, even for a uniform array: a sum, for one.
    reading.steps.append((str(eqn.params), [v.aval.shape for v in eqn.invars], shapes))
    joined = _join(operands)
    if joined in (UNIFORM, FIXED):
        return [UNIFORM if shape == () else FIXED for shape in shapes]
    return [joined if joined == OTHER else MIXED for _ in shapes]


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


def _constant(value: Any) -> Any:
    """Returns a key that compares by value; for a traced value, by identity."""
    if isinstance(value, jax.Array) and not is_concrete(value):
        return id(value)
    return np.asarray(value).dtype.name, np.shape(value), np.asarray(value).tobytes()
