"""Intercepts the calls of modules that own packed kernels."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn

from ..adapters.call import adapted_call
from ..trees.paths import refuse_listed
from .boxes import KernelBox, boxes_of, run_in_float
from .calls import RULES, call_of
from .lifted import (
    FORWARD_MODE,
    MAPPED,
    NO_DROPOUT,
    is_in_forward_mode,
    is_mapped,
    method_of,
)


class Interceptor:
    """Runs methods of modules as products of packed kernels, or on float weights.

    The float weights exist only during a call: the backward pass decodes them again. A
    checkpoint policy that saves products would save A B, as large as the kernel.
    """

    def __init__(self, backend: str | tuple[str, ...] | None):
        self.backend = backend
        self.kernels: dict[str, Any] = {}
        self.in_float: list[tuple] = []

    def __call__(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: Any
    ) -> Any:
        """Runs a method of a module."""
        module = context.module
        if module.scope is None or module.path in self.in_float:
            return next_fun(*args, **kwargs)
        boxes = boxes_of(module, KernelBox)
        method = method_of(context) if boxes else None
        if method is None:
            return next_fun(*args, **kwargs)
        self._refuse_mapped(module, boxes.values())
        if method == "setup":
            is_read = isinstance(module, nn.Embed) or RULES.find(type(module)) is None
            if is_read:  # others may read what setup makes
                _refuse_dropout(boxes.values())
            return next_fun(*args, **kwargs)
        call = call_of(module, method, args, kwargs)
        if call is not None and call.is_complete and list(boxes) == [call.kernel]:
            box = boxes[call.kernel]
            if is_in_forward_mode(module):
                raise ValueError(f"{box.path}: {FORWARD_MODE}")
            return adapted_call(call, *box.parts(), path=box.path, backend=self.backend)
        _refuse_dropout(boxes.values())
        self.in_float.append(module.path)
        try:
            kinds = (KernelBox, self.backend)
            return run_in_float(module, method, args, kwargs, *kinds)
        finally:
            self.in_float.pop()

    def _refuse_mapped(self, module: nn.Module, boxes: Iterable[KernelBox]) -> None:
        # A wrapped model inside this one has kernels that this `apply` did not get.
        original = lambda box: self.kernels.get(str(box.path), box.kernel)
        mapped = [b for b in boxes if is_mapped(module, b.kernel, original(b))]
        refuse_listed(
            "these kernels must not be packed", [f"{b.path}: {MAPPED}" for b in mapped]
        )


def _refuse_dropout(boxes: Iterable[KernelBox]) -> None:
    refuse_listed(
        "these kernels cannot have dropout",
        [f"{b.path}: {NO_DROPOUT.format(b.dropout)}" for b in boxes if b.dropout],
    )
