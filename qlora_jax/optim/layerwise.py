"""Runs a function of stacks of layers on one layer at a time.

The jaxpr of the function runs with `[1, ...]` in place of each stack `[layers, ...]`.
Primitives that mix the entries of layers have no result here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AxisType

from .._jax.jaxprs import bind, run_program
from .paging import to_host

_ENTRYWISE = frozenset(
    """abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh
    device_put div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
    le log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision
    rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor""".split()
)
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call checkpoint
    remat2""".split()
)


class NotByLayers(Exception):
    """Says why a function cannot be run layer by layer."""


class OneLayer(NamedTuple):
    """A value of which one layer is known, `[1, ...]`."""

    x: Any


def by_layers(
    fn: Callable[..., list[Any]],
    arguments: Sequence[Any],
    layers: Sequence[int],
    results: Sequence[int],
    *,
    names: Sequence[str] = (),
    in_place: bool = False,
) -> list[Any]:
    """Returns `fn(*arguments)`, a list, computed layer by layer for stacks.

    `layers` and `results` are the layers of each argument and result, 0 for no stack.
    With `in_place`, results replace arguments. Raises NotByLayers where layers mix.
    """
    # Traced on entire stacks, so that numbers of layers in the program are right.
    function = _Function(jax.make_jaxpr(fn)(*arguments), layers, results, [])
    function.check(arguments, names)
    done = function.compute(0, arguments)
    for n in {*results} - {0}:
        done |= function.loop(n, arguments, in_place)
    return [done[j] for j in range(len(results))]


@dataclass(frozen=True)
class _Function:
    """A jaxpr, the layers of its arguments and results; `mixers` is filled."""

    program: Any
    layers: Sequence[int]
    results: Sequence[int]
    mixers: list[str]

    def compute(self, n: int, arguments: Sequence[Any], i: Any = 0) -> dict[int, Any]:
        """Returns layer `i` of results with n layers; for n = 0 entire results."""
        run = _Run(n, i, self.mixers)
        given = [
            x if m == 0 else OneLayer(run.layer(x)) if m == n else None
            for x, m in zip(arguments, self.layers, strict=True)
        ]
        found = enumerate(run.program(self.program, given))
        one = lambda x: run.layer(x) if n and x is not None else x
        return {j: one(x) for j, x in found if self.results[j] == n}

    def check(self, arguments: Sequence[Any], names: Sequence[str]) -> None:
        shapes = zip(self.program.out_avals, self.results, strict=True)
        if odd := [x.shape for x, n in shapes if n and x.shape[:1] != (n,)]:
            raise NotByLayers(f"it changes the shape of the state, to {odd}")
        found = {}
        for n in {0, *self.results}:
            found |= jax.eval_shape(lambda n=n: self.compute(n, arguments))
        if mixed := sorted(j for j, x in found.items() if x is None):
            named = [names[j] for j in mixed if j < len(names)] or "the state"
            how = ", ".join(dict.fromkeys(self.mixers)) or "another array"
            raise NotByLayers(
                f"the update of {named} depends on other entries, by {how}"
            )

    def loop(self, n: int, arguments: Sequence[Any], in_place: bool) -> dict[int, Any]:
        # The loop carries entire arrays and replaces one layer at a time: a scan with
        # stacked outputs would make a second copy of them in host memory.
        kinds = enumerate(self.program.out_avals)
        own = {j: x for j, x in kinds if self.results[j] == n}
        kept = {j for j, x in own.items() if in_place and _is_like(arguments[j], x)}

        def body(i: Any, made: dict[int, Any]) -> dict[int, Any]:
            now = [made[j] if j in kept else x for j, x in enumerate(arguments)]
            put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new, i, 0)
            return jax.tree.map(put, made, self.compute(n, now, i))

        made = {j: arguments[j] if j in kept else _empty(x) for j, x in own.items()}
        return lax.fori_loop(0, n, body, made)


