"""`wrap` for linen models."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn

from .._jax.pytree import is_tree_leaf
from ..matmul.choose import checked_backend
from ..trees.adapters import combine
from ..trees.paths import map_by_path
from .boxes import KernelBox
from .calls import RULES
from .collections import check_collections, for_call, without_boxes
from .interceptor import Interceptor
from .boxes import Stacks, check_scanned, is_inside


@dataclass(frozen=True)
class WrappedModel:
    """A linen model that takes packed kernels and adapters; made by `wrap`.

    All other attributes are those of the model, except `bind`, which raises an
    AttributeError.

    Attributes:
        module: The model.
        scanned: Patterns for the modules that run under `nn.scan`, as in `wrap`.
        backend: Back end of all products, as in `wrap`; None for the platform's.

    Example:
        >>> import flax.linen as nn, qlora_jax as ql
        >>> model = ql.linen.wrap(nn.Dense(8))
        >>> type(model).__name__, model.features, model.clone(features=4).features
        ('WrappedModel', 8, 4)
    """

    module: nn.Module
    scanned: tuple[str, ...] = ()
    backend: str | tuple[str, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "bind":
            raise AttributeError(
                "a wrapped model has no `bind`: it accepts packed kernels only during "
                "`apply`. Use apply(..., method=...)."
            )
        return getattr(object.__getattribute__(self, "module"), name)

    def clone(self, **updates: Any) -> "WrappedModel":
        """Returns a copy with other fields of the model; also called `copy`.

        Args:
            **updates: As in `nn.Module.clone`.
        """
        return replace(self, module=self.module.clone(**updates))

    copy = clone

    def apply(
        self,
        variables: Mapping,
        *args: Any,
        rngs: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Returns the output for packed kernels, as `nn.Module.apply` for float ones.

        Args:
            variables: A dict of collections: `"params"` is the base tree, or a combined
                one; `"lora"` is the lora tree, if it is separate; other collections as
                the model has them.
            *args: Passed to the model.
            rngs: As for the model. The adapters' dropout is active only with a key: as
                in Flax, the `"dropout"` key, or else the `"params"` key. A single key
                that is not in a dict is the `"params"` key.
            mutable: As for the model: if it is not False, a pair of the output and the
                mutable collections is returned. Kernels and adapters do not change.
            **kwargs: Passed to `nn.Module.apply`.

        Raises:
            TypeError: If `"params"` is a combined tree and there is a `"lora"` too.
            ValueError: If an adapter does not fit its kernel, or the back end is
                unknown; if `"params"` is missing, or another collection than `"lora"`
                holds adapters; if a pattern in `scanned` matches no module with
                parameters, or a module that no scan slices; if packed kernels are
                stacked along another axis than 0, transformed by `nn.map_variables`, or
                differentiated by `nn.jvp`; or if there is dropout for a kernel that its
                module reads itself.
            NotImplementedError: If the back end that was asked for does not support a
                product.

        Example:
            >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
            >>> model, x = ql.linen.wrap(nn.Dense(8)), jnp.ones((2, 64))
            >>> params = model.init(jax.random.key(0), x)["params"]
            >>> config = ql.QLoRAConfig(rank=4, dropout=0.1)
            >>> base, lora = ql.linen.init(
            ...     jax.random.key(1), model, params, config, x)
            >>> rngs = {"dropout": jax.random.key(2)}
            >>> model.apply({"params": base, "lora": lora}, x, rngs=rngs).shape
            (2, 8)
        """
        collections = dict(variables)
        lora = collections.pop("lora", None)
        check_collections(collections)
        params = collections["params"]
        if lora:
            params = combine(params, lora)
        params = for_call(params, rngs)
        version = (RULES.version, self.backend)
        check_scanned(self.scanned, params)
        interceptor = Interceptor(self.backend)
        with Stacks() as stacks, nn.intercept_methods(interceptor):

            def box(path: str, leaf: Any) -> Any:
                if not is_tree_leaf(leaf):
                    return leaf
                if is_inside(self.scanned, path):
                    leaf = stacks.add(path, leaf)
                interceptor.kernels[path] = leaf
                return KernelBox(leaf, version, path)

            collections["params"] = map_by_path(box, params)
            result = self.module.apply(
                collections, *args, rngs=rngs, mutable=mutable, **kwargs
            )
        if mutable is False:
            return result
        output, updates = result
        return output, without_boxes(updates, variables, mutable)


def wrap(
    model: nn.Module | WrappedModel,
    *,
    scanned: str | Sequence[str] = (),
    backend: str | Sequence[str] | None = None,
) -> WrappedModel:
    """Returns the model with an `apply` that takes packed kernels and adapters.

    Dense, DenseGeneral, Einsum and registered classes multiply by packed weights. Other
    modules get float weights during their call, which the backward pass decodes again:
    also `nn.WeightNorm` and `nn.SpectralNorm` for the layer inside, and
    `nnx.bridge.ToLinen`. In those `jax.lax.ragged_dot` multiplies by packed experts and
    their adapters as they are (`ql.ragged_dot`). Packed kernels do not use a module's
    `dot_general`.

    A model that is wrapped already is returned unchanged or, if an option is given,
    wrapped again with the options of this call alone.

    Args:
        model: Any linen model, also with `nn.scan` and `nn.remat`.
        scanned: Pattern, or several, for the full paths of modules under `nn.scan` with
            `variable_axes={"params": 0}`: "layers", "decoder/blocks". The scan passes
            the index of the layer, and products read the layer in the packed stack.
            Results are the same, and a TPU does not copy each layer's codes.
        backend: A back end, or several, as in `qlora_jax.matmul`, for all products.

    Raises:
        TypeError: If `model` is not a linen module.
        ValueError: If a back end is unknown.

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
    if isinstance(model, WrappedModel) and not scanned and backend is None:
        return model
    return WrappedModel(linen_module(model), scanned, checked_backend(backend))


def linen_module(model: Any) -> nn.Module:
    """Returns the linen module of a model, wrapped or not; else raises TypeError."""
    if isinstance(model, WrappedModel):
        return model.module
    if isinstance(model, nn.Module):
        return model
    got, nnx = type(model).__name__, sys.modules.get("flax.nnx")
    if isinstance(model, type):
        got = f"the class {model.__name__}. Pass an instance"
    elif nnx is not None and isinstance(model, nnx.Module):
        got += ", an nnx module. Use ql.nnx.wrap"
    raise TypeError(f"`model` must be a linen module. Got {got}.")
