"""Runs an optimizer update on one layer at a time.

A *stack* is an array `[layers, ...]`, and its *depth* is the number of layers. Arrays
that are not stacks have depth 0. The update is traced once, on whole stacks, and its
jaxpr is then run with an array `[1, ...]` in place of each stack of one depth.
Elementwise primitives return the entries of that layer. Primitives that mix entries of
different layers cannot be computed from a single layer, and raise `NotByLayers`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.sharding import AxisType

from .._jax.jaxprs import Program, bind, evaluate
from .._jax.modes import explicit_mesh, with_mapped_axis
from .._jax.specs import spec_of
from ..adapters.config import matches, unmatched_by
from ..trees.paths import Tree, paths_where
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
    """Raised, with the reason, if a function cannot be run layer by layer."""


class OneLayer(NamedTuple):
    """One layer of a stack, `[1, ...]`. The other layers are not available."""

    layer: Any


# A value in the program: a whole array, one layer of a stack, or None for a value that
# is unknown because it depends on other layers, or on stacks of another depth.
Value = Array | OneLayer | None


def stack_depths(tree: Tree, stacks: str | Sequence[str]) -> list[int]:
    """Returns the depth of each array."""
    # Adapters and kernels that are trained have a method `stack_flags`, which returns
    # whether each of their arrays is a stack.
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "stack_flags"))
    flags = [getattr(x, "stack_flags", lambda: False)() for x in nodes]
    leaves, paths = jax.tree.leaves(tree), paths_where(lambda _: True, tree)
    patterns = (stacks,) if isinstance(stacks, str) else tuple(stacks)
    unmatched = unmatched_by(patterns, paths)
    # `optax.tree_utils` calls `init` on trees without arrays, so these are accepted.
    if unmatched and any(hasattr(x, "shape") for x in leaves):
        raise ValueError(
            "every pattern of `stacks` must match the path of an array. Got "
            f"{unmatched}, which match none of {paths}."
        )
    # A stack of a single layer is updated as a whole, like arrays that are not stacks.
    return [
        x.shape[0] if can_be_sliced(x) and (is_stack or matches(patterns, path)) else 0
        for is_stack, path, x in zip(jax.tree.leaves(flags), paths, leaves, strict=True)
    ]


def can_be_sliced(x: Array) -> bool:
    """Whether an array has several layers on its first axis, which can be sliced."""
    if jnp.ndim(x) == 0 or x.shape[0] == 1:
        return False
    # In Explicit mode, JAX does not slice an axis that is split over devices.
    return explicit_mesh(x) is None or spec_of(x)[0] is None


def find_state_stacks(
    init: Callable[[Tree], Tree], params: Tree, param_depths: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[int], Any]:
    """Returns the shapes and depths of the arrays of a state, and its treedef.

    To find out which arrays of the state are stacks, `init` is traced a second time
    with one more layer in each stack of the parameters. An array of the state that
    grows by a layer is a stack.
    """
    leaves, params_def = jax.tree.flatten(params)
    grown_leaves = [
        jax.ShapeDtypeStruct((n + 1, *x.shape[1:]), x.dtype) if n else x
        for x, n in zip(leaves, param_depths, strict=True)
    ]
    state, state_def = jax.tree.flatten(jax.eval_shape(init, params))
    try:
        grown_state = jax.eval_shape(init, params_def.unflatten(grown_leaves))
    except Exception as error:  # the user's `init` may raise anything
        raise NotByLayers(f"`init` fails on arrays of other sizes: {error}") from error
    if jax.tree.structure(grown_state) != state_def:
        raise NotByLayers("the structure of the state depends on sizes")

    def depth_of(x: jax.ShapeDtypeStruct, grown: jax.ShapeDtypeStruct) -> int:
        if x.shape == grown.shape:
            return 0
        n, *layer_shape = x.shape or (0,)
        if n and n in param_depths and grown.shape == (n + 1, *layer_shape):
            return n
        raise NotByLayers(f"the state has an array of shape {x.shape}, not a stack")

    depths = list(map(depth_of, state, jax.tree.leaves(grown_state)))
    return [x.shape for x in state], depths, state_def


def by_layers(
    fn: Callable[..., list[Array]],
    arguments: Sequence[Array],
    argument_depths: Sequence[int],
    result_depths: Sequence[int],
    *,
    names: Sequence[str] = (),
) -> list[Array]:
    """Returns `fn(*arguments)`, computed layer by layer for stacks.

    A result replaces the argument at its position if both have the same type. `names`
    are the paths of the first results, for the error message.
    """
    # The trace is on whole stacks, so that a program that reads the number of layers
    # gets the right one.
    closed_jaxpr = jax.make_jaxpr(fn)(*arguments)
    update = _LayerwiseUpdate(closed_jaxpr, argument_depths, result_depths)
    update.check(arguments, names)
    results = update.compute(0, arguments)
    for depth in {*result_depths} - {0}:
        results |= update.loop(depth, arguments)
    return [results[j] for j in range(len(result_depths))]


@dataclass(frozen=True)
class _LayerwiseUpdate:
    """A traced update, with the depths of its arguments and results."""

    program: core.ClosedJaxpr
    argument_depths: Sequence[int]
    result_depths: Sequence[int]
    mixing_primitives: list[str] = field(default_factory=list)  # collects their names

    def compute(
        self, depth: int, arguments: Sequence[Array], index: Array | int = 0
    ) -> dict[int, Any]:
        """Returns layer `index` of the results of this depth, by position.

        Results of depth 0 are returned as a whole. A result that cannot be computed
        from one layer is None.
        """
        interpreter = _LayerInterpreter(depth, index, self.mixing_primitives)

        def argument_value(x: Array, x_depth: int) -> Value:
            if x_depth == 0:
                return x
            return OneLayer(interpreter.layer_of(x)) if x_depth == depth else None

        pairs = zip(arguments, self.argument_depths, strict=True)
        values = [argument_value(x, x_depth) for x, x_depth in pairs]
        results = interpreter.run(self.program, *values)
        return {
            j: interpreter.layer_of(x) if depth and x is not None else x
            for j, x in enumerate(results)
            if self.result_depths[j] == depth
        }

    def check(self, arguments: Sequence[Array], names: Sequence[str]) -> None:
        """Raises NotByLayers if a result depends on several layers."""
        result_types = zip(self.program.out_avals, self.result_depths, strict=True)
        if changed := [x.shape for x, n in result_types if n and x.shape[:1] != (n,)]:
            raise NotByLayers(f"it changes the shape of the state, to {changed}")
        results = {}
        for depth in {0, *self.result_depths}:
            results |= jax.eval_shape(lambda n=depth: self.compute(n, arguments))
        if mixed := sorted(j for j, x in results.items() if x is None):
            paths = [names[j] for j in mixed if j < len(names)] or "the state"
            primitives = ", ".join(dict.fromkeys(self.mixing_primitives))
            raise NotByLayers(
                f"the update of {paths} depends on other entries, through "
                f"{primitives or 'another array'}"
            )

    def loop(self, depth: int, arguments: Sequence[Array]) -> dict[int, Array]:
        """Computes the results of this depth in a loop over the layers."""
        # The loop carries whole stacks and replaces one layer at a time. A scan with
        # stacked outputs would allocate a second copy of them in host memory.
        result_types = {
            j: x
            for j, x in enumerate(self.program.out_avals)
            if self.result_depths[j] == depth
        }

        def has_type(x: Array, aval: Any) -> bool:
            types = jax.typeof(x), aval
            return len({(t.shape, t.dtype, t.memory_space) for t in types}) == 1

        # Layer i of an argument is read before layer i of its result is written.
        replaced = {
            j
            for j, x in enumerate(arguments)
            if self.argument_depths[j] == depth
            and j in result_types
            and has_type(x, result_types[j])
        }

        def update_layer(i: Array, stacks: dict[int, Array]) -> dict[int, Array]:
            current = [
                stacks[j] if j in replaced else x for j, x in enumerate(arguments)
            ]
            layers = self.compute(depth, current, i)
            return jax.tree.map(lambda s, x: _write_layer(s, x, i), stacks, layers)

        stacks = {
            j: arguments[j] if j in replaced else _empty(x)
            for j, x in result_types.items()
        }
        return lax.fori_loop(0, depth, update_layer, stacks)


class _LayerInterpreter:
    """Runs programs on layer `index` of all stacks of one depth."""

    def __init__(self, depth: int, index: Array | int, mixing_primitives: list[str]):
        self._depth, self._index = depth, index
        self._mixing_primitives = mixing_primitives

    def layer_of(self, x: Array | OneLayer) -> Array:
        """Returns the layer of a stack; a scalar is the same in all layers."""
        if isinstance(x, OneLayer):
            return x.layer
        return _read_layer(x, self._index) if jnp.ndim(x) else x

    def run(self, program: Program, *arguments: Value) -> list[Value]:
        def is_call(eqn: core.JaxprEqn, _: list[Value]) -> bool:
            return eqn.primitive.name in _CALLS

        return evaluate(program, arguments, self._run_equation, is_call)

    def _run_equation(self, eqn: core.JaxprEqn, values: list[Any]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name == "cond" and not isinstance(values[0], OneLayer | None):
            return self._run_cond(params["branches"], *values)
        unknown: list[Value] = [None for _ in eqn.outvars]
        if any(x is None for x in values):
            return unknown
        if self._fills_stack(eqn):
            layer_shape = (1, *params["shape"][1:])
            return [OneLayer(x) for x in bind(eqn, values, shape=layer_shape)]
        if not any(isinstance(x, OneLayer) for x in values):
            return bind(eqn, values)
        if name in _ENTRYWISE:
            return [OneLayer(x) for x in bind(eqn, map(self.layer_of, values))]
        if name == "scan" and (layers := self._run_scan_over_layers(eqn, values)):
            return [OneLayer(x) for x in layers]
        self._mixing_primitives.append(name)
        return unknown

    def _run_scan_over_layers(
        self, eqn: core.JaxprEqn, values: Sequence[Any]
    ) -> list[Array] | None:
        """Returns one layer of a scan's results, or None if the scan mixes layers."""
        # In the body of a scan, scanned arguments and stacked results have one axis
        # fewer than outside. Carried and shared values have the same number of axes.
        body: core.ClosedJaxpr = eqn.params["jaxpr"]

        def is_scanned(variable: Any, inner: ShapedArray) -> bool:
            return variable.aval.ndim > inner.ndim

        scanned = [*map(is_scanned, eqn.invars, body.in_avals)]
        shared = [x for x, s in zip(values, scanned, strict=True) if not s]
        is_mixing = any(isinstance(x, OneLayer) for x in shared)
        if is_mixing or not all(map(is_scanned, eqn.outvars, body.out_avals)):
            return None
        results = core.jaxpr_as_fun(body)(
            *(
                lax.squeeze(self.layer_of(x), [0]) if s else x
                for x, s in zip(values, scanned, strict=True)
            )
        )
        return [lax.expand_dims(x, [0]) for x in results]

    def _run_cond(
        self, branches: Sequence[Program], index: Array, *operands: Value
    ) -> list[Value]:
        """Runs a `cond`. Its branches may return different kinds of `Value`."""
        functions = [functools.partial(self.run, branch) for branch in branches]
        kinds_by_branch = [jax.eval_shape(run, *operands) for run in functions]
        kinds = list(zip(*kinds_by_branch, strict=True))  # the kinds of each result

        def align(x: Any, kinds: Sequence[Value]) -> Value:
            if None in kinds:
                return None
            is_layer = any(isinstance(kind, OneLayer) for kind in kinds)
            return OneLayer(self.layer_of(x)) if is_layer else x

        def aligned(run: Callable[..., list[Value]]) -> Callable[..., list[Value]]:
            return lambda *operands: list(map(align, run(*operands), kinds))

        return lax.switch(index, list(map(aligned, functions)), *operands)

    def _fills_stack(self, eqn: core.JaxprEqn) -> bool:
        """Whether an equation broadcasts a scalar to a stack, such as `jnp.zeros`."""
        if eqn.primitive.name != "broadcast_in_dim" or not self._depth:
            return False
        spec = getattr(eqn.params["sharding"], "spec", ())
        variable: Any = eqn.invars[0]
        is_scalar = variable.aval.shape == ()
        is_stack = eqn.params["shape"][:1] == (self._depth,)
        return is_scalar and is_stack and not any(spec[:1])