class _Run:
    """Runs jaxprs on layer `i` of stacks of `n` layers; None is an unknown value."""

    def __init__(self, n: int, i: Any, mixers: list[str]):
        self._n, self._i, self._mixers = n, i, mixers

    def layer(self, x: Any) -> Any:
        if isinstance(x, OneLayer):
            return x.x
        return lax.dynamic_slice_in_dim(x, self._i, 1) if jnp.ndim(x) else x

    def program(self, program: Any, arguments: Sequence[Any]) -> list[Any]:
        jaxpr = getattr(program, "jaxpr", program)
        constants = getattr(program, "consts", ())
        return run_program(jaxpr, (*constants, *arguments), self._equation)

    def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        name, params = eqn.primitive.name, eqn.params
        is_program = lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)
        inner = [x for x in params.values() if is_program(x)]
        if name in _CALLS and len(inner) == 1:
            return self.program(inner[0], values)
        if name == "cond" and not isinstance(values[0], OneLayer | None):
            return self._cond(params["branches"], *values)
        nothing = [None for _ in eqn.outvars]
        if any(x is None for x in values):
            return nothing
        if self._is_one_number(eqn):
            shape = (1, *params["shape"][1:])
            return [OneLayer(x) for x in bind(eqn, values, shape=shape)]
        if not any(isinstance(x, OneLayer) for x in values):
            return bind(eqn, values)
        if name in _ENTRYWISE:
            return [OneLayer(x) for x in bind(eqn, map(self.layer, values))]
        if name == "scan" and (found := self._map(eqn, inner[0], values)):
            return found
        self._mixers.append(name)
        return nothing

    def _map(self, eqn: Any, body: Any, values: Sequence[Any]) -> list[OneLayer]:
        """Returns a scan's results, or [] if it does more than map over layers."""
        # A scan takes and gives layers with one axis less in its body; carried and
        # shared values have as many.
        is_apart = lambda x, inner: x.aval.ndim > inner.ndim
        pairs = list(zip(values, map(is_apart, eqn.invars, body.in_avals), strict=True))
        is_shared = any(isinstance(x, OneLayer) for x, apart in pairs if not apart)
        if is_shared or not all(map(is_apart, eqn.outvars, body.out_avals)):
            return []
        one = lambda x: lax.squeeze(self.layer(x), [0])
        found = core.jaxpr_as_fun(body)(*(one(x) if apart else x for x, apart in pairs))
        return [OneLayer(lax.expand_dims(x, [0])) for x in found]

    def _cond(self, branches: Sequence[Any], index: Any, *values: Any) -> list[Any]:
        runs = [lambda *values, b=b: self.program(b, values) for b in branches]
        kinds = list(zip(*(jax.eval_shape(run, *values) for run in runs), strict=True))

        def alike(x: Any, kind: Sequence[Any]) -> Any:
            if None in kind:
                return None
            is_layer = any(isinstance(k, OneLayer) for k in kind)
            return OneLayer(self.layer(x)) if is_layer else x

        ways = [lambda *values, r=r: list(map(alike, r(*values), kinds)) for r in runs]
        return lax.switch(index, ways, *values)

    def _is_one_number(self, eqn: Any) -> bool:
        """Whether a result is one number in the shape of a stack, such as zeros."""
        if eqn.primitive.name != "broadcast_in_dim" or not self._n:
            return False
        spec = getattr(eqn.params["sharding"], "spec", ())
        is_scalar = eqn.invars[0].aval.shape == ()
        return is_scalar and eqn.params["shape"][:1] == (self._n,) and not any(spec[:1])


def _is_like(x: Any, kind: Any) -> bool:
    parts = lambda x: (x.shape, x.dtype, x.memory_space)
    return parts(jax.typeof(x)) == parts(kind)


def _empty(kind: Any) -> jax.Array:
    """Returns an array whose values do not matter."""
    is_typed = AxisType.Explicit in kind.sharding.mesh.axis_types
    sharding = kind.sharding if is_typed else None
    x = lax.empty(kind.shape, kind.dtype, out_sharding=sharding)
    return to_host(x) if kind.memory_space == jax.memory.Space.Host else x
