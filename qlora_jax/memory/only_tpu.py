"""Raises a clear error when lowered off TPU."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# What a program compiles for is known when it is lowered, not when it is traced: a
# machine without a TPU may compile for one. So this is an operation, the identity.
_identity = Primitive("only_on_tpu")
_identity.def_impl(lambda x, what: jax.jit(only_on_tpu, static_argnums=1)(x, what))
_identity.def_abstract_eval(lambda x, what: x)
ad.deflinear2(_identity, lambda g, x, what: [g])
batching.defvectorized(_identity)
mlir.register_lowering(_identity, lambda ctx, x, what: [x], platform="tpu")


def _refuse(ctx: Any, x: Any, what: str) -> Any:
    del x
    raise NotImplementedError(
        f"{what} must run on a TPU: its kernel is compiled for nothing else. Got "
        f"{' and '.join(ctx.module_context.platforms)}. Choose attention by XLA, or "
        "`interpret=True` to test."
    )


mlir.register_lowering(_identity, _refuse)


def only_on_tpu(x: Array, what: str) -> Array:
    """Returns `x`; lowering for another platform raises NotImplementedError."""
    return _identity.bind(x, what=what)