# Under `vmap`, JAX's own rules for slices become gathers and scatters, which do not
# accept arrays in host memory. These rules slice the next axis instead.
@custom_vmap
def _read_layer(stack: Array, index: Array | int) -> Array:
    return lax.dynamic_slice_in_dim(stack, index, 1)


@_read_layer.def_vmap
def _read_mapped_layer(
    axis_size: int, is_mapped: list[bool], stack: Array, index: Array
) -> tuple[Array, bool]:
    del axis_size
    return lax.dynamic_slice_in_dim(stack, index, 1, int(is_mapped[0])), is_mapped[0]


@custom_vmap
def _write_layer(stack: Array, layer: Array, index: Array | int) -> Array:
    return lax.dynamic_update_slice_in_dim(stack, layer, index, 0)


@_write_layer.def_vmap
def _write_mapped_layer(
    axis_size: int, is_mapped: list[bool], stack: Array, layer: Array, index: Array
) -> tuple[Array, bool]:
    stack = with_mapped_axis(axis_size, stack, is_mapped[0])
    layer = with_mapped_axis(axis_size, layer, is_mapped[1])
    return lax.dynamic_update_slice_in_dim(stack, layer, index, 1), True


def _empty(aval: Any) -> Array:
    is_typed = AxisType.Explicit in aval.sharding.mesh.axis_types
    sharding = aval.sharding if is_typed else None
    x = lax.empty(aval.shape, aval.dtype, out_sharding=sharding)
    return to_host(x) if aval.memory_space == jax.memory.Space.Host else x
