"""Intercepts the calls of modules that own packed kernels."""

import inspect
import re
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext
from jaxtyping import Array

from ..adapters.base import Adapter, dropout_keys, parts_of
from ..adapters.call import adapted_call
from ..trees.paths import Leaf, Tree, raise_if_any
from .boxes import Backend, KernelBox, boxes_of, has_dropout_stream, run_in_float
from .calls import RULES, call_of, no_dropout

MAPPED = (
    "nn.map_variables transforms it, which would change its codes. Exclude it from the "
    "targets."
)
# The `capture_intermediates` of Flax's `apply`.
Capture = bool | Callable[[nn.Module, str], bool]

FORWARD_MODE = (
    "nn.jvp differentiates its product in forward mode, which packed kernels do not "
    "support. Use nn.vjp, or exclude it from the targets."
)


class Interceptor:
    """Runs methods of modules as products of packed kernels, or on float weights."""

    # The float weights exist only during a call: the backward pass decodes them again.

    def __init__(self, backend: Backend):
        self.backend = backend
        self.kernels: dict[str, Leaf] = {}  # as passed to `apply`, by path
        # The modules that run on float weights, by path, and the method that runs.
        self.in_float: dict[tuple, str] = {}

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: InterceptorContext
    ) -> Tree:
        """Runs a method of a module."""
        module = context.module
        # 1. Pass on calls without packed kernels, and those inside a call in float.
        if module.scope is None or module.path in self.in_float:
            return next_fun(*args, **kwargs)
        boxes = boxes_of(module, KernelBox)
        method = method_of(context) if boxes else None
        if method is None:
            return next_fun(*args, **kwargs)
        self._refuse_mapped(module, boxes.values())
        # 2. Run `setup` as it is: later methods may use what it computes from kernels.
        #    In modules without a rule and in tables, no later product applies dropout.
        if method == "setup":
            if isinstance(module, nn.Embed) or RULES.find(type(module)) is None:
                _refuse_dropout(module, boxes.values())
            return next_fun(*args, **kwargs)
        # 3. Compute a call that a rule describes as a packed product.
        call = call_of(module, method, args, kwargs)
        if call is not None and call.is_complete and list(boxes) == [call.kernel]:
            box = boxes[call.kernel]
            if is_in_forward_mode(module):
                raise ValueError(f"{box.path}: {FORWARD_MODE}")
            kernel, lora, key = box.parts()
            if lora is not None and box.dropout:
                key = self._dropout_key(module, box, lora, key)
            path, backend = box.path, self.backend
            return adapted_call(call, kernel, lora, key, path=path, backend=backend)
        # 4. Run any other method, and the methods that it calls, on float weights.
        _refuse_dropout(module, boxes.values())
        self.in_float[module.path] = method
        try:
            return run_in_float(module, method, args, kwargs, KernelBox, self.backend)
        finally:
            del self.in_float[module.path]

    def capture(self, intermediates: Capture, module: nn.Module, method: str) -> bool:
        """Whether Flax stores the result of a method as an intermediate."""
        # A method on float weights runs inside another call of it, which is stored.
        if self.in_float.get(module.path) == method:
            return False
        is_filter = callable(intermediates)
        return intermediates(module, method) if is_filter else method == "__call__"

    def _dropout_key(
        self, module: nn.Module, box: KernelBox, lora: Adapter, key: Array | None
    ) -> Array | None:
        # Each call draws from the stream of its module, as `nn.Dropout` does, because
        # calls of a layer in a vmap or a scan may share the leaf and its key.
        if has_dropout_stream(module):
            return dropout_keys(lora, module.make_rng("dropout"))
        # Without a stream, only the layers of a stack, which the transform slices with
        # their adapters and keys, have different keys.
        _, original, _ = parts_of(self.kernels.get(str(box.path), box.kernel))
        if original is None or original.batch_shape == lora.batch_shape:
            raise ValueError(
                f"{box.path}: the `split_rngs` of the transform around its module must "
                "have 'dropout', since its adapter has dropout. Got none, and a call "
                "with a dropout key."
            )
        return key

    def _refuse_mapped(self, module: nn.Module, boxes: Iterable[KernelBox]) -> None:
        # The model may call another wrapped model, whose kernels are not in
        # `self.kernels`. They always pass.
        pairs = [(box, self.kernels.get(str(box.path), box.kernel)) for box in boxes]
        mapped = [b for b, original in pairs if is_mapped(module, b.kernel, original)]
        raise_if_any(
            "these kernels must not be packed", [f"{b.path}: {MAPPED}" for b in mapped]
        )


def _refuse_dropout(module: nn.Module, boxes: Iterable[KernelBox]) -> None:
    dropped = [box for box in boxes if box.dropout]
    raise_if_any(
        "these kernels cannot have dropout",
        {str(box.path): no_dropout(box.path, box.dropout, module) for box in dropped},
    )


def method_of(context: InterceptorContext) -> str | None:
    """Returns the name of the called method, or None if a function was called."""
    # Lifted transforms call functions, as in `nn.vjp(lambda m, x: m(x), m, x)`, as if
    # they were methods of the module. But a method is in the class of the module, under
    # the name in its definition or another one. `orig_method` is a `functools.partial`.
    function = inspect.unwrap(getattr(context.orig_method, "func"))  # noqa: B009
    for cls in type(context.module).__mro__:
        for name in (context.method_name, *vars(cls)):
            value = vars(cls).get(name)
            if callable(value) and inspect.unwrap(value) is function:
                return name
    return None


def is_mapped(module: nn.Module, leaf: Leaf, original: Leaf) -> bool:
    """Whether `nn.map_variables` may have changed the arrays of `original`."""
    if not any("map_variables(" in name for name in _transforms(module)):
        return False
    # If it maps only other collections, the parameters are still the same arrays.
    arrays, originals = jax.tree.leaves(leaf), jax.tree.leaves(original)
    return [id(x) for x in arrays] != [id(x) for x in originals]


def is_in_forward_mode(module: nn.Module) -> bool:
    """Whether a module runs under `nn.jvp`."""
    # "jvp(layers)" or "vmap(jvp(layers))", but not "my_jvp(layers)".
    return any(re.search(r"(^|\()jvp\(", name) for name in _transforms(module))


def _transforms(module: nn.Module) -> tuple[str, ...]:
    # Flax names the lifted transforms in the path: ("vmap(layers)",).
    return () if module.scope is None else tuple(module.scope.debug_path)
