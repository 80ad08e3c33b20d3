"""Computes the calls of modules that own packed kernels."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn

from ..adapters.call import adapted_call
from ..trees.paths import refuse_listed
from .float_kernels import FloatCalls, KernelBox, no_dropout
from .rules import RULES, call_of


class Interceptor:
    """An interceptor for `nn.intercept_methods`, during one `apply`; see `wrap`.

    A call that a rule describes becomes a product with the packed kernel. Any other
    method of a module that owns packed kernels runs on their float weights.
    """

    def __init__(self, backend: str | None):
        """Takes the back end of the products, as in `matmul`."""
        self.backend = backend
        self.float_calls = FloatCalls()

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Runs a method of a module."""
        module, method = context.module, context.method_name
        if module.scope is None:
            return next_fun(*args, **kwargs)
        boxes = _boxes(module)
        if not boxes or module in self.float_calls:
            return next_fun(*args, **kwargs)
        if method == "setup":
            if RULES.find(type(module)) is None:  # others may read what setup makes
                _refuse_dropout(boxes.values())
            return next_fun(*args, **kwargs)
        call = call_of(module, method, args, kwargs)
        if call is not None and call.is_complete and list(boxes) == [call.kernel]:
            kernel, lora, key = boxes[call.kernel].parts()
            return adapted_call(
                call, kernel, lora, dropout_key=key, backend=self.backend
            )
        _refuse_dropout(boxes.values())
        return self.float_calls.run(module, method, args, kwargs)


def _boxes(module: nn.Module) -> dict[str, KernelBox]:
    own = module.variables.get("params", {})
    return {name: box for name, box in own.items() if isinstance(box, KernelBox)}


def _refuse_dropout(boxes: Iterable[KernelBox]) -> None:
    refuse_listed(
        "these kernels cannot have dropout",
        [f"{b.path}: {no_dropout(b.dropout)}" for b in boxes if b.dropout],
    )
