"""Calls of Flax modules, and the function that computes them."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from .._jax.arguments import as_array, as_int32
from .._jax.modes import call_in_auto_mode, split_as
from .._jax.specs import spec_of
from ..product.einsum import kernel_kinds, parse_equation, through_matrix, why_no_fit
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel
from ..quant.views import take_rows
from .base import Adapter
from .product import product

DENSE = "...k,kn->...n"

Rule = TypeVar("Rule")
OutSharding = NamedSharding | PartitionSpec | None


def general_equation(
    ndim: int, axes: Iterable[int], batch: Iterable[int], num_outputs: int
) -> str:
    """Returns the einsum of Flax's `DenseGeneral` and `LinearGeneral`.

    `ndim` is the input's number of axes, of which `axes` are contracted.
    """
    x, outputs = ascii_letters[:ndim], ascii_letters[ndim:][:num_outputs]
    contracted = sorted(a % ndim for a in axes)
    batch = sorted(a % ndim for a in batch)
    free = [a for a in range(ndim) if a not in contracted and a not in batch]

    def labels(input_axes: list[int]) -> str:
        return "".join(x[a] for a in input_axes)

    kernel = labels(batch + contracted) + outputs
    return f"{x},{kernel}->{labels(batch + free)}{outputs}"


def promote_to_kernel(x: Array, kernel: Array, bias: Array | None) -> tuple:
    """Promotes the input as `jnp.einsum` does with a kernel."""
    return x.astype(np.promote_types(x.dtype, kernel.dtype)), kernel, bias


def is_plain(module: object, promote_dtype: Callable) -> bool:
    """Whether a packed product computes what a layer's options say.

    Options must have Flax's defaults, such as `promote_dtype`, or be functions that
    equal them up to rounding and say so with an attribute `is_plain_product`.
    """
    defaults = {
        "dot_general": lax.dot_general,
        "dot_general_cls": None,
        "einsum_op": jnp.einsum,
        "preferred_element_type": None,
        "promote_dtype": promote_dtype,
    }
    values = ((getattr(module, name, None), x) for name, x in defaults.items())
    return all(
        value is None or value is default or getattr(value, "is_plain_product", False)
        for value, default in values
    )


@dataclass(frozen=True)
class ModuleCall:
    """One product of an input with a module's kernel."""

    kernel: str  # name of the kernel's parameter
    equation: str  # explicit, of the input and the kernel
    x: Any  # an array, or a value that JAX converts to one
    # Its axes are the kernel's batch and output axes, in the order of the result.
    bias: Array | None = None
    # Casts the input, the kernel and the bias as the module does. Of the kernel, only
    # the dtype is read, so `adapted_call` passes a scalar instead of the kernel.
    promote: Callable[[Any, Any, Any], Sequence[Any]] = promote_to_kernel
    precision: lax.PrecisionLike = None
    out_sharding: OutSharding = None  # of the product, over Explicit mesh axes
    # False if the module may compute more than this: it must then run on float weights.
    is_complete: bool = True


