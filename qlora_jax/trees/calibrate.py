"""`calibrate` measures the inputs of kernels: the `importance` for `quantize`."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._jax.memory import all_below, is_concrete
from ..adapters.input_moments import InputMoments
from ..adapters.lora import is_low_rank
from ..quant.kernel import as_kernel
from .adapters import adapters_by_keys, checked_adapters
from .paths import (
    Tree,
    leaves_by_path,
    map_by_path,
    nested_by_keys,
    path_string,
    raise_if_any,
)


def calibrate(
    apply: Callable[[Tree, Tree, PyTree], PyTree],
    base: Tree,
    lora: Tree,
    batches: Iterable[PyTree],
) -> dict:
    """Returns the mean square of each input of the adapted kernels.

    If rounding changes a weight by e, the output changes by e times the input x of that
    weight. The mean of x**2 over some data therefore says how much errors in each row
    of a kernel matter. `quantize` with `scales="search"` takes it as `importance`. Each
    batch takes about the time of a forward pass, and the memory of a training step.
    `calibrate` may be called inside `jit`.

    Args:
        apply: A function of the base tree, the lora tree and a batch, for example the
            forward pass of the model. Its outputs must depend on the products with all
            adapted kernels.
        base: The base tree, packed or in float.
        lora: The lora tree. Only the kernels that have a low-rank adapter in it are
            measured. The adapters themselves are not applied. To measure the adapted
            model, merge them first.
        batches: The data. Give all batches the same shapes, to avoid recompilations.

    Returns:
        A nested dict with a float32 array `[*batch, K]` at the path of each kernel. The
        entries of an expert that got no rows are zero.

    Raises:
        TypeError: If `batches` is a single batch in a dict.
        ValueError: If there is no batch, or an adapter does not fit its kernel. Outside
            jit, also if the outputs do not depend on the product with some kernel. The
            message then lists all such kernels.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> config = ql.QLoRAConfig(fmt=None)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> batches = [jnp.ones((4, 64)), 3 * jnp.ones((4, 64))]
        >>> importance = ql.calibrate(ql.apply, base, lora, batches)
        >>> importance["kernel"][0]
        Array(5., dtype=float32)
        >>> search = ql.QLoRAConfig(scales="search")
        >>> ql.quantize(params, search, importance=importance)["kernel"].fmt
        'nf4'
    """
    # A loop over a single batch would take its keys for batches.
    if isinstance(batches, Mapping):
        kind = type(batches).__name__
        raise TypeError(f"`batches` must be an iterable of batches. Got {kind}.")
    checked_adapters(base, lora)  # raises if they do not fit
    kernels = leaves_by_path(base)
    by_keys = {}
    for keys, adapter in adapters_by_keys(lora).items():
        if is_low_rank(adapter):
            kernel = as_kernel(kernels[path_string(keys)], adapter.geometry)
            by_keys[keys] = InputMoments.of(kernel)
    total = nested_by_keys(by_keys)  # a lora tree of zeros

    # The gradient of an `InputMoments` is the measurement itself, whatever function of
    # the outputs is differentiated. Here, that is their sum.
    @jax.jit
    def add_batch(total: Tree, base: Tree, batch: PyTree) -> Tree:
        def sum_outputs(moments: Tree) -> Array:
            outputs = map(jnp.asarray, jax.tree.leaves(apply(base, moments, batch)))
            floats = [x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.zeros(()))

        zeros = jax.tree.map(jnp.zeros_like, total)
        return jax.tree.map(jnp.add, total, jax.grad(sum_outputs)(zeros))

    num_batches = 0
    for batch in batches:
        total = add_batch(total, base, batch)
        num_batches += 1
    if not num_batches:
        raise ValueError("`batches` must have at least one batch. Got none.")
    counts = {path: moments.count for path, moments in leaves_by_path(total).items()}
    raise_if_any(
        "the outputs of `apply` must depend on products with these kernels",
        [path for path, x in counts.items() if is_concrete(x) and all_below(x, 1)],
    )
    return map_by_path(
        lambda _, x: x.squares / jnp.maximum(x.count, 1)[..., None], total
    )
