"""Evaluates jaxprs while computing some of their operations in another way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


def run_program(
    jaxpr: Jaxpr,
    arguments: Iterable[object],
    compute: Callable[[JaxprEqn, list[Any]], Sequence[object]],
) -> list[Any]:
    """Runs a jaxpr with `compute(eqn, values)` for each equation. Returns its results.

    `arguments` are the constants followed by the inputs. Values may be of any type that
    `compute` accepts.
    """
    variables = (*jaxpr.constvars, *jaxpr.invars)
    env: dict[Var, Any] = dict(zip(variables, arguments, strict=True))

    def read(atom: Literal | Var) -> object:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        # The context holds configuration that was active when the equation was traced.
        with eqn.ctx.manager:
            results = compute(eqn, [read(atom) for atom in eqn.invars])
        env |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def bind(
    eqn: JaxprEqn, values: Iterable[object], **changed_params: object
) -> list[Any]:
    """Returns the results of an equation, optionally with changed parameters."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed_params})
    results = eqn.primitive.bind(*values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
