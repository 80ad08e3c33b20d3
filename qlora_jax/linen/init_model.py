"""`init` for linen models: one abstract trace finds the contracted axes of kernels."""

import warnings
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen.module import InterceptorContext

from .._jax.memory import is_concrete
from .._jax.pytree import is_tree_leaf, register, split_arrays
from ..adapters.base import parts_of
from ..adapters.call import Lookup, ModuleCall
from ..adapters.config import QLoRAConfig, check_config
from ..product.einsum import kernel_kinds, parse_equation
from ..trees.init import check_and_init
from ..trees.paths import Leaf, Tree, leaves_by_path, map_by_path
from .boxes import NORMS, WRONG_AXIS, ReadableBox, boxes_of, run_in_float
from .calls import call_of, no_dropout
from .interceptor import (
    FORWARD_MODE,
    MAPPED,
    is_in_forward_mode,
    is_mapped,
    method_of,
)
from .wrapped import WrappedModel, linen_module


def init(
    key: jax.Array,
    model: nn.Module | WrappedModel,
    params: Tree,
    config: QLoRAConfig,
    *args: object,
    other_variables: Mapping | None = None,
    donate: bool = False,
    **kwargs: object,
) -> tuple[Tree, Tree]:
    """Returns a model's parameters with quantized targets, and a tree of adapters.

    Like `qlora_jax.init`, but one abstract trace of `model.apply` finds the contracted
    axes. `config.contract` is needed only if an axis other than -2 is contracted by a
    custom module that is not registered, or by an nnx module (`nnx.bridge.ToLinen`).

    Args:
        key: PRNG key for A.
        model: The model, wrapped or not.
        params: Its parameters. Inside `jax.eval_shape` they may be shapes.
        config: The targets, and how to pack and adapt them.
        *args: Arguments of a sample call; arrays may be shapes
            (`jax.ShapeDtypeStruct`).
        other_variables: The model's other collections, such as `"batch_stats"`.
        donate: As in `qlora_jax.init`.
        **kwargs: Keyword arguments of the sample call, passed to `model.apply`, such as
            `rngs`, `method` and `mutable` (by default, all of `other_variables`).

    Raises:
        TypeError: If `key` is not a PRNG key, `model` is not a linen module, or
            `config` is not a `QLoRAConfig`.
        ValueError: As `qlora_jax.init`; or if
            targets cannot be packed, which are all listed: no module of the sample call
            has them, or they are contracted in several ways, stacked along an axis
            other than 0, transformed by `nn.map_variables`, differentiated by `nn.jvp`
            or, with dropout, read by a module that computes on float weights.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.DenseGeneral((4, 16)), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> base["kernel"].shape, lora["kernel"].b.shape
        ((64, 4, 16), (4, 64))
    """
    module = linen_module(model)
    check_config(config)
    params = _with_arrays(params)
    # The trace finds the roles of axes, and the targets that cannot be packed.
    kinds, problems = trace_kinds(
        module, params, config, args, kwargs, other_variables or {}
    )
    base, lora = check_and_init(key, params, config, kinds, problems, donate=donate)
    return base, FrozenDict(lora) if isinstance(params, FrozenDict) else lora


def _with_arrays(params: Tree) -> Tree:
    # `init` computes with arrays. In a trace, `jnp.zeros` is a tracer without memory.
    def to_array(leaf: Leaf) -> Leaf:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    # Outside of a trace, shapes stay, and `init` raises an error for them.
    is_traced = not is_concrete(jnp.zeros(()))
    return jax.tree.map(to_array, params) if is_traced else params


class _Target(ReadableBox):
    """A box around a targeted parameter during the trace."""

    def __init__(self, value: Leaf, path: str, recorder: "_Recorder"):
        self.value = value  # the float array
        self.path = path
        self.recorder = recorder

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def unbox(self) -> jax.Array:
        return self.value

    def read(self) -> jax.Array:
        self.recorder.owned.add(self.path)
        self.recorder.read_in_float.setdefault(self.path)
        return self.value

    def replace_boxed(self, val: Leaf) -> "_Target":
        return _Target(val, self.path, self.recorder)

    # A scan or vmap removes the stacked axis from a parameter, and adds it again.
    def add_axis(self, index: int, params: dict) -> "_Target":
        return self

    def remove_axis(self, index: int, params: dict) -> "_Target":
        if index != 0:
            self.recorder.stacked[self.path] = index
        return self


# Path and recorder are static, and each recorder is equal only to itself. So `nn.jit`
# does not reuse an earlier trace, and the recorder sees each module.
register(_Target, ("value",), ("path", "recorder"))


