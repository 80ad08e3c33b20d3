"""Runs jaxprs, some of whose operations are computed in another way."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import Literal


def run_program(
    jaxpr: Any,
    arguments: Iterable[Any],
    compute: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Returns the results of a jaxpr, whose operations are `compute(eqn, values)`.

    `arguments` are its constants, then its inputs. Values may be of any type that
    `compute` knows.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            results = compute(eqn, [read(atom) for atom in eqn.invars])
        env |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def bind(eqn: Any, values: Iterable[Any], **changes: Any) -> list[Any]:
    """Returns the results of an operation, perhaps with other parameters."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    found = eqn.primitive.bind(*values, **params)
    return list(found) if eqn.primitive.multiple_results else [found]
