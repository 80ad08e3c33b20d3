"""`wrap` and `init` for linen models."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..lora.adapter import AdaptedKernel
from ..lora.config import QLoRAConfig
from ..transform import quantize as quantize_transform
from ..transform.combine import combine
from ..transform.tree import Tree, is_kernel, map_by_path
from .box import KernelBox
from .equations import registrations
from .interceptor import intercept
from .stacks import Stacks, check_scanned, is_inside
from .trace import trace_kinds


@dataclass(frozen=True)
class WrappedModel:
    """A linen model that takes packed kernels and adapters; made by `wrap`.

    Other attributes are those of the model.

    Attributes:
        module: The model.
        scanned: As in `wrap`.
        backend: As in `wrap`.

    Example:
        >>> import flax.linen as nn, qlora_jax as ql
        >>> model = ql.linen.wrap(nn.Dense(8))
        >>> type(model).__name__, model.features
        ('WrappedModel', 8)
    """

    module: nn.Module
    scanned: tuple[str, ...] = ()
    backend: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "module"), name)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initializes the model itself, in float."""
        return self.module.init(*args, **kwargs)

    def apply(
        self, variables: Mapping, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> Any:
        """As `nn.Module.apply`, on packed kernels.

        Args:
            variables: `"params"` is the base tree (or a combined one), `"lora"` the
                lora tree, if it is apart; other collections as the model has them.
            *args: Passed to the model.
            rngs: As for the model. The adapters' dropout is active if, and only if,
                there is a `"dropout"` key.
            **kwargs: Passed to `nn.Module.apply`.

        Returns:
            What the model returns.

        Raises:
            ValueError: If a pattern in `scanned` matches no module with parameters, or
                a module that no scan slices; or if packed kernels are stacked along
                another axis than 0.
        """
        collections = dict(variables)
        params = collections["params"]
        if lora := collections.pop("lora", None):
            params = combine(params, lora)
        params = _with_dropout(params, rngs)
        version = (registrations(), self.backend)
        check_scanned(self.scanned, params)
        interceptor = functools.partial(intercept, backend=self.backend)
        with Stacks() as stacks, nn.intercept_methods(interceptor):

            def box(path, leaf):
                if not is_kernel(leaf):
                    return leaf
                if is_inside(self.scanned, path):
                    leaf = stacks.keep(path, leaf)
                return KernelBox(leaf, version, path)

            collections["params"] = map_by_path(box, params)
            return self.module.apply(collections, *args, rngs=rngs, **kwargs)


def _with_dropout(params, rngs):
    """Gives every adapter with a dropout rate keys of its own, one for each matrix."""
    if not isinstance(rngs, Mapping) or "dropout" not in rngs:
        return params
    key = rngs["dropout"]
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    count = 0

    def add_key(_, leaf):
        nonlocal count
        if not isinstance(leaf, AdaptedKernel) or leaf.lora.dropout == 0:
            return leaf
        count += 1
        batch = leaf.lora.a.shape[:-2]
        own = jax.random.fold_in(key, count)
        keys = jax.random.split(own, batch) if batch else own
        return AdaptedKernel(leaf.base, leaf.lora, keys)

    return map_by_path(add_key, params)


def wrap(
    model: nn.Module | WrappedModel,
    *,
    scanned: str | Sequence[str] = (),
    backend: str | None = None,
) -> WrappedModel:
    """Returns the model with an `apply` that takes packed kernels and adapters.

    Dense, DenseGeneral, Einsum and registered classes multiply by packed weights.
    Other modules that own a packed kernel get its float weights for the time of their
    call; these are decoded again for the backward pass. A module's own `dot_general`
    is not used for a packed kernel.

    Args:
        model: Any linen model, scanned and remat'ed ones included.
        scanned: Pattern, or several, for the whole paths of modules under `nn.scan`
            with `variable_axes={"params": 0}`: "layers", "decoder/blocks". Packed
            kernels inside are not sliced by the scan: it passes the index of the layer,
            and the product reads the layer in the stack. Results are the same; a TPU
            does not copy each layer's codes.
        backend: As in `qlora_jax.matmul`, for all packed kernels of the model.

    Returns:
        The wrapped model. A wrapped one is returned as it is, or, where an option is
        given, wrapped anew with the options of this call alone.

    Raises:
        TypeError: If it is not a linen module.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.Dense(8), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> model = ql.linen.wrap(model)
        >>> model.apply({"params": base, "lora": lora}, x).shape
        (2, 8)
    """
    scanned = (scanned,) if isinstance(scanned, str) else tuple(scanned)
    if isinstance(model, WrappedModel):
        if not scanned and backend is None:
            return model
        model = model.module
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a linen module. Got {type(model).__name__}.")
    return WrappedModel(model, scanned, backend)


def init(
    key: Any,
    model: nn.Module | WrappedModel,
    params: Tree,
    config: QLoRAConfig,
    *args: Any,
    other_variables: Mapping | None = None,
    donate: bool = False,
    **kwargs: Any,
) -> tuple[Tree, dict]:
    """Quantizes and adapts a model's targets, as `qlora_jax.init`.

    One abstract trace of `model.apply` (nothing is computed) tells which axes of each
    kernel are contracted, so `config.contract` is needed only for modules that read
    their kernels themselves and contract another axis than -2.

    Args:
        key: PRNG key for A.
        model: The model, wrapped or not.
        params: Its parameters.
        config: What to target, and how.
        *args: Arguments of a call; arrays may be shapes (`jax.ShapeDtypeStruct`).
        other_variables: The model's other collections, such as `"batch_stats"`.
        donate: As in `qlora_jax.init`.
        **kwargs: Passed to `model.apply`.

    Returns:
        The base tree and the lora tree.

    Raises:
        ValueError: As `qlora_jax.init`; and if a target belongs to no module that the
            call runs, is contracted in several ways, is stacked along another axis
            than 0, or, with dropout, is read by its module itself: all of those are
            named in the same error.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.DenseGeneral((4, 16)), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> base["kernel"].shape, lora["kernel"].b.shape
        ((64, 4, 16), (4, 64))
    """
    module = model.module if isinstance(model, WrappedModel) else model
    kinds, problems = trace_kinds(
        module, params, config, args, kwargs, other_variables or {}
    )
    return quantize_transform.init(
        key, params, config, kinds=kinds, problems=problems, donate=donate
    )
