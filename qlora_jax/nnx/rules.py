"""Rules that describe the calls of module classes."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from .._jax.memory import is_concrete
from ..adapters.call import (
    DENSE,
    Lookup,
    ModuleCall,
    OutSharding,
    RegisteredEinsum,
    Registry,
    adapted_call,
    general_equation,
)
from ..product.einsum import kernel_kinds, split_equation


@dataclass(frozen=True)
class Rule:
    """Describes the product of a module class with its kernel."""

    kernel: Callable[[Any], str]  # returns the name of the kernel's attribute
    # Returns the roles of the kernel's axes, as in `Geometry.kinds`, or None if only
    # calls determine them.
    kinds: Callable[[Any], str | None]
    call: Callable[..., ModuleCall | Lookup]  # of `(module, *args, **kwargs)`
    has_float_methods: bool = False  # whether other methods read the kernel in float
    registered: RegisteredEinsum | None = None


def _flax_call(
    module: Any, equation: str, inputs: Array, out_sharding: OutSharding
) -> ModuleCall:
    return ModuleCall(
        "kernel",
        equation,
        inputs,
        bias=None if module.bias is None else module.bias[...],
        promote=lambda *arrays: module.promote_dtype(arrays, dtype=module.dtype),
        precision=module.precision,
        out_sharding=out_sharding,
    )


def _linear(
    module: nnx.Linear, inputs: Array, out_sharding: OutSharding = None
) -> ModuleCall:
    return _flax_call(module, DENSE, inputs, out_sharding)


def _linear_general(
    module: nnx.LinearGeneral, inputs: Array, out_sharding: OutSharding = None
) -> ModuleCall:
    axes, batch = module.axis, module.batch_axis
    num_outputs = len(module.out_features)
    equation = general_equation(jnp.ndim(inputs), axes, batch, num_outputs)
    return _flax_call(module, equation, inputs, out_sharding)


def _einsum(
    module: nnx.Einsum,
    inputs: Array,
    einsum_str: str | None = None,
    out_sharding: OutSharding = None,
) -> ModuleCall:
    equation = einsum_str or module.einsum_str or ""
    return _flax_call(module, equation, inputs, out_sharding)


def _embed(
    module: nnx.Embed, inputs: Array, out_sharding: OutSharding = None
) -> Lookup:
    def cast(rows: Array) -> Array:
        return module.promote_dtype((rows,), dtype=module.dtype, inexact=False)[0]

    # Flax returns the only row of a table for any id, even one that is out of range.
    if module.num_embeddings == 1:
        inputs = jnp.zeros_like(inputs)
    return Lookup("embedding", inputs, cast, out_sharding)


def _general_kinds(module: nnx.LinearGeneral) -> str:
    batch, num_outputs = len(module.batch_axis), len(module.out_features)
    return "b" * batch + "k" * len(module.axis) + "n" * num_outputs


def _layer_rule(kinds: Callable, call: Callable) -> Rule:
    return Rule(lambda module: "kernel", kinds, call)


# Rules by class, to which `register` adds for the whole process.
RULES = Registry(
    {
        nnx.Linear: _layer_rule(lambda module: "kn", _linear),
        nnx.LinearGeneral: _layer_rule(_general_kinds, _linear_general),
        # `nnx.Embed.attend` reads the table in float.
        nnx.Embed: Rule(
            lambda module: "embedding",
            lambda module: None,
            _embed,
            has_float_methods=True,
        ),
        nnx.Einsum: _layer_rule(
            lambda module: kernel_kinds(module.einsum_str), _einsum
        ),
    }
)


def register(
    cls: type[nnx.Module],
    *,
    kernel: str | Callable[[Any], str] = "kernel",
    einsum: str | Callable[[Any], str],
) -> None:
    """Registers the einsum that a custom module class computes with its kernel.

    The class multiplies by the packed kernel, and its adapter may have dropout. Classes
    that are not registered get a float kernel during each call. The rule applies to the
    whole process; registering a class again replaces it.

    Args:
        cls: The module class. Its `__call__` computes only the einsum of one input and
            the kernel, which `wrap` checks. Subclasses that inherit `__call__` and the
            methods that it uses are included.
        kernel: As in `qlora_jax.linen.register`.
        einsum: As in `qlora_jax.linen.register`. If it names an argument of `__call__`,
            `config.contract` must specify the roles of the kernel's axes.

    Raises:
        TypeError: If `cls` is not an `nnx.Module` class with a `__call__` of one input,
            or if `kernel` or `einsum` is neither a string nor a function.
        ValueError: If the form of the equation `einsum` is not supported.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> from flax import nnx
        >>> class Heads(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.w = nnx.Param(rngs.params.normal((2, 64, 8)))
        ...
        ...     def __call__(self, x):
        ...         return jnp.einsum("BTD,NDH->BTNH", x, self.w[...])
        >>> ql.nnx.register(Heads, kernel="w", einsum="BTD,NDH->BTNH")
        >>> config = ql.QLoRAConfig(rank=4, targets="w")
        >>> model = ql.nnx.wrap(Heads(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
        >>> model(jnp.ones((1, 3, 64))).shape
        (1, 3, 2, 8)
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise TypeError(f"`cls` must be an nnx.Module class. Got {cls!r}.")
    registered = RegisteredEinsum(cls, kernel, einsum)

    def kinds_of(module: nnx.Module) -> str | None:
        equation = registered.equation_of(module)
        return None if equation is None else kernel_kinds(equation)

    def call_of(module: nnx.Module, *args: object, **kwargs: object) -> ModuleCall:
        equation, x = registered.operands(module, args, kwargs)
        return ModuleCall(registered.kernel_of(module), equation, x)

    rule = Rule(registered.kernel_of, kinds_of, call_of, registered=registered)
    RULES.add(cls, rule)


def registration_misfit(module: nnx.Module, rule: Rule) -> str | None:
    """Returns why the class of a float module should not be registered, or None.

    It compares a call on a small input with the einsum, unless the equation is an
    argument of the call, or the module is abstract.
    """
    registered = rule.registered
    equation = registered and registered.equation_of(module)
    graph, state = nnx.split(module)
    if (
        not registered
        or not equation
        or not all(map(is_concrete, jax.tree.leaves(state)))
    ):
        return None
    # 1. Take the first layer of a stack, which has its layers along the first axes.
    name, labels = rule.kernel(module), split_equation(equation)
    num_stacked = vars(module)[name].ndim - len(labels.kernel)
    layer: Any = nnx.merge(graph, jax.tree.map(lambda x: x[(0,) * num_stacked], state))
    kernel = vars(layer)[name]
    # 2. Change the other parameters: biases, for example, are often zero at first.
    for seed, (_, node) in enumerate(nnx.iter_graph(layer)):
        is_other = isinstance(node, nnx.Variable) and node is not kernel
        if is_other and jnp.issubdtype((value := node.get_value()).dtype, jnp.floating):
            key = jax.random.key(seed)
            node.set_value(jax.random.normal(key, value.shape, value.dtype))
    # 3. Compare the call on a random input, of size 2 along axes that the kernel lacks.
    sizes = dict(zip(labels.kernel, kernel.shape, strict=False))
    shape = [sizes.get(label, 2) for label in labels.x.replace(".", "")]
    x = jax.random.normal(jax.random.key(0), shape, kernel.dtype)
    want = adapted_call(rule.call(layer, x), kernel.get_value(), None, path=name)
    try:
        got = jnp.asarray(layer(x))
    except Exception:  # noqa: BLE001
        return None  # the class takes inputs of another form
    # The products are rounded differently, by up to 1% in 16 bits and on TPUs.
    if got.shape == want.shape:
        error = jnp.linalg.norm((got - want).astype(jnp.float32))
        if not error > 0.02 * jnp.linalg.norm(want.astype(jnp.float32)):
            return None
    return (
        f"its class, {registered.cls.__name__}, is registered with the einsum "
        f"{equation!r}, but its `__call__` computes something else, perhaps with other "
        "parameters. Without ql.nnx.register, it runs on float weights."
    )


# A stacked kernel has more axes than its module declares: the first are batch axes.
def kernel_shape(module: nnx.Module, name: str) -> tuple[int, ...] | None:
    """Returns the kernel's shape without stacked axes; None if unknown."""
    match module, name:
        case nnx.Linear(), "kernel":
            return module.in_features, module.out_features
        case nnx.LinearGeneral(), "kernel":
            batch = module.batch_axis.values()
            return (*batch, *module.in_features, *module.out_features)
        case ((nnx.Einsum() | nnx.Conv() | nnx.ConvTranspose()), "kernel"):
            return tuple(module.kernel_shape)
        case nnx.Embed(), "embedding":
            return module.num_embeddings, module.features
        case _, "kernel" if (shapes := _maxtext_shapes(module)) is not None:
            return (*shapes[0], *shapes[1])
    return None


def _maxtext_shapes(module: nnx.Module) -> tuple[tuple[int, ...], ...] | None:
    # Returns the sizes of contracted and output axes of MaxText's linear layers.
    inputs = getattr(module, "in_features_shape", None)
    outputs = getattr(module, "out_features_shape", None)
    if isinstance(inputs, tuple) and isinstance(outputs, tuple):
        return inputs, outputs
    return None


def guess_axis_roles(module: nnx.Module, name: str, ndim: int) -> str | None:
    """Guesses the roles of a kernel's axes if no rule describes the kernel."""
    # The module computes with float weights, so results are right even if the guess is
    # wrong: only the quantization blocks then run along another axis.
    if name == "kernel":
        if isinstance(module, nnx.LinearGeneral):
            return _general_kinds(module)
        if isinstance(module, nnx.Conv | nnx.ConvTranspose):
            return "k" * (len(module.kernel_shape) - 1) + "n"
        if (shapes := _maxtext_shapes(module)) is not None:
            return "k" * len(shapes[0]) + "n" * len(shapes[1])
    # If an attribute is an einsum equation, it is probably the kernel's.
    candidates = set()
    for equation in (x for x in vars(module).values() if isinstance(x, str)):
        with contextlib.suppress(ValueError):
            candidates.add(kernel_kinds(equation))
    fitting = [kinds for kinds in candidates if kinds and len(kinds) <= ndim]
    return fitting[0] if len(fitting) == 1 else None
