"""LoRA (Hu et al. 2021, section 4.1): `y = x W + scaling * (x A) B`."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from ..product.floats import float_product, ragged_float_product
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from .base import (
    Adapter,
    ProductCall,
    constrained,
    on_matrix,
    register_adapter,
)

SETTINGS = ("scaling", "dropout", "geometry")  # of every low-rank adapter
CHECKPOINT_NAME = "lora_product"  # of `x A`, for `jax.checkpoint` policies


L = TypeVar("L", bound="LowRank")


@dataclass(frozen=True, eq=False)
class LowRank(Adapter):
    """An adapter that trains A and B, and adds `scaling * A B` to its kernel.

    The sum may be scaled afterwards, as in a `DoRA`.
    """

    a: Array
    b: Array
    # The scaling must not be trained. It is therefore static, because optimizers change
    # all leaves: weight decay would shrink an array even if its gradient is zero.
    scaling: float
    dropout: float
    geometry: Geometry

    roles = {"a": "kr", "b": "rn"}
    settings = SETTINGS

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        lora = constrained(self, kernel)
        return on_matrix(kernel, jnp.add, lora_delta(lora))


@dataclass(frozen=True, eq=False)
class LoRA(LowRank):
    """A low-rank adapter of one kernel. Only its two arrays are trained.

    It adds `scaling * (x A) B` to the product of its kernel (LoRA, Hu et al. 2021,
    section 4.1). `init` makes adapters; `apply` and the integrations compute with them.

    Attributes:
        a: A, `[*batch, K, r]` in the config's `lora_dtype`: K runs over the kernel's
            contracted axes.
        b: B, `[*batch, r, N]` in the same dtype, zero at first: N runs over the
            kernel's output axes.
        scaling: Multiplier of the product: `alpha / rank`, or `alpha / sqrt(rank)` if
            it is rank-stabilized.
        dropout: Rate of dropout on the adapter's input, in [0, 1).
        geometry: How the kernel's axes map to `[*batch, K, N]`, as in `QTensor`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, alpha=8)
        >>> _, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scaling
        ((64, 4), (4, 8), 2.0)
    """

    # Fields of `LowRank`. The tests of docstrings read them from this class.
    a: Array
    b: Array
    scaling: float
    dropout: float
    geometry: Geometry

    label = "lora"
    is_linear = True
    can_be_in_bank = True
    can_be_ragged = True

    def change(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        x = apply_dropout(x, self.dropout, call.dropout_key)
        return lora_product(x, self, kernel, call.precision, call.offsets)


register_adapter(LoRA)


def is_low_rank(lora: object) -> TypeGuard[LowRank]:
    """Whether an adapter is low-rank, such as a LoRA or a DoRA."""
    return isinstance(lora, LowRank)


def lora_product(
    x: Float[Array, "..."],
    lora: LowRank,
    kernel: Kernel,
    precision: lax.PrecisionLike = None,
    offsets: Array | None = None,
) -> Float[Array, "..."]:
    """Returns `scaling * (x A) B` in float32 for x `[*batch, ..., K]`.

    Both products are computed in the dtype of `x` with float32 sums. With `offsets`,
    the rows of x are sorted by expert, and the result has the dtype of `x`.
    """
    if offsets is not None:
        lora = constrained(lora, kernel, x)
        # B is smaller than the product.
        b = scaled(lora.b.astype(jnp.float32), lora)
        a, b = cast(lora.a, x.dtype), cast(b, x.dtype)
        multiply = functools.partial(
            ragged_float_product,
            offsets=offsets,
            precision=precision,
            placement=kernel.placement,
        )
        h = checkpoint_name(multiply(x, a, shared="k"), CHECKPOINT_NAME)  # [M, r]
        return multiply(h, b, shared="n")
    # Cast first, so that a mesh moves arrays in the dtype of x.
    a, b = cast(lora.a, x.dtype), cast(lora.b, x.dtype)
    lora = constrained(dataclasses.replace(lora, a=a, b=b), kernel, x)
    h = float_product(x, lora.a, precision).astype(x.dtype)
    h = checkpoint_name(h, CHECKPOINT_NAME)  # [*batch, ..., r]
    return scaled(float_product(h, lora.b, precision), lora)


def lora_delta(lora: LowRank) -> Float32[Array, "*batch k n"]:
    """Returns `scaling * A B` in float32, in matrix form."""
    a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
    delta = float_product(a, b, lax.Precision.HIGHEST)
    return scaled(delta, lora)


def scaled(y: Array, lora: LowRank) -> Array:
    """Returns `scaling * y`."""
    # A product with 1, the default, would only take time to compile.
    return y if lora.scaling == 1 else y * lora.scaling


def with_scaling(lora: L, scaling: float) -> L:
    """Returns an equal adapter of another scaling, in which B is multiplied instead."""
    if lora.scaling == scaling:
        return lora
    wide = jnp.promote_types(lora.b.dtype, jnp.float32)
    b = lora.b.astype(wide) * (lora.scaling / scaling)
    return dataclasses.replace(lora, b=b.astype(lora.b.dtype), scaling=scaling)


def cast(w: Array, dtype: DTypeLike) -> Array:
    """Returns `w.astype(dtype)`, bit for bit, in a form that stays inside loops."""
    # XLA moves a cast of each layer's A and B out of a scan and keeps the copies of all
    # layers: 0.34 GB for an 8B model at rank 64. It does not move a `reduce_precision`.
    # `reduce_precision` flushes subnormal numbers of float16 to zero, so it is used
    # only if both dtypes have the same exponent range, as float32 and bfloat16 do.
    source, target = jnp.finfo(w.dtype), jnp.finfo(dtype)
    if source.nexp == target.nexp and source.nmant > target.nmant:
        w = lax.reduce_precision(w, int(target.nexp), int(target.nmant))
    return w.astype(dtype)


def apply_dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Applies inverted dropout to an input, if there is a key."""
    if key is None or rate == 0:
        return x
    # `jax.random.PRNGKey` makes raw keys, which are wrapped. A stack has a key for each
    # matrix, which scans slice. If the whole stack is multiplied at once, the first key
    # is used for all of `x`.
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    keys: Array = key if is_typed else jax.random.wrap_key_data(key)
    first_key = keys.reshape(-1)[0] if keys.ndim else keys
    is_kept = jax.random.bernoulli(first_key, 1 - rate, x.shape)
    return jnp.where(is_kept, x / (1 - rate), jnp.zeros_like(x))