@dataclass(frozen=True)
class Lookup:
    """One lookup of rows in a module's table `[V, D]`."""

    kernel: str  # name of the table's parameter
    ids: Any  # an array, or a value that JAX converts to one
    cast: Callable[[Any], Any]  # casts the rows as the module casts its table
    out_sharding: OutSharding = None
    is_complete: bool = True  # as in `ModuleCall`
    equation: ClassVar = "v,vd->d"  # as a product: the ids are one-hot rows

    def compute(self, table: PyTree, lora: Adapter | None) -> Array:
        """Returns the rows, `[*ids.shape, D]`."""
        is_numpy = isinstance(self.ids, np.ndarray)
        ids = self.ids if is_numpy else as_array("ids", self.ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids of a table must be integers. Got {ids.dtype}.")
        kernel = as_kernel(table, lora and lora.geometry)
        # From here on, ids are 0 to V - 1, or V, which returns NaN. They are int32,
        # because 8-bit ids would wrap around at 256 rows.
        size, ids = kernel.shape[0], as_int32(ids)
        ids = jnp.where(ids < 0, ids + size, ids)
        ids = jnp.where((ids < 0) | (ids > size), size, ids)

        def take(ids: Array, kernel: Kernel, lora: Adapter | None) -> Array:
            return take_rows(kernel, ids) if lora is None else lora.lookup(ids, kernel)

        rows = call_in_auto_mode(
            take, lambda _: PartitionSpec(*spec_of(ids), None), ids, kernel, lora
        )
        rows = self.cast(rows)
        if self.out_sharding is None:
            return rows
        return jax.sharding.reshard(rows, self.out_sharding)


def adapted_call(
    call: ModuleCall | Lookup,
    kernel: PyTree,
    lora: Adapter | None,
    dropout_key: Array | None = None,
    *,
    path: str,
    backend: tuple[str, ...] | None = None,
) -> Float[Array, "..."]:
    """Computes a module's call: the rows of a table, or its einsum with the bias added.

    `path` names the kernel in errors. Raises ValueError if the equation does not fit.
    """
    if isinstance(call, Lookup):
        return call.compute(kernel, lora)
    scalar = jnp.zeros((), kernel.dtype)
    x, _, bias = call.promote(jnp.asarray(call.x), scalar, call.bias)
    equation = parse_equation(call.equation, x.ndim, len(kernel.shape))
    if reason := why_no_fit(equation, x.shape, kernel.shape):
        raise ValueError(f"{path}: {reason}")
    geometry = lora and lora.geometry
    kernel = as_kernel(kernel, geometry or Geometry.of(equation.kinds, kernel.shape))

    def multiply(x: Array) -> Array:
        return product(x, kernel, lora, dropout_key, backend, call.precision)

    y = through_matrix(equation, kernel.geometry, x, kernel.shape, multiply)
    if call.out_sharding is not None:
        y = jax.sharding.reshard(y, call.out_sharding)
    if bias is None:
        return y
    # The bias gets a size of 1 for each axis of the result that the kernel lacks.
    sizes = dict(zip(equation.kernel, kernel.shape, strict=True))
    return y + split_as(bias.reshape([sizes.get(c, 1) for c in equation.out]), y)


@dataclass(frozen=True)
class RegisteredEinsum:
    """The einsum that a registered class computes with its kernel."""

    cls: type
    # The name of the parameter, or a function of the module that returns it.
    kernel: str | Callable[[Any], str]
    # The equation; the name of the attribute, or of the argument of `__call__`, that
    # holds it; or a function of the module that returns it.
    einsum: str | Callable[[Any], str]

    def __post_init__(self):
        for argument in ("kernel", "einsum"):
            value = getattr(self, argument)
            if not isinstance(value, str) and not callable(value):
                raise TypeError(
                    f"`{argument}` must be a string, or a function of a module that "
                    f"returns one. Got {value!r}."
                )
        # Classes themselves are callable, so `hasattr` would be True for any class.
        if not any("__call__" in vars(cls) for cls in self.cls.__mro__):
            raise TypeError(f"`cls` must have a `__call__`. Got {self.cls.__name__}.")
        _, *arguments = inspect.signature(self.cls.__call__).parameters.values()
        inputs = [x for x in arguments if x.name != self.einsum]
        if len(inputs) != 1 or "*" in str(inputs[0]):
            raise TypeError(
                "`cls` must have a `__call__` of one input, besides the equation. Got "
                f"{self.cls.__name__} with {[*map(str, arguments)]}."
            )
        if isinstance(self.einsum, str) and not self.einsum.isidentifier():
            kernel_kinds(self.einsum)  # raises for equations of another form

    def kernel_of(self, module: object) -> str:
        """Returns the name of a module's kernel."""
        return self.kernel if isinstance(self.kernel, str) else self.kernel(module)

    def equation_of(self, module: object) -> str | None:
        """Returns a module's equation, or None if it is an argument of the call."""
        if not isinstance(self.einsum, str):
            return self.einsum(module)
        is_name = self.einsum.isidentifier()
        return getattr(module, self.einsum, None) if is_name else self.einsum

    def operands(
        self, module: object, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[str, Any]:
        """Returns the equation and the one input of a call, or raises TypeError."""
        signature = inspect.signature(self.cls.__call__)
        _, *arguments = signature.bind(module, *args, **kwargs).arguments.items()
        inputs, equation = dict(arguments), self.equation_of(module)
        if equation is None and isinstance(self.einsum, str):
            equation = inputs.pop(self.einsum, None)
        if equation is None or len(inputs) != 1:
            raise TypeError(
                f"the call of a registered class, {self.cls.__name__}, must have one "
                f"input and an equation. Got {equation!r} and {sorted(inputs)}."
            )
        return equation, *inputs.values()

    def check_call(
        self, call: ModuleCall, plain_call: Callable, params: Mapping[str, Any]
    ) -> None:
        """Raises ValueError if a module computes more than its rule's `call`.

        `plain_call(x, params)` is the module's own call, which is traced. `params` are
        its parameters by name, arrays or shapes.
        """
        x = jax.ShapeDtypeStruct(jnp.shape(call.x), jnp.result_type(call.x))
        steps = Counter(_steps(jax.make_jaxpr(plain_call)(x, params).jaxpr))
        has_bias = call.bias is not None
        expected_params = {call.kernel, "bias"} if has_bias else {call.kernel}
        is_same = steps == Counter(dot_general=1, add=int(has_bias))
        if {*params} != expected_params or not is_same:
            raise ValueError(
                f"`cls` must compute only {call.equation!r} of its input and its "
                f"parameter {call.kernel!r}, and may add a bias. Got "
                f"{self.cls.__name__}, with parameters {sorted(params)} and operations "
                f"{sorted(steps)}. Unregistered classes run on float weights."
            )


def _steps(jaxpr: Jaxpr) -> Iterator[str]:
    # Yields the operations that do more than to move or round values.
    moves = "broadcast_in_dim", "copy", "reshape", "reshard", "squeeze", "transpose"
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("checkpoint", "jit", "pjit"):
            yield from _steps(
                getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
            )
        elif name not in (*moves, "convert_element_type", "sharding_constraint"):
            yield name


class Registry(Generic[Rule]):
    """Rules by module class: the product that a class computes with its kernel.

    A rule applies to its class and to subclasses that inherit its `__call__`. `version`
    counts the rules that users added. Traces from an older version are stale.
    """

    def __init__(self, rules: dict[type, Rule]):
        self._rules = dict(rules)
        self.version = 0

    def add(self, cls: type, rule: Rule) -> None:
        """Adds a rule, or replaces one."""
        self._rules[cls] = rule
        self.version += 1

    def find(self, cls: type) -> Rule | None:
        """Returns the rule of a class, or None."""
        for base in cls.__mro__:
            if base in self._rules:
                inherits = cls.__call__ is base.__call__
                return self._rules[base] if inherits else None
        return None

    def is_overridden(self, cls: type) -> bool:
        """Whether a subclass overrides a method on which the product may depend.

        For example, weight standardization may override the `param` of `nn.Dense`.
        """
        base = next(base for base in cls.__mro__ if base in self._rules)
        # Rules read fields of dataclasses, and `__call__` does not use `attend`.
        harmless = {*getattr(base, "__dataclass_fields__", ()), "attend"}
        for name in {*dir(base)} - harmless:
            inherited, value = (inspect.getattr_static(c, name) for c in (base, cls))
            is_method = callable(value) or hasattr(type(value), "__get__")
            is_hook = not name.startswith("__") or name.startswith("__getattr")
            if value is not inherited and is_method and is_hook:
                return True
        return False
