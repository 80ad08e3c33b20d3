"""Evaluates traced programs while computing some of their operations in another way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

Program = ClosedJaxpr | Jaxpr


def evaluate(
    program: Program,
    arguments: Iterable[object],
    compute: Callable[[JaxprEqn, list[Any]], Sequence[object]],
    is_entered: Callable[[JaxprEqn, list[Any]], bool],
) -> list[Any]:
    """Runs a program, and returns its results.

    `compute(eqn, values)` returns the results of an equation. Values may be of any type
    that it accepts. If an equation calls a single program, as `jit` does, and
    `is_entered(eqn, values)` is true, the equations of this program are computed
    instead.
    """
    jaxpr: Any = getattr(program, "jaxpr", program)
    variables = (*jaxpr.constvars, *jaxpr.invars)
    inputs = (*getattr(program, "consts", ()), *arguments)
    env: dict[Var, Any] = dict(zip(variables, inputs, strict=True))

    def read(atom: Literal | Var) -> object:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        programs = [x for x in eqn.params.values() if isinstance(x, Program)]
        # The context holds configuration that was active when the equation was traced.
        with eqn.ctx.manager:
            if len(programs) == 1 and is_entered(eqn, values):
                results = evaluate(programs[0], values, compute, is_entered)
            else:
                results = compute(eqn, values)
        env |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def bind(
    eqn: JaxprEqn, values: Iterable[object], **changed_params: object
) -> list[Any]:
    """Returns the results of an equation, optionally with changed parameters."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed_params})
    results = eqn.primitive.bind(*values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