class _Recorder:
    """Interceptor that records, by path, the targets of the modules in one trace."""

    def __init__(self, paths: list[str]):
        # The roles of axes (`Geometry.kinds`) in the calls that use each kernel.
        self.kinds: dict[str, set[str]] = {path: set() for path in paths}
        self.values: dict[str, jax.Array] = {}  # as passed to `apply`
        self.owned: set[str] = set()  # parameters of modules that ran
        # Parameters that a module reads in float, and the module, if it is known.
        self.read_in_float: dict[str, nn.Module | None] = {}
        self.guessed: dict[str, tuple[int, ...]] = {}  # shapes of unknown kernels
        self.unfit: dict[str, str] = {}  # why a parameter cannot be a target
        self.stacked: dict[str, int] = {}  # the axis of a stack, if it is not 0
        # Paths of modules whose current call a rule describes. In a wrapped model, a
        # packed product replaces the call, so calls inside it are not recorded.
        self.described: list[tuple] = []

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: InterceptorContext
    ) -> Tree:
        # These branches mirror those of `Interceptor`.
        module = context.module
        if module.scope is None or module.path in self.described:
            return next_fun(*args, **kwargs)
        boxes = boxes_of(module, _Target)
        method = method_of(context)
        if method in (None, "setup"):
            return next_fun(*args, **kwargs)
        if not boxes:
            return next_fun(*args, **kwargs)
        call = call_of(module, method, args, kwargs)
        for target in boxes.values():
            # Errors are collected, so that one error lists the problems of all targets.
            try:
                self.record(target, module, call)
            except ValueError as error:
                self.unfit[target.path] = str(error)
        # Flax does not unbox the parameters of the layer in a norm.
        if isinstance(module, NORMS):
            return run_in_float(module, method, args, kwargs, _Target)
        if call is None or not call.is_complete:
            return next_fun(*args, **kwargs)
        self.described.append(module.path)
        try:
            return next_fun(*args, **kwargs)
        finally:
            self.described.pop()

    def record(
        self, target: _Target, module: nn.Module, call: ModuleCall | Lookup | None
    ) -> None:
        self.owned.add(target.path)
        if is_mapped(module, target, self.values[target.path]):
            raise ValueError(MAPPED)
        # A stacked bias has two axes too, but only one inside its module.
        ndim = target.value.ndim
        if ndim < 2:
            raise ValueError(
                "weights must have at least 2 axes in their module. Got shape "
                f"{target.value.shape}."
            )
        if call is not None and call.kernel != target.name:
            raise ValueError(
                f"it is the {target.name} of its module, {type(module).__name__}: "
                "no axis of it is contracted."
            )
        # A look-up contracts no axis, so only `config.contract` can set the roles.
        if isinstance(call, Lookup):
            return
        if call is not None:
            if not call.is_complete:
                self.read_in_float[target.path] = module
                self.kinds[target.path].add(kernel_kinds(call.equation))
                return
            equation = parse_equation(call.equation, jnp.ndim(call.x), ndim)
            self.kinds[target.path].add(equation.kinds)
            if is_in_forward_mode(module):
                raise ValueError(FORWARD_MODE)
            return
        # No rule describes the module, so it reads its kernel in float.
        self.read_in_float[target.path] = module
        # Convolutions contract all axes of their kernel but the last.
        if isinstance(module, nn.Conv | nn.ConvTranspose):
            self.kinds[target.path].add("k" * (ndim - 1) + "n")
        elif ndim > 3:
            self.guessed[target.path] = target.value.shape

    def problems(self, config: QLoRAConfig) -> dict[str, str]:
        # One reason for each target: the first of these, or else the one in `unfit`.
        # Adapters of tables never have dropout, so a table may be read in float.
        problems = {}
        for path, kinds in self.kinds.items():
            if path not in self.owned:
                problems[path] = (
                    "no module that ran owns it. Exclude it, or trace a call that uses "
                    "it."
                )
            elif len(kinds) > 1:
                problems[path] = (
                    f"it must be contracted in one way. Got several: {sorted(kinds)}."
                )
            elif path in self.stacked:
                problems[path] = WRONG_AXIS.format(self.stacked[path])
            elif config.dropout and path in self.read_in_float:
                module = self.read_in_float[path]
                problems[path] = no_dropout(path, config.dropout, module)
        return self.unfit | problems


def trace_kinds(
    module: nn.Module,
    params: Tree,
    config: QLoRAConfig,
    args: tuple,
    kwargs: dict,
    other_variables: Mapping,
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the targets' axis roles, and why some targets are unfit, by path."""
    recorder = _Recorder([*filter(config.is_target, leaves_by_path(params))])

    def box_target(path: str, leaf: Leaf) -> Leaf:
        leaf, *_ = parts_of(leaf)
        # A trace needs only the shape of a packed kernel's float array.
        if is_tree_leaf(leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return _Target(leaf, path, recorder) if path in recorder.kinds else leaf

    variables = {**other_variables, "params": map_by_path(box_target, params)}
    # Flags in the arguments stay Python values, and only arrays are traced.
    arrays, rebuild = split_arrays((variables, args, kwargs))

    def abstract_call(arrays: list) -> None:
        variables, args, kwargs = rebuild(arrays)
        values = leaves_by_path(variables["params"])
        recorder.values.update({path: values[path] for path in recorder.kinds})
        # Layers such as BatchNorm change variables in training. The results, which may
        # not be arrays, are not needed.
        options = {"mutable": [*other_variables], **kwargs}
        with nn.intercept_methods(recorder):
            module.apply(variables, *args, **options)

    jax.eval_shape(abstract_call, jax.tree.map(_unsharded, arrays))
    kinds = {path: next(iter(ks)) for path, ks in recorder.kinds.items() if ks}
    guessed = {p: x for p, x in recorder.guessed.items() if not config.contract_of(p)}
    if guessed:
        warnings.warn(
            "the library assumes that only axis -2 of these kernels is contracted, and "
            f"gives each matrix [K, N] an adapter: {guessed}. For a convolution, set "
            'contract="kkkn", with k for each axis but the last.',
            stacklevel=3,
        )
    return kinds, recorder.problems(config)


def _unsharded(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # In Explicit mode, float models cannot contract an axis that is split. Packed
    # products can, so the trace has no shardings.
    weak_type = getattr(x, "weak_type", False)
    # NumPy's 64-bit ids become 32-bit ones, as in any call; JAX 0.12 would warn.
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(x.shape, dtype, weak_type=weak_type)
